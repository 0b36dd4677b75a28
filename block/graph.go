package block

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"sort"
	"strings"
	"sync"
)

// A Graph holds nodes, the edges between them and the roots above them. All its
// methods may be called in parallel.
type Graph struct {
	log     *slog.Logger
	drivers map[string]*Driver
	allow   map[string]bool // drivers that may be used, and whether for writing; nil: all
	overlay func(ctx context.Context, g *Graph, size int64) (Overlay, error)

	mu      sync.Mutex // guards all below, and the fields of nodes and edges that say so
	nodes   map[string]*Node
	ids     map[string]*Root // by RootConfig.ID: one space of names with nodes
	auto    int              // number of the next made-up node name
	quiesce int              // drained sections of all nodes, those to come included
	ready   chan struct{}    // closed and replaced when a node has been opened or closed

	telling sync.WaitGroup // drivers that are told of a drain that was given up
}

// NewGraph returns an empty graph that can open nodes of the given drivers.
func NewGraph(log *slog.Logger, drivers ...*Driver) *Graph {
	g := &Graph{log: log, drivers: make(map[string]*Driver), nodes: make(map[string]*Node), ids: make(map[string]*Root), ready: make(chan struct{})}
	for _, d := range drivers {
		g.drivers[d.Name] = d
	}
	return g
}

// Log is the logger for what drivers have to tell the operator.
func (g *Graph) Log() *slog.Logger { return g.log }

// Close ends the graph. A node that is still there is a bug of its user: the error names it.
func (g *Graph) Close(context.Context) error {
	g.telling.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.nodes) == 0 {
		return nil
	}
	var left []string
	for name, n := range g.nodes {
		left = append(left, fmt.Sprintf("'%s' (%d references)", name, n.refs))
	}
	sort.Strings(left)
	return fmt.Errorf("nodes left at the end: %s", strings.Join(left, ", "))
}

// Lookup returns the node called name, or nil. The caller gets no reference.
func (g *Graph) Lookup(name string) *Node {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.find(name)
}

// find is Lookup. A node that is being opened or closed is not found. Graph.mu is held.
func (g *Graph) find(name string) *Node {
	if n := g.nodes[name]; n != nil && n.inst != nil && n.refs > 0 {
		return n
	}
	return nil
}

// FindNode returns the node called name. The caller gets no reference.
func (g *Graph) FindNode(name string) (*Node, error) {
	n := g.Lookup(name)
	if n == nil {
		return nil, refuse(ErrInvalid, "Failed to find node with node-name='%s'", name)
	}
	return n, nil
}

// lookup finds the node below the root of that id, or else the node of that name
// (rule G2). Graph.mu is held.
func (g *Graph) lookup(name string) (*Node, error) {
	if r := g.ids[name]; r != nil {
		return r.Node(), nil
	}
	if n := g.find(name); n != nil {
		return n, nil
	}
	return nil, refuse(ErrInvalid, "Cannot find device='%s' nor node-name='%s'", name, name)
}

// Nodes lists the open nodes by name.
func (g *Graph) Nodes() []*Node {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.openNodes()
}

// openNodes is Nodes. Graph.mu is held.
func (g *Graph) openNodes() []*Node {
	var ns []*Node
	for _, n := range g.nodes {
		if n.inst != nil && n.refs > 0 {
			ns = append(ns, n)
		}
	}
	sort.Slice(ns, func(i, j int) bool { return ns[i].name < ns[j].name })
	return ns
}

const maxNodeName = 31 // bytes, rule G2

var nodeName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9._-]*$`)

// reserve enters n under name, or under a made-up one. Graph.mu is held.
func (g *Graph) reserve(n *Node, name string) error {
	switch {
	case name == "":
		// '#' cannot occur in a name that a user gives.
		name = fmt.Sprintf("#block%d", g.auto)
		g.auto++
	case len(name) > maxNodeName:
		return fmt.Errorf("Node name too long: '%s' has %d bytes, at most %d are allowed", name, len(name), maxNodeName)
	case !nodeName.MatchString(name):
		return fmt.Errorf("Invalid node-name: '%s' (a letter, then letters, digits, '.', '_' and '-')", name)
	case g.ids[name] != nil:
		return fmt.Errorf("node-name=%s is conflicting with a device id", name)
	case g.nodes[name] != nil:
		return fmt.Errorf("Duplicate nodes with node-name='%s'", name)
	}
	n.name = name
	n.quiesce = g.quiesce
	g.nodes[name] = n
	return nil
}

// Open opens the node that cfg describes, with its children. The caller holds a
// reference, to be given back with [Graph.Release]. On error nothing is left open.
func (g *Graph) Open(ctx context.Context, cfg *Config) (*Node, error) {
	if cfg.Snapshot {
		return g.openSnapshot(ctx, cfg)
	}
	return g.open(ctx, cfg, origin{})
}

// detach takes e out of the graph, drops its permissions and gives its reference
// back. The error is that ctx ended in the wait for another change of the permissions,
// and e is still there, or what went wrong with closing the node.
func (g *Graph) detach(ctx context.Context, e *Edge) error {
	return g.change(ctx, func(t *tx) error {
		if !slices.Contains(e.Node().parents, e) {
			return refuse(ErrClosed, "%s was detached before", e.user())
		}
		t.unlink(e)
		if r := e.root; r != nil && r.id != "" {
			t.onCommit(func() { delete(g.ids, r.id) })
		}
		return nil
	})
}

// Release gives a reference back. With the last one the node is flushed and closed,
// its children released and its name freed. The error is what went wrong in that; the
// node is gone nevertheless.
//
// A node that is drained is closed by the end of the section, because closing it
// reaches its children. What goes wrong then is logged.
func (g *Graph) Release(ctx context.Context, n *Node) error {
	g.mu.Lock()
	n.refs--
	closes := n.dead()
	n.busy = n.busy || closes
	g.mu.Unlock()
	if !closes {
		return nil
	}
	return g.close(ctx, n)
}

// dead tells whether n is to be closed now. Graph.mu is held.
func (n *Node) dead() bool { return n.refs == 0 && !n.held() && !n.busy }

// close closes a node that nobody uses, and that is busy from now on.
func (g *Graph) close(ctx context.Context, n *Node) error {
	n.resume()
	var err error
	if n.Active() {
		err = n.flush(ctx)
	}
	err = errors.Join(err, n.inst.Close(ctx))
	if err != nil {
		err = fmt.Errorf("close of node '%s': %w", n.name, err)
	}
	return errors.Join(err, g.dismantle(ctx, n))
}

// dismantle detaches the children of a closed or never opened node and frees its name.
func (g *Graph) dismantle(ctx context.Context, n *Node) error {
	ctx = context.WithoutCancel(ctx)
	var errs []error
	for _, e := range slices.Backward(n.Children()) {
		errs = append(errs, g.detach(ctx, e))
	}
	if n.storage != nil {
		errs = append(errs, n.storage.Close())
	}
	g.mu.Lock()
	delete(g.nodes, n.name)
	g.signalReady()
	g.mu.Unlock()
	return errors.Join(errs...)
}

// signalReady wakes those who wait for nodes to be opened or closed. Graph.mu is held.
func (g *Graph) signalReady() {
	close(g.ready)
	g.ready = make(chan struct{})
}
