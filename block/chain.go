package block

import "slices"

// The backing chain (rule G33): from a node down by the edges to backing nodes, and
// through filters.

// filteredEdge is the edge to the node that n is a filter of, or nil. Graph.mu is held.
func (n *Node) filteredEdge() *Edge {
	if n.driver.Kind != Filter {
		return nil
	}
	for _, e := range n.children {
		if e.role&RoleFiltered != 0 {
			return e
		}
	}
	return nil
}

// filtered is filteredEdge.
func (n *Node) filtered() *Edge {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.filteredEdge()
}

// chainEdge is the edge down the backing chain, or nil. Graph.mu is held.
func (n *Node) chainEdge() *Edge {
	if e := n.Backing(); e != nil {
		return e
	}
	return n.filteredEdge()
}

// chain lists n and the nodes down its backing chain, filters included. Graph.mu is held.
func (n *Node) chain() []*Node {
	list := []*Node{n}
	for e := n.chainEdge(); e != nil; e = e.Node().chainEdge() {
		list = append(list, e.Node())
	}
	return list
}

// images is chain without filters. Graph.mu is held.
func (n *Node) images() []*Node {
	return slices.DeleteFunc(n.chain(), func(l *Node) bool { return l.filteredEdge() != nil })
}

// Chain lists n and the nodes down its backing chain, filters included.
func (n *Node) Chain() []*Node {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.chain()
}

// Images lists the nodes of n's backing chain that are no filters.
func (n *Node) Images() []*Node {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.images()
}

// ChainContains tells whether base is n or in its backing chain.
func (n *Node) ChainContains(base *Node) bool { return slices.Contains(n.Chain(), base) }

// SkipFilters is the first node from n down that is no filter.
func (n *Node) SkipFilters() *Node { return n.Images()[0] }

// Base is the last image of n's backing chain.
func (n *Node) Base() *Node {
	list := n.Images()
	return list[len(list)-1]
}

// Overlay finds the image in n's backing chain whose backing node, filters aside, is
// base; nil if there is none.
func (n *Node) Overlay(base *Node) *Node {
	list := n.Images()
	if i := slices.Index(list, base.SkipFilters()); i > 0 {
		return list[i-1]
	}
	return nil
}

// FindBacking finds the image below n in its backing chain that goes by name: the
// name in an overlay's header, or the name of its file. A name that states a protocol
// is compared as it is, a relative path is relative to the overlay. resolve makes a
// path canonical, "" if there is no such file; nil leaves paths as they are.
func (n *Node) FindBacking(name string, resolve func(path string) string) *Node {
	if resolve == nil {
		resolve = func(path string) string { return path }
	}
	images := n.Images()
	for i, below := range images[1:] {
		overlay, file, header := images[i], below.Filename(), ""
		if c, ok := overlay.inst.(BackingChanger); ok {
			header, _ = c.BackingFile()
		}
		if name == file || name == header && samePath(overlay, header, file, resolve) ||
			!statesProtocol(name) && samePath(overlay, name, file, resolve) {
			return below
		}
	}
	return nil
}

// samePath tells whether a name in the header of overlay would be that of file.
func samePath(overlay *Node, name, file string, resolve func(string) string) bool {
	full, err := overlay.BackingName(name)
	if err != nil || full == "" || statesProtocol(full) || statesProtocol(file) {
		return full == file
	}
	path := resolve(full)
	return path != "" && path == resolve(file)
}

// Freeze keeps the links from top down its backing chain to base as they are, until
// thaw is called, once. base nil: to the end of the chain. It waits for a change of
// the chain that is going on.
func (g *Graph) Freeze(top, base *Node) (thaw func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var links []*Edge
	for n := top; n != base; {
		if t := n.tx; t != nil {
			g.mu.Unlock()
			<-t.hold.done
			g.mu.Lock()
			n, links = top, nil
			continue
		}
		e := n.chainEdge()
		if e == nil {
			if base == nil {
				break
			}
			return nil, notInChain(base, top)
		}
		links = append(links, e)
		n = e.Node()
	}
	for _, e := range links {
		e.frozen++
	}
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, e := range links {
			e.frozen--
		}
	}, nil
}

func notInChain(base, top *Node) error {
	return refuse(ErrInvalid, "Node '%s' is not in the backing chain of '%s'", base.name, top.name)
}
