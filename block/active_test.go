package block_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// A lifeNode is a test node that tells of activation. call is asked at each step, as
// in "activate N", and may fail it.
type lifeNode struct{ *testNode }

func lifeDriver() *block.Driver {
	d := testDriver()
	d.Name = "life"
	open := d.Open
	d.Open = func(ctx context.Context, o *block.Opening) (block.Instance, error) {
		n, err := open(ctx, o)
		if err != nil {
			return nil, err
		}
		return lifeNode{n.(*testNode)}, nil
	}
	return d
}

func (n lifeNode) step(what string) error {
	n.o.events.add("%s %s", what, n.name)
	if n.o.call != nil {
		return n.o.call(what + " " + n.name)
	}
	return nil
}

func (n lifeNode) Inactivate(context.Context) error  { return n.step("inactivate") }
func (n lifeNode) Deactivate()                       { _ = n.step("deactivate") }
func (n lifeNode) PreActivate(context.Context) error { return n.step("preactivate") }
func (n lifeNode) Activate(context.Context) error    { return n.step("activate") }

// life describes a life node, as node does.
func life(name string, ev *events, call func(string) error, kids ...any) *block.Config {
	c := node(name, ev, kids...)
	c.Driver = "life"
	c.Options.(*nodeOptions).call = call
	return c
}

func lifeGraph(t blocktest.TB) *block.Graph { return blocktest.NewGraph(t, lifeDriver(), testDriver()) }

func setActive(t blocktest.TB, g *block.Graph, active bool, nodes ...*block.Node) {
	t.Helper()
	if err := g.SetActive(ctx, active, nodes...); err != nil {
		t.Fatalf("set active %t: %v", active, err)
	}
}

// allowing attaches a root that lets its node become inactive.
func allowing(t blocktest.TB, n *block.Node, user string, perm, shared block.Perm) *block.Root {
	t.Helper()
	r, err := n.Graph().AttachRoot(ctx, block.RootConfig{User: user, Node: n, Perm: perm, Shared: shared, AllowInactive: func() error { return nil }})
	if err != nil {
		t.Fatalf("attach of %s: %v", user, err)
	}
	t.Cleanup(func() { detach(t, r) })
	return r
}

func TestG22Order(t *testing.T) {
	g := lifeGraph(t)
	ev := new(events)
	n := opened(t, g, life("top", ev, nil, image, life("file", ev, nil), backing, life("base", ev, nil)))
	allowing(t, n, "export", rd|wr, rd)
	ev.take()
	setActive(t, g, false, n)
	wantEvents(t, ev,
		"drain top", "drain base", "drain file",
		"inactivate top", "inactivate base", "inactivate file",
		"check top 0/15", "check base 0/15", "check file 0/15",
		"set top 0/15", "set base 0/15", "set file 0/15",
		"deactivate top", "deactivate base", "deactivate file",
		"undrain base", "undrain file", "undrain top")
	setActive(t, g, false, n)
	wantEvents(t, ev)
	setActive(t, g, true, n)
	wantEvents(t, ev,
		"drain top", "drain base", "drain file",
		"preactivate file", "preactivate base", "preactivate top",
		"check top 3/1", "check base 1/5", "check file 11/1",
		"set top 3/1", "set base 1/5", "set file 11/1",
		"activate file", "activate base", "activate top",
		"undrain base", "undrain file", "undrain top")
	setActive(t, g, true, n)
	wantEvents(t, ev)
}

func TestG22RequestsToAnInactiveNodeFail(t *testing.T) {
	g := lifeGraph(t)
	n := opened(t, g, disk("d", 4096))
	r := allowing(t, n, "export", all, all)
	p := make([]byte, 512)
	requests := map[string]func(context.Context) error{
		"read":     func(ctx context.Context) error { return r.ReadAt(ctx, p, 0) },
		"write":    func(ctx context.Context) error { return r.WriteAt(ctx, p, 0, 0) },
		"zero":     func(ctx context.Context) error { return r.WriteZeroes(ctx, 0, 512, 0) },
		"discard":  func(ctx context.Context) error { return r.Discard(ctx, 0, 512) },
		"flush":    r.Flush,
		"prefetch": func(ctx context.Context) error { return r.Prefetch(ctx, 0, 512) },
		"truncate": func(ctx context.Context) error { return r.Truncate(ctx, 4096) },
		"status":   func(ctx context.Context) error { _, err := r.BlockStatus(ctx, 0, 512, false); return err },
		"locate": func(context.Context) error {
			if l := r.Locate(0, 0, 512); l.Kind == block.LocateAsk {
				return block.ErrInactive
			}
			return nil
		},
	}
	for _, active := range []bool{true, false, true} {
		setActive(t, g, active, n)
		for name, f := range requests {
			err := r.Do(ctx, f)
			if active && err != nil || !active && !(errors.Is(err, block.ErrInactive) && errors.Is(err, syscall.EPERM)) {
				t.Errorf("active %t: %s: %v", active, name, err)
			}
		}
	}
}

