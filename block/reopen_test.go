package block_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	pass "github.com/nbdserve/nbdserve/block/filter"
)

// reOptions are those of the driver "re": a node over child "file", with or without a
// backing node, that tells how it is reopened.
type reOptions struct {
	Level  int64  `option:"level"` // may change
	Fixed  string `option:"fixed"`
	events *events
	call   func(step string) error // may fail a step
}

type reNode struct {
	pass.Pass
	name     string
	o        *reOptions
	level    int64
	readOnly bool
}

func reDriver() *block.Driver {
	return &block.Driver{
		Name:       "re",
		Kind:       block.Format,
		Backing:    true,
		Mutable:    []string{"level"},
		NewOptions: func() any { return &reOptions{Level: 1, Fixed: "std"} },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			opts := o.Config.Options.(*reOptions)
			n := &reNode{name: o.NodeName, o: opts, level: opts.Level, readOnly: o.Config.ReadOnly}
			var err error
			n.Child, err = o.OpenChild(ctx, "file", block.RoleImage, nil)
			if err == nil && o.Config.Children["backing"] != nil {
				_, err = o.OpenBacking(ctx, o.Config.Children["backing"])
			}
			return n, err
		},
	}
}

func (n *reNode) step(what string) error {
	if n.o.events != nil {
		n.o.events.add("%s %s", what, n.name)
	}
	if n.o.call != nil {
		return n.o.call(what + " " + n.name)
	}
	return nil
}

func (n *reNode) Flush(ctx context.Context) error {
	return errors.Join(n.step("flush"), n.Pass.Flush(ctx))
}

func (n *reNode) PrepareReopen(_ context.Context, r *block.Reopening) (block.Switch, error) {
	return &reSwitch{n: n, old: *n, opts: r.Config.Options.(*reOptions), readOnly: r.Config.ReadOnly}, n.step("prepare")
}

type reSwitch struct {
	n        *reNode
	old      reNode
	opts     *reOptions
	readOnly bool
}

func (s *reSwitch) Apply(context.Context) error {
	s.n.level, s.n.readOnly = s.opts.Level, s.readOnly
	return s.n.step("apply")
}
func (s *reSwitch) Commit() { _ = s.n.step("commit") }
func (s *reSwitch) Abort() {
	s.n.level, s.n.readOnly = s.old.level, s.old.readOnly
	_ = s.n.step("abort")
}

func reGraph(t blocktest.TB) *block.Graph {
	return blocktest.NewGraph(t, reDriver(), lifeDriver(), testDriver())
}

// re describes a node over a disk that it opens itself.
func re(name string, o *reOptions) *block.Config {
	if o.Level == 0 {
		o.Level = 1
	}
	if o.Fixed == "" {
		o.Fixed = "std"
	}
	return &block.Config{Driver: "re", NodeName: name, Options: o, Children: map[string]*block.Config{"file": disk(name+"-file", 1<<20)}}
}

// like is the description of a node as it is, to be changed.
func like(n *block.Node) *block.Config {
	c := *n.ExplicitConfig()
	c.Children = map[string]*block.Config{}
	if e := n.Backing(); e != nil {
		c.Children["backing"] = ref(e.Node().Name())
	}
	return &c
}

// dumpAll is dump with all that a reopen may change; the users of a node are in order.
func dumpAll(g *block.Graph) string {
	var b strings.Builder
	for _, n := range g.Nodes() {
		fmt.Fprintf(&b, "%s config %p %+v explicit %p limits %+v size %d claimed %t held %s\n", n.Name(), n.Config(), n.Config(), n.ExplicitConfig(), n.Limits(), n.Size(), n.Claimed(), n.Held())
		if r, ok := n.Instance().(*reNode); ok {
			fmt.Fprintf(&b, "  level %d read-only %t\n", r.level, r.readOnly)
		}
	}
	const user = "  used by "
	lines := strings.SplitAfter(dump(g), "\n")
	for i := 0; i < len(lines); i++ {
		j := i
		for ; j < len(lines) && strings.HasPrefix(lines[j], user); j++ {
		}
		slices.Sort(lines[i:j])
		i = max(i, j-1)
	}
	return b.String() + strings.Join(lines, "")
}

