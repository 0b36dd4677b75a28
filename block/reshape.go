package block

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// The changes of a graph in use (rules G17, G18, G28). Each drains just the nodes whose
// users or children change, and is a transaction: on an error the graph is what it was.
// ctx bounds the wait for the drain. The nodes that are named must stay referenced by
// the caller. Other changes may go on in parallel.

// reshape runs edit as a transaction while the nodes are drained.
func (g *Graph) reshape(ctx context.Context, edit func(t *tx) error, nodes ...*Node) error {
	return g.reshaping(ctx, func() error { return g.change(ctx, edit) }, nodes...)
}

// reshaping runs f while the nodes are drained; again if a node was opened over them
// meanwhile, for which the next drain waits.
func (g *Graph) reshaping(ctx context.Context, f func() error, nodes ...*Node) error {
	for {
		if err := g.drained(ctx, f, nodes...); !errors.Is(err, errOpening) {
			return err
		}
	}
}

// Replace makes all users of from use to instead, except those inside to's own
// subtree (the edge by which a filter or overlay uses from stays), and roots that are
// to stay. Clients notice a pause only.
func (g *Graph) Replace(ctx context.Context, from, to *Node) error {
	if err := from.OpAllowed(OpReplace); err != nil {
		return err
	}
	return g.reshape(ctx, func(t *tx) error {
		if err := from.opAllowed(OpReplace); err != nil {
			return err
		}
		return t.replace(from, to, true)
	}, from)
}

// replace moves the parents of from, which is drained, to to. skip tells whether
// roots that are to stay may do so, or are an error.
func (t *tx) replace(from, to *Node, skip bool) error {
	inside := topological(to)
	for _, e := range slices.Clone(from.parents) {
		switch {
		case e.parent != nil && slices.Contains(inside, e.parent):
			continue
		case e.root != nil && e.root.stays:
			if skip {
				continue
			}
			return refuse(ErrBusy, "Should not change '%s' link to '%s'", e.name, from.name)
		}
		if err := t.move(e, to); err != nil {
			return err
		}
	}
	return nil
}

// InsertFilter opens a filter above n, between n and all its users. cfg must name n
// as the filter's child: {"file": {Ref: n}}. The caller holds a reference to the
// filter. On an error nothing is left open, once drained sections of n have ended.
func (g *Graph) InsertFilter(ctx context.Context, cfg *Config, n *Node) (*Node, error) {
	f, err := g.Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if child := f.filtered(); child == nil || child.Node() != n {
		err = refuse(ErrInvalid, "Node '%s' is no filter of node '%s'", f.name, n.name)
	} else {
		err = g.reshape(ctx, func(t *tx) error { return t.replace(n, f, true) }, n)
	}
	if err != nil {
		return nil, errors.Join(err, g.Release(context.WithoutCancel(ctx), f))
	}
	return f, nil
}

// RemoveFilter makes the users of filter f use its child instead. f stays open, for
// those who hold references to it.
func (g *Graph) RemoveFilter(ctx context.Context, f *Node) error {
	return g.reshape(ctx, func(t *tx) error {
		child := f.filteredEdge()
		if child == nil {
			return refuse(ErrInvalid, "Node '%s' is no filter", f.name)
		}
		return t.replace(f, child.Node(), true)
	}, f)
}

// AppendOverlay puts overlay, which has no backing node and no users yet, on top of
// base: base becomes its backing node, and base's users use overlay instead (a live
// snapshot). What they have written is made durable first, because their flushes go to
// overlay from then on.
func (g *Graph) AppendOverlay(ctx context.Context, overlay, base *Node) error {
	check := func() error {
		if err := base.opAllowed(OpExternalSnapshot); err != nil {
			return err
		}
		if err := overlay.opAllowed(OpExternalSnapshot); err != nil {
			return err
		}
		switch {
		case slices.ContainsFunc(overlay.parents, func(e *Edge) bool { return e.root != nil }):
			return refuse(ErrBusy, "The overlay is already in use")
		case overlay.Backing() != nil:
			return refuse(ErrInvalid, "The overlay already has a backing image")
		case !overlay.driver.Backing:
			return refuse(ErrNotSupported, "The overlay does not support backing images")
		}
		return nil
	}
	g.mu.Lock()
	err := check()
	g.mu.Unlock()
	if err != nil {
		return err // without a pause
	}
	return g.reshaping(ctx, func() error {
		if err := base.flush(ctx); err != nil {
			return base.fail("flush", 0, 0, err)
		}
		return g.change(ctx, func(t *tx) error {
			if err := check(); err != nil {
				return err
			}
			if err := t.setBacking(overlay, base); err != nil {
				return err
			}
			return t.replace(base, overlay, true)
		})
	}, base, overlay)
}

// SetBacking makes backing what n reads where it holds nothing; nil for zeroes. The
// header of n's image keeps its backing file name, see [BackingChanger].
func (g *Graph) SetBacking(ctx context.Context, n, backing *Node) error {
	return g.reshape(ctx, func(t *tx) error { return t.setBacking(n, backing) }, n)
}

// setBacking links, moves or unlinks the backing edge of n, which is drained.
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
	case e.Node() == backing:
		return nil
	case e.frozen > 0:
		return refuse(ErrBusy, "Cannot change frozen '%s' link from '%s' to '%s'", e.name, n.name, e.Node().name)
	case backing != nil:
		return t.move(e, backing)
	}
	t.unlink(e)
	return nil
}

