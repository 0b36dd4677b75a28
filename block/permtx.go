package block

import (
	"slices"
	"sync/atomic"
)

type atomicPerm struct{ v atomic.Uint32 }

func (p *atomicPerm) load() Perm   { return Perm(p.v.Load()) }
func (p *atomicPerm) store(q Perm) { p.v.Store(uint32(q)) }

// A permTx changes the permissions of the edges below some nodes: check everything,
// then commit, or abort to exactly what was before (rule G14).
type permTx struct {
	edges   []savedEdge
	checked []*Node // whose Permitter was asked
	grants  []grant
}

type savedEdge struct {
	edge         *Edge
	perm, shared Perm
}

type grant struct {
	node         *Node
	perm, shared Perm
	agreed       bool // of the Permitter
}

func (tx *permTx) set(e *Edge, perm, shared Perm) {
	tx.edges = append(tx.edges, savedEdge{e, e.perm.load(), e.shared})
	e.perm.store(perm)
	e.shared = shared
}

func (tx *permTx) abort() {
	for _, n := range slices.Backward(tx.checked) {
		n.permitter.AbortPerm()
	}
	for _, s := range slices.Backward(tx.edges) {
		s.edge.perm.store(s.perm)
		s.edge.shared = s.shared
	}
}

func (tx *permTx) commit() {
	for _, g := range tx.grants {
		g.node.perm, g.node.shared = g.perm, g.shared
		if g.agreed {
			g.node.permitter.SetPerm(g.perm, g.shared)
		}
	}
}

// wanted is what an edge needs and shares, given what its parent's parents hold now.
func (e *Edge) wanted() (perm, shared Perm) {
	if e.root != nil {
		return e.root.perm, e.root.shared
	}
	perm, shared = e.parent.cumulative()
	return childPerm(e.role, !e.parent.cfg().ReadOnly, e.Node().cfg().NoIO, e.Node().cfg().ForceShare, perm, shared)
}

// cumulative sums up what the parents hold and share.
func (n *Node) cumulative() (perm, shared Perm) {
	shared = PermAll
	for _, e := range n.parents {
		perm |= e.perm.load()
		shared &= e.shared
	}
	return perm, shared
}

// check verifies n's parents against each other and the node, asks the driver, and moves on the edges to n's children.
func (tx *permTx) check(n *Node) error {
	for _, a := range n.parents {
		for _, b := range n.parents {
			if a == b {
				continue
			}
			if clash := b.perm.load() &^ a.shared; clash != 0 {
				return refuse(ErrBusy, "Permission conflict on node '%s': permissions '%s' are both required by %s (uses node '%s' as '%s' child) and unshared by %s (uses node '%s' as '%s' child).",
					n.name, clash, b.user(), n.name, b.name, a.user(), n.name, a.name)
			}
		}
	}
	perm, shared := n.cumulative()
	if n.cfg().ReadOnly && perm&(PermWrite|PermWriteUnchanged) != 0 {
		return refuse(ErrReadOnly, "Block node '%s' is read-only", n.name)
	}
	agreed := n.permitter != nil
	if agreed {
		switch err := n.permitter.CheckPerm(perm, shared); {
		case err == nil:
			tx.checked = append(tx.checked, n)
		case perm&^n.perm == 0 && n.shared&^shared == 0:
			agreed = false // loosening is never refused: the driver keeps what it has
		default:
			return err
		}
	}
	tx.grants = append(tx.grants, grant{n, perm, shared, agreed})
	for _, e := range n.children {
		perm, shared := e.wanted()
		tx.set(e, perm, shared)
	}
	return nil
}

// topological lists the nodes in start and those below them, parents before
// children. Graph.mu is held.
func topological(start ...*Node) []*Node {
	order := postOrder(start, func(n *Node, visit func(*Node)) {
		for _, e := range n.children {
			visit(e.Node())
		}
	})
	slices.Reverse(order)
	return order
}

// ancestors lists the nodes in start and those above them, upper ones first.
// Graph.mu is held.
func ancestors(start ...*Node) []*Node {
	return postOrder(start, func(n *Node, visit func(*Node)) {
		for _, e := range n.parents {
			if e.parent != nil {
				visit(e.parent)
			}
		}
	})
}

// postOrder lists the nodes in start and what each leads to from there, each node
// once and after all that it leads to.
func postOrder(start []*Node, each func(n *Node, visit func(*Node))) []*Node {
	var order []*Node
	seen := make(map[*Node]bool)
	var visit func(*Node)
	visit = func(n *Node) {
		if seen[n] {
			return
		}
		seen[n] = true
		each(n, visit)
		order = append(order, n)
	}
	for _, n := range start {
		visit(n)
	}
	return order
}
