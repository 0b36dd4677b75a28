package throttle

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

var ctx = context.Background()

// TestMain has fewer random runs than usual, unless there is time or the command line says otherwise.
func TestMain(m *testing.M) {
	if os.Getenv("NBDSERVE_LONG") == "" {
		if err := flag.Set("rapid.checks", "25"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// limits makes limits of pairs of an option and a value.
func limits(pairs ...any) Limits {
	l := None()
	v := reflect.ValueOf(&l).Elem()
	for i := 0; i < len(pairs); i += 2 {
		f := v.FieldByName(pairs[i].(string))
		f.SetInt(int64(pairs[i+1].(int)))
	}
	return l
}

// A disk is a throttle node over memory, with a root on it.
type disk struct {
	t     testing.TB
	g     *block.Graph
	node  *block.Node
	root  *block.Root
	store *blocktest.Store
}

func config(o *Options, s *blocktest.Store) *block.Config {
	return &block.Config{Driver: "throttle", Unmap: true, Options: o, Children: map[string]*block.Config{"file": blocktest.MemoryConfig(s)}}
}

const diskSize = 1 << 20

func openDisk(t testing.TB, g *block.Graph, o *Options) *disk {
	t.Helper()
	d := &disk{t: t, g: g, store: blocktest.NewStore(diskSize)}
	d.store.Write(bytes.Repeat([]byte{7}, diskSize), 0)
	var err error
	if d.node, err = g.Open(ctx, config(o, d.store)); err != nil {
		t.Fatal(err)
	}
	d.root, err = g.AttachRoot(ctx, block.RootConfig{User: "test", Node: d.node, Perm: block.PermConsistentRead | block.PermWrite})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *disk) close() {
	d.t.Helper()
	if err := errors.Join(d.root.Detach(ctx), d.g.Release(ctx, d.node)); err != nil {
		d.t.Error(err)
	}
}

// request is one kind of request to a disk.
type request func(ctx context.Context, d *disk, bytes int64) error

func read(ctx context.Context, d *disk, n int64) error {
	return d.root.ReadAt(ctx, make([]byte, n), 0)
}

func write(ctx context.Context, d *disk, n int64) error {
	return d.root.WriteAt(ctx, sevens[:n], 0, 0)
}

var sevens = bytes.Repeat([]byte{7}, 1<<20)

func zero(ctx context.Context, d *disk, n int64) error     { return d.root.WriteZeroes(ctx, 0, n, 0) }
func discard(ctx context.Context, d *disk, n int64) error  { return d.root.Discard(ctx, 0, n) }
func prefetch(ctx context.Context, d *disk, n int64) error { return d.root.Prefetch(ctx, 0, n) }

func (d *disk) do(r request, n int64) {
	d.t.Helper()
	if err := d.root.Do(ctx, func(ctx context.Context) error { return r(ctx, d, n) }); err != nil {
		d.t.Error(err)
	}
}

// A load is requests that follow one another, several at a time, until it is stopped.
type load struct {
	passed atomic.Int64
	stop   atomic.Bool
	wg     sync.WaitGroup
}

func (d *disk) load(depth int, n int64, r request) *load {
	l := new(load)
	for range depth {
		l.wg.Go(func() {
			for !l.stop.Load() {
				d.do(r, n)
				l.passed.Add(1)
			}
		})
	}
	return l
}

func (l *load) end() {
	l.stop.Store(true)
	l.wg.Wait()
}

// during tells how many requests pass in so much time.
func during(d time.Duration, loads ...*load) []int64 {
	before := make([]int64, len(loads))
	for i, l := range loads {
		before[i] = l.passed.Load()
	}
	time.Sleep(d)
	synctest.Wait()
	for i, l := range loads {
		before[i] = l.passed.Load() - before[i]
	}
	return before
}

func near(t testing.TB, what string, got, want, percent float64) {
	t.Helper()
	if math.Abs(got-want) > want*percent/100 {
		t.Errorf("%s: %.0f, want %.0f within %v %%", what, got, want, percent)
	}
}

func newGraph(t testing.TB, gs *Groups) *block.Graph { return blocktest.NewGraph(t, Driver(gs)) }

func TestThrottleHoldsEachLimit(t *testing.T) {
	type side struct {
		name string
		r    request
	}
	for _, c := range []struct {
		limit string
		value int
		sides []side
		bytes bool
	}{
		{"BpsTotal", 2_000_000, []side{{"read", read}, {"write", write}}, true},
		{"BpsRead", 2_000_000, []side{{"read", read}}, true},
		{"BpsWrite", 2_000_000, []side{{"write", write}}, true},
		{"IopsTotal", 1000, []side{{"read", read}, {"write", write}}, false},
		{"IopsRead", 1000, []side{{"read", read}}, false},
		{"IopsWrite", 1000, []side{{"write", write}, {"zero", zero}, {"discard", discard}}, false},
	} {
		t.Run(c.limit, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits(c.limit, c.value)})
				defer d.close()
				const size = 4096
				var loads []*load
				for _, s := range c.sides {
					loads = append(loads, d.load(4, size, s.r))
				}
				passed := during(10*time.Second, loads...)
				var sum int64
				for _, n := range passed {
					sum += n
				}
				for i, n := range passed {
					near(t, c.sides[i].name, float64(n), float64(sum)/float64(len(passed)), 5)
				}
				if c.bytes {
					sum *= size
				}
				near(t, "units in 10 s", float64(sum), 10*float64(c.value), 3)
				for _, l := range loads {
					l.end()
				}
			})
		})
	}
}

