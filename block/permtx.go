package block

import (
	"errors"
	"slices"
	"sync/atomic"
)

type atomicPerm struct{ v atomic.Uint32 }

func (p *atomicPerm) load() Perm   { return Perm(p.v.Load()) }
func (p *atomicPerm) store(q Perm) { p.v.Store(uint32(q)) }

// A permTx changes the permissions of the edges below some nodes (rule G14): check
// everything, ask the drivers, then commit, or abort to exactly what was before.
type permTx struct {
	edges  []savedEdge // in the order of the changes
	grants []grant     // parents before children
	by     *claim      // who changes them, if that has a claim
	busy   *claim      // somebody else's, which is in the way
	// keep has the drivers of the nodes claimed hold on to what they have, beside what is
	// new, until drop.
	keep, drop bool
}

// errClaimed ends a transaction that waits for a claim and then begins again.
var errClaimed = errors.New("somebody else changes the node")

type savedEdge struct {
	edge         *Edge
	perm, shared Perm
}

// A grant is what the parents of a node are to hold and share in sum.
type grant struct {
	node         *Node
	permitter    Permitter // nil: nobody is asked
	perm, shared Perm
	kept         kept // beside that, by the permitter
	loosens      bool // asks for nothing that was not granted before
	agreed       bool // the permitter has
}

// kept is what a driver holds on to beyond what its parents hold and share.
type kept struct{ perm, unshared Perm }

func (k kept) or(perm, shared Perm) kept { return kept{k.perm | perm, k.unshared | PermAll&^shared} }

// ask is what the permitter is asked for.
func (g *grant) ask() (perm, shared Perm) { return g.perm | g.kept.perm, g.shared &^ g.kept.unshared }

func (tx *permTx) set(e *Edge, perm, shared Perm) {
	tx.edges = append(tx.edges, savedEdge{e, e.perm.load(), e.shared})
	e.perm.store(perm)
	e.shared = shared
}

// ask asks the drivers, parents first. If one refuses, those that had agreed are told
// so, in reverse. Graph.mu is not held.
func (tx *permTx) ask() error {
	for i := range tx.grants {
		g := &tx.grants[i]
		if g.permitter == nil {
			continue
		}
		err := g.permitter.CheckPerm(g.ask())
		switch {
		case err == nil:
			g.agreed = true
		case g.loosens:
			// Never refused: the driver keeps what it has.
		default:
			for _, g := range slices.Backward(tx.grants[:i]) {
				if g.agreed {
					g.permitter.AbortPerm()
				}
			}
			return err
		}
	}
	for _, g := range tx.grants {
		if g.agreed {
			g.permitter.SetPerm(g.ask())
		}
	}
	return nil
}

// abort puts the permissions back. Graph.mu is held.
func (tx *permTx) abort() {
	for _, s := range slices.Backward(tx.edges) {
		s.edge.perm.store(s.perm)
		s.edge.shared = s.shared
	}
}

// commit notes what the drivers have agreed to. Graph.mu is held.
func (tx *permTx) commit() {
	for _, g := range tx.grants {
		g.node.perm, g.node.shared, g.node.kept = g.perm, g.shared, g.kept
		if g.node.isCopiedUp() {
			g.node.writes.tracked.Store(true)
		}
	}
}

// wanted is what an edge needs and shares, given what its parent's parents hold now.
func (e *Edge) wanted() (perm, shared Perm) {
	switch {
	case e.root != nil && e.Node().Active():
		if e.root.denied != nil {
			return e.root.perm &^ (PermWrite | PermWriteUnchanged | PermResize), e.root.shared
		}
		return e.root.perm, e.root.shared
	case e.root != nil || !e.parent.Active():
		return 0, PermAll
	}
	perm, shared = e.parent.cumulative()
	if needs := e.parent.driver.Needs; needs != nil {
		own, unshared := needs(e.parent.cfg())
		perm |= own
		shared &^= unshared
	}
	return childPerm(e.role, !e.parent.cfg().ReadOnly, e.parent.cfg().NoIO, e.Node().cfg().ForceShare, perm, shared)
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

// check verifies n's parents against each other and the node, and moves on to the
// edges to its children. Graph.mu is held.
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
	g := grant{node: n, perm: perm, shared: shared, kept: n.kept, loosens: perm&^n.perm == 0 && n.shared&^shared == 0}
	if n.claim != nil && n.claim != tx.by && !g.loosens {
		// What is granted now might not go with what the node is to become.
		tx.busy = n.claim
		return errClaimed
	}
	if n.cfg().ReadOnly && perm&(PermWrite|PermWriteUnchanged) != 0 {
		if tx.keep {
			return refuse(ErrReadOnly, "Read-only block node '%s' cannot support read-write users", n.name)
		}
		return refuse(ErrReadOnly, "Block node '%s' is read-only", n.name)
	}
	switch {
	case tx.drop:
		g.kept = kept{}
	case tx.keep && n.claim == tx.by:
		g.kept = g.kept.or(n.perm, n.shared)
	}
	if !n.busy {
		g.permitter = n.permitter
	}
	tx.grants = append(tx.grants, g)
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
