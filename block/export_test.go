package block

// For the tests of the rules, which are in package block_test.

var ChildPerm = childPerm

// Shared is what the parent lets others hold.
func (e *Edge) Shared() Perm {
	g := e.Node().graph
	g.mu.Lock()
	defer g.mu.Unlock()
	return e.shared
}

// Parents lists the edges from the parents, roots too.
func (n *Node) Parents() []*Edge {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return append([]*Edge(nil), n.parents...)
}

// User names the parent.
func (e *Edge) User() string { return e.user() }

// Refs is the number of references.
func (n *Node) Refs() int {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.refs
}
