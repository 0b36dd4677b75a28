package block

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
)

// DrainBegin stops the requests to the nodes (rule G16): the roots above them stop
// admitting, the background work of the nodes and of those above pauses, and what
// waits of its own accord, as in a throttle, is let go; then it waits until nothing
// is in flight at these roots, and no node above is being opened or closed. Other
// roots go on. It is one section over all the nodes, and sections nest. The nodes stay
// open until [Graph.DrainEnd].
//
// If ctx ends first, the drain is undone and the error says who was still busy.
//
// A node that is opened over a drained one inside the section reads from it while it
// opens: only the owner of the section should have that done.
func (g *Graph) DrainBegin(ctx context.Context, nodes ...*Node) error {
	return g.begin(ctx, nodeList(nodes), func() []*Node { return nodes },
		func(q *quiesced) { q.each(nodes, q.close) }, func() { g.DrainEnd(nodes...) })
}

// DrainEnd ends a section that [Graph.DrainBegin] began with the same nodes.
// Requests that waited start in their order.
func (g *Graph) DrainEnd(nodes ...*Node) {
	g.recount(func(q *quiesced) { q.each(nodes, q.open) })
}

// DrainParentsBegin is DrainBegin for what is above the nodes: their own drivers go on
// with background work. It ends with [Graph.DrainParentsEnd].
func (g *Graph) DrainParentsBegin(ctx context.Context, nodes ...*Node) error {
	return g.begin(ctx, "what is above "+nodeList(nodes), func() []*Node { return nodes },
		func(q *quiesced) { q.each(nodes, q.closeAbove) }, func() { g.DrainParentsEnd(nodes...) })
}

// DrainParentsEnd ends a section that [Graph.DrainParentsBegin] began with the same nodes.
func (g *Graph) DrainParentsEnd(nodes ...*Node) {
	g.recount(func(q *quiesced) { q.each(nodes, q.openAbove) })
}

// DrainAll is DrainBegin for all nodes of the graph, also those that are opened inside
// the section: all roots are stopped before the first is waited for. The returned
// function ends the section.
func (g *Graph) DrainAll(ctx context.Context) (end func(), err error) {
	every := func() []*Node { return slices.Collect(maps.Values(g.nodes)) }
	end = func() {
		g.recount(func(q *quiesced) { g.quiesce--; q.each(every(), q.open) })
	}
	err = g.begin(ctx, "all nodes", every, func(q *quiesced) { g.quiesce++; q.each(every(), q.close) }, end)
	if err != nil {
		return nil, err
	}
	return end, nil
}

// begin waits until nothing is in flight above the nodes that pick lists, after shut
// has counted the reason. On an error it calls undo. pick and shut are called with
// Graph.mu held; what is for the text of the error.
func (g *Graph) begin(ctx context.Context, what string, pick func() []*Node, shut func(q *quiesced), undo func()) error {
	g.mu.Lock()
	nodes := pick()
	g.mu.Unlock()
	err := g.waitReady(ctx, nodes) // before clients have to
	if err == nil {
		var q quiesced
		g.mu.Lock()
		nodes = pick()
		shut(&q)
		above := ancestors(nodes...)
		roots := rootsAbove(above)
		g.mu.Unlock()
		err = g.pause(ctx, above)
		for _, r := range roots {
			err = both(err, r.waitIdle(ctx)) // after the end of ctx, it tells who is busy
		}
		if err = both(err, g.waitReady(ctx, nodes)); err != nil {
			undo()
		}
	}
	if err != nil {
		return fmt.Errorf("drain of %s did not finish: %w", what, err)
	}
	return nil
}

// recount takes reasons away, with Graph.mu held, and does what follows from that.
func (g *Graph) recount(open func(q *quiesced)) {
	var q quiesced
	g.mu.Lock()
	open(&q)
	g.mu.Unlock()
	g.settle(&q)
}

func both(err, more error) error {
	switch {
	case err == nil:
		return more
	case more == nil:
		return err
	}
	return fmt.Errorf("%w; %w", err, more)
}

// waitReady waits until the drivers of the nodes, and of those above, open and close none of them.
func (g *Graph) waitReady(ctx context.Context, nodes []*Node) error {
	for {
		g.mu.Lock()
		above, ready := ancestors(nodes...), g.ready
		i := slices.IndexFunc(above, func(n *Node) bool { return n.busy && !n.waiting && g.nodes[n.name] == n })
		g.mu.Unlock()
		if i < 0 {
			return nil
		}
		select {
		case <-ready:
		case <-ctx.Done():
			return fmt.Errorf("node '%s' is still being opened or closed: %w", above[i].name, ctx.Err())
		}
	}
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
	nodes []*Node // whose drivers are to be told
	roots []*Root // whose gate may open
	dead  []*Node // that nobody uses, kept for the section; they are busy from now on
}

func (*quiesced) each(nodes []*Node, f func(n *Node)) {
	for _, n := range nodes {
		f(n)
	}
}

// close counts one more reason for n to be drained.
func (q *quiesced) close(n *Node) {
	n.quiesce++
	if n.quiesce == 1 {
		q.nodes = append(q.nodes, n)
	}
	if n.quiesce+n.still == 1 {
		q.closeParents(n)
	}
}

// closeAbove counts one more reason for n's parents to be drained.
func (q *quiesced) closeAbove(n *Node) {
	n.still++
	if n.quiesce+n.still == 1 {
		q.closeParents(n)
	}
}

func (q *quiesced) closeParents(n *Node) {
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
	if n.quiesce == 0 {
		q.nodes = append(q.nodes, n)
	}
	q.openParents(n)
}

func (q *quiesced) openAbove(n *Node) {
	n.still--
	q.openParents(n)
}

func (q *quiesced) openParents(n *Node) {
	if n.held() {
		return
	}
	for _, e := range n.parents {
		q.openParent(e)
	}
	if n.dead() {
		n.busy = true
		q.dead = append(q.dead, n)
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

// settle tells drivers, opens the gates that nothing keeps closed, and closes nodes
// that were released meanwhile.
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
	for _, n := range q.dead {
		if err := g.close(context.Background(), n); err != nil {
			g.log.Error("a node that was released while drained did not close well", "node", n.name, "err", err)
		}
	}
}

// pause tells the drivers of the nodes that they are drained. Background work may take
// long to pause; if ctx ends first it is left to do so. It takes the list over.
func (g *Graph) pause(ctx context.Context, nodes []*Node) error {
	g.mu.Lock()
	nodes = slices.DeleteFunc(nodes, func(n *Node) bool { _, ok := n.inst.(Quiescer); return !ok })
	g.mu.Unlock()
	if len(nodes) == 0 {
		return nil
	}
	told := make(chan struct{})
	var at atomic.Pointer[Node]
	at.Store(nodes[0])
	g.telling.Go(func() {
		defer close(told)
		for _, n := range nodes {
			at.Store(n)
			n.tell(true)
		}
	})
	select {
	case <-told:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("background work of node '%s' did not pause: %w", at.Load().name, ctx.Err())
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
	if !n.busy {
		q, _ = n.inst.(Quiescer)
	}
	return q, n.quiesce > 0
}

// resume tells the driver of a node that is about to be closed, and will not be told
// anything any more, that it is not drained.
func (n *Node) resume() {
	n.pauseMu.Lock()
	defer n.pauseMu.Unlock()
	if n.paused {
		n.paused = false
		n.inst.(Quiescer).DrainEnd()
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
