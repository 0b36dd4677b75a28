package block_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// slowDisk opens a disk of 1 MiB behind a gate.
func slowDisk(t *testing.T, g *block.Graph, name string) (*block.Node, *blocktest.Gate) {
	t.Helper()
	gate := blocktest.NewGate()
	c := blocktest.SlowConfig(gate, disk("", 1<<20))
	c.NodeName = name
	return opened(t, g, c), gate
}

// start runs one request of a lane in the background; the returned channel gives its error.
func start(t *testing.T, l *block.Lane, f func(ctx context.Context) error) <-chan error {
	t.Helper()
	a, ok := l.Begin()
	if !ok {
		t.Fatalf("the request was not admitted")
	}
	done := make(chan error, 1)
	go func() {
		err := f(l.Context(ctx))
		l.End(a)
		done <- err
	}()
	return done
}

func readOf(r *block.Root) func(context.Context) error {
	return func(ctx context.Context) error { return r.ReadAt(ctx, make([]byte, 512), 0) }
}

func waitHeld(t *testing.T, gate *blocktest.Gate, n int) {
	t.Helper()
	if err := gate.WaitHeld(ctx, n); err != nil {
		t.Fatal(err)
	}
}

func drain(t *testing.T, g *block.Graph, n *block.Node) {
	t.Helper()
	if err := g.DrainBegin(ctx, n); err != nil {
		t.Fatalf("drain: %v", err)
	}
}

func refused(l *block.Lane) bool {
	a, ok := l.Begin()
	if ok {
		l.End(a)
	}
	return !ok
}

func TestG16DrainWaitsForWhatIsInFlight(t *testing.T) {
	g := newGraph(t)
	n, gate := slowDisk(t, g, "slow")
	r := attached(t, n, "export", rd, all)
	l := r.NewLane(3, nil)
	defer l.Close()
	gate.Hold(blocktest.OpRead)
	first, second := start(t, l, readOf(r)), start(t, l, readOf(r))
	waitHeld(t, gate, 2)
	if got := r.InFlight(); got != 2 {
		t.Errorf("%d in flight, want 2", got)
	}
	var released atomic.Bool
	drained := make(chan error, 1)
	go func() {
		err := g.DrainBegin(ctx, n)
		if !released.Load() {
			t.Errorf("the drain ended before the requests")
		}
		drained <- err
	}()
	for !refused(l) {
	}
	gate.Release(1)
	var err error
	select {
	case err = <-first:
		first = second
	case err = <-second:
	}
	released.Store(true)
	gate.ReleaseAll()
	if err := errors.Join(err, <-first, <-drained); err != nil {
		t.Error(err)
	}
	if got := r.InFlight(); got != 0 {
		t.Errorf("%d in flight after the drain", got)
	}
	g.DrainEnd(n)
}

func TestG16DrainedRootAdmitsNothingAndResumesOnce(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("", 4096))
	r := attached(t, n, "export", rd, all)
	var resumed atomic.Int32
	var l *block.Lane
	l = r.NewLane(0, func() {
		resumed.Add(1)
		if refused(l) {
			t.Errorf("resumed, and still refused")
		}
	})
	defer l.Close()
	idle := r.NewLane(1, func() { t.Errorf("a lane was resumed that had not been refused") })
	defer idle.Close()
	drain(t, g, n)
	for range 3 {
		if !refused(l) {
			t.Errorf("a drained root admitted a request")
		}
	}
	if resumed.Load() != 0 {
		t.Errorf("resumed while drained")
	}
	if r.InFlight() != 0 || l.InFlight() != 0 {
		t.Errorf("refused requests count as in flight")
	}
	g.DrainEnd(n)
	if got := resumed.Load(); got != 1 {
		t.Errorf("resumed %d times, want once", got)
	}
	drain(t, g, n)
	g.DrainEnd(n)
	if got := resumed.Load(); got != 1 {
		t.Errorf("resumed again without having been refused")
	}
}

func TestG16DrainedSectionsNest(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	n := opened(t, g, node("n", ev, filter, disk("file0", 4096)))
	r := attached(t, n, "export", rd, all)
	l := r.NewLane(0, nil)
	defer l.Close()
	ev.take()
	drain(t, g, n)
	drain(t, g, g.Lookup("file0")) // reaches the same root by another way
	drain(t, g, n)
	for i, end := range []*block.Node{n, n, g.Lookup("file0")} {
		if !refused(l) || !r.Drained() {
			t.Errorf("admitted after %d of 3 ends", i)
		}
		g.DrainEnd(end)
	}
	if refused(l) || r.Drained() || n.Quiesced() != 0 {
		t.Errorf("still drained after the last end; %d sections", n.Quiesced())
	}
	depth := 0
	for _, e := range ev.take() {
		if e == "drain n" {
			depth++
		}
		if e == "undrain n" {
			depth--
		}
		if depth < 0 {
			t.Errorf("background work was resumed more often than paused")
		}
	}
	if depth != 0 {
		t.Errorf("background work is left paused")
	}
}

