package block_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

const (
	rd  = block.PermConsistentRead
	wr  = block.PermWrite
	wu  = block.PermWriteUnchanged
	rs  = block.PermResize
	all = block.PermAll
)

var ctx = context.Background()

// events is what happened to test nodes, in order.
type events struct {
	mu   sync.Mutex
	list []string
}

func (e *events) add(format string, args ...any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, fmt.Sprintf(format, args...))
}

func (e *events) take() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	l := e.list
	e.list = nil
	return l
}

func (e *events) has(event string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Contains(e.list, event)
}

type kid struct {
	name string
	role block.Role
}

// nodeOptions configure a node of the driver "test": it tells what happens to it,
// and passes requests on to its first child; without children it is empty.
type nodeOptions struct {
	events *events
	kids   []kid
	fail   error                               // of Open, after the children were opened
	veto   func(perm, shared block.Perm) error // of CheckPerm
	call   func(step string) error             // of a life node: asked at each step of its life
}

type testNode struct {
	name string
	o    *nodeOptions
	file *block.Edge
}

func testDriver() *block.Driver { return testDriverOf("test", block.Format) }

// testFilterDriver is testDriver as a filter, "testfilter".
func testFilterDriver() *block.Driver { return testDriverOf("testfilter", block.Filter) }

func testDriverOf(name string, kind block.DriverKind) *block.Driver {
	return &block.Driver{
		Name:       name,
		Kind:       kind,
		NewOptions: func() any { return &nodeOptions{events: new(events)} },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			n := &testNode{name: o.NodeName, o: o.Config.Options.(*nodeOptions)}
			for _, k := range n.o.kids {
				e, err := o.OpenChild(ctx, k.name, k.role, nil)
				if err != nil {
					return nil, err
				}
				if n.file == nil {
					n.file = e
				}
			}
			if n.o.fail != nil {
				return nil, n.o.fail
			}
			n.o.events.add("open %s", n.name)
			return n, nil
		},
	}
}

func (n *testNode) ReadAt(ctx context.Context, p []byte, off int64) error {
	return n.file.ReadAt(ctx, p, off)
}

func (n *testNode) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	return n.file.WriteAt(ctx, p, off, flags)
}

func (n *testNode) Flush(context.Context) error { n.o.events.add("flush %s", n.name); return nil }
func (n *testNode) Close(context.Context) error { n.o.events.add("close %s", n.name); return nil }
func (n *testNode) DrainBegin()                 { n.o.events.add("drain %s", n.name) }
func (n *testNode) DrainEnd()                   { n.o.events.add("undrain %s", n.name) }

func (n *testNode) Size() int64 {
	if n.file == nil {
		return 0
	}
	return n.file.Size()
}

func (n *testNode) Limits() block.Limits {
	if n.file == nil {
		return block.Limits{RequestAlignment: 1}
	}
	return n.file.Limits()
}

func (n *testNode) CheckPerm(perm, shared block.Perm) error {
	n.o.events.add("check %s %d/%d", n.name, perm, shared)
	if n.o.veto != nil {
		return n.o.veto(perm, shared)
	}
	return nil
}

func (n *testNode) SetPerm(perm, shared block.Perm) {
	n.o.events.add("set %s %d/%d", n.name, perm, shared)
}

func (n *testNode) AbortPerm() { n.o.events.add("abort %s", n.name) }

func newGraph(t blocktest.TB) *block.Graph {
	return blocktest.NewGraph(t, testDriver(), testFilterDriver(), cowDriver())
}

// newLoggedGraph is newGraph, with its log in w.
func newLoggedGraph(t blocktest.TB, w io.Writer) *block.Graph {
	g := block.NewGraph(slog.New(slog.NewTextHandler(w, nil)), testDriver(), cowDriver(), blocktest.Memory(t), blocktest.FaultDriver())
	t.Cleanup(func() {
		if err := g.Close(ctx); err != nil {
			t.Errorf("%v", err)
		}
	})
	return g
}

// filtering describes a test node that is a filter of child.
func filtering(name string, ev *events, child *block.Config) *block.Config {
	c := node(name, ev, filter, child)
	c.Driver = "testfilter"
	return c
}

// node describes a test node over kids; each kid's name is followed by its configuration.
func node(name string, ev *events, kids ...any) *block.Config {
	o := &nodeOptions{events: ev}
	c := &block.Config{Driver: "test", NodeName: name, Options: o, Children: map[string]*block.Config{}, Unmap: true}
	for i := 0; i < len(kids); i += 2 {
		k := kids[i].(kid)
		o.kids = append(o.kids, k)
		c.Children[k.name] = kids[i+1].(*block.Config)
	}
	return c
}

