package block

import (
	"fmt"
	"slices"
)

// For the tests of the rules, which are in package block_test.

var ChildPerm = childPerm

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

// Verify lists what is wrong with the graph while no change and no drain begins or ends.
func (g *Graph) Verify() []string {
	g.telling.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	var wrong []string
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	for name, n := range g.nodes {
		if n.tx != nil || n.busy || n.refs < len(n.parents) || n.refs == 0 && !n.held() {
			bad("node '%s' is occupied (%t) or busy (%t), or has %d references and %d parents", name, n.tx != nil, n.busy, n.refs, len(n.parents))
		}
		held := 0
		var cow *Edge
		for _, e := range n.children {
			child := e.Node()
			if e.parent != n || !slices.Contains(child.parents, e) || g.nodes[child.name] != child {
				bad("child '%s' of '%s' does not know its parent", e.name, name)
			}
			if child.held() {
				held++
			}
			if e.role&RoleCOW != 0 {
				cow = e
			}
			if perm, shared := e.wanted(); perm != e.perm.load() || shared != e.shared {
				bad("child '%s' of '%s' holds %s / %s, want %s / %s", e.name, name, e.perm.load(), e.shared, perm, shared)
			}
		}
		if n.cow.Load() != cow {
			bad("the backing edge of '%s' is another one", name)
		}
		if n.quiesce < held+g.quiesce || n.paused != (n.quiesce > 0) && n.isQuiescer() {
			bad("'%s' is in %d sections, has %d children in sections, and is paused: %t", name, n.quiesce, held, n.paused)
		}
		for _, e := range n.parents {
			if e.Node() != n {
				bad("parent %s of '%s' uses another node", e.user(), name)
			}
			if e.root == nil {
				if !slices.Contains(e.parent.children, e) {
					bad("parent %s of '%s' does not know it", e.user(), name)
				}
				continue
			}
			if want := n.held(); (e.root.quiesce == 1) != want || e.root.Drained() != want || e.root.quiesce > 1 {
				bad("%s is in %d sections and drained: %t; its node '%s': %t", e.user(), e.root.quiesce, e.root.Drained(), name, want)
			}
		}
		for _, a := range n.parents {
			for _, b := range n.parents {
				if a != b && b.perm.load()&^a.shared != 0 {
					bad("on '%s', %s holds %s, and %s shares %s", name, b.user(), b.perm.load(), a.user(), a.shared)
				}
			}
		}
		if perm, shared := n.cumulative(); perm != n.perm || shared != n.shared {
			bad("'%s' was granted %s / %s, its parents hold %s / %s", name, n.perm, n.shared, perm, shared)
		}
	}
	slices.Sort(wrong)
	return wrong
}

func (n *Node) isQuiescer() bool { _, ok := n.inst.(Quiescer); return ok }

// Frozen tells how often the link is frozen.
func (e *Edge) Frozen() int {
	g := e.Node().graph
	g.mu.Lock()
	defer g.mu.Unlock()
	return e.frozen
}

// Granted is what the parents of the node hold and share in sum, as the driver was told.
func (n *Node) Granted() (perm, shared Perm) {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.perm, n.shared
}

// Occupied tells whether a transaction is at work on the node.
func (n *Node) Occupied() bool {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.tx != nil
}
