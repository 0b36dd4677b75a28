package block_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

func TestG16ParentsOnlyLeavesTheDriverAtWork(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	opened(t, g, disk("disk", 4096))
	n := opened(t, g, node("n", ev, filter, ref("disk")))
	top := opened(t, g, node("top", ev, filter, ref("n")))
	r, below := attached(t, top, "above", rd, all), attached(t, g.Lookup("disk"), "below", rd, all)
	before := dump(g)
	ev.take()
	if err := g.DrainParentsBegin(ctx, n); err != nil {
		t.Fatal(err)
	}
	wantEvents(t, ev, "drain top")
	if !r.Drained() || below.Drained() || n.Quiesced() != 0 || top.Quiesced() != 1 {
		t.Errorf("root above drained: %t, below: %t; sections %d and %d", r.Drained(), below.Drained(), n.Quiesced(), top.Quiesced())
	}
	late := attach(t, n, "late", rd, all)
	if !late.Drained() {
		t.Errorf("a new parent goes on")
	}
	verify(t, g)
	ev.take()
	// It nests with the other kind.
	drain(t, g, n)
	wantEvents(t, ev, "drain n")
	g.DrainParentsEnd(n)
	wantEvents(t, ev)
	if !r.Drained() || !late.Drained() {
		t.Errorf("the parents go on before the last section ended")
	}
	g.DrainEnd(n)
	wantEvents(t, ev, "undrain n", "undrain top")
	detach(t, late)
	unchanged(t, g, before)
}

func TestG16ParentsOnlyThatIsGivenUpIsUndone(t *testing.T) {
	g := newGraph(t)
	n, gate := slowDisk(t, g, "slow")
	r := attached(t, n, "export 'a'", rd, all)
	l := r.NewLane(0, nil)
	defer l.Close()
	before := dump(g)
	gate.Hold(blocktest.OpRead)
	stuck := start(t, l, readOf(r))
	waitHeld(t, gate, 1)
	short, cancel := context.WithCancel(ctx)
	cancel()
	wantError(t, g.DrainParentsBegin(short, n), context.Canceled, "drain of what is above node 'slow' did not finish: export 'a' still has 1 requests in flight")
	unchanged(t, g, before)
	gate.ReleaseAll()
	if err := <-stuck; err != nil {
		t.Error(err)
	}
}

func TestG16AllStopsEveryRootBeforeItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGraph(t)
		hung, gate := slowDisk(t, g, "hung")
		a, b := attached(t, hung, "export 'a'", rd, all), attached(t, opened(t, g, disk("other", 4096)), "export 'b'", rd, all)
		la, lb := a.NewLane(0, nil), b.NewLane(1, nil)
		defer la.Close()
		defer lb.Close()
		before := dump(g)
		gate.Hold(blocktest.OpRead)
		stuck := start(t, la, readOf(a))
		waitHeld(t, gate, 1)
		ends := make(chan func())
		go func() {
			end, err := g.DrainAll(ctx)
			if err != nil {
				t.Error(err)
			}
			ends <- end
		}()
		synctest.Wait() // it waits for a
		if !refused(la) || !refused(lb) {
			t.Errorf("a root goes on while all are drained")
		}
		gate.ReleaseAll()
		if err := <-stuck; err != nil {
			t.Error(err)
		}
		end := <-ends
		verify(t, g)
		end()
		unchanged(t, g, before)
	})
}

func TestG16AllHoldsForWhatComesAndGoes(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	old := open(t, g, node("old", ev, filter, disk("below", 4096)))
	r := attach(t, old, "old", rd, all)
	one, err := g.DrainAll(ctx)
	if err != nil {
		t.Fatal(err)
	}
	n := open(t, g, node("new", ev, filter, disk("newdisk", 4096)))
	fresh := attach(t, n, "new", rd, all)
	if !fresh.Drained() || n.Quiesced() != 2 {
		t.Errorf("a node opened inside is in %d sections, its root drained: %t", n.Quiesced(), fresh.Drained())
	}
	two, err := g.DrainAll(ctx)
	if err != nil {
		t.Fatal(err)
	}
	verify(t, g)
	detach(t, r)
	release(t, g, old)
	gone := open(t, g, disk("gone", 512))
	release(t, g, gone)
	if ev.has("close old") {
		t.Errorf("a node was closed inside the section")
	}
	one()
	verify(t, g)
	if !fresh.Drained() {
		t.Errorf("the new root goes on after the first of two ends")
	}
	two()
	verify(t, g)
	if fresh.Drained() {
		t.Errorf("the new root is left drained")
	}
	if got, want := g.Nodes(), 2; len(got) != want {
		t.Errorf("%d nodes are left, want %d:\n%s", len(got), want, dump(g))
	}
	balancedDrains(t, ev)
	detach(t, fresh)
	release(t, g, n)
}

