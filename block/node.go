package block

import (
	"slices"
	"sync"
	"sync/atomic"
)

// A Node is an opened driver in a graph.
type Node struct {
	graph  *Graph
	name   string
	driver *Driver

	// Set once, before the node can be found.
	inst       Instance
	zeroer     Zeroer
	discarder  Discarder
	status     StatusReporter
	locator    Locator
	prefetcher Prefetcher
	truncater  Truncater
	permitter  Permitter

	// Read by requests; they change only while the node is drained.
	config atomic.Pointer[Config] // effective
	limits atomic.Pointer[Limits]
	cow    atomic.Pointer[Edge] // the child that is read where this node holds nothing; nil: none

	// Guarded by Graph.mu.
	refs         int
	parents      []*Edge
	children     []*Edge
	quiesce      int  // drained sections of the node's own, and children that are drained
	perm, shared Perm // what the parents hold and share in sum
	blockers     []blocker

	pauseMu sync.Mutex // held while the driver is told of a drain
	paused  bool       // what it was told last

	stats [NumShards]nodeCell

	rmu    sync.Mutex // guards writes
	writes writeRanges

	gmu sync.Mutex // held while a write makes the node longer, see growTo
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
	for _, e := range n.Children() {
		if e.name == name {
			return e
		}
	}
	return nil
}

// Backing is the edge to the child that is read where this node holds nothing
// (role COW), or nil. It stands for the same child from the begin of a request to its end.
func (n *Node) Backing() *Edge { return n.cow.Load() }

// Filename is the file name of the image: that of the child that stands for it, down
// to the protocol node. It is "" where there is none.
func (n *Node) Filename() string {
	if f, ok := n.inst.(Named); ok {
		return f.Filename()
	}
	for _, e := range n.Children() {
		if e.role&RolePrimary != 0 {
			return e.Node().Filename()
		}
	}
	return ""
}

// Quiesced tells how many drained sections the node is in: its own, and one for each child that is drained.
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