func TestThrottleLeavesTheOtherDirectionAlone(t *testing.T) {
	for limit, free := range map[string][]request{
		"IopsRead": {write, zero, discard}, "BpsRead": {write, zero, discard}, "IopsWrite": {read, prefetch}, "BpsWrite": {read, prefetch},
	} {
		synctest.Test(t, func(t *testing.T) {
			d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits(limit, 1)})
			defer d.close()
			began := time.Now()
			for range 10 {
				for _, r := range free {
					d.do(r, 4096)
				}
			}
			if took := time.Since(began); took != 0 {
				t.Errorf("with %s, requests of the other direction took %v", limit, took)
			}
		})
	}
}

func TestThrottleNeverDelaysFlushAndStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits("IopsTotal", 1)})
		defer d.close()
		d.do(write, 4096) // now the next would wait
		began := time.Now()
		for range 10 {
			d.do(func(ctx context.Context, d *disk, _ int64) error { return d.root.Flush(ctx) }, 0)
			d.do(func(ctx context.Context, d *disk, n int64) error {
				_, err := d.root.BlockStatus(ctx, 0, n, true)
				return err
			}, 4096)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("took %v", took)
		}
	})
}

func TestThrottleCountsPrefetchAsReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits("IopsRead", 100)})
		defer d.close()
		l := d.load(2, 4096, prefetch)
		near(t, "in 10 s", float64(during(10*time.Second, l)[0]), 1000, 3)
		l.end()
	})
}

func TestThrottleGroupSharesFairly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gs := new(Groups)
		if err := gs.Create("g", limits("IopsTotal", 1000)); err != nil {
			t.Fatal(err)
		}
		g := newGraph(t, gs)
		a, b := openDisk(t, g, &Options{Group: "g", Limits: None()}), openDisk(t, g, &Options{Group: "g", Limits: None()})
		defer a.close()
		defer b.close()
		la := a.load(8, 4096, read)
		near(t, "alone", float64(during(10*time.Second, la)[0]), 10_000, 3)
		// However many requests one has waiting, the other gets its half.
		lb := b.load(1, 4096, read)
		both := during(10*time.Second, la, lb)
		near(t, "half with 8 waiting", float64(both[0]), 5000, 3)
		near(t, "half with 1 waiting", float64(both[1]), 5000, 3)
		la.end()
		near(t, "alone again", float64(during(10*time.Second, lb)[0]), 10_000, 3)
		lb.end()
	})
}