// balancedDrains checks that each node was told the end of each drain before it was closed.
func balancedDrains(t blocktest.TB, ev *events) {
	t.Helper()
	drained := map[string]bool{}
	for _, e := range ev.take() {
		what, name, _ := strings.Cut(e, " ")
		switch {
		case what == "drain" && drained[name], what == "undrain" && !drained[name]:
			t.Errorf("%s was told '%s' twice", name, what)
		case what == "close" && drained[name]:
			t.Errorf("%s was closed while drained", name)
		}
		drained[name] = what == "drain" || drained[name] && what != "undrain"
	}
	for name, is := range drained {
		if is {
			t.Errorf("%s is left drained", name)
		}
	}
}

// Closing a node reaches its children, so it must not happen while these are drained.
func TestG16NodeReleasedOverADrainedChildIsClosedByTheEnd(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	base := opened(t, g, node("base", ev))
	top := open(t, g, node("top", ev, filter, ref("base")))
	ev.take()
	drain(t, g, base)
	release(t, g, top)
	if g.Lookup("top") != nil {
		t.Errorf("a released node can be found")
	}
	if list := ev.take(); !slices.Equal(list, []string{"drain top", "drain base"}) {
		t.Errorf("inside the section: %q", list)
	}
	g.DrainEnd(base)
	list := ev.take()
	if i, j := slices.Index(list, "undrain top"), slices.Index(list, "close top"); i < 0 || j < i {
		t.Errorf("at the end: %q", list)
	}
	verify(t, g)
}

func TestG16FailedCloseByTheEndOfASectionIsLogged(t *testing.T) {
	var log strings.Builder
	g := newLoggedGraph(t, &log)
	faults := new(blocktest.Faults)
	c := blocktest.FaultConfig(faults, disk("", 512))
	c.NodeName = "n"
	n := open(t, g, c)
	faults.Add(blocktest.Fault{Op: blocktest.OpClose, Err: syscall.EIO})
	drain(t, g, n)
	release(t, g, n)
	g.DrainEnd(n)
	if !strings.Contains(log.String(), "close of node 'n'") || !strings.Contains(log.String(), "input/output error") {
		t.Errorf("log: %s", log.String())
	}
	if len(g.Nodes()) != 0 {
		t.Errorf("nodes are left:\n%s", dump(g))
	}
}

func TestG16DrainWaitsForNodesThatAreOpenedOrClosed(t *testing.T) {
	for _, op := range []blocktest.Op{blocktest.OpOpen, blocktest.OpClose} {
		t.Run(op.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGraph(t)
				base := opened(t, g, disk("base", 512))
				gate := blocktest.NewGate()
				c := blocktest.SlowConfig(gate, ref("base"))
				c.NodeName = "top"
				done := make(chan error, 1)
				if op == blocktest.OpClose {
					n := open(t, g, c)
					gate.Hold(op)
					go func() { done <- g.Release(ctx, n) }()
				} else {
					gate.Hold(op)
					go func() {
						n, err := g.Open(ctx, c)
						if err == nil {
							defer release(t, g, n)
						}
						done <- err
					}()
				}
				waitHeld(t, gate, 1)
				short, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				wantError(t, g.DrainBegin(short, base), context.DeadlineExceeded, "node 'top' is still being opened or closed")
				drained := make(chan error, 1)
				go func() { drained <- g.DrainBegin(ctx, base) }()
				synctest.Wait()
				select {
				case err := <-drained:
					t.Fatalf("drained while a node works on it: %v", err)
				default:
				}
				gate.ReleaseAll()
				if err := errors.Join(<-done, <-drained); err != nil {
					t.Error(err)
				}
				g.DrainEnd(base)
			})
		})
	}
}