func TestG22SharedNodesStayActiveWhileSomebodyNeedsThem(t *testing.T) {
	g := lifeGraph(t)
	ev := new(events)
	base := opened(t, g, life("base", ev, nil))
	a := opened(t, g, life("a", ev, nil, backing, ref("base")))
	b := opened(t, g, life("b", ev, nil, backing, ref("base")))
	own := opened(t, g, life("own", ev, nil, backing, ref("base")))
	user := attach(t, base, "user", rd, all)
	wantActive := func(want string) {
		t.Helper()
		var got []string
		for _, n := range g.Nodes() {
			if n.Active() {
				got = append(got, n.Name())
			}
		}
		if s := strings.Join(got, " "); s != want {
			t.Errorf("active: %q, want %q", s, want)
		}
	}
	setActive(t, g, false, a)
	wantActive("b base own")
	setActive(t, g, false, b, own)
	wantActive("base") // the root
	wantError(t, g.SetActive(ctx, false, base), block.ErrPermission, "Failed to inactivate node: Operation not permitted", "user")
	wantError(t, g.SetAllActive(ctx, false), syscall.EPERM, "Failed to inactivate node: Operation not permitted")
	detach(t, user)
	setActive(t, g, true, b)
	wantError(t, g.SetActive(ctx, false, base), block.ErrPermission, "Node has active parent node")
	if err := g.SetAllActive(ctx, false); err != nil {
		t.Error(err)
	}
	wantActive("")
	setActive(t, g, true, b)
	wantActive("b base")
	setActive(t, g, false, base, b)
	wantActive("")
	if err := g.SetAllActive(ctx, true); err != nil {
		t.Error(err)
	}
	wantActive("a b base own")
}

func TestG22RefusalOfARoot(t *testing.T) {
	g := lifeGraph(t)
	n := opened(t, g, disk("d", 4096))
	reason := errors.New("2 clients are connected")
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "export 'x'", Node: n, Perm: rd, Shared: all, AllowInactive: func() error { return reason }})
	if err != nil {
		t.Fatal(err)
	}
	defer detach(t, r)
	err = g.SetActive(ctx, false, n)
	wantError(t, err, block.ErrPermission, "Failed to inactivate node: Operation not permitted", "export 'x'", "2 clients")
	wantError(t, err, reason)
	if !n.Active() {
		t.Errorf("inactive")
	}
}

// dumpActive is dump with the state of the nodes.
func dumpActive(g *block.Graph) string {
	var b strings.Builder
	for _, n := range g.Nodes() {
		fmt.Fprintf(&b, "%s active %t claimed %t\n", n.Name(), n.Active(), n.Claimed())
	}
	return b.String() + dump(g)
}