func TestThrottleServesMembersInTurnAndRequestsInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gs := new(Groups)
		if err := gs.Create("g", limits("IopsTotal", 10)); err != nil {
			t.Fatal(err)
		}
		g := newGraph(t, gs)
		var mu sync.Mutex
		var order []string
		var wg sync.WaitGroup
		for _, name := range []string{"a", "b", "c"} {
			d := openDisk(t, g, &Options{Group: "g", Limits: None()})
			defer d.close()
			if name == "a" {
				d.do(read, 1)
				d.do(read, 1) // the bucket is full
			}
			for i := range 3 {
				wg.Go(func() {
					d.do(read, 1)
					mu.Lock()
					defer mu.Unlock()
					order = append(order, fmt.Sprint(name, i))
				})
				synctest.Wait()
			}
		}
		wg.Wait()
		if got, want := fmt.Sprint(order), "[a0 b0 c0 a1 b1 c1 a2 b2 c2]"; got != want {
			t.Errorf("order %v, want %v", got, want)
		}
	})
}

func TestThrottleWhoComesLaterDoesNotOvertake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits("IopsTotal", 1)})
		defer d.close()
		d.do(read, 1)
		began := time.Now()
		first := make(chan time.Duration)
		go func() {
			d.do(write, 1)
			first <- time.Since(began)
		}()
		synctest.Wait()
		// The timer is late: when it was due, another request comes first.
		g := d.node.Instance().(*node).member.Load().group
		g.mu.Lock()
		g.timer.Stop()
		g.mu.Unlock()
		time.Sleep(1500 * time.Millisecond)
		second := make(chan time.Duration)
		go func() {
			d.do(read, 1)
			second <- time.Since(began)
		}()
		if got := <-first; got != 1500*time.Millisecond {
			t.Errorf("the first passed after %v", got)
		}
		near(t, "ms until the second passed", float64((<-second).Milliseconds()), 2400, 1)
	})
}

func TestThrottleBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits("IopsTotal", 100, "IopsTotalMax", 1000, "IopsTotalMaxLength", 9)})
		defer d.close()
		l := d.load(4, 512, read)
		// The burst of 9 s at 1000 a second is used up after 10 s, as meanwhile 100 a second leak.
		for range 9 {
			near(t, "burst", float64(during(time.Second, l)[0]), 1000, 12) // the first second has a tenth more
		}
		during(2*time.Second, l)
		near(t, "after the burst", float64(during(10*time.Second, l)[0]), 1000, 3)
		l.end()
		time.Sleep(20 * time.Second) // 2000 have leaked
		l = d.load(4, 512, read)
		near(t, "the burst that a pause has earned", float64(during(5*time.Second, l)[0]), 2500, 3)
		l.end()
	})
}

func TestThrottleBurstOfOneSecondHasNoRateOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits("IopsTotal", 100, "IopsTotalMax", 1000)})
		defer d.close()
		began := time.Now()
		for range 1000 {
			d.do(read, 1)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("the burst took %v", took)
		}
		l := d.load(4, 512, read)
		near(t, "after the burst", float64(during(10*time.Second, l)[0]), 1000, 3)
		l.end()
	})
}

func TestThrottleIopsSize(t *testing.T) {
	for size, each := range map[int64]float64{512: 1, 4096: 1, 6144: 1.5, 16384: 4} {
		synctest.Test(t, func(t *testing.T) {
			d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits("IopsTotal", 1000, "IopsSize", 4096)})
			defer d.close()
			l := d.load(4, size, read)
			near(t, fmt.Sprintf("requests of %d bytes in 10 s", size), float64(during(10*time.Second, l)[0]), 10_000/each, 3)
			l.end()
		})
	}
}

func TestThrottleSmallLimitsAreHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits("BpsTotal", 1)})
		defer d.close()
		began := time.Now()
		d.do(read, 1<<20) // passes at once, and what comes then pays for it
		d.do(read, 1)
		if took := time.Since(began); took < 1<<20*time.Second-time.Second || took > 1<<20*time.Second+time.Second {
			t.Errorf("a MiB at a byte a second took %v", took)
		}
	})
}

