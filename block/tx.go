package block

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// A tx is a change of the graph: edges are linked, unlinked and moved, then the
// permissions of everything below are checked, and all of it is committed, or undone
// to exactly the graph before. Graph.mu is held from the first edit to the end.
//
// Edges that requests may be passing move or go only while their parents are drained.
type tx struct {
	g        *Graph
	undo     []func() // in the order of the edits
	edges    []*Edge  // new or moved: their permissions are to be computed
	below    []*Node  // permissions of these, and limits of those above, are to be computed
	freed    []*Node  // a reference to each is given back after a commit
	perms    permTx
	quiesced quiesced
}

// change runs edit as one transaction. The error is why nothing has changed, or what
// went wrong with closing nodes that nobody uses any more.
func (g *Graph) change(ctx context.Context, edit func(t *tx) error) error {
	t := &tx{g: g}
	g.mu.Lock()
	err := edit(t)
	if err == nil {
		err = t.permissions()
	}
	if err != nil {
		t.abort()
	} else {
		t.commit()
	}
	g.mu.Unlock()
	g.settle(&t.quiesced)
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range t.freed {
		errs = append(errs, g.Release(ctx, n))
	}
	return errors.Join(errs...)
}

// onAbort has f called if the transaction fails, later ones first.
func (t *tx) onAbort(f func()) { t.undo = append(t.undo, f) }

// recheck has the permissions below n computed, because what n is has changed.
func (t *tx) recheck(n *Node) { t.below = append(t.below, n) }

func (t *tx) permissions() error {
	for _, e := range t.edges {
		perm, shared := e.wanted()
		t.perms.set(e, perm, shared)
	}
	for _, n := range topological(t.below...) {
		if err := t.perms.check(n); err != nil {
			return err
		}
	}
	return nil
}

func (t *tx) commit() {
	t.perms.commit()
	// What lies below was computed before.
	for _, n := range slices.Backward(ancestors(t.below...)) {
		if n.inst != nil {
			n.refreshLimits()
		}
	}
}

func (t *tx) abort() {
	t.perms.abort()
	for _, f := range slices.Backward(t.undo) {
		f()
	}
}

// save notes the lists of edges around e, to be put back on abort.
func (t *tx) save(e *Edge, child *Node) {
	parents := slices.Clone(child.parents)
	t.onAbort(func() { child.parents = parents })
	if p := e.parent; p != nil {
		children, cow := slices.Clone(p.children), p.cow.Load()
		t.onAbort(func() { p.children = children; p.cow.Store(cow) })
	}
}

// link adds e, whose fields are set, with a reference of its own to the child.
func (t *tx) link(e *Edge) error {
	if err := t.mayLink(e, e.Node()); err != nil {
		return err
	}
	child := e.Node()
	t.save(e, child)
	if p := e.parent; p != nil {
		p.children = append(p.children, e)
		if e.role&RoleCOW != 0 {
			p.cow.Store(e)
		}
	}
	t.enter(e, child)
	t.edges = append(t.edges, e)
	return nil
}

// unlink takes e away and gives its reference back.
func (t *tx) unlink(e *Edge) {
	child := e.Node()
	t.save(e, child)
	if p := e.parent; p != nil {
		p.children = slices.DeleteFunc(slices.Clone(p.children), func(o *Edge) bool { return o == e })
		if p.cow.Load() == e {
			p.cow.Store(nil)
		}
	}
	t.leave(e, child)
	if e.parent != nil {
		t.below = append(t.below, e.parent)
	}
}

// move makes e lead to another child. Its place in the parent's list stays.
func (t *tx) move(e *Edge, to *Node) error {
	from := e.Node()
	if err := e.mayChange(); err != nil {
		return err
	}
	if err := t.mayLink(e, to); err != nil {
		return err
	}
	t.save(e, from)
	t.save(e, to)
	// The new child first: a gate that both close must not open between.
	t.enter(e, to)
	t.leave(e, from)
	e.child.Store(to)
	t.onAbort(func() { e.child.Store(from) })
	t.edges = append(t.edges, e)
	return nil
}

// enter makes e one of the parents of child.
func (t *tx) enter(e *Edge, child *Node) {
	child.parents = append(child.parents[:len(child.parents):len(child.parents)], e)
	child.refs++
	t.onAbort(func() { child.refs-- })
	if child.quiesce > 0 {
		t.quiesced.closeParent(e)
		t.onAbort(func() { t.quiesced.openParent(e) })
	}
	t.below = append(t.below, child)
}

// leave takes e out of the parents of child.
func (t *tx) leave(e *Edge, child *Node) {
	child.parents = slices.DeleteFunc(slices.Clone(child.parents), func(o *Edge) bool { return o == e })
	t.freed = append(t.freed, child)
	if child.quiesce > 0 {
		t.quiesced.openParent(e)
		t.onAbort(func() { t.quiesced.closeParent(e) })
	}
	t.below = append(t.below, child)
}

// mayLink tells why e must not lead to child.
func (t *tx) mayLink(e *Edge, child *Node) error {
	p := e.parent
	if p == nil {
		return nil
	}
	if p == child || child.reaches(p) {
		return fmt.Errorf("Making '%s' a %s child of '%s' would create a cycle", child.name, e.name, p.name)
	}
	return nil
}

// mayChange tells whether e may lead elsewhere or go. Graph.mu is held.
func (e *Edge) mayChange() error {
	if e.frozen > 0 {
		return refuse(ErrBusy, "Cannot change '%s' link from '%s' to '%s'", e.name, e.parentName(), e.Node().name)
	}
	return nil
}

func (e *Edge) parentName() string {
	if e.root != nil {
		return e.root.user
	}
	return e.parent.name
}
