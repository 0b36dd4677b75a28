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
	touched  []*Node  // must not be claimed by others
	by       *claim   // by whom the change is made, if by a claim
	perms    permTx
	quiesced quiesced
	resized  []*Root // roots that are to be told after a commit
}

// change runs edit as one transaction. The error is why nothing has changed, or what
// went wrong with closing nodes that nobody uses any more. While somebody else has a
// claim on what is linked or moved it waits and tries again, until ctx ends.
func (g *Graph) change(ctx context.Context, edit func(t *tx) error) error {
	return g.changeBy(ctx, nil, edit)
}

// changeBy is change on behalf of a claim.
func (g *Graph) changeBy(ctx context.Context, by *claim, edit func(t *tx) error) error {
	t, busy, err := g.tryChange(by, edit)
	for ; busy != nil; t, busy, err = g.tryChange(by, edit) {
		if err := busy.wait(ctx); err != nil {
			return err
		}
	}
	if err != nil {
		return err
	}
	tellResized(t.resized)
	var errs []error
	for _, n := range t.freed {
		errs = append(errs, g.Release(ctx, n))
	}
	return errors.Join(errs...)
}

// tryChange does it unless there is a claim in the way, which it returns.
func (g *Graph) tryChange(by *claim, edit func(t *tx) error) (t *tx, busy *claim, err error) {
	t = &tx{g: g, by: by}
	g.mu.Lock()
	err = edit(t)
	busy = t.inTheWay()
	if err == nil && busy == nil {
		err = t.permissions()
	}
	if err != nil || busy != nil {
		t.abort()
	} else {
		t.commit()
	}
	g.mu.Unlock()
	g.settle(&t.quiesced)
	return t, busy, err
}

// inTheWay is somebody else's claim on what the change touches, or nil.
func (t *tx) inTheWay() *claim {
	for _, n := range t.touched {
		if n != nil && n.claim != nil && n.claim != t.by {
			return n.claim
		}
	}
	return nil
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
	above := ancestors(t.below...)
	// What lies below was computed before.
	for _, n := range slices.Backward(above) {
		if n.inst != nil {
			n.refreshLimits()
		}
	}
	t.resized = resizedRoots(above)
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
	t.touched = append(t.touched, e.parent, e.Node())
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
	t.touched = append(t.touched, e.parent) // a user of a claimed child may leave
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
	t.touched = append(t.touched, e.parent, from, to)
	if err := e.mayChange(); err != nil {
		return err
	}
	if e.root != nil && from.Active() && !to.Active() {
		return mixed(e, to)
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
		return e.root.mayUse(child)
	}
	if p == child || child.reaches(p) {
		return fmt.Errorf("Making '%s' a %s child of '%s' would create a cycle", child.name, e.name, p.name)
	}
	if p.Active() && !child.Active() {
		return mixed(e, child)
	}
	return nil
}

func mixed(e *Edge, child *Node) error {
	return refuse(ErrInactive, "Inactive '%s' can't be a %s child of active '%s'", child.name, e.name, e.parentName())
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
