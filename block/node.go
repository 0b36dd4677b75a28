package block

import (
	"io"
	"slices"
	"sync"
	"sync/atomic"
)

// A Node is an opened driver in a graph.
type Node struct {
	graph    *Graph
	name     string
	driver   *Driver
	explicit atomic.Pointer[Config] // see ExplicitConfig
	storage  io.Closer              // of a temporary overlay, closed last; nil: none

	// Set once, before the node can be found.
	inst       Instance
	zeroer     Zeroer
	discarder  Discarder
	status     StatusReporter
	locator    Locator
	prefetcher Prefetcher
	truncater  Truncater
	permitter  Permitter
	debugger   Debugger

	// Read by requests; they change only while the node is drained.
	config atomic.Pointer[Config] // effective
	limits atomic.Pointer[Limits]
	cow    atomic.Pointer[Edge] // the child that is read where this node holds nothing; nil: none
	// bitmaps changes under Graph.mu too; nil: there are none.
	bitmaps atomic.Pointer[bitmapSet]
	// inactive is written under Graph.mu too.
	inactive atomic.Bool

	// Guarded by Graph.mu.
	refs         int
	busy         bool   // the driver is opening or closing it
	waiting      bool   // what busy is about waits for a change of the node's edges
	claim        *claim // somebody changes the node as a whole
	parents      []*Edge
	children     []*Edge
	quiesce      int  // drained sections of the node's own, and children that hold up their parents
	still        int  // drained sections of the parents only
	perm, shared Perm // what the parents hold and share in sum
	kept         kept
	blockers     []blocker
	tx           *tx  // that alone may change edges and permissions now; nil: none
	heir         heir // of the parent that opened the node as its child

	pauseMu sync.Mutex // held while the driver is told of a drain
	paused  bool       // what it was told last

	stats [NumShards]nodeCell

	writes  writeRanges
	flushes flushes

	gmu sync.Mutex // held while a write makes the node longer, see growTo
}

// A heir inherits options from a parent (rule G9), for whom it has a role.
type heir struct {
	parent *Node // nil: from none
	role   Role
}

func (n *Node) setInstance(inst Instance) {
	n.inst = inst
	n.refreshLimits()
	n.zeroer, _ = inst.(Zeroer)
	n.discarder, _ = inst.(Discarder)
	n.status, _ = inst.(StatusReporter)
	n.locator, _ = inst.(Locator)
	n.prefetcher, _ = inst.(Prefetcher)
	n.truncater, _ = inst.(Truncater)
	n.permitter, _ = inst.(Permitter)
	n.debugger, _ = inst.(Debugger)
}

// refreshLimits asks the driver for its limits.
func (n *Node) refreshLimits() {
	l := n.inst.Limits()
	if l.RequestAlignment == 0 {
		l.RequestAlignment = 1
	}
	n.limits.Store(&l)
}

func (n *Node) cfg() *Config { return n.config.Load() }
func (n *Node) lim() *Limits { return n.limits.Load() }

// Name is the node name, unique in the graph.
func (n *Node) Name() string { return n.name }

// Driver is the driver that opened the node.
func (n *Node) Driver() *Driver { return n.driver }

// Instance is the opened driver; use it for its optional interfaces, never for requests.
func (n *Node) Instance() Instance { return n.inst }

// Config is the effective configuration. It must not be changed. A reopen replaces it.
func (n *Node) Config() *Config { return n.cfg() }

// ExplicitConfig is the configuration without what the node inherits or fell back to,
// but with what was found out: its driver and that one's options. It must not be changed. A reopen replaces it.
func (n *Node) ExplicitConfig() *Config { return n.explicit.Load() }

// Graph is the graph that the node belongs to.
func (n *Node) Graph() *Graph { return n.graph }

// ReadOnly tells whether the node refuses writes.
func (n *Node) ReadOnly() bool { return n.cfg().ReadOnly }

// Size is the length in bytes, exact.
func (n *Node) Size() int64 { return n.inst.Size() }

// Limits are the node's abilities and constraints.
func (n *Node) Limits() Limits { return *n.lim() }

// Children lists the edges to the children in the order in which they were opened.
func (n *Node) Children() []*Edge {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return append([]*Edge(nil), n.children...)
}

// Child returns the edge called name, or nil.
func (n *Node) Child(name string) *Edge {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.child(name)
}

// child is Child. Graph.mu is held.
func (n *Node) child(name string) *Edge {
	for _, e := range n.children {
		if e.name == name {
			return e
		}
	}
	return nil
}

// Backing is the edge to the child that is read where this node holds nothing
// (role COW), or nil. It stands for the same child from the begin of a request to its end.
func (n *Node) Backing() *Edge { return n.cow.Load() }

// held tells whether the parents are drained. Graph.mu is held.
func (n *Node) held() bool { return n.quiesce > 0 || n.still > 0 }

// Quiesced tells how many drained sections the node is in: its own, and one for each
// child whose parents are drained.
func (n *Node) Quiesced() int {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.quiesce
}

// reaches tells whether other is below n. Graph.mu is held.
func (n *Node) reaches(other *Node) bool { return slices.Contains(topological(n)[1:], other) }

// eachRoot calls f for the roots above n, once for each way up. Graph.mu is held.
func (n *Node) eachRoot(f func(*Root)) {
	for _, e := range n.parents {
		if e.root != nil {
			f(e.root)
		} else {
			e.parent.eachRoot(f)
		}
	}
}

// An Edge joins a parent, a node or a [Root], to a child. Its request methods may
// be called in parallel.
type Edge struct {
	parent *Node                // nil for a root
	root   *Root                // nil for a child of a node
	child  atomic.Pointer[Node] // changes only while drained
	name   string
	role   Role

	perm   atomicPerm // read by requests, written under Graph.mu
	shared Perm       // guarded by Graph.mu
	frozen int        // guarded by Graph.mu; more than 0: the child must stay
}

func newEdge(parent *Node, child *Node, name string, role Role) *Edge {
	e := &Edge{parent: parent, name: name, role: role}
	e.child.Store(child)
	return e
}

// Node is the child.
func (e *Edge) Node() *Node { return e.child.Load() }

// Name is the child's name for its parent: "file", "backing", "root".
func (e *Edge) Name() string { return e.name }

// Role says what the child is to its parent.
func (e *Edge) Role() Role { return e.role }

// Perm is what the parent holds on the child.
func (e *Edge) Perm() Perm { return e.perm.load() }

// Shared is what the parent lets the other parents hold.
func (e *Edge) Shared() Perm {
	g := e.Node().graph
	g.mu.Lock()
	defer g.mu.Unlock()
	return e.shared
}

// Size is the length of the child in bytes, exact.
func (e *Edge) Size() int64 { return e.Node().inst.Size() }

// Limits are the child's abilities and constraints.
func (e *Edge) Limits() Limits { return *e.Node().lim() }

// user names the parent in error texts (rule G12).
func (e *Edge) user() string {
	if e.root != nil {
		return e.root.user
	}
	return "node '" + e.parent.name + "'"
}
