package block

import (
	"context"
	"slices"
)

// SizeChanged tells the roots above n whose size is not what it was when they were
// attached or told last (see RootConfig.OnResize). Whoever has changed a node's size,
// or noticed that it has, calls it; changes of the graph do so by themselves. It may
// be called in parallel.
func (n *Node) SizeChanged() {
	n.graph.mu.Lock()
	resized := resizedRoots(ancestors(n))
	n.graph.mu.Unlock()
	tellResized(resized)
}

// resizedRoots takes over the sizes of the roots directly above the nodes, and lists
// those that have another one now. Graph.mu is held.
func resizedRoots(nodes []*Node) []*Root {
	var list []*Root
	for _, r := range rootsAbove(nodes) {
		if size := r.Size(); size != r.known {
			r.known = size
			list = append(list, r)
		}
	}
	return list
}

// tellResized is called without locks.
func tellResized(roots []*Root) {
	for _, r := range roots {
		if r.onResize != nil {
			r.onResize()
		}
	}
}

// RefreshSize looks whether what n stores in, itself or by its children, has grown or
// shrunk by itself, in a drained section, and tells parents and roots (see
// RootConfig.OnResize). Backing nodes are not looked at. It returns the size of n, in
// bytes. ctx bounds the wait for the drain. n must stay referenced by the caller.
func (g *Graph) RefreshSize(ctx context.Context, n *Node) (int64, error) {
	c, err := g.claimWhenFree(ctx, func() []*Node { return storage(n) })
	if err != nil {
		return 0, err
	}
	if !n.Active() {
		return 0, g.end(c, refuse(ErrInactive, "Node '%s' is inactive", n.name))
	}
	var size int64
	err = g.drained(ctx, func() error {
		for _, below := range slices.Backward(c.nodes) {
			if r, ok := below.inst.(Refresher); ok {
				if err := r.Refresh(ctx); err != nil {
					return err
				}
				below.SizeChanged()
			}
		}
		size = n.Size()
		return nil
	}, c.nodes...)
	return size, g.end(c, err)
}

// storage lists n and the nodes below that hold its own bytes: not what it reads where it
// holds nothing. Parents come before children. Graph.mu is held.
func storage(n *Node) []*Node {
	order := postOrder([]*Node{n}, func(n *Node, visit func(*Node)) {
		for _, e := range n.children {
			if e.role&RoleCOW == 0 {
				visit(e.Node())
			}
		}
	})
	slices.Reverse(order)
	return order
}