func TestThrottleLimitsChangeLive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gs := new(Groups)
		if err := gs.Create("g", limits("IopsTotal", 1)); err != nil {
			t.Fatal(err)
		}
		d := openDisk(t, newGraph(t, gs), &Options{Group: "g", Limits: None()})
		defer d.close()
		l := d.load(4, 512, write)
		near(t, "at 1", float64(during(10*time.Second, l)[0]), 10, 10)
		for _, rate := range []int{1000, 10, 500} {
			if err := gs.SetLimits("g", limits("IopsTotal", rate)); err != nil {
				t.Fatal(err)
			}
			near(t, fmt.Sprint("at ", rate), float64(during(10*time.Second, l)[0]), float64(10*rate), 3)
		}
		// Without limits, what waits goes at once.
		l.stop.Store(true)
		began := time.Now()
		if err := gs.SetLimits("g", None()); err != nil {
			t.Fatal(err)
		}
		l.wg.Wait()
		if took := time.Since(began); took != 0 {
			t.Errorf("what waited took %v", took)
		}
	})
}

func TestG16ThrottleLetsGoWhatIsDrained(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gs := new(Groups)
		if err := gs.Create("g", limits("IopsTotal", 1)); err != nil {
			t.Fatal(err)
		}
		g := newGraph(t, gs)
		a, b := openDisk(t, g, &Options{Group: "g", Limits: None()}), openDisk(t, g, &Options{Group: "g", Limits: None()})
		defer a.close()
		defer b.close()
		la, lb := a.load(20, 512, read), b.load(2, 512, read)
		during(10*time.Second, la, lb)
		began := time.Now()
		if err := g.DrainBegin(ctx, a.node); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("the drain took %v", took)
		}
		if n := a.root.InFlight(); n != 0 {
			t.Errorf("%d requests are in flight", n)
		}
		if n := b.root.InFlight(); n != 2 {
			t.Errorf("%d requests of the other member are in flight, want 2 that wait", n)
		}
		la.stop.Store(true)
		g.DrainEnd(a.node)
		// What passed was counted: 20 requests at 1 a second are to be paid for.
		if n := during(10*time.Second, lb)[0]; n != 0 {
			t.Errorf("%d requests passed in the 10 s after", n)
		}
		la.wg.Wait()
		near(t, "later", float64(during(100*time.Second, lb)[0]), 100, 3)
		lb.end()
	})
}

func TestG16ThrottleDoesNotHoldUpADrainThatHasBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGraph(t, new(Groups))
		d := openDisk(t, g, &Options{Limits: limits("IopsTotal", 1)})
		defer d.close()
		l, end := d.admitted()
		d.do(read, 1)
		drained := make(chan error)
		go func() { drained <- g.DrainBegin(ctx, d.node) }()
		synctest.Wait() // it waits for the admitted request
		began := time.Now()
		for range 5 {
			if err := read(l.Context(ctx), d, 4096); err != nil {
				t.Error(err)
			}
		}
		end()
		if err := <-drained; err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("took %v", took)
		}
		g.DrainEnd(d.node)
		d.do(read, 1)
		near(t, "seconds that are paid for afterwards", time.Since(began).Seconds(), 6, 3)
	})
}

// admitted gives a lane with a request admitted, and what ends both.
func (d *disk) admitted() (*block.Lane, func()) {
	d.t.Helper()
	l := d.root.NewLane(1, nil)
	a, ok := l.Begin()
	if !ok {
		d.t.Fatal("not admitted")
	}
	return l, func() {
		l.End(a)
		l.Close()
	}
}

func TestThrottleLocateChargesOrSaysAskMe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits("BpsTotal", 40960)})
		defer d.close()
		_, end := d.admitted()
		defer end()
		located := 0
		for began := time.Now(); time.Since(began) < 10*time.Second; time.Sleep(time.Millisecond) {
			l := d.root.Locate(1, 0, 512)
			if l.Kind == block.LocateAsk {
				continue
			}
			located++
			p := make([]byte, l.Length)
			if n := l.File.ReadNowait(p, l.Offset); n != 512 || p[0] != 7 {
				t.Fatalf("%d bytes were read, the first is %d", n, p[0])
			}
		}
		near(t, "bytes located in 10 s", float64(512*located), 409600, 3)
		if s := d.node.Stats(); s.ReadBytes != int64(512*located) {
			t.Errorf("the node counts %d bytes, want %d", s.ReadBytes, 512*located)
		}
	})
}