func TestG16UnrelatedExportsAreNotDrained(t *testing.T) {
	g := newGraph(t)
	hung, gate := slowDisk(t, g, "hung")
	other := opened(t, g, disk("other", 1<<20))
	ra := attached(t, hung, "export 'a'", rd, all)
	rb := attached(t, other, "export 'b'", rd, all)
	la, lb := ra.NewLane(0, nil), rb.NewLane(1, nil)
	defer la.Close()
	defer lb.Close()
	gate.Hold(blocktest.OpRead)
	stuck := start(t, la, readOf(ra))
	waitHeld(t, gate, 1)

	drained := make(chan error, 1)
	go func() { drained <- g.DrainBegin(ctx, hung) }()
	// Export b serves, drains and changes while a hangs.
	for range 100 {
		if err := <-start(t, lb, readOf(rb)); err != nil {
			t.Fatal(err)
		}
	}
	drain(t, g, other)
	rc := attach(t, other, "export 'c'", rd, all)
	g.DrainEnd(other)
	detach(t, rc)

	gate.ReleaseAll()
	if err := errors.Join(<-stuck, <-drained); err != nil {
		t.Error(err)
	}
	g.DrainEnd(hung)
}

func TestG16DrainOfASharedChildDrainsAllAboveIt(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	opened(t, g, disk("base", 4096))
	one := opened(t, g, node("one", ev, filter, ref("base")))
	two := opened(t, g, node("two", ev, filter, ref("base")))
	r1, r2 := attached(t, one, "a", rd, all), attached(t, two, "b", rd, all)
	drain(t, g, g.Lookup("base"))
	if !r1.Drained() || !r2.Drained() {
		t.Errorf("a parent of the drained node goes on")
	}
	g.DrainEnd(g.Lookup("base"))
	drain(t, g, one)
	if !r1.Drained() || r2.Drained() {
		t.Errorf("the drain of a node reached beside it")
	}
	g.DrainEnd(one)
	if r1.Drained() || r2.Drained() {
		t.Errorf("a root is left drained")
	}
}

func TestG16CancelledDrainIsUndone(t *testing.T) {
	g := newGraph(t)
	n, gate := slowDisk(t, g, "slow")
	r := attached(t, n, "export 'a'", rd, all)
	resumed := make(chan struct{}, 1)
	l := r.NewLane(0, func() { resumed <- struct{}{} })
	defer l.Close()
	gate.Hold(blocktest.OpRead)
	stuck := start(t, l, readOf(r))
	waitHeld(t, gate, 1)
	short, cancel := context.WithCancel(ctx)
	drained := make(chan error, 1)
	go func() { drained <- g.DrainBegin(short, n) }()
	for !refused(l) {
	}
	cancel()
	wantError(t, <-drained, context.Canceled, "'slow'", "export 'a'", "1 requests in flight")
	<-resumed
	if refused(l) || n.Quiesced() != 0 {
		t.Errorf("still drained after the drain was given up")
	}
	gate.ReleaseAll()
	if err := <-stuck; err != nil {
		t.Error(err)
	}
}

func TestG16BackgroundWorkPausesFromTheTopDown(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	opened(t, g, disk("base", 4096))
	n := opened(t, g, node("mid", ev, filter, ref("base")))
	opened(t, g, node("top", ev, filter, ref("mid")))
	ev.take()
	drain(t, g, g.Lookup("base"))
	wantEvents(t, ev, "drain top", "drain mid")
	g.DrainEnd(g.Lookup("base"))
	got := ev.take()
	if len(got) != 2 {
		t.Errorf("after the end: %q", got)
	}
	drain(t, g, n)
	wantEvents(t, ev, "drain top", "drain mid") // parents of n and n, not its child
	g.DrainEnd(n)
	ev.take()
}

