package blkdebug_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"github.com/nbdserve/nbdserve/block/filter/blkdebug"
	"github.com/nbdserve/nbdserve/formats/qcow2"
)

var ctx = context.Background()

func config(o *blkdebug.Options, image *block.Config) *block.Config {
	return &block.Config{Driver: "blkdebug", Unmap: true, Options: o, Children: map[string]*block.Config{"image": image}}
}

// A rig is a blkdebug node over memory with a root.
type rig struct {
	t     *testing.T
	graph *block.Graph
	node  *block.Node
	root  *block.Root
	debug block.Debugger
}

func newRig(t *testing.T, o *blkdebug.Options) *rig {
	t.Helper()
	r := &rig{t: t, graph: blocktest.NewGraph(t, blkdebug.Driver())}
	var err error
	if r.node, err = r.graph.Open(ctx, config(o, blocktest.MemoryConfig(blocktest.NewStore(1<<20)))); err != nil {
		t.Fatal(err)
	}
	r.root, err = r.graph.AttachRoot(ctx, block.RootConfig{User: "test", Node: r.node, Perm: block.PermConsistentRead | block.PermWrite})
	if err := errors.Join(err, r.graph.Release(ctx, r.node)); err != nil {
		t.Fatal(err)
	}
	r.debug = r.node.Debugger()
	t.Cleanup(func() {
		// A flush that is to fail does so in the end, too.
		if err := r.root.Detach(ctx); err != nil && !strings.Contains(err.Error(), "injected error") {
			t.Error(err)
		}
	})
	return r
}

// requests are one of each kind, at byte off.
func (r *rig) requests(off int64) map[blkdebug.IOType]func() error {
	p := make([]byte, 512)
	return map[blkdebug.IOType]func() error{
		blkdebug.Read:        func() error { return r.root.ReadAt(ctx, p, off) },
		blkdebug.Write:       func() error { return r.root.WriteAt(ctx, p, off, 0) },
		blkdebug.WriteZeroes: func() error { return r.root.WriteZeroes(ctx, off, 512, 0) },
		blkdebug.Discard:     func() error { return r.root.Discard(ctx, off, 512) },
		blkdebug.Flush:       func() error { return r.root.Flush(ctx) },
		blkdebug.BlockStatus: func() error { _, err := r.root.BlockStatus(ctx, off, 512, true); return err },
	}
}

// fails tells which kinds of requests at off fail with errno, and checks that the others succeed.
func (r *rig) fails(off int64, errno syscall.Errno) string {
	r.t.Helper()
	requests := r.requests(off)
	var failed []string
	for k := blkdebug.Read; k <= blkdebug.BlockStatus; k++ {
		switch err := requests[k](); {
		case errors.Is(err, errno):
			failed = append(failed, k.String())
		case err != nil:
			r.t.Errorf("%s at %d: %v", k, off, err)
		}
	}
	return strings.Join(failed, " ")
}

func sector(n int64) *int64 { return &n }

func TestG27InjectError(t *testing.T) {
	for _, c := range []struct {
		name  string
		rule  blkdebug.InjectError
		off   int64
		fails string
	}{
		{"all kinds but block status", blkdebug.InjectError{}, 0, "read write write-zeroes discard flush"},
		{"reads", blkdebug.InjectError{IOType: blkdebug.Read}, 0, "read"},
		{"writes", blkdebug.InjectError{IOType: blkdebug.Write}, 0, "write"},
		{"zeroes", blkdebug.InjectError{IOType: blkdebug.WriteZeroes}, 0, "write-zeroes"},
		{"discards", blkdebug.InjectError{IOType: blkdebug.Discard}, 0, "discard"},
		{"flushes", blkdebug.InjectError{IOType: blkdebug.Flush}, 0, "flush"},
		{"status", blkdebug.InjectError{IOType: blkdebug.BlockStatus}, 0, "block-status"},
		{"the sector", blkdebug.InjectError{Sector: sector(8)}, 4096, "read write write-zeroes discard"},
		{"before the sector", blkdebug.InjectError{Sector: sector(8)}, 4096 - 512, ""},
		{"up into the sector", blkdebug.InjectError{Sector: sector(8), IOType: blkdebug.Read}, 4096 - 511, "read"},
		{"after the sector", blkdebug.InjectError{Sector: sector(8)}, 4097, ""},
		{"once", blkdebug.InjectError{Once: true}, 0, "read"},
		{"another event", blkdebug.InjectError{Event: block.EventL2Update}, 0, ""},
		{"another state", blkdebug.InjectError{State: 2}, 0, ""},
		{"this state", blkdebug.InjectError{State: 1, IOType: blkdebug.Read}, 0, "read"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
				rule := c.rule
				if errno != syscall.EIO {
					rule.Errno = int64(errno)
				}
				r := newRig(t, &blkdebug.Options{InjectError: []blkdebug.InjectError{rule}})
				if got := r.fails(c.off, errno); got != c.fails {
					t.Errorf("%v fail, want %v", got, c.fails)
				}
				r.debug.DebugEvent(block.EventL2Update)
				if got := r.fails(c.off, errno); c.rule.Event == block.EventL2Update && got != "read write write-zeroes discard flush" {
					t.Errorf("after the event %v fail", got)
				} else if c.rule.Once && got != "" {
					t.Errorf("%v fail again", got)
				}
			}
		})
	}
}