func TestG22FailureAtEveryStepLeavesTheGraphAsItWas(t *testing.T) {
	g := lifeGraph(t)
	ev := new(events)
	var failing string
	call := func(step string) error {
		if step == failing {
			return syscall.EIO
		}
		return nil
	}
	c := life("top", ev, call, image, life("file", ev, call), backing, life("base", ev, call))
	var veto string
	for _, o := range []*block.Config{c, c.Children["file"], c.Children["backing"]} {
		name := o.NodeName
		o.Options.(*nodeOptions).veto = func(perm, shared block.Perm) error {
			if name == veto && perm != 0 {
				return fmt.Errorf("process 7 has the lock: %w", block.ErrBusy)
			}
			return nil
		}
	}
	n := opened(t, g, c)
	allowing(t, n, "export", rd|wr, rd)
	for _, active := range []bool{true, false} {
		before := dumpActive(g)
		steps := map[bool][]string{true: {"inactivate"}, false: {"preactivate", "activate"}}[active]
		for _, step := range steps {
			for _, name := range []string{"top", "file", "base"} {
				failing = step + " " + name
				wantError(t, g.SetActive(ctx, !active, n), syscall.EIO, name)
				if after := dumpActive(g); after != before {
					t.Errorf("after a failed %s:\n%s\nbefore:\n%s", failing, after, before)
				}
			}
		}
		failing = ""
		if !active {
			for _, veto = range []string{"top", "file", "base"} {
				wantError(t, g.SetActive(ctx, true, n), block.ErrBusy, "process 7 has the lock")
				if after := dumpActive(g); after != before {
					t.Errorf("after the veto of %s:\n%s\nbefore:\n%s", veto, after, before)
				}
				last := ev.take()
				if got := strings.Join(last[len(last)-6:], ", "); !strings.HasPrefix(got, "deactivate top, deactivate base, deactivate file") {
					t.Errorf("last events: %s", got)
				}
			}
			veto = ""
		}
		setActive(t, g, !active, n)
	}
}

func TestG22ConcurrentActivationsJoin(t *testing.T) {
	for _, fails := range []bool{false, true} {
		g := lifeGraph(t)
		reached, letGo := make(chan struct{}), make(chan struct{})
		var calls atomic.Int32
		n := opened(t, g, life("n", new(events), func(step string) error {
			if step != "activate n" {
				return nil
			}
			if calls.Add(1) == 1 {
				close(reached)
			}
			<-letGo
			if fails {
				return syscall.EIO
			}
			return nil
		}))
		setActive(t, g, false, n)
		const callers = 8
		results := make(chan error, callers)
		activate := func() { results <- g.SetActive(ctx, true, n) }
		go activate()
		<-reached
		for range callers - 1 {
			go activate()
		}
		short, cancel := context.WithCancel(ctx)
		cancel()
		wantError(t, g.SetActive(short, true, n), context.Canceled, "'n'")
		close(letGo)
		for range callers {
			if err := <-results; (err != nil) != fails || fails && !errors.Is(err, syscall.EIO) {
				t.Errorf("fails %t: %v", fails, err)
			}
		}
		if n.Active() == fails {
			t.Errorf("active %t", n.Active())
		}
		// Who came after the end tries once more.
		if got := calls.Load(); !fails && got != 1 {
			t.Errorf("activated %d times", got)
		}
	}
}

func TestG22AnActivationThatWasGivenUpDoesNotFailTheOthers(t *testing.T) {
	g := lifeGraph(t)
	reached := make(chan struct{})
	var first atomic.Bool
	mine, cancel := context.WithCancel(ctx)
	n := opened(t, g, life("n", new(events), func(step string) error {
		if step == "activate n" && first.CompareAndSwap(false, true) {
			close(reached)
			<-mine.Done()
			return mine.Err()
		}
		return nil
	}))
	setActive(t, g, false, n)
	gaveUp, joined := make(chan error), make(chan error)
	go func() { gaveUp <- g.SetActive(mine, true, n) }()
	<-reached
	go func() { joined <- g.SetActive(ctx, true, n) }()
	cancel()
	wantError(t, <-gaveUp, context.Canceled)
	if err := <-joined; err != nil {
		t.Error(err)
	}
}

func TestG22ActivationWaitsForTheEndOfAnInactivation(t *testing.T) {
	g := lifeGraph(t)
	reached, letGo := make(chan struct{}), make(chan struct{})
	n := opened(t, g, life("n", new(events), func(step string) error {
		if step == "inactivate n" {
			close(reached)
			<-letGo
		}
		return nil
	}))
	down, up, used := make(chan error), make(chan error), make(chan error)
	go func() { down <- g.SetActive(ctx, false, n) }()
	<-reached
	go func() { up <- g.SetActive(ctx, true, n) }()
	// A graph change of the node waits as well, and is done then.
	go func() {
		r, err := g.AttachRoot(ctx, block.RootConfig{User: "late", Node: n, Perm: rd, Shared: all})
		if err == nil {
			err = r.Detach(ctx)
		}
		used <- err
	}()
	short, cancel := context.WithCancel(ctx)
	cancel()
	_, err := g.AttachRoot(short, block.RootConfig{User: "hurried", Node: n, Perm: rd, Shared: all})
	wantError(t, err, context.Canceled, "'n'")
	close(letGo)
	if err := errors.Join(<-down, <-up, <-used); err != nil {
		t.Error(err)
	}
	if !n.Active() {
		t.Errorf("inactive")
	}
}