// A node that is put over a drained one was never told to pause.
func TestG16NewParentOfADrainedNodeIsDrainedLikeTheOthers(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	opened(t, g, disk("base", 4096))
	base := g.Lookup("base")
	drain(t, g, base)
	n := opened(t, g, node("late", ev, filter, ref("base")))
	r := attached(t, n, "late", rd, all)
	if !r.Drained() {
		t.Errorf("the new root of a drained node admits requests")
	}
	l := r.NewLane(0, nil)
	defer l.Close()
	g.DrainEnd(base)
	if refused(l) || n.Quiesced() != 0 {
		t.Errorf("the new root is left drained")
	}
	depth := 0
	for _, e := range ev.take() {
		switch e {
		case "drain late":
			depth++
		case "undrain late":
			depth--
		}
		if depth < 0 {
			t.Fatalf("background work was resumed that had not been paused")
		}
	}
	if depth != 0 {
		t.Errorf("background work is left paused")
	}
}

func TestG16RootLeavesDuringADrain(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("", 4096))
	a, b := attach(t, n, "a", rd, all), attached(t, n, "b", rd, all)
	drain(t, g, n)
	detach(t, a)
	if !b.Drained() {
		t.Errorf("the other root goes on")
	}
	g.DrainEnd(n)
	if b.Drained() || n.Quiesced() != 0 {
		t.Errorf("still drained")
	}
}

func TestDetachTwiceIsAnError(t *testing.T) {
	g := newGraph(t)
	r := attach(t, opened(t, g, disk("", 4096)), "tool", rd|wr, all)
	detach(t, r)
	before := dump(g)
	wantError(t, r.Detach(ctx), block.ErrClosed, "tool was detached before")
	unchanged(t, g, before)
}

func TestG16DoWaitsWhileDrained(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("", 4096))
	r := attached(t, n, "tool", rd, all)
	drain(t, g, n)
	short, cancel := context.WithCancel(ctx)
	cancel()
	if err := r.Do(short, readOf(r)); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled Do on a drained root: %v", err)
	}
	var open atomic.Bool
	done := make(chan error, 1)
	go func() {
		done <- r.Do(ctx, func(ctx context.Context) error {
			if !open.Load() {
				t.Errorf("admitted while drained")
			}
			return readOf(r)(ctx)
		})
	}()
	open.Store(true)
	g.DrainEnd(n)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestG16DetachWaitsForWhatIsInFlight(t *testing.T) {
	g := newGraph(t)
	n, gate := slowDisk(t, g, "slow")
	r := attach(t, n, "export 'a'", rd, all)
	l := r.NewLane(0, nil)
	gate.Hold(blocktest.OpRead)
	stuck := start(t, l, readOf(r))
	waitHeld(t, gate, 1)
	short, cancel := context.WithCancel(ctx)
	cancel()
	wantError(t, r.Detach(short), context.Canceled, "export 'a'", "1 requests")
	gate.ReleaseAll()
	if err := <-stuck; err != nil {
		t.Error(err)
	}
	l.Close()
	detach(t, r)
}

// Many connections work while drains come and go: inside a drained section nothing
// may run, and everything refused must be resumed.
func TestG16NothingRunsInsideADrainedSection(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("", 1<<20))
	r := attached(t, n, "export", rd|wr, rd|wr)
	const lanes, rounds = 8, 200
	var running atomic.Int32
	var wg sync.WaitGroup
	for i := range lanes {
		resume := make(chan struct{}, 1)
		l := r.NewLane(block.Shard(i), func() {
			select {
			case resume <- struct{}{}:
			default:
			}
		})
		wg.Go(func() {
			defer l.Close()
			c := l.Context(ctx)
			for k := 0; k < rounds; {
				a, ok := l.Begin()
				if !ok {
					<-resume
					continue
				}
				running.Add(1)
				if err := r.WriteAt(c, []byte{byte(k)}, int64(i*1000+k), 0); err != nil {
					t.Error(err)
				}
				running.Add(-1)
				l.End(a)
				k++
			}
		})
	}
	stop := make(chan struct{})
	var drains sync.WaitGroup
	for range 2 {
		drains.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := g.DrainBegin(ctx, n); err != nil {
					t.Error(err)
					return
				}
				for range 20 {
					if got := running.Load(); got != 0 {
						t.Errorf("%d requests run inside a drained section", got)
					}
				}
				g.DrainEnd(n)
			}
		})
	}
	wg.Wait()
	close(stop)
	drains.Wait()
	if r.InFlight() != 0 || n.Stats().Writes != lanes*rounds {
		t.Errorf("%d in flight, %d writes", r.InFlight(), n.Stats().Writes)
	}
}

