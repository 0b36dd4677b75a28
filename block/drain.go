package block

import (
	"context"
	"errors"
)

// DrainBegin stops the requests to n (rule G16): the roots above it stop
// admitting, then it waits until nothing is in flight there and the background
// work of n and of the nodes above it has paused. Roots that do not reach n go on.
// Sections nest. If ctx ends first, the drain is undone and the error says who was
// still busy.
func (g *Graph) DrainBegin(ctx context.Context, n *Node) error {
	g.mu.Lock()
	n.quiesceUp()
	var roots []*Root
	n.eachRoot(func(r *Root) { roots = append(roots, r) })
	above := n.ancestors()
	g.mu.Unlock()
	for _, r := range roots {
		if err := r.waitIdle(ctx); err != nil {
			g.unquiesce(n)
			return errors.Join(errors.New("drain of node '"+n.name+"' did not finish"), err)
		}
	}
	for _, a := range above {
		if q, ok := a.inst.(Quiescer); ok {
			q.DrainBegin()
			g.mu.Lock()
			a.paused++
			g.mu.Unlock()
		}
	}
	return nil
}

// DrainEnd ends a section that [Graph.DrainBegin] began. Requests that waited start in their order.
func (g *Graph) DrainEnd(n *Node) {
	g.mu.Lock()
	var paused []Quiescer
	for _, a := range n.ancestors() {
		// A node that came above n meanwhile was not paused.
		if a.paused > 0 {
			a.paused--
			paused = append(paused, a.inst.(Quiescer))
		}
	}
	g.mu.Unlock()
	for _, q := range paused {
		q.DrainEnd()
	}
	g.unquiesce(n)
}

func (g *Graph) unquiesce(n *Node) {
	g.mu.Lock()
	var open []*Root
	n.unquiesceUp(&open)
	g.mu.Unlock()
	for _, r := range open {
		r.resumeLanes()
	}
}

// quiesceUp closes the gates above n. Graph.mu is held.
func (n *Node) quiesceUp() {
	n.quiesce++
	if n.quiesce > 1 {
		return
	}
	for _, e := range n.parents {
		e.quiesceParent()
	}
}

func (e *Edge) quiesceParent() {
	if e.root == nil {
		e.parent.quiesceUp()
		return
	}
	e.root.quiesce++
	if e.root.quiesce == 1 {
		e.root.state.Or(gateClosed)
	}
}

// unquiesceUp reverses quiesceUp and collects the roots whose gate opened. Graph.mu is held.
func (n *Node) unquiesceUp(open *[]*Root) {
	n.quiesce--
	if n.quiesce > 0 {
		return
	}
	for _, e := range n.parents {
		e.unquiesceParent(open)
	}
}

// unquiesceParent reverses quiesceParent. Graph.mu is held.
func (e *Edge) unquiesceParent(open *[]*Root) {
	if e.root == nil {
		e.parent.unquiesceUp(open)
	} else if e.root.quiesce--; e.root.quiesce == 0 {
		e.root.state.And(^uint64(gateClosed))
		*open = append(*open, e.root)
	}
}

// resumeLanes tells those that were refused that the gate is open.
func (r *Root) resumeLanes() {
	r.notify()
	r.mu.Lock()
	var resume []func()
	for l := range r.lanes {
		if l.refused.Swap(false) && l.resume != nil {
			resume = append(resume, l.resume)
		}
	}
	r.mu.Unlock()
	for _, f := range resume {
		f()
	}
}

// ancestors lists n and the nodes above it, each once, upper ones first. Graph.mu is held.
func (n *Node) ancestors() []*Node {
	return postOrder(n, func(n *Node, visit func(*Node)) {
		for _, e := range n.parents {
			if e.parent != nil {
				visit(e.parent)
			}
		}
	})
}
