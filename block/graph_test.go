package block_test

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

func TestNodeNamesFollowRuleG2(t *testing.T) {
	g := newGraph(t)
	for _, name := range []string{"a", "A9", "disk0", "a.b_c-d", strings.Repeat("x", 31)} {
		n := open(t, g, disk(name, 512))
		if n.Name() != name || g.Lookup(name) != n {
			t.Errorf("node %q is called %q", name, n.Name())
		}
		_, err := g.Open(ctx, disk(name, 512))
		wantError(t, err, nil, "Duplicate nodes with node-name='"+name+"'")
		release(t, g, n)
		if g.Lookup(name) != nil {
			t.Errorf("name %q is still there after the release", name)
		}
		release(t, g, open(t, g, disk(name, 512))) // the name is free again
	}
	for _, name := range []string{"0a", "-a", "_a", ".a", "#block0", "a b", "a/b", "a:b", "ä", "a\x00", "a\n"} {
		_, err := g.Open(ctx, disk(name, 512))
		wantError(t, err, nil, "Invalid node-name: '"+name+"'")
	}
	_, err := g.Open(ctx, disk(strings.Repeat("x", 32), 512))
	wantError(t, err, nil, "Node name too long")
}

func TestMadeUpNamesAreUniqueAndCannotClash(t *testing.T) {
	g := newGraph(t)
	seen := map[string]bool{}
	for range 20 {
		n := opened(t, g, disk("", 512))
		if !strings.HasPrefix(n.Name(), "#block") || seen[n.Name()] {
			t.Errorf("made-up name %q", n.Name())
		}
		seen[n.Name()] = true
	}
}

func TestReferencesKeepANodeOpen(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	top := open(t, g, node("top", ev, image, node("file", ev)))
	again := open(t, g, ref("top"))
	if top != again {
		t.Fatalf("a reference opened another node")
	}
	ev.take()
	release(t, g, top)
	if g.Lookup("top") == nil {
		t.Fatalf("the node was closed while a reference was held")
	}
	wantEvents(t, ev)
	release(t, g, again)
	if len(g.Nodes()) != 0 {
		t.Errorf("nodes are left")
	}
}

func TestCloseGoesFromParentToChild(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	top := open(t, g, node("top", ev, image, node("file", ev), backing, node("base", ev, image, node("basefile", ev))))
	ev.take()
	release(t, g, top)
	var life []string
	for _, e := range ev.take() {
		if strings.HasPrefix(e, "flush") || strings.HasPrefix(e, "close") {
			life = append(life, e)
		}
	}
	// The backing chain is read-only: nothing to flush.
	want := "flush top, close top, close base, close basefile, flush file, close file"
	if got := strings.Join(life, ", "); got != want {
		t.Errorf("order of close:\n got %s\nwant %s", got, want)
	}
}

func TestSharedChildOutlivesOneParent(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	base := node("base", ev)
	base.ReadOnly = true
	b := open(t, g, base)
	one := open(t, g, node("one", ev, backing, ref("base")))
	two := open(t, g, node("two", ev, backing, ref("base")))
	release(t, g, b)
	release(t, g, one)
	if g.Lookup("base") == nil {
		t.Errorf("the base was closed under 'two'")
	}
	release(t, g, two)
	if g.Lookup("base") != nil {
		t.Errorf("the base is left")
	}
}

