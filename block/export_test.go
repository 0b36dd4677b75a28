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

// Claimed tells whether the node is being changed as a whole.
func (n *Node) Claimed() bool {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.claim != nil
}

// User names the parent.
func (e *Edge) User() string { return e.user() }

// Refs is the number of references.
func (n *Node) Refs() int {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.refs
}

// Held tells what the node's driver holds on to beyond what the parents need; "" for nothing.
func (n *Node) Held() string {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	if n.kept == (kept{}) {
		return ""
	}
	return n.kept.perm.String() + "/" + n.kept.unshared.String()
}