func TestThrottleChargesWhatWasLocatedInVainOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits("IopsRead", 100)})
		defer d.close()
		lane, end := d.admitted()
		defer end()
		began, located := time.Now(), 0
		for range 1000 {
			time.Sleep(10 * time.Millisecond) // so that it need not wait
			if l := d.root.Locate(1, 0, 512); l.Kind == block.LocateData {
				located++
				d.store.Truncate(100) // the file has less now than it promised
				if n := l.File.ReadNowait(make([]byte, 512), l.Offset); n != 100 {
					t.Fatalf("%d bytes were read", n)
				}
				d.store.Truncate(diskSize)
			}
			if err := read(lane.Context(ctx), d, 512); err != nil {
				t.Fatal(err)
			}
		}
		near(t, "located", float64(located), 1000, 3)
		near(t, "seconds for 1000 reads", time.Since(began).Seconds(), 10, 3)
	})
}

func TestThrottleDoesNotLocateInParts(t *testing.T) {
	d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits("IopsRead", 1000)})
	defer d.close()
	d.store.Zero(4096, 4096, true)
	_, end := d.admitted()
	defer end()
	if l := d.root.Locate(1, 0, 4096); l.Kind != block.LocateData || l.Length != 4096 {
		t.Errorf("data: %+v", l)
	}
	if l := d.root.Locate(1, 4096, 4096); l.Kind != block.LocateZero || l.Length != 4096 {
		t.Errorf("hole: %+v", l)
	}
	if l := d.root.Locate(1, 0, 8192); l.Kind != block.LocateAsk {
		t.Errorf("both: %+v: a request would count as two", l)
	}
}

func TestThrottleUnlimitedTakesNoLock(t *testing.T) {
	gs := new(Groups)
	if err := gs.Create("g", limits("IopsWrite", 1)); err != nil {
		t.Fatal(err)
	}
	d := openDisk(t, newGraph(t, gs), &Options{Group: "g", Limits: None()})
	defer d.close()
	g := d.node.Instance().(*node).member.Load().group
	g.mu.Lock()
	defer g.mu.Unlock()
	lane, end := d.admitted()
	defer end()
	for _, r := range []request{read, prefetch} {
		if err := r(lane.Context(ctx), d, 512); err != nil {
			t.Error(err)
		}
	}
	if l := d.root.Locate(1, 0, 512); l.Kind != block.LocateData {
		t.Errorf("%+v", l)
	}
	if n := testing.AllocsPerRun(100, func() { d.root.Locate(1, 0, 512) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestThrottleAllocatesNothingWithoutWaiting(t *testing.T) {
	d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits("BpsTotal", 1_000_000_000_000, "IopsTotal", 1_000_000_000)})
	defer d.close()
	lane, end := d.admitted()
	defer end()
	p, c := make([]byte, 4096), lane.Context(ctx)
	for name, f := range map[string]func(){
		"read":  func() { d.root.ReadAt(c, p, 0) },
		"write": func() { d.root.WriteAt(c, p, 0, 0) },
		"locate": func() {
			l := d.root.Locate(1, 0, 4096)
			l.File.ReadNowait(p, l.Offset)
		},
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func TestThrottleTellsHowLongItHeldUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := openDisk(t, newGraph(t, new(Groups)), &Options{Limits: limits("IopsTotal", 1)})
		defer d.close()
		l := d.load(3, 512, read)
		time.Sleep(10*time.Second + time.Millisecond)
		synctest.Wait()
		inst := d.node.Instance().(*node)
		got := map[string]float64{}
		for _, m := range inst.Measurements() {
			got[m.Name] = m.Value
		}
		// 11 requests had passed, and since the second all had to wait; three wait at any time.
		near(t, "waits", got["throttled_requests_total"], 13, 8)
		near(t, "seconds", got["throttled_seconds_total"], 27, 8)
		if got["throttled_requests"] != 3 {
			t.Errorf("%v wait, want 3", got["throttled_requests"])
		}
		what, age, ok := inst.OldestWait()
		if !ok || what != "the limits of the throttle node" || age < 2*time.Second || age > 3*time.Second {
			t.Errorf("oldest: %s, %v, %v", what, age, ok)
		}
		l.stop.Store(true)
		l.wg.Wait()
		if _, _, ok := inst.OldestWait(); ok {
			t.Errorf("something waits")
		}
	})
}