func TestAdmissionAllocatesNothing(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("", 4096))
	r := attached(t, n, "export", rd, all)
	l := r.NewLane(0, nil)
	defer l.Close()
	if allocs := testing.AllocsPerRun(100, func() {
		a, _ := l.Begin()
		l.End(a)
	}); allocs != 0 {
		t.Errorf("%v allocations a request", allocs)
	}
}

func TestGraceWaitsForOlderRequestsOnly(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("", 4096))
	r := attached(t, n, "export", rd, all)
	l, m := r.NewLane(0, nil), r.NewLane(1, nil)
	defer l.Close()
	defer m.Close()
	if !n.Grace().Passed() {
		t.Errorf("with nothing in flight grace has not passed")
	}
	a, _ := l.Begin()
	grace := n.Grace()
	if grace.Passed() {
		t.Errorf("grace passed over a request in flight")
	}
	b, _ := m.Begin() // newer: it does not count
	if grace.Passed() {
		t.Errorf("grace passed over a request in flight")
	}
	l.End(a)
	if !grace.Passed() {
		t.Errorf("grace waits for a newer request")
	}
	m.End(b)
	if err := n.Grace().Wait(ctx); err != nil {
		t.Error(err)
	}
}

func TestGraceOfANodeWithoutRootsPasses(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("", 4096))
	if !n.Grace().Passed() {
		t.Errorf("nobody can be in flight, and grace has not passed")
	}
}

func TestGraceLooksAtAllRootsAbove(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	opened(t, g, disk("base", 4096))
	r1 := attached(t, opened(t, g, node("one", ev, filter, ref("base"))), "a", rd, all)
	r2 := attached(t, g.Lookup("base"), "b", rd, all)
	l1, l2 := r1.NewLane(0, nil), r2.NewLane(1, nil)
	defer l1.Close()
	defer l2.Close()
	for _, l := range []*block.Lane{l1, l2} {
		a, _ := l.Begin()
		grace := g.Lookup("base").Grace()
		if grace.Passed() {
			t.Errorf("grace passed over a request in flight")
		}
		l.End(a)
		if !grace.Passed() {
			t.Errorf("grace did not pass")
		}
	}
}

// Safety against a model: whatever the order of begins, ends, graces and drains,
// grace never passes while a request that was in flight then still is.
func TestGraceNeverPassesTooEarly(t *testing.T) {
	type open struct {
		lane *block.Lane
		a    block.Admission
	}
	for seed := range uint64(100) {
		g := newGraph(t)
		n := opened(t, g, disk("", 4096))
		r := attached(t, n, "export", rd, all)
		rng := rand.New(rand.NewPCG(seed, 0))
		lanes := []*block.Lane{r.NewLane(0, nil), r.NewLane(1, nil), r.NewLane(2, nil)}
		inFlight := map[int]open{}
		next := 0
		type waiting struct {
			grace *block.Grace
			older []int
		}
		var graces []waiting
		for range 200 {
			switch rng.IntN(6) {
			case 0, 1:
				l := lanes[rng.IntN(len(lanes))]
				if a, ok := l.Begin(); ok {
					inFlight[next] = open{l, a}
					next++
				}
			case 2, 3:
				for id, o := range inFlight {
					o.lane.End(o.a)
					delete(inFlight, id)
					break
				}
			case 4:
				w := waiting{grace: n.Grace()}
				for id := range inFlight {
					w.older = append(w.older, id)
				}
				graces = append(graces, w)
			case 5:
				if len(inFlight) == 0 {
					drain(t, g, n)
					g.DrainEnd(n)
				}
			}
			for _, w := range graces {
				if !w.grace.Passed() {
					continue
				}
				for _, id := range w.older {
					if _, there := inFlight[id]; there {
						t.Fatalf("seed %d: grace passed, request %d is still in flight", seed, id)
					}
				}
			}
		}
		for _, o := range inFlight {
			o.lane.End(o.a)
		}
		for _, w := range graces {
			if !w.grace.Passed() {
				t.Fatalf("seed %d: nothing is in flight, and grace has not passed", seed)
			}
		}
		for _, l := range lanes {
			l.Close()
		}
	}
}

// Requests overlap without a gap; a waiter for grace must get through all the same.
func TestGracePassesUnderSteadyTraffic(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("", 4096))
	r := attached(t, n, "export", rd, all)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			l := r.NewLane(block.Shard(i), nil)
			defer l.Close()
			older, _ := l.Begin()
			for {
				newer, _ := l.Begin()
				l.End(older)
				older = newer
				select {
				case <-stop:
					l.End(older)
					return
				default:
				}
			}
		})
	}
	for range 200 {
		if err := n.Grace().Wait(ctx); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
}
