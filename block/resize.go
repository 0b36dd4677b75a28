package block

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