func TestG27EventsActivateRulesAndChangeState(t *testing.T) {
	r := newRig(t, &blkdebug.Options{
		InjectError: []blkdebug.InjectError{
			{Event: block.EventWriteAIO, State: 2, IOType: blkdebug.Write, Errno: int64(syscall.ENOSPC)},
			{Event: block.EventReadAIO, IOType: blkdebug.Read, Once: true},
			{Event: block.EventReadAIO, IOType: blkdebug.Read, Once: true, Errno: int64(syscall.EPERM)},
		},
		SetState: []blkdebug.SetState{
			{Event: block.EventL2Load, State: 1, NewState: 2},
			{Event: block.EventL2Update, State: 2, NewState: 3},
		},
	})
	step := func(e block.DebugEvent, errno syscall.Errno, want string) {
		t.Helper()
		r.debug.DebugEvent(e)
		if got := r.fails(0, errno); got != want {
			t.Errorf("after %s fail %q, want %q", e, got, want)
		}
	}
	step(block.EventWriteAIO, syscall.ENOSPC, "")
	step(block.EventL2Update, syscall.ENOSPC, "") // no change: the state is 1
	step(block.EventL2Load, syscall.ENOSPC, "")   // 2, but the event comes now
	step(block.EventWriteAIO, syscall.ENOSPC, "write")
	step(block.EventCowRead, syscall.ENOSPC, "write") // an event without rules changes nothing
	step(block.EventReadAIO, syscall.EPERM, "read")   // its rules go in place of those before, the last first
	step(block.EventCowRead, syscall.EIO, "read")
	step(block.EventReadAIO, syscall.EIO, "") // used up
	step(block.EventWriteAIO, syscall.ENOSPC, "write")
	step(block.EventL2Update, syscall.ENOSPC, "write") // 3
	step(block.EventWriteAIO, syscall.ENOSPC, "write") // no rule takes the place of the active one
}

func TestG27Breakpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, new(blkdebug.Options))
		var wg sync.WaitGroup
		var mu sync.Mutex
		passed := ""
		event := func(name string) {
			wg.Go(func() {
				r.debug.DebugEvent(block.EventL2Update)
				mu.Lock()
				defer mu.Unlock()
				passed += name
			})
			synctest.Wait()
		}
		check := func(want string, suspended ...string) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if passed != want {
				t.Errorf("%q have passed, want %q", passed, want)
			}
			for _, tag := range []string{"a", "b"} {
				if got, want := r.debug.Suspended(tag), strings.Contains(strings.Join(suspended, ""), tag); got != want {
					t.Errorf("suspended at %s: %v", tag, got)
				}
			}
		}
		enoent := func(err error) {
			t.Helper()
			if !errors.Is(err, syscall.ENOENT) {
				t.Errorf("%v, want ENOENT", err)
			}
		}
		enoent(r.debug.Resume("a"))
		enoent(r.debug.RemoveBreakpoint("a"))
		r.debug.Breakpoint(block.EventL2Update, "a")
		r.debug.Breakpoint(block.EventReadAIO, "b")
		enoent(r.debug.Resume("a"))
		event("1")
		check("", "a")
		event("2") // a breakpoint is for one
		check("2", "a")
		enoent(r.debug.Resume("b"))
		if err := r.debug.Resume("a"); err != nil {
			t.Error(err)
		}
		check("21")
		r.debug.Breakpoint(block.EventL2Update, "a")
		r.debug.Breakpoint(block.EventL2Update, "a")
		r.debug.Breakpoint(block.EventL2Update, "a")
		event("3")
		event("4")
		check("21", "a")
		if err := r.debug.Resume("a"); err != nil { // the oldest
			t.Error(err)
		}
		check("213", "a")
		if err := r.debug.RemoveBreakpoint("a"); err != nil { // lets go, and forgets the third
			t.Error(err)
		}
		check("2134")
		event("5")
		check("21345")
		enoent(r.debug.RemoveBreakpoint("a"))
		if err := r.debug.RemoveBreakpoint("b"); err != nil { // where nothing has stopped
			t.Error(err)
		}
		wg.Wait()
	})
}

