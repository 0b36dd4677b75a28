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

	mu    sync.Mutex // guards all below, and the fields of nodes and edges that say so
	nodes map[string]*Node
	auto  int // number of the next made-up node name

	telling sync.WaitGroup // drivers that are told of a drain that was given up
}

// NewGraph returns an empty graph that can open nodes of the given drivers.
func NewGraph(log *slog.Logger, drivers ...*Driver) *Graph {
	g := &Graph{log: log, drivers: make(map[string]*Driver), nodes: make(map[string]*Node)}
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

// Nodes lists the open nodes by name.
func (g *Graph) Nodes() []*Node {
	g.mu.Lock()
	defer g.mu.Unlock()
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
	case g.nodes[name] != nil:
		return fmt.Errorf("Duplicate nodes with node-name='%s'", name)
	}
	n.name = name
	g.nodes[name] = n
	return nil
}

// Open opens the node that cfg describes, with its children. The caller holds a
// reference, to be given back with [Graph.Release]. On error nothing is left open.
func (g *Graph) Open(ctx context.Context, cfg *Config) (*Node, error) {
	if cfg.Ref != "" {
		g.mu.Lock()
		defer g.mu.Unlock()
		n := g.find(cfg.Ref)
		if n == nil {
			return nil, fmt.Errorf("Failed to find node with node-name='%s'", cfg.Ref)
		}
		n.refs++
		return n, nil
	}
	d := g.drivers[cfg.Driver]
	if d == nil {
		return nil, fmt.Errorf("Unknown driver '%s'", cfg.Driver)
	}
	if cfg.ForceShare && !cfg.ReadOnly {
		return nil, errors.New("force-share=on can only be used with read-only images")
	}
	if cfg.DetectZeroes == DetectZeroesUnmap && !cfg.Unmap {
		return nil, errors.New("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
	}
	eff := *cfg
	if eff.Options == nil && d.NewOptions != nil {
		eff.Options = d.NewOptions()
	}
	n := &Node{graph: g, driver: d, refs: 1, shared: PermAll}
	n.config.Store(&eff)
	g.mu.Lock()
	err := g.reserve(n, cfg.NodeName)
	g.mu.Unlock()
	if err != nil {
		return nil, err
	}
	inst, err := d.Open(ctx, &Opening{Config: &eff, NodeName: n.name, graph: g, node: n})
	if err != nil {
		return nil, errors.Join(err, g.dismantle(ctx, n))
	}
	g.mu.Lock()
	n.setInstance(inst)
	g.mu.Unlock()
	n.tell(true) // a child may be drained
	return n, nil
}

// openChild opens cfg as parent's child.
func (g *Graph) openChild(ctx context.Context, parent *Node, name string, role Role, cfg *Config) (*Edge, error) {
	c := cfg
	if cfg.Ref == "" {
		c = inherit(parent.cfg(), role, cfg)
	}
	child, err := g.Open(ctx, c)
	if err != nil {
		return nil, err
	}
	e := newEdge(parent, child, name, role)
	err = g.change(ctx, func(t *tx) error { return t.link(e) })
	if err = errors.Join(err, g.Release(ctx, child)); err != nil {
		return nil, err
	}
	return e, nil
}

// detach takes e out of the graph, drops its permissions and gives its reference
// back. Only that can fail: e is gone nevertheless.
func (g *Graph) detach(ctx context.Context, e *Edge) error {
	return g.change(ctx, func(t *tx) error {
		t.unlink(e)
		return nil
	})
}

// Release gives a reference back. With the last one the node is flushed and
// closed, its children released and its name freed. The error is what went wrong
// in that; the node is gone nevertheless.
func (g *Graph) Release(ctx context.Context, n *Node) error {
	g.mu.Lock()
	n.refs--
	last := n.refs == 0
	g.mu.Unlock()
	if !last {
		return nil
	}
	var err error
	if !n.cfg().ReadOnly && !n.cfg().NoIO {
		err = n.inst.Flush(ctx)
	}
	err = errors.Join(err, n.inst.Close(ctx))
	if err != nil {
		err = fmt.Errorf("close of node '%s': %w", n.name, err)
	}
	return errors.Join(err, g.dismantle(ctx, n))
}

// dismantle detaches the children of a closed or never opened node and frees its name.
func (g *Graph) dismantle(ctx context.Context, n *Node) error {
	var errs []error
	for _, e := range slices.Backward(n.Children()) {
		errs = append(errs, g.detach(ctx, e))
	}
	g.mu.Lock()
	delete(g.nodes, n.name)
	g.mu.Unlock()
	return errors.Join(errs...)
}
