package block

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// The changes of a graph in use (rules G17, G18, G28). Each drains just the nodes
// concerned and is a transaction: on an error the graph is what it was. ctx bounds the
// wait for the drain. The nodes that are named must stay referenced by the caller.

// Replace makes all users of from use to instead, except those inside to's own
// subtree: the edge by which a filter or overlay uses from stays. Clients notice a
// pause only.
func (g *Graph) Replace(ctx context.Context, from, to *Node) error {
	if err := from.OpAllowed(OpReplace); err != nil {
		return err
	}
	return g.drained(ctx, func() error {
		return g.change(ctx, func(t *tx) error { return t.replace(from, to) })
	}, from, to)
}

// replace moves the parents of from to to. Both are drained.
func (t *tx) replace(from, to *Node) error {
	inside := topological(to)
	for _, e := range slices.Clone(from.parents) {
		if e.parent != nil && slices.Contains(inside, e.parent) {
			continue
		}
		if err := t.move(e, to); err != nil {
			return err
		}
	}
	return nil
}

// InsertFilter opens a filter above n, between n and all its users. cfg must name n
// as the filter's child: {"file": {Ref: n}}. The caller holds a reference to the
// filter. On an error nothing is left open.
func (g *Graph) InsertFilter(ctx context.Context, cfg *Config, n *Node) (*Node, error) {
	f, err := g.Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if child := f.filtered(); child == nil || child.Node() != n {
		err = refuse(ErrInvalid, "node '%s' is no filter of node '%s'", f.name, n.name)
	} else {
		err = g.Replace(ctx, n, f)
	}
	if err != nil {
		return nil, errors.Join(err, g.Release(ctx, f))
	}
	return f, nil
}

// RemoveFilter makes the users of filter f use its child instead. f stays open, for
// those who hold references to it.
func (g *Graph) RemoveFilter(ctx context.Context, f *Node) error {
	child := f.filtered()
	if child == nil {
		return refuse(ErrInvalid, "node '%s' is no filter", f.name)
	}
	below := child.Node()
	return g.drained(ctx, func() error {
		return g.change(ctx, func(t *tx) error { return t.replace(f, below) })
	}, f, below)
}

// filtered is the edge to the node that n is a filter of, or nil.
func (n *Node) filtered() *Edge {
	for _, e := range n.Children() {
		if e.role&RoleFiltered != 0 {
			return e
		}
	}
	return nil
}

// AppendOverlay puts overlay, which has no backing node yet, on top of base: base
// becomes its backing node, and base's users use overlay instead (a live snapshot).
func (g *Graph) AppendOverlay(ctx context.Context, overlay, base *Node) error {
	if err := base.OpAllowed(OpExternalSnapshot); err != nil {
		return err
	}
	if overlay.Backing() != nil {
		return refuse(ErrInvalid, "The overlay '%s' already has a backing image", overlay.name)
	}
	return g.drained(ctx, func() error {
		return g.change(ctx, func(t *tx) error {
			if err := t.setBacking(overlay, base); err != nil {
				return err
			}
			return t.replace(base, overlay)
		})
	}, overlay, base)
}

// SetBacking makes backing what n reads where it holds nothing; nil for zeroes. The
// header of n's image keeps its backing file name, see [BackingChanger].
func (g *Graph) SetBacking(ctx context.Context, n, backing *Node) error {
	nodes := []*Node{n}
	if old := n.Backing(); old != nil {
		nodes = append(nodes, old.Node())
	}
	if backing != nil {
		nodes = append(nodes, backing)
	}
	return g.drained(ctx, func() error {
		return g.change(ctx, func(t *tx) error { return t.setBacking(n, backing) })
	}, nodes...)
}

// setBacking links, moves or unlinks n's backing edge.
func (t *tx) setBacking(n, backing *Node) error {
	if !n.driver.Backing {
		return refuse(ErrNotSupported, "Driver '%s' of node '%s' does not support backing files", n.driver.Name, n.name)
	}
	e := n.Backing()
	switch {
	case e == nil && backing == nil:
		return nil
	case e == nil:
		return t.link(newEdge(n, backing, "backing", RoleCOW))
	case backing != nil:
		return t.move(e, backing)
	}
	if err := e.mayChange(); err != nil {
		return err
	}
	t.unlink(e)
	return nil
}