// An opening that waits for another change does nothing meanwhile. A drain that waited
// for it could be what the other change waits for.
func TestG16DrainDoesNotWaitForAnOpeningThatWaits(t *testing.T) {
	blocktest.Watchdog(t, 30*time.Second)
	g := newGraph(t)
	ev := new(events)
	c := newConsent()
	slow, file := opened(t, g, hesitant("slow", ev, c)), opened(t, g, disk("file", 512))
	asking := try(attachTo(slow, "writer", rd|wr, all))
	<-c.asked
	opening := try(func() (*block.Root, error) {
		n, err := g.Open(ctx, node("top", ev, filter, ref("file"), backing, ref("slow")))
		if err == nil {
			defer release(t, g, n)
		}
		return nil, err
	})
	for len(file.Parents()) == 0 {
	}
	drain(t, g, file)
	g.DrainEnd(file)
	c.answer <- nil
	if err := errors.Join(<-asking.done, <-opening.done); err != nil {
		t.Error(err)
	}
	detach(t, asking.root)
}

func TestG16UnfinishedDrainNamesWhatItWaitsFor(t *testing.T) {
	g := newGraph(t)
	n, gate := slowDisk(t, g, "slow")
	other, _ := slowDisk(t, g, "other")
	root := func(n *block.Node, user string, busy ...string) *block.Lane {
		r, err := g.AttachRoot(ctx, block.RootConfig{User: user, Node: n, Perm: rd, Shared: all, Busy: func() []string { return busy }})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { detach(t, r) })
		l := r.NewLane(0, nil)
		t.Cleanup(l.Close)
		return l
	}
	many := make([]string, 11)
	for i := range many {
		many[i] = fmt.Sprintf("read %d", i)
	}
	a, b, c, d := root(n, "export 'a'", "read of 4096 bytes at offset 512 for 12s"), root(n, "export 'b'"), root(n, "export 'c'", many...), root(other, "export 'd'")
	var open []block.Admission
	for _, l := range []*block.Lane{a, b, c, d} {
		adm, ok := l.Begin()
		if !ok {
			t.Fatal("not admitted")
		}
		open = append(open, adm)
	}
	short, cancel := context.WithCancel(ctx)
	cancel()
	err := g.DrainBegin(short, n)
	wantError(t, err, context.Canceled,
		"drain of node 'slow' did not finish: ",
		"export 'a' still has 1 requests in flight (read of 4096 bytes at offset 512 for 12s): ",
		"; export 'b' still has 1 requests in flight: ",
		"; export 'c' still has 1 requests in flight (read 0, read 1, read 2, read 3, read 4, read 5, read 6, read 7 and 3 more): ")
	if strings.Contains(err.Error(), "export 'd'") || strings.Contains(err.Error(), "\n") {
		t.Errorf("the error is %q", err)
	}
	for i, l := range []*block.Lane{a, b, c, d} {
		l.End(open[i])
	}
	gate.ReleaseAll()
	verify(t, g)
}

// lazy is a node whose background work does not pause until it is let go.
type lazy struct {
	block.Instance
	entered, letGo chan struct{}
	told           atomic.Int32
}

func (l *lazy) DrainBegin() { l.told.Add(1); l.entered <- struct{}{}; <-l.letGo }
func (l *lazy) DrainEnd()   { l.told.Add(-1) }

func TestG16DrainThatIsGivenUpLeavesBackgroundWorkRunning(t *testing.T) {
	blocktest.Watchdog(t, 30*time.Second)
	l := &lazy{entered: make(chan struct{}, 9), letGo: make(chan struct{})}
	g := blocktest.NewGraph(t, &block.Driver{
		Name: "lazy", Kind: block.Filter, NewOptions: func() any { return new(struct{}) },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			e, err := o.OpenChild(ctx, "file", block.RoleFiltered|block.RolePrimary, nil)
			l.Instance = &testNode{name: o.NodeName, o: &nodeOptions{events: new(events)}, file: e}
			return l, err
		},
	})
	n := opened(t, g, &block.Config{Driver: "lazy", NodeName: "lazy", Children: map[string]*block.Config{"file": disk("file", 4096)}})
	r := attached(t, n, "export", rd, all)
	short, cancel := context.WithCancel(ctx)
	drained := make(chan error, 1)
	go func() { drained <- g.DrainBegin(short, n) }()
	<-l.entered
	cancel()
	wantError(t, <-drained, context.Canceled, "drain of node 'lazy' did not finish: background work of node 'lazy' did not pause")
	if err := r.Do(ctx, readOf(r)); err != nil {
		t.Error(err)
	}
	close(l.letGo)
	drain(t, g, n) // whatever is still going on from the first one comes to its end before
	if got := l.told.Load(); got != 1 {
		t.Errorf("the driver was told %d drains", got)
	}
	g.DrainEnd(n)
	if got := l.told.Load(); got != 0 {
		t.Errorf("the driver was told %d drains after the end", got)
	}
	verify(t, g)
}