// TestG27BreakpointsReachTheDebuggerBelow: breakpoints are for the first node from the
// top down that takes them.
func TestG27BreakpointsReachTheDebuggerBelow(t *testing.T) {
	g := blocktest.NewGraph(t, blkdebug.Driver())
	lower := config(new(blkdebug.Options), blocktest.MemoryConfig(blocktest.NewStore(1<<20)))
	lower.NodeName = "lower"
	n, err := g.Open(ctx, blocktest.SlowConfig(blocktest.NewGate(), lower))
	if err != nil {
		t.Fatal(err)
	}
	n.Debugger().Breakpoint(block.EventReadAIO, "tag")
	if err := g.Lookup("lower").Debugger().RemoveBreakpoint("tag"); err != nil {
		t.Error(err)
	}
	if err := g.Release(ctx, n); err != nil {
		t.Error(err)
	}
	n, err = g.Open(ctx, blocktest.MemoryConfig(blocktest.NewStore(1<<20)))
	if err != nil {
		t.Fatal(err)
	}
	if d := n.Debugger(); d != nil {
		t.Errorf("a graph without blkdebug has %T", d)
	}
	if err := g.Release(ctx, n); err != nil {
		t.Error(err)
	}
}

// TestG27AnImageMeetsTheErrors: events of qcow2 reach the node below it.
func TestG27AnImageMeetsTheErrors(t *testing.T) {
	g := blocktest.NewGraph(t, blkdebug.Driver(), qcow2.Driver(qcow2.Host{}))
	file := blocktest.MemoryConfig(blocktest.NewStore(0))
	raw, err := g.Open(ctx, file)
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "create", Node: raw, Perm: block.PermConsistentRead | block.PermWrite | block.PermResize})
	if err := errors.Join(err, g.Release(ctx, raw)); err != nil {
		t.Fatal(err)
	}
	err = qcow2.Create(ctx, r, qcow2.CreateOptions{Size: 1 << 20})
	if err := errors.Join(err, r.Detach(ctx)); err != nil {
		t.Fatal(err)
	}
	o := &blkdebug.Options{InjectError: []blkdebug.InjectError{
		{Event: block.EventL2Update, IOType: blkdebug.Write, Errno: int64(syscall.ENOSPC), Once: true},
		{Event: block.EventReadAIO, IOType: blkdebug.Read, Once: true},
	}}
	n, err := g.Open(ctx, &block.Config{Driver: "qcow2", Unmap: true, Children: map[string]*block.Config{"file": config(o, file)}})
	if err != nil {
		t.Fatal(err)
	}
	if r, err = g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermConsistentRead | block.PermWrite}); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{7}, 4096)
	got := make([]byte, 4096)
	for _, c := range []struct {
		what  string
		do    func(context.Context) error
		fails error
	}{
		{"write", func(ctx context.Context) error { return r.WriteAt(ctx, want, 0, 0) }, nil},
		{"flush", r.Flush, syscall.ENOSPC},
		{"flush", r.Flush, nil},
		{"read", func(ctx context.Context) error { return r.ReadAt(ctx, got, 0) }, syscall.EIO},
		{"read", func(ctx context.Context) error { return r.ReadAt(ctx, got, 0) }, nil},
	} {
		if err := r.Do(ctx, c.do); !errors.Is(err, c.fails) {
			t.Errorf("%s: %v, want %v", c.what, err, c.fails)
		}
	}
	if !bytes.Equal(got, want) {
		t.Errorf("wrong data")
	}
	if n.Debugger() == nil {
		t.Errorf("breakpoints of the image do not reach the node below")
	}
	if err := errors.Join(r.Detach(ctx), g.Release(ctx, n)); err != nil {
		t.Error(err)
	}
}