// Freeze keeps the links from top down its backing chain to base as they are, until
// thaw is called, once. base nil: to the end of the chain.
func (g *Graph) Freeze(top, base *Node) (thaw func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var links []*Edge
	for n := top; n != base; {
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

// chainEdge is the edge down the backing chain: to the backing node, or to what a
// filter filters. Graph.mu is held.
func (n *Node) chainEdge() *Edge {
	for _, e := range n.children {
		if e.role&(RoleCOW|RoleFiltered) != 0 {
			return e
		}
	}
	return nil
}

// chain lists n and the nodes down its backing chain, filters included. Graph.mu is held.
func (n *Node) chain() []*Node {
	list := []*Node{n}
	for e := n.chainEdge(); e != nil; e = e.Node().chainEdge() {
		list = append(list, e.Node())
	}
	return list
}

// Chain lists n and the nodes down its backing chain, filters included (rule G33).
func (n *Node) Chain() []*Node {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.chain()
}

// ChainContains tells whether base is n or in its backing chain.
func (n *Node) ChainContains(base *Node) bool { return slices.Contains(n.Chain(), base) }

// Overlay finds the image in n's backing chain whose backing node, filters aside, is
// base; nil if there is none.
func (n *Node) Overlay(base *Node) *Node {
	var overlay *Node
	for _, l := range n.Chain() {
		if l == base {
			return overlay
		}
		if l.filtered() == nil {
			overlay = l
		}
	}
	return nil
}

// Base is the last image of n's backing chain.
func (n *Node) Base() *Node {
	list := n.Chain()
	return list[len(list)-1]
}

// SkipFilters is the first node from n down that is no filter.
func (n *Node) SkipFilters() *Node {
	for _, l := range n.Chain() {
		if l.filtered() == nil {
			return l
		}
	}
	return n
}

// DropIntermediate takes the images from top down to just above base out of the
// backing chain: the users of top use base instead. The header of each image that had
// top as backing file names backingName, of backingFormat, from now on; "" for the
// file name of base. The caller has seen to it that the dropped images hold nothing
// that the users need.
func (g *Graph) DropIntermediate(ctx context.Context, top, base *Node, backingName, backingFormat string) error {
	if !top.ChainContains(base) || top == base {
		return notInChain(base, top)
	}
	if backingName == "" {
		backingName, backingFormat = base.Filename(), base.driver.Name
	}
	return g.drained(ctx, func() (err error) {
		// Both chains read the same, so the headers may go first; they can fail late.
		for _, o := range top.overlays() {
			c, ok := o.inst.(BackingChanger)
			if !ok {
				continue
			}
			oldName, oldFormat := c.BackingFile()
			if err := c.ChangeBackingFile(ctx, backingName, backingFormat); err != nil {
				return fmt.Errorf("Could not change the backing file of node '%s' to '%s': %w", o.name, backingName, err)
			}
			defer func() {
				if err != nil {
					err = errors.Join(err, c.ChangeBackingFile(ctx, oldName, oldFormat))
				}
			}()
		}
		return g.change(ctx, func(t *tx) error { return t.replace(top, base) })
	}, top, base)
}

// overlays lists the nodes that have n as backing node.
func (n *Node) overlays() []*Node {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	var list []*Node
	for _, e := range n.parents {
		if e.role&RoleCOW != 0 {
			list = append(list, e.parent)
		}
	}
	return list
}

// AddChild makes child one more child of n, which must take any number (quorum). It
// returns the new edge.
func (g *Graph) AddChild(ctx context.Context, n, child *Node) (*Edge, error) {
	a, ok := n.inst.(ChildAdder)
	if !ok {
		return nil, refuse(ErrNotSupported, "The node %s does not support adding a child", n.name)
	}
	for _, e := range n.Children() {
		if e.Node() == child {
			return nil, refuse(ErrBusy, "The node %s already has a parent", child.name)
		}
	}
	var e *Edge
	err := g.drained(ctx, func() error {
		name, role, err := a.NewChild(child)
		if err != nil {
			return err
		}
		e = newEdge(n, child, name, role)
		if err := g.change(ctx, func(t *tx) error { return t.link(e) }); err != nil {
			return err
		}
		a.ChildrenChanged(n.Children())
		return nil
	}, n, child)
	if err != nil {
		return nil, err
	}
	return e, nil
}

// RemoveChild takes the child called name from n, which must take any number (quorum).
func (g *Graph) RemoveChild(ctx context.Context, n *Node, name string) error {
	a, ok := n.inst.(ChildAdder)
	if !ok {
		return refuse(ErrNotSupported, "The node %s does not support removing a child", n.name)
	}
	e := n.Child(name)
	if e == nil {
		return refuse(ErrInvalid, "The node %s does not have a child named %s", n.name, name)
	}
	return g.drained(ctx, func() error {
		if err := a.MayRemove(e); err != nil {
			return err
		}
		err := g.change(ctx, func(t *tx) error {
			if err := e.mayChange(); err != nil {
				return err
			}
			t.unlink(e)
			return nil
		})
		a.ChildrenChanged(n.Children())
		return err
	}, n, e.Node())
}
