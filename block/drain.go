package block

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// DrainBegin stops the requests to the nodes (rule G16): the roots above them stop
// admitting, the background work of the nodes and of those above pauses, and what
// waits of its own accord, as in a throttle, is let go; then it waits until nothing
// is in flight at these roots. Other roots go on. It is one section over all the
// nodes, and sections nest. The nodes stay open until [Graph.DrainEnd].
//
// If ctx ends first, the drain is undone and the error says who was still busy.
func (g *Graph) DrainBegin(ctx context.Context, nodes ...*Node) error {
	var q quiesced
	g.mu.Lock()
	for _, n := range nodes {
		n.refs++
		q.close(n)
	}
	above := ancestors(nodes...)
	roots := rootsAbove(above)
	g.mu.Unlock()
	err := g.pause(ctx, above)
	for _, r := range roots {
		if err == nil {
			err = r.waitIdle(ctx)
		}
	}
	if err == nil {
		return nil
	}
	g.DrainEnd(nodes...)
	return fmt.Errorf("drain of %s did not finish: %w", nodeList(nodes), err)
}

// DrainEnd ends a section that [Graph.DrainBegin] began with the same nodes.
// Requests that waited start in their order.
func (g *Graph) DrainEnd(nodes ...*Node) {
	var q quiesced
	g.mu.Lock()
	for _, n := range nodes {
		q.open(n)
	}
	g.mu.Unlock()
	g.settle(&q)
	for _, n := range nodes {
		if err := g.Release(context.Background(), n); err != nil {
			g.log.Error("a node that was released while drained did not close well", "node", n.name, "err", err)
		}
	}
}

// DrainAll is DrainBegin for all nodes of the graph. The returned function ends the section.
func (g *Graph) DrainAll(ctx context.Context) (end func(), err error) {
	nodes := g.Nodes()
	if err := g.DrainBegin(ctx, nodes...); err != nil {
		return nil, err
	}
	return func() { g.DrainEnd(nodes...) }, nil
}

// drained runs f while the nodes are drained.
func (g *Graph) drained(ctx context.Context, f func() error, nodes ...*Node) error {
	if err := g.DrainBegin(ctx, nodes...); err != nil {
		return err
	}
	defer g.DrainEnd(nodes...)
	return f()
}

func nodeList(nodes []*Node) string {
	var names []string
	for _, n := range nodes {
		names = append(names, "'"+n.name+"'")
	}
	if len(names) == 1 {
		return "node " + names[0]
	}
	return "nodes " + strings.Join(names, ", ")
}

// rootsAbove lists the roots directly above the nodes. Graph.mu is held.
func rootsAbove(nodes []*Node) []*Root {
	var roots []*Root
	for _, n := range nodes {
		for _, e := range n.parents {
			if e.root != nil {
				roots = append(roots, e.root)
			}
		}
	}
	return roots
}

// quiesced collects whose drain counts have changed, for [Graph.settle] to follow.
// Counts change under Graph.mu; gates close at once and open when all is settled.
type quiesced struct {
	nodes []*Node
	roots []*Root // whose gate may open
}

// close counts one more reason for n to be drained.
func (q *quiesced) close(n *Node) {
	n.quiesce++
	if n.quiesce > 1 {
		return
	}
	q.nodes = append(q.nodes, n)
	for _, e := range n.parents {
		q.closeParent(e)
	}
}

func (q *quiesced) closeParent(e *Edge) {
	if e.root == nil {
		q.close(e.parent)
		return
	}
	e.root.quiesce++
	e.root.state.Or(gateClosed)
}

// open takes one reason away.
func (q *quiesced) open(n *Node) {
	n.quiesce--
	if n.quiesce > 0 {
		return
	}
	q.nodes = append(q.nodes, n)
	for _, e := range n.parents {
		q.openParent(e)
	}
}

func (q *quiesced) openParent(e *Edge) {
	if e.root == nil {
		q.open(e.parent)
		return
	}
	e.root.quiesce--
	q.roots = append(q.roots, e.root)
}

// settle tells drivers, then opens the gates that nothing keeps closed.
func (g *Graph) settle(q *quiesced) {
	for _, n := range q.nodes {
		n.tell(false)
	}
	var open []*Root
	g.mu.Lock()
	for _, r := range q.roots {
		if r.quiesce == 0 && r.Drained() {
			r.state.And(^uint64(gateClosed))
			open = append(open, r)
		}
	}
	g.mu.Unlock()
	for _, r := range open {
		r.resumeLanes()
	}
}

// pause tells drivers that they are drained. Background work may take long to
// pause; if ctx ends first it is left to do so.
func (g *Graph) pause(ctx context.Context, nodes []*Node) error {
	told := make(chan struct{})
	g.telling.Go(func() {
		defer close(told)
		for _, n := range nodes {
			n.tell(true)
		}
	})
	select {
	case <-told:
		return nil
	case <-ctx.Done():
		return errors.Join(errors.New("background work did not pause"), ctx.Err())
	}
}

// tell tells the driver whether the node is drained, if that has changed. Where
// another call is at it, that one does, and is waited for only if wait says so.
func (n *Node) tell(wait bool) {
	for {
		if !n.pauseMu.TryLock() {
			if !wait {
				return
			}
			n.pauseMu.Lock()
		}
		q, drained := n.quiescer()
		if q != nil && drained != n.paused {
			n.paused = drained
			if drained {
				q.DrainBegin()
			} else {
				q.DrainEnd()
			}
		}
		n.pauseMu.Unlock()
		// Whoever changed it meanwhile may have relied on us.
		if _, now := n.quiescer(); q == nil || now == drained {
			return
		}
	}
}

// quiescer returns the driver, nil if it need not be told, and what it is to be told.
func (n *Node) quiescer() (q Quiescer, drained bool) {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	q, _ = n.inst.(Quiescer)
	return q, n.quiesce > 0
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