func TestG21Order(t *testing.T) {
	g := reGraph(t)
	ev := new(events)
	base := opened(t, g, re("base", &reOptions{events: ev}))
	c := re("top", &reOptions{events: ev})
	c.Children["backing"] = ref("base")
	top := opened(t, g, c)
	a, b := like(top), like(base)
	a.Options = &reOptions{Level: 2, Fixed: "std", events: ev}
	b.Options = &reOptions{Level: 3, Fixed: "std", events: ev}
	if err := g.Reopen(ctx, block.ReopenRequest{Node: base, Config: b}, block.ReopenRequest{Node: top, Config: a}); err != nil {
		t.Fatal(err)
	}
	wantEvents(t, ev, "flush top", "flush base", "prepare base", "prepare top", "apply base", "apply top", "commit top", "commit base")
	if x, y := top.Instance().(*reNode).level, base.Instance().(*reNode).level; x != 2 || y != 3 {
		t.Errorf("levels %d and %d", x, y)
	}
}

func TestG21Refusals(t *testing.T) {
	g := reGraph(t)
	base := opened(t, g, re("base", &reOptions{}))
	c := re("n", &reOptions{Fixed: "mine"})
	c.Children["backing"] = ref("base")
	n := opened(t, g, c)
	outside := opened(t, g, node("outside", new(events)))
	attached(t, n, "export 'x'", rd|wr, all)
	_ = outside
	for _, x := range []struct {
		name   string
		node   *block.Node
		change func(c *block.Config)
		is     error
		text   string
	}{
		{"driver", n, func(c *block.Config) { c.Driver = "memory" }, block.ErrInvalid, "Cannot change the option 'driver'"},
		{"name", n, func(c *block.Config) { c.NodeName = "m" }, block.ErrInvalid, "Cannot change the option 'node-name'"},
		{"force-share", base, func(c *block.Config) { c.ForceShare, c.ReadOnly = true, true }, block.ErrInvalid, "Cannot change the option 'force-share'"},
		{"fixed", n, func(c *block.Config) { c.Options = &reOptions{Level: 1, Fixed: "other"} }, block.ErrInvalid, "Cannot change the option 'fixed'"},
		{"reset", n, func(c *block.Config) { c.Options = nil }, block.ErrInvalid, "Option 'fixed' cannot be reset to its default value"},
		{"backing", n, func(c *block.Config) { c.Children = nil }, block.ErrInvalid, "backing is missing for 'n'"},
		{"driver without reopen", outside, func(c *block.Config) {}, block.ErrNotSupported, "Block format 'test' used by node 'outside' does not support reopening files"},
		{"read-only", n, func(c *block.Config) { c.ReadOnly = true }, block.ErrReadOnly, "Read-only block node 'n' cannot support read-write users"},
		{"cycle", base, func(c *block.Config) { c.Children = map[string]*block.Config{"backing": ref("n")} }, nil, "Making 'n' a backing child of 'base' would create a cycle"},
		{"unknown node", n, func(c *block.Config) { c.Children["backing"] = ref("nobody") }, block.ErrInvalid, "Cannot find device='nobody' nor node-name='nobody'"},
		{"no file", n, func(c *block.Config) { c.Children["other"] = ref("base") }, block.ErrInvalid, "Cannot change the option 'other'"},
		{"new child", n, func(c *block.Config) { c.Children["backing"] = re("new", &reOptions{}) }, block.ErrInvalid, "Cannot change the option 'backing'"},
		{"detect-zeroes", n, func(c *block.Config) { c.DetectZeroes = block.DetectZeroesUnmap }, nil, "detect-zeroes"},
	} {
		before := dumpAll(g)
		cfg := like(x.node)
		x.change(cfg)
		err := g.Reopen(ctx, block.ReopenRequest{Node: x.node, Config: cfg})
		if err == nil {
			t.Errorf("%s: no error", x.name)
			continue
		}
		wantError(t, err, x.is, x.text)
		if after := dumpAll(g); after != before {
			t.Errorf("%s: after:\n%s\nbefore:\n%s", x.name, after, before)
		}
	}
	q := block.ReopenRequest{Node: n, Config: like(n)}
	wantError(t, g.Reopen(ctx, q, q), block.ErrInvalid, "Node 'n' is named twice")
}