// SetChild makes the child of n that is called name another node, in the role that the
// old one has; for "backing" it is [Graph.SetBacking]. n must read the same from it.
func (g *Graph) SetChild(ctx context.Context, n *Node, name string, child *Node) error {
	return g.reshape(ctx, func(t *tx) error { return t.setChild(n, name, child) }, n)
}

func (t *tx) setChild(n *Node, name string, child *Node) error {
	e := n.child(name)
	switch {
	case name == "backing" && n.driver.Kind != Filter:
		return t.setBacking(n, child)
	case e == nil && n.driver.Kind == Filter:
		return refuse(ErrInvalid, "'%s' is a %s filter node that does not support a %s child", n.name, n.driver.Name, name)
	case e == nil:
		return refuse(ErrInvalid, "The node %s does not have a child named %s", n.name, name)
	case child == nil:
		return refuse(ErrInvalid, "The node %s must have a child named %s", n.name, name)
	case e.Node() == child:
		return nil
	case e.frozen > 0:
		return refuse(ErrBusy, "Cannot change frozen '%s' link from '%s' to '%s'", e.name, n.name, e.Node().name)
	}
	return t.move(e, child)
}

// DropIntermediate takes the images from top down to just above base out of the
// backing chain: the users of top use base instead. The header of each image that had
// top as backing file names backingName, of backingFormat, from now on; "" for the
// file name of base. The caller has seen to it that the dropped images hold nothing
// that the users need.
func (g *Graph) DropIntermediate(ctx context.Context, top, base *Node, backingName, backingFormat string) error {
	if backingName == "" {
		backingName, backingFormat = base.headerName()
	}
	check := func() error {
		if top == base || !slices.Contains(top.chain(), base) {
			return notInChain(base, top)
		}
		return nil
	}
	return g.reshaping(ctx, func() (err error) {
		g.mu.Lock()
		err, overlays := check(), top.overlays()
		g.mu.Unlock()
		if err != nil {
			return err
		}
		// Both chains read the same, so the headers may go first; they can fail late.
		for _, o := range overlays {
			c, ok := o.inst.(BackingChanger)
			if !ok {
				continue
			}
			if backingName == "" {
				return refuse(ErrInvalid, "Node '%s' has no file name for the header of node '%s'", base.name, o.name)
			}
			oldName, oldFormat := c.BackingFile()
			if err := c.ChangeBackingFile(ctx, backingName, backingFormat); err != nil {
				return fmt.Errorf("Could not change the backing file of node '%s' to '%s': %w", o.name, backingName, err)
			}
			defer func() {
				if err != nil {
					err = errors.Join(err, c.ChangeBackingFile(context.WithoutCancel(ctx), oldName, oldFormat))
				}
			}()
		}
		return g.change(ctx, func(t *tx) error {
			if err := check(); err != nil {
				return err
			}
			if !slices.Equal(overlays, top.overlays()) {
				return refuse(ErrBusy, "Node '%s' has got another overlay meanwhile", top.name)
			}
			return t.replace(top, base, false)
		})
	}, top)
}

// headerName is what the header of an overlay of n says: file and format.
func (n *Node) headerName() (name, format string) {
	n = n.SkipFilters()
	format = n.driver.Name
	if n.driver.Kind == Protocol {
		format = "raw"
	}
	return n.ExactFilename(), format
}

// overlays lists the nodes that have n, filters between them aside, as backing node.
// Graph.mu is held.
func (n *Node) overlays() []*Node {
	var list []*Node
	for _, e := range n.parents {
		switch p := e.parent; {
		case p == nil:
		case e.role&RoleCOW != 0:
			list = append(list, p)
		case e == p.filteredEdge():
			list = append(list, p.overlays()...)
		}
	}
	return list
}

// AddChild makes child, which has no user yet, one more child of n, which must take any
// number (quorum). It returns the new edge.
func (g *Graph) AddChild(ctx context.Context, n, child *Node) (*Edge, error) {
	a, ok := n.inst.(ChildAdder)
	if !ok {
		return nil, refuse(ErrNotSupported, "The node %s does not support adding a child", n.name)
	}
	var e *Edge
	err := g.reshape(ctx, func(t *tx) error {
		if len(child.parents) > 0 {
			return refuse(ErrBusy, "The node %s already has a parent", child.name)
		}
		name, role, err := a.NewChild(child)
		if err != nil {
			return err
		}
		e = newEdge(n, child, name, role)
		t.onCommit(func() { a.ChildrenChanged(slices.Clone(n.children)) })
		return t.link(e)
	}, n)
	if err != nil {
		return nil, err
	}
	return e, nil
}

// RemoveChild takes the child called name from n, which must take any number (quorum).
// An error with which the child is gone nevertheless is about its closing.
func (g *Graph) RemoveChild(ctx context.Context, n *Node, name string) error {
	a, ok := n.inst.(ChildAdder)
	if !ok {
		return refuse(ErrNotSupported, "The node %s does not support removing a child", n.name)
	}
	return g.reshape(ctx, func(t *tx) error {
		e := n.child(name)
		if e == nil {
			return refuse(ErrInvalid, "The node %s does not have a child named %s", n.name, name)
		}
		if err := errors.Join(a.MayRemove(e), e.mayChange()); err != nil {
			return err
		}
		t.onCommit(func() { a.ChildrenChanged(slices.Clone(n.children)) })
		t.unlink(e)
		return nil
	}, n)
}