func TestG16WriterLeavesAfterTheSection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGraph(t)
		ev := new(events)
		n := opened(t, g, node("n", ev))
		r := attach(t, n, "writer", rd|wr, all)
		drain(t, g, n)
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if err := r.Detach(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a flush inside a drained section: %v", err)
		}
		left := make(chan error, 1)
		go func() { left <- r.Detach(ctx) }()
		synctest.Wait()
		ev.take()
		g.DrainEnd(n)
		if err := <-left; err != nil {
			t.Error(err)
		}
		if list := ev.take(); !slices.Contains(list, "flush n") {
			t.Errorf("the writer left without a flush: %q", list)
		}
	})
}

// Sections of all kinds, and changes inside them, from many sides at once.
func TestG16SectionsOfAllKindsAtOnce(t *testing.T) {
	beat := blocktest.Watchdog(t, 30*time.Second)
	g := newGraph(t)
	ev := new(events)
	names := []string{"base", "left", "right", "top"}
	opened(t, g, disk("base", 4096))
	opened(t, g, node("left", ev, filter, ref("base")))
	opened(t, g, node("right", ev, filter, ref("base")))
	opened(t, g, node("top", ev, filter, ref("left"), backing, ref("right")))
	var roots []*block.Root
	for _, name := range names {
		roots = append(roots, attached(t, g.Lookup(name), "user of "+name, rd, all))
	}
	before := dump(g)
	var wg sync.WaitGroup
	each := func(n int, f func(i int) error) {
		wg.Go(func() {
			for i := range n {
				if err := f(i); err != nil {
					t.Error(err)
				}
				beat()
			}
		})
	}
	for _, r := range roots {
		each(500, func(int) error { return r.Do(ctx, readOf(r)) })
	}
	each(300, func(i int) error {
		n, m := g.Lookup(names[i%4]), g.Lookup(names[i/4%4])
		if err := g.DrainBegin(ctx, n, m); err != nil {
			return err
		}
		g.DrainEnd(n, m)
		return nil
	})
	each(300, func(i int) error {
		n := g.Lookup(names[i%4])
		if err := g.DrainParentsBegin(ctx, n); err != nil {
			return err
		}
		g.DrainParentsEnd(n)
		return nil
	})
	each(100, func(int) error {
		end, err := g.DrainAll(ctx)
		if err == nil {
			end()
		}
		return err
	})
	each(100, func(i int) error {
		n := g.Lookup(names[i%4])
		f, err := g.InsertFilter(ctx, blocktest.SlowConfig(blocktest.NewGate(), ref(n.Name())), n)
		if err != nil {
			return err
		}
		return errors.Join(g.RemoveFilter(ctx, f), g.Release(ctx, f))
	})
	each(200, func(i int) error {
		n, err := g.Open(ctx, node("", ev, filter, ref(names[i%4])))
		if err != nil {
			return err
		}
		r, err := g.AttachRoot(ctx, block.RootConfig{User: "passer-by", Node: n, Perm: rd, Shared: all})
		if err != nil {
			return errors.Join(err, g.Release(ctx, n))
		}
		return errors.Join(r.Detach(ctx), g.Release(ctx, n))
	})
	wg.Wait()
	if len(g.Nodes()) != 4 {
		t.Errorf("nodes are left:\n%s", dump(g))
	}
	// A filter that came between a parent and its child has moved the edge to the end of a list.
	sorted := func(s string) []string { l := strings.Split(s, "\n"); slices.Sort(l); return l }
	if after := dump(g); !slices.Equal(sorted(after), sorted(before)) {
		t.Errorf("at the end:\n%s\nbefore:\n%s", after, before)
	}
	verify(t, g)
	balancedDrains(t, ev)
}