func TestG22InactivationWaitsForRequestsInFlight(t *testing.T) {
	g := newGraph(t)
	n, gate := slowDisk(t, g, "slow")
	r := allowing(t, n, "export", rd, all)
	l := r.NewLane(0, nil)
	defer l.Close()
	gate.Hold(blocktest.OpRead)
	read := start(t, l, readOf(r))
	waitHeld(t, gate, 1)
	short, cancel := context.WithCancel(ctx)
	cancel()
	wantError(t, g.SetActive(short, false, n), context.Canceled, "'slow'")
	if !n.Active() {
		t.Errorf("inactive")
	}
	down := make(chan error)
	go func() { down <- g.SetActive(ctx, false, n) }()
	gate.ReleaseAll()
	if err := errors.Join(<-read, <-down); err != nil {
		t.Error(err)
	}
	wantError(t, r.Do(ctx, readOf(r)), block.ErrInactive)
}

func TestG22OpenedInactive(t *testing.T) {
	g := lifeGraph(t)
	ev := new(events)
	c := life("top", ev, nil, image, life("file", ev, nil))
	c.Inactive = true
	n := opened(t, g, c)
	file := n.Child("file").Node()
	if n.Active() || file.Active() {
		t.Errorf("active")
	}
	wantEvents(t, ev, "open file", "check file 0/15", "set file 0/15", "open top")

	_, err := g.AttachRoot(ctx, block.RootConfig{User: "export", Node: n, Perm: rd | wr, Shared: all})
	wantError(t, err, block.ErrInactive, "Permission 'write' unavailable on inactive node")
	attached(t, n, "reader", rd, all)
	setActive(t, g, true, file) // its parent stays inactive
	if n.Active() || !file.Active() {
		t.Errorf("top active %t, file active %t", n.Active(), file.Active())
	}
	setActive(t, g, true, n)
	if !n.Active() {
		t.Errorf("inactive")
	}
}

func TestG15InactiveChildOfActiveParent(t *testing.T) {
	g := lifeGraph(t)
	ev := new(events)
	c := life("c", ev, nil)
	c.Inactive = true
	sleeper := opened(t, g, c)
	_, err := g.Open(ctx, life("p", ev, nil, image, ref("c")))
	wantError(t, err, block.ErrInactive, "Inactive 'c' can't be a file child of active 'p'")

	n := opened(t, g, life("n", ev, nil))
	r := attached(t, n, "export", rd, all)
	wantError(t, g.Replace(ctx, n, sleeper), block.ErrInactive, "Inactive 'c' can't be a root child of active 'export'")
	if r.Node() != n {
		t.Errorf("the root was moved")
	}
}

func TestG22ActivationTakesBackPermissionsOrFails(t *testing.T) {
	g := lifeGraph(t)
	n := opened(t, g, disk("d", 4096))
	r := allowing(t, n, "export 'a'", rd|wr, rd)
	setActive(t, g, false, n)
	// While it is inactive somebody else may use what is below it.
	if perm, shared := r.Node().Parents()[0].Perm(), r.Node().Parents()[0].Shared(); perm != 0 || shared != all {
		t.Errorf("the root holds %s and shares %s", perm, shared)
	}
	other := allowing(t, n, "export 'b'", rd|wr, rd)
	before := dumpActive(g)
	wantError(t, g.SetActive(ctx, true, n), block.ErrBusy, "Permission conflict on node 'd'", "export 'a'", "export 'b'")
	if after := dumpActive(g); after != before {
		t.Errorf("after:\n%s\nbefore:\n%s", after, before)
	}
	_ = other
}

func TestG22PeekLooksAtWhatIsThere(t *testing.T) {
	g := lifeGraph(t)
	s := blocktest.NewStore(4096)
	c := blocktest.MemoryConfig(s)
	c.Inactive = true
	n := opened(t, g, c)
	r := allowing(t, n, "export", rd, all)
	for _, want := range []int64{4096, 8192} {
		s.Truncate(want)
		if got, err := r.PeekSize(ctx); err != nil || got != want {
			t.Errorf("size %d, %v; want %d", got, err, want)
		}
	}
}