func TestG21DefaultsAndInheritance(t *testing.T) {
	g := reGraph(t)
	c := re("n", &reOptions{Level: 7})
	c.ReadOnly, c.DetectZeroes, c.Cache.Direct = true, block.DetectZeroesOn, true
	n := opened(t, g, c)
	file := n.Child("file").Node()
	r := attach(t, n, "export", rd, all)
	if !file.ReadOnly() || !file.Config().Cache.Direct {
		t.Errorf("the file is %+v", file.Config())
	}
	if err := g.Reopen(ctx, block.ReopenRequest{Node: n, Config: &block.Config{}}); err != nil {
		t.Fatal(err)
	}
	got := n.Config()
	if got.ReadOnly || got.DetectZeroes != 0 || got.Cache.Direct || got.Options.(*reOptions).Level != 1 || n.Instance().(*reNode).level != 1 {
		t.Errorf("the node is %+v", got)
	}
	if file.ReadOnly() || file.Config().Cache.Direct {
		t.Errorf("the file is %+v", file.Config())
	}
	detach(t, r)
	r = attach(t, n, "writer", rd|wr, all)
	if err := r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, []byte{1}, 0, 0) }); err != nil {
		t.Error(err)
	}
	detach(t, r)
	// The child by itself, through its parent's description; the parent stays read-write.
	d := &block.Config{Children: map[string]*block.Config{"file": {ReadOnly: true, Given: block.GivenReadOnly, Options: file.Config().Options}}}
	if err := g.Reopen(ctx, block.ReopenRequest{Node: n, Config: d}); err == nil || !strings.Contains(err.Error(), "Read-only block node 'n-file' cannot support read-write users") {
		t.Errorf("a writable image on a read-only file: %v", err)
	}
	d.ReadOnly = true
	if err := g.Reopen(ctx, block.ReopenRequest{Node: n, Config: d}); err != nil {
		t.Error(err)
	}
	attached(t, n, "reader", rd, all)
	if !n.ReadOnly() || !file.ReadOnly() {
		t.Errorf("not read-only")
	}
}

// writes tells whether a root can write.
func writes(r *block.Root) error {
	return r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, []byte{1}, 0, 0) })
}