func TestThrottleRefusesBadLimits(t *testing.T) {
	const most = 1_000_000_000_000_000
	for _, c := range []struct {
		l    Limits
		text string
	}{
		{limits("BpsTotal", -1), "bps/iops/max values must be within [0, 1000000000000000]"},
		{limits("IopsWrite", most+1), "bps/iops/max values must be within [0, 1000000000000000]"},
		{limits("BpsRead", 1, "BpsReadMax", most+1), "bps/iops/max values must be within [0, 1000000000000000]"},
		{limits("BpsTotal", 1, "BpsRead", 1), "bps/iops/max total values and read/write values cannot be used at the same time"},
		{limits("IopsTotal", 1, "IopsWrite", 1), "bps/iops/max total values and read/write values cannot be used at the same time"},
		{limits("BpsTotalMax", 1, "BpsWriteMax", 1), "bps/iops/max total values and read/write values cannot be used at the same time"},
		{limits("IopsSize", 4096), "iops size requires an iops value to be set"},
		{limits("IopsSize", 4096, "BpsTotal", 1), "iops size requires an iops value to be set"},
		{limits("IopsSize", -1, "IopsTotal", 1), "iops size cannot be negative"},
		{limits("BpsTotalMaxLength", 0), "the burst length cannot be 0"},
		{limits("BpsTotalMaxLength", -1), "the burst length cannot be negative"},
		{limits("BpsTotal", 1, "BpsTotalMaxLength", 2), "burst length set without burst rate"},
		{limits("BpsTotal", 1, "BpsTotalMax", most, "BpsTotalMaxLength", 2), "burst length too high for this burst rate"},
		{limits("BpsTotalMax", 1), "bps_max/iops_max require corresponding bps/iops values"},
		{limits("IopsRead", 2, "IopsReadMax", 1), "bps_max/iops_max cannot be lower than bps/iops"},
		{limits("BpsTotal", most, "BpsTotalMax", most), ""},
		{limits("BpsRead", 1, "BpsWrite", 2, "IopsTotal", 3), ""},
		{limits("IopsWrite", 1, "IopsSize", 1, "IopsWriteMax", 10, "IopsWriteMaxLength", 60), ""},
	} {
		err := c.l.Validate()
		switch {
		case c.text == "" && err != nil:
			t.Errorf("%+v: %v", c.l, err)
		case c.text != "" && (err == nil || err.Error() != c.text || !errors.Is(err, block.ErrInvalid)):
			t.Errorf("%+v: %v, want %s", c.l, err, c.text)
		}
	}
}

func TestThrottleOptionsName(t *testing.T) {
	gs := new(Groups)
	if err := gs.Create("g", None()); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		o    Options
		text string
	}{
		{Options{Limits: None()}, "Please specify a throttle group"},
		{Options{Group: "x", Limits: None()}, "Throttle group 'x' does not exist"},
		{Options{Group: "g", Limits: limits("IopsTotal", 1)}, "throttle-group and limits of its own cannot be used at the same time"},
		{Options{Limits: limits("IopsTotal", -1)}, "bps/iops/max values must be within [0, 1000000000000000]"},
	} {
		g := newGraph(t, gs)
		n, err := g.Open(ctx, config(&c.o, blocktest.NewStore(4096)))
		if err == nil {
			t.Errorf("opened, want %s", c.text)
			g.Release(ctx, n)
			continue
		}
		if err.Error() != c.text {
			t.Errorf("%v, want %s", err, c.text)
		}
	}
	// A failed open has left no member.
	if err := gs.Delete("g"); err != nil {
		t.Error(err)
	}
}