func TestFailedOpenClosesWhatItOpened(t *testing.T) {
	faults := new(blocktest.Faults)
	for name, make := range map[string]func(ev *events) *block.Config{
		"second child has no driver": func(ev *events) *block.Config {
			return node("top", ev, image, node("file", ev), backing, &block.Config{Driver: "nonesuch"})
		},
		"second child missing": func(ev *events) *block.Config {
			c := node("top", ev, image, node("file", ev))
			c.Options.(*nodeOptions).kids = append(c.Options.(*nodeOptions).kids, backing)
			return c
		},
		"driver fails after its children": func(ev *events) *block.Config {
			c := node("top", ev, image, node("file", ev), backing, node("base", ev))
			c.Options.(*nodeOptions).fail = syscall.EIO
			return c
		},
		"grandchild fails": func(ev *events) *block.Config {
			c := node("base", ev, image, node("basefile", ev))
			c.Options.(*nodeOptions).fail = syscall.EIO
			return node("top", ev, image, node("file", ev), backing, c)
		},
		"duplicate name": func(ev *events) *block.Config {
			return node("top", ev, image, node("file", ev), backing, node("file", ev))
		},
		"name of the node under construction": func(ev *events) *block.Config {
			return node("top", ev, image, node("file", ev), backing, node("top", ev))
		},
		"permission vetoed": func(ev *events) *block.Config {
			c := node("file", ev)
			c.Options.(*nodeOptions).veto = func(perm, _ block.Perm) error {
				if perm&wr != 0 {
					return syscall.EACCES
				}
				return nil
			}
			return node("top", ev, backing, node("base", ev), image, c)
		},
		"reference to itself": func(ev *events) *block.Config {
			return node("top", ev, image, node("file", ev), backing, ref("top"))
		},
		"filter fails to open": func(ev *events) *block.Config {
			faults.Add(blocktest.Fault{Op: blocktest.OpOpen, Err: syscall.EIO, Times: 1})
			return node("top", ev, image, blocktest.FaultConfig(faults, node("file", ev)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGraph(t)
			ev := new(events)
			n, err := g.Open(ctx, make(ev))
			if err == nil {
				release(t, g, n)
				t.Fatalf("the open succeeded")
			}
			if left := dump(g); left != "" {
				t.Errorf("nodes left:\n%s", left)
			}
			count := map[string]int{}
			for _, e := range ev.take() {
				count[strings.Fields(e)[0]]++
			}
			if count["open"] != count["close"] {
				t.Errorf("%d nodes opened, %d closed", count["open"], count["close"])
			}
			release(t, g, open(t, g, disk("top", 512))) // its name is free
		})
	}
}

func TestClosingNodeCannotBeReferenced(t *testing.T) {
	g := newGraph(t)
	gate := blocktest.NewGate()
	c := blocktest.SlowConfig(gate, disk("", 512))
	c.NodeName = "slow"
	n := open(t, g, c)
	gate.Hold(blocktest.OpClose)
	done := make(chan error)
	go func() { done <- g.Release(ctx, n) }()
	if err := gate.WaitHeld(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if g.Lookup("slow") != nil {
		t.Errorf("a closing node can be found")
	}
	if again, err := g.Open(ctx, ref("slow")); err == nil {
		t.Errorf("a closing node can be opened by reference: %s", again.Name())
	}
	if ns := g.Nodes(); len(ns) != 1 || ns[0].Name() == "slow" {
		t.Errorf("a closing node is listed")
	}
	gate.ReleaseAll()
	if err := <-done; err != nil {
		t.Errorf("release: %v", err)
	}
}

func TestFailedCloseIsToldAndTheNodeIsGone(t *testing.T) {
	for _, op := range []blocktest.Op{blocktest.OpClose, blocktest.OpFlush} {
		g := newGraph(t)
		faults := new(blocktest.Faults)
		c := blocktest.FaultConfig(faults, disk("", 512))
		c.NodeName = "bad"
		n := open(t, g, c)
		faults.Add(blocktest.Fault{Op: op, Err: syscall.EIO})
		wantError(t, g.Release(ctx, n), syscall.EIO, "bad")
		if len(g.Nodes()) != 0 {
			t.Errorf("nodes are left after a failed %s", op)
		}
	}
}

func TestGraphCloseNamesTheNodesLeft(t *testing.T) {
	g := newGraph(t)
	n := open(t, g, disk("left", 512))
	wantError(t, g.Close(ctx), nil, "left")
	release(t, g, n)
	if err := g.Close(ctx); err != nil {
		t.Errorf("close of an empty graph: %v", err)
	}
}

func TestConfigsThatContradictThemselves(t *testing.T) {
	g := newGraph(t)
	for want, change := range map[string]func(*block.Config){
		"Unknown driver 'x'": func(c *block.Config) { c.Driver = "x" },
		"force-share=on can only be used with read-only images":                                    func(c *block.Config) { c.ForceShare = true },
		"setting detect-zeroes to unmap is not allowed without setting discard operation to unmap": func(c *block.Config) { c.DetectZeroes = block.DetectZeroesUnmap; c.Unmap = false },
		"Cannot find device='x' nor node-name='x'":                                                 func(c *block.Config) { *c = *ref("x") },
	} {
		c := disk("", 512)
		change(c)
		_, err := g.Open(ctx, c)
		wantError(t, err, nil, want)
	}
}

func TestChildrenInheritByRole(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	c := node("top", ev, image, node("file", ev), backing, node("base", ev, image, node("basefile", ev)))
	c.Unmap = false
	c.Cache = block.CacheMode{Direct: true, NoFlush: true}
	for _, k := range c.Children {
		k.Unmap = false
	}
	opened(t, g, c)
	for name, ro := range map[string]bool{"top": false, "file": false, "base": true, "basefile": true} {
		got := g.Lookup(name).Config()
		if got.Cache != c.Cache || got.ReadOnly != ro || got.Unmap != (name != "top") || g.Lookup(name).ReadOnly() != ro {
			t.Errorf("%s: cache %v, read-only %t, unmap %t", name, got.Cache, got.ReadOnly, got.Unmap)
		}
	}
	if c.Children["file"].Unmap {
		t.Errorf("the configuration given was changed")
	}
}

func TestForceShareReachesTheWholeChain(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	c := node("top", ev, image, node("file", ev), backing, node("base", ev, image, node("basefile", ev)))
	c.ReadOnly, c.ForceShare = true, true
	n := opened(t, g, c)
	attached(t, n, "looker", rd, all)
	for _, name := range []string{"file", "base", "basefile"} {
		for _, e := range g.Lookup(name).Parents() {
			if e.Shared() != all {
				t.Errorf("%s is shared for %s only", name, e.Shared())
			}
		}
	}
}

func TestProbeTakesTheHighestScore(t *testing.T) {
	score := func(n int) func([]byte) int { return func(h []byte) int { return n * len(h) } }
	g := block.NewGraph(nil, &block.Driver{Name: "low", Probe: score(2)}, &block.Driver{Name: "high", Probe: score(3)}, &block.Driver{Name: "none"})
	if got := g.ProbeFormat([]byte{1}); got != "high" {
		t.Errorf("probed %s", got)
	}
	if got := g.ProbeFormat(nil); got != "raw" {
		t.Errorf("probed %s where nobody claims it", got)
	}
	if err := g.Close(ctx); err != nil {
		t.Error(err)
	}
}

func TestErrnoOfErrors(t *testing.T) {
	for _, c := range []struct {
		err  error
		want syscall.Errno
	}{
		{nil, 0},
		{errors.New("x"), syscall.EIO},
		{block.ErrRange, syscall.EINVAL},
		{block.ErrNoSpace, syscall.ENOSPC},
		{block.ErrReadOnly, syscall.EPERM},
		{block.ErrNotSupported, syscall.EOPNOTSUPP},
		{block.ErrCorrupt, syscall.EIO},
		{&block.NodeError{Err: syscall.ENOSPC}, syscall.ENOSPC},
	} {
		if got := block.Errno(c.err); got != c.want {
			t.Errorf("errno of %v is %v, want %v", c.err, got, c.want)
		}
	}
}