func TestG21ForcedReadOnly(t *testing.T) {
	g := reGraph(t)
	n := opened(t, g, re("n", &reOptions{}))
	f := opened(t, g, blocktest.FaultConfig(new(blocktest.Faults), ref("n")))
	direct := attached(t, n, "export 'a'", rd|wr, all)
	filtered := attached(t, f, "export 'b'", rd|wr|rs, all)
	c := like(n)
	c.ReadOnly = true
	for _, round := range []string{"first", "second"} {
		if err := errors.Join(writes(direct), writes(filtered)); err != nil {
			t.Errorf("%s: %v", round, err)
		}
		wantError(t, g.Reopen(ctx, block.ReopenRequest{Node: n, Config: c}), block.ErrReadOnly, "cannot support read-write users")
		if err := g.Reopen(ctx, block.ReopenRequest{Node: n, Config: c, Force: true}); err != nil {
			t.Fatal(err)
		}
		for _, r := range []*block.Root{direct, filtered} {
			wantError(t, writes(r), syscall.EPERM)
			if err := r.Do(ctx, readOf(r)); err != nil {
				t.Errorf("%s: read: %v", round, err)
			}
		}
		_, err := g.AttachRoot(ctx, block.RootConfig{User: "late", Node: n, Perm: wr, Shared: all})
		wantError(t, err, block.ErrReadOnly, "Block node 'n' is read-only")
		if err := g.Reopen(ctx, block.ReopenRequest{Node: n, Config: &block.Config{}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(writes(direct), writes(filtered)); err != nil {
		t.Error(err)
	}
}

func TestG21Links(t *testing.T) {
	g := reGraph(t)
	n := opened(t, g, re("n", &reOptions{}))
	one := opened(t, g, re("one", &reOptions{}))
	two := opened(t, g, re("two", &reOptions{}))
	other := opened(t, g, disk("other", 1<<20))
	r := attached(t, n, "export", rd|wr, all)
	backing := func() string {
		if e := n.Backing(); e != nil {
			return e.Node().Name()
		}
		return ""
	}
	reopen := func(change func(c *block.Config)) {
		t.Helper()
		c := like(n)
		change(c)
		if err := g.Reopen(ctx, block.ReopenRequest{Node: n, Config: c}); err != nil {
			t.Fatal(err)
		}
	}
	for _, to := range []*block.Node{one, two, one} {
		reopen(func(c *block.Config) { c.Children["backing"] = ref(to.Name()) })
		if backing() != to.Name() {
			t.Errorf("backing %q, want %q", backing(), to.Name())
		}
	}
	reopen(func(c *block.Config) { c.Children, c.NoBacking = nil, true })
	if backing() != "" {
		t.Errorf("backing %q, want none", backing())
	}
	file := n.Child("file").Node()
	reopen(func(c *block.Config) { c.Children["file"] = ref("other") })
	if n.Child("file").Node() != other {
		t.Errorf("the file is %s", n.Child("file").Node().Name())
	}
	if g.Lookup(file.Name()) != nil {
		t.Errorf("the old file is still open")
	}
	// A filter comes between a node and its file, and goes again.
	f := opened(t, g, blocktest.FaultConfig(new(blocktest.Faults), ref("other")))
	for _, to := range []*block.Node{f, other} {
		reopen(func(c *block.Config) { c.Children["file"] = ref(to.Name()) })
		if n.Child("file").Node() != to {
			t.Errorf("the file is %s", n.Child("file").Node().Name())
		}
		if err := writes(r); err != nil {
			t.Error(err)
		}
	}
}

func TestG21AutoReadOnly(t *testing.T) {
	g := reGraph(t)
	c := disk("file", 4096)
	c.ReadOnly = true
	file := opened(t, g, c)
	c = re("n", &reOptions{})
	c.ReadOnly, c.AutoReadOnly, c.Children["file"] = true, true, ref("file")
	n := opened(t, g, c)
	d := like(n)
	d.ReadOnly = false
	// What is below is read-only, so the node stays so; if that changes too, it does not.
	if err := g.Reopen(ctx, block.ReopenRequest{Node: n, Config: d}); err != nil || !n.ReadOnly() {
		t.Errorf("read-only %t, %v", n.ReadOnly(), err)
	}
	fc := like(file)
	fc.ReadOnly = false
	if err := g.Reopen(ctx, block.ReopenRequest{Node: n, Config: d}, block.ReopenRequest{Node: file, Config: fc}); err != nil || n.ReadOnly() {
		t.Errorf("read-only %t, %v", n.ReadOnly(), err)
	}
}

func TestG21FailureAtEveryStepLeavesTheGraphAsItWas(t *testing.T) {
	g := reGraph(t)
	var failing string
	call := func(step string) error {
		if step == failing {
			return syscall.EIO
		}
		return nil
	}
	veto := func(block.Perm, block.Perm) error { return nil }
	locked := node("locked", new(events))
	locked.Options.(*nodeOptions).veto = func(perm, shared block.Perm) error { return veto(perm, shared) }
	below := opened(t, g, locked)
	spare := opened(t, g, re("spare", &reOptions{call: call}))
	base := opened(t, g, re("base", &reOptions{call: call}))
	c := re("top", &reOptions{call: call})
	c.Children["backing"] = ref("base")
	top := opened(t, g, c)
	r := attached(t, top, "export", rd|wr, rd)
	reader := attached(t, base, "reader", rd, all)
	requests := func() []block.ReopenRequest {
		a, b := like(top), like(base)
		a.Options, b.Options = &reOptions{Level: 2, Fixed: "std", call: call}, &reOptions{Level: 3, Fixed: "std", call: call}
		a.Cache.NoFlush, a.ReadOnly, b.ReadOnly = true, true, true
		a.Children["backing"], a.Children["file"] = ref("spare"), ref("locked")
		return []block.ReopenRequest{{Node: top, Config: a, Force: true}, {Node: base, Config: b}}
	}
	check := func(before string, is error) {
		t.Helper()
		wantError(t, g.Reopen(ctx, requests()...), is)
		if after := dumpAll(g); after != before {
			t.Errorf("after a failed %s:\n%s\nbefore:\n%s", failing, after, before)
		}
		if err := errors.Join(writes(r), reader.Do(ctx, readOf(reader))); err != nil {
			t.Errorf("after a failed %s: %v", failing, err)
		}
	}
	before := dumpAll(g)
	for _, step := range []string{"flush", "prepare", "apply"} {
		for _, name := range []string{"top", "base"} {
			failing = step + " " + name
			check(before, syscall.EIO)
		}
	}
	failing = "veto"
	veto = func(perm, _ block.Perm) error {
		if perm != 0 {
			return block.ErrBusy
		}
		return nil
	}
	check(before, block.ErrBusy)
	veto = func(block.Perm, block.Perm) error { return nil }
	thaw, err := g.Freeze(top, base)
	if err != nil {
		t.Fatal(err)
	}
	failing = "freeze"
	frozen := dumpAll(g)
	wantError(t, g.Reopen(ctx, requests()...), block.ErrBusy, "Cannot change 'backing' link from 'top' to 'base'")
	if after := dumpAll(g); after != frozen {
		t.Errorf("after:\n%s\nbefore:\n%s", after, frozen)
	}
	thaw()
	failing = ""
	if err := g.Reopen(ctx, requests()...); err != nil {
		t.Fatal(err)
	}
	if top.Backing().Node() != spare || top.Child("file").Node() != below || !base.ReadOnly() {
		t.Errorf("not reopened: %s", dumpAll(g))
	}
	if h := below.Held(); h != "" {
		t.Errorf("still held: %s", h)
	}
}

// While a reopen is under way nobody gets permissions that it might have to take back.
func TestG21OthersWaitForTheEnd(t *testing.T) {
	g := reGraph(t)
	reached, letGo := make(chan struct{}), make(chan error)
	call := func(step string) error {
		if step != "apply n" {
			return nil
		}
		reached <- struct{}{}
		return <-letGo
	}
	c := re("n", &reOptions{call: call})
	c.ReadOnly = true
	n := opened(t, g, c)
	f := opened(t, g, blocktest.FaultConfig(new(blocktest.Faults), ref("n")))
	d := like(n)
	d.ReadOnly = false
	for _, fails := range []error{syscall.EIO, nil} {
		done, attach := make(chan error), make(chan error)
		go func() { done <- g.Reopen(ctx, block.ReopenRequest{Node: n, Config: d}) }()
		<-reached
		short, cancel := context.WithCancel(ctx)
		cancel()
		_, err := g.AttachRoot(short, block.RootConfig{User: "hurried", Node: f, Perm: rd | wr, Shared: all})
		wantError(t, err, context.Canceled, "'n'")
		var late *block.Root
		go func() {
			var err error
			late, err = g.AttachRoot(ctx, block.RootConfig{User: "late", Node: f, Perm: rd | wr, Shared: all})
			attach <- err
		}()
		letGo <- fails
		if err := <-done; !errors.Is(err, fails) {
			t.Errorf("reopen: %v, want %v", err, fails)
		}
		err = <-attach
		if fails != nil {
			wantError(t, err, block.ErrReadOnly)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		detach(t, late)
	}
}