func TestThrottleGroups(t *testing.T) {
	gs := new(Groups)
	for _, name := range []string{"b", "a"} {
		if err := gs.Create(name, limits("IopsTotal", 5)); err != nil {
			t.Fatal(err)
		}
	}
	if got := fmt.Sprint(gs.Names()); got != "[a b]" {
		t.Errorf("names %s", got)
	}
	if err := gs.Create("a", None()); !errors.Is(err, block.ErrBusy) || err.Error() != "Throttle group 'a' exists already: in use" {
		t.Errorf("created twice: %v", err)
	}
	if err := gs.Create("", None()); err == nil {
		t.Errorf("created without a name")
	}
	bad := limits("IopsTotal", -1)
	if err := gs.Create("c", bad); err == nil {
		t.Errorf("created with bad limits")
	}
	if err := gs.SetLimits("a", bad); err == nil {
		t.Errorf("bad limits were set")
	}
	if l, err := gs.Limits("a"); err != nil || l != limits("IopsTotal", 5) {
		t.Errorf("limits %+v, %v", l, err)
	}
	missing := "Throttle group 'x' does not exist"
	_, err := gs.Limits("x")
	for _, err := range []error{err, gs.SetLimits("x", None()), gs.Delete("x")} {
		if err == nil || err.Error() != missing {
			t.Errorf("%v, want %s", err, missing)
		}
	}
	d := openDisk(t, newGraph(t, gs), &Options{Group: "a", Limits: None()})
	if err := gs.Delete("a"); !errors.Is(err, block.ErrBusy) {
		t.Errorf("delete of a group with a member: %v", err)
	}
	d.close()
	if err := gs.Delete("a"); err != nil {
		t.Errorf("delete of a group that was left: %v", err)
	}
}

func reopened(d *disk, o *Options) error {
	return d.g.Reopen(ctx, block.ReopenRequest{Node: d.node, Config: &block.Config{Unmap: true, Options: o}})
}

func TestG21ThrottleGetsOtherLimitsAndGroups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gs := new(Groups)
		if err := gs.Create("g", limits("IopsTotal", 500)); err != nil {
			t.Fatal(err)
		}
		d := openDisk(t, newGraph(t, gs), &Options{Limits: limits("IopsTotal", 100)})
		defer d.close()
		l := d.load(4, 512, read)
		near(t, "before", float64(during(10*time.Second, l)[0]), 1000, 3)
		for _, c := range []struct {
			o    Options
			rate float64
		}{
			{Options{Limits: limits("IopsTotal", 1000)}, 1000},
			{Options{Group: "g", Limits: None()}, 500},
			{Options{Limits: limits("IopsRead", 50)}, 50},
		} {
			began := time.Now()
			if err := reopened(d, &c.o); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); took != 0 {
				t.Errorf("the reopen took %v", took)
			}
			near(t, fmt.Sprintf("with %+v", c.o), float64(during(10*time.Second, l)[0]), 10*c.rate, 3)
		}
		// Refused, nothing changes.
		for text, o := range map[string]*Options{
			"Could not reopen node '" + d.node.Name() + "': Please specify a throttle group":                                      {Limits: None()},
			"Could not reopen node '" + d.node.Name() + "': Throttle group 'x' does not exist":                                    {Group: "x", Limits: None()},
			"Could not reopen node '" + d.node.Name() + "': bps/iops/max values must be within [0, 1000000000000000]":             {Limits: limits("IopsRead", -1)},
			"Could not reopen node '" + d.node.Name() + "': throttle-group and limits of its own cannot be used at the same time": {Group: "g", Limits: limits("IopsRead", 1)},
		} {
			if err := reopened(d, o); err == nil || err.Error() != text {
				t.Errorf("%v, want %s", err, text)
			}
		}
		near(t, "as before", float64(during(10*time.Second, l)[0]), 500, 3)
		l.end()
		if err := gs.Delete("g"); err != nil {
			t.Errorf("the group still has a member: %v", err)
		}
	})
}