var (
	image   = kid{"file", block.RoleImage}
	filter  = kid{"file", block.RoleFiltered | block.RolePrimary}
	backing = kid{"backing", block.RoleCOW}
)

func ref(name string) *block.Config { return &block.Config{Ref: name} }

// disk describes a memory node of size bytes.
func disk(name string, size int64) *block.Config {
	c := blocktest.MemoryConfig(blocktest.NewStore(size))
	c.NodeName = name
	return c
}

func open(t blocktest.TB, g *block.Graph, c *block.Config) *block.Node {
	t.Helper()
	n, err := g.Open(ctx, c)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return n
}

// opened is open, released at the end of the test.
func opened(t blocktest.TB, g *block.Graph, c *block.Config) *block.Node {
	t.Helper()
	n := open(t, g, c)
	t.Cleanup(func() { release(t, g, n) })
	return n
}

func release(t blocktest.TB, g *block.Graph, n *block.Node) {
	t.Helper()
	if err := g.Release(ctx, n); err != nil {
		t.Errorf("release: %v", err)
	}
}

func attach(t blocktest.TB, n *block.Node, user string, perm, shared block.Perm) *block.Root {
	t.Helper()
	r, err := n.Graph().AttachRoot(ctx, block.RootConfig{User: user, Node: n, Perm: perm, Shared: shared})
	if err != nil {
		t.Fatalf("attach of %s: %v", user, err)
	}
	return r
}

// attached is attach, detached at the end of the test.
func attached(t blocktest.TB, n *block.Node, user string, perm, shared block.Perm) *block.Root {
	t.Helper()
	r := attach(t, n, user, perm, shared)
	t.Cleanup(func() { detach(t, r) })
	return r
}

func detach(t blocktest.TB, r *block.Root) {
	t.Helper()
	if err := r.Detach(ctx); err != nil {
		t.Errorf("detach of %s: %v", r.User(), err)
	}
}

// dump describes all of a graph that a transaction may change.
func dump(g *block.Graph) string {
	var b strings.Builder
	for _, n := range g.Nodes() {
		perm, shared := n.Granted()
		fmt.Fprintf(&b, "%s refs %d quiesced %d active %t size %d limits %v granted %s / %s\n",
			n.Name(), n.Refs(), n.Quiesced(), n.Active(), n.Size(), n.Limits(), perm, shared)
		if c, ok := n.Instance().(block.BackingChanger); ok {
			name, format := c.BackingFile()
			fmt.Fprintf(&b, "  header %s %s\n", name, format)
		}
		for _, e := range n.Parents() {
			fmt.Fprintf(&b, "  used by %s as %s (%s): %s / %s\n", e.User(), e.Name(), e.Role(), e.Perm(), e.Shared())
		}
		for _, e := range n.Children() {
			fmt.Fprintf(&b, "  uses %s as %s (%s): %s / %s, frozen %d\n", e.Node().Name(), e.Name(), e.Role(), e.Perm(), e.Shared(), e.Frozen())
		}
		if e := n.Backing(); e != nil {
			fmt.Fprintf(&b, "  reads %s\n", e.Node().Name())
		}
	}
	return b.String()
}

// verify checks that the graph is in order. No change and no drain may begin or end meanwhile.
func verify(t blocktest.TB, g *block.Graph) {
	t.Helper()
	if wrong := g.Verify(); len(wrong) > 0 {
		t.Fatalf("the graph is out of order:\n%s\n%s", strings.Join(wrong, "\n"), dump(g))
	}
}

// unchanged checks that the graph is what it was.
func unchanged(t blocktest.TB, g *block.Graph, before string) {
	t.Helper()
	if after := dump(g); after != before {
		t.Errorf("the graph has changed:\n%s\nbefore:\n%s", after, before)
	}
	verify(t, g)
}

func wantEvents(t *testing.T, ev *events, want ...string) {
	t.Helper()
	if got := ev.take(); !slices.Equal(got, want) {
		t.Errorf("events:\n got %q\nwant %q", got, want)
	}
}

func wantError(t blocktest.TB, err error, is error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", parts)
	}
	if is != nil && !errors.Is(err, is) {
		t.Errorf("error %q does not wrap %q", err, is)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}