func TestG27OptionsByName(t *testing.T) {
	g := blocktest.NewGraph(t, blkdebug.Driver())
	parse := func(text string) (*block.Config, error) {
		t.Helper()
		o, err := block.ParseOptions(text, "")
		if err != nil {
			t.Fatal(err)
		}
		return g.Configure("", o)
	}
	c, err := parse("driver=blkdebug,image=x,align=4096,inject-error.0.event=read_aio,inject-error.0.errno=28,inject-error.0.iotype=write-zeroes," +
		"inject-error.0.sector=7,inject-error.0.once=on,inject-error.0.immediately=on,inject-error.0.state=2,set-state.0.event=l2_update,set-state.0.state=1,set-state.0.new_state=2")
	if err != nil {
		t.Fatal(err)
	}
	got := c.Options.(*blkdebug.Options)
	want := blkdebug.InjectError{Event: block.EventReadAIO, Errno: 28, IOType: blkdebug.WriteZeroes, Once: true, Immediately: true, State: 2}
	rule := got.InjectError[0]
	at := *rule.Sector
	rule.Sector = nil
	if got.Align != 4096 || rule != want || at != 7 || got.SetState[0] != (blkdebug.SetState{Event: block.EventL2Update, State: 1, NewState: 2}) {
		t.Errorf("%+v", got)
	}
	for text, says := range map[string]string{
		"config=rules.conf":              "Block format 'blkdebug' does not support the option 'config'",
		"take-child-perms.0=write":       "Block format 'blkdebug' does not support the option 'take-child-perms.0'",
		"inject-error.0.event=foo":       "inject-error.0: Parameter 'event' does not accept value 'foo'",
		"inject-error.0.iotype=foo":      "inject-error.0: Parameter 'iotype' does not accept value 'foo'",
		"inject-error.0.tag=foo":         "Invalid parameter 'inject-error.0.tag'",
		"set-state.0.event=vmstate_load": "set-state.0: Parameter 'event' does not accept value 'vmstate_load'",
	} {
		if _, err := parse("driver=blkdebug,image=x," + text); err == nil || err.Error() != says {
			t.Errorf("%s: %v, want %s", text, err, says)
		}
	}
}

func TestG27Limits(t *testing.T) {
	for text, o := range map[string]*blkdebug.Options{
		"align 3":             {Align: 3},
		"align -512":          {Align: -512},
		"align 131072":        {Align: 128 << 10},
		"max-transfer 100":    {Align: 512, MaxTransfer: 100},
		"max-transfer -512":   {MaxTransfer: -512},
		"opt-write-zero 100":  {Align: 512, OptWriteZero: 100},
		"max-write-zero 1024": {OptWriteZero: 4096, MaxWriteZero: 1024},
		"opt-discard 100":     {Align: 512, OptDiscard: 100},
		"max-discard 5000":    {OptDiscard: 4096, MaxDiscard: 5000},
	} {
		g := blocktest.NewGraph(t, blkdebug.Driver())
		_, err := g.Open(ctx, config(o, blocktest.MemoryConfig(blocktest.NewStore(1<<20))))
		if want := fmt.Sprintf("Cannot meet constraints with %s: invalid argument", text); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
	r := newRig(t, &blkdebug.Options{Align: 1024, MaxTransfer: 4096, OptWriteZero: 2048, MaxWriteZero: 8192, OptDiscard: 1024, MaxDiscard: 2048})
	l := r.node.Limits()
	if l.RequestAlignment != 1024 || l.MaxTransfer != 4096 || l.ZeroAlignment != 2048 || l.MaxZero != 8192 || l.DiscardAlignment != 1024 || l.MaxDiscard != 2048 {
		t.Errorf("%+v", l)
	}
}

func TestBlkdebugConforms(t *testing.T) {
	for name, o := range map[string]*blkdebug.Options{
		"NoRules": {},
		"Limits":  {Align: 4096, MaxTransfer: 8192, MaxWriteZero: 16384, MaxDiscard: 8192},
		"Rules":   {InjectError: []blkdebug.InjectError{{Event: block.EventL2Update}}},
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.Conformance(t, blocktest.Factory{
				New: func(t blocktest.TB) blocktest.Subject {
					s := blocktest.NewStore(100_001)
					s.Write(bytes.Repeat([]byte{1, 2, 3}, 14_000), 1000)
					return blocktest.Subject{Graph: blocktest.NewGraph(t, blkdebug.Driver()), Config: config(o, blocktest.MemoryConfig(s)), Contents: s.Bytes()}
				},
				FastZero: true, Holes: true, Resizes: o.Align == 0, DiscardZeroes: o.Align == 0,
			})
		})
	}
}