func TestG21ThrottleStaysWhenAnotherNodeRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gs := new(Groups)
		if err := gs.Create("g", limits("IopsTotal", 500)); err != nil {
			t.Fatal(err)
		}
		g := newGraph(t, gs)
		a, b := openDisk(t, g, &Options{Limits: limits("IopsTotal", 100)}), openDisk(t, g, &Options{Limits: limits("IopsTotal", 100)})
		defer a.close()
		defer b.close()
		err := g.Reopen(ctx, block.ReopenRequest{Node: a.node, Config: &block.Config{Unmap: true, Options: &Options{Group: "g", Limits: None()}}},
			block.ReopenRequest{Node: b.node, Config: &block.Config{Unmap: true, Options: &Options{Group: "x", Limits: None()}}})
		if err == nil {
			t.Fatal("reopened")
		}
		l := a.load(4, 512, read)
		near(t, "at the old limit", float64(during(10*time.Second, l)[0]), 1000, 3)
		l.end()
		if err := gs.Delete("g"); err != nil {
			t.Errorf("the group still has a member: %v", err)
		}
	})
}

func TestThrottleConforms(t *testing.T) {
	for name, o := range map[string]*Options{
		"NoLimits":  {Group: "none", Limits: None()},
		"FarLimits": {Limits: limits("BpsTotal", 1_000_000_000_000_000, "IopsRead", 1_000_000_000_000, "IopsWrite", 1_000_000_000_000, "IopsSize", 512)},
	} {
		for _, align := range []int64{1, 512} {
			t.Run(fmt.Sprint(name, align), func(t *testing.T) {
				blocktest.Conformance(t, blocktest.Factory{
					New: func(t blocktest.TB) blocktest.Subject {
						gs := new(Groups)
						if err := gs.Create("none", None()); err != nil {
							t.Fatalf("%v", err)
						}
						s := blocktest.NewStore(100_001)
						s.Write(bytes.Repeat([]byte{1, 2, 3}, 14_000), 1000)
						c := config(o, s)
						c.Children["file"].Options.(*blocktest.MemoryOptions).Limits.RequestAlignment = align
						return blocktest.Subject{Graph: blocktest.NewGraph(t, Driver(gs)), Config: c, Contents: s.Bytes()}
					},
					FastZero: true, Locates: true, Holes: true, Resizes: align == 1, DiscardZeroes: align == 1,
				})
			})
		}
	}
}

func BenchmarkThrottle(b *testing.B) {
	gs := new(Groups)
	if err := gs.Create("none", None()); err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct {
		name string
		o    *Options
	}{
		{"without", nil},
		{"no limits", &Options{Group: "none", Limits: None()}},
		{"limits far away", &Options{Limits: limits("BpsTotal", 1_000_000_000_000_000, "IopsTotal", 1_000_000_000_000)}},
	} {
		g := newGraph(b, gs)
		cfg := blocktest.MemoryConfig(blocktest.NewStore(diskSize))
		if c.o != nil {
			cfg = config(c.o, blocktest.NewStore(diskSize))
		}
		n, err := g.Open(ctx, cfg)
		if err != nil {
			b.Fatal(err)
		}
		r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermConsistentRead | block.PermWrite})
		if err != nil {
			b.Fatal(err)
		}
		b.Run("read/"+c.name, func(b *testing.B) {
			var shard atomic.Uint32
			b.RunParallel(func(pb *testing.PB) {
				l := r.NewLane(block.Shard(shard.Add(1)), nil)
				defer l.Close()
				a, _ := l.Begin()
				defer l.End(a)
				c, p := l.Context(ctx), make([]byte, 16)
				for pb.Next() {
					if err := r.ReadAt(c, p, 0); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
		b.Run("locate/"+c.name, func(b *testing.B) {
			for b.Loop() {
				r.Locate(1, 0, 16)
			}
		})
		if err := errors.Join(r.Detach(ctx), g.Release(ctx, n)); err != nil {
			b.Fatal(err)
		}
	}
}
