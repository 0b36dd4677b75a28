package block

import (
	"context"
	"errors"
	"slices"
)

// A tx is a change of the graph: edges are linked, unlinked and moved, then the
// permissions of everything below are checked, and all of it is committed, or undone
// to exactly the graph before.
//
// Edges that requests may be passing move or go only while their parents are drained.
//
// Graph.mu is not held while drivers are asked for their consent, which may take long
// (file locks). Until then the transaction has occupied the nodes whose edges and
// permissions it reads or changes; another one that needs one of these waits for its
// end. Only readers of the graph may see a change that is undone afterwards.
type tx struct {
	g        *Graph
	undo     []func() // in the order of the edits
	done     []func() // to be called after a commit
	edges    []*Edge  // new or moved: their permissions are to be computed
	below    []*Node  // permissions of these are to be computed
	freed    []*Node  // a reference to each is given back after a commit
	taken    []*Node  // a reference to each is given back after an abort
	touched  []*Node  // whose users or children change; must not be claimed by others
	perms    permTx
	quiesced quiesced
	resized  []*Root // roots that are to be told after a commit
	hold     *claim  // on the nodes whose Node.tx is this one
}

// change runs edit as one transaction. edit makes its edits through t, with Graph.mu
// held; it must have no other effect that onAbort does not undo, because it is run
// again after a wait for another transaction, or for the end of somebody else's claim
// on what is linked or moved. ctx bounds that wait. The error is why nothing has
// changed, or what went wrong with closing nodes that nobody uses any more.
func (g *Graph) change(ctx context.Context, edit func(t *tx) error) error {
	return g.changeBy(ctx, nil, edit)
}

// changeBy is change on behalf of a claim.
func (g *Graph) changeBy(ctx context.Context, by *claim, edit func(t *tx) error) error {
	for {
		t := &tx{g: g, perms: permTx{by: by}}
		other, err := t.prepare(edit)
		if err == nil && other == nil {
			err = t.perms.ask()
			t.end(err)
		}
		g.settle(&t.quiesced)
		if err := t.clear(ctx, err); err != nil || other == nil {
			return err
		}
		if err := other.wait(ctx); err != nil {
			return err
		}
	}
}

// prepare makes the edits and computes the permissions. If that fails, or somebody
// else, who is returned, is at work on one of the nodes, all is undone.
func (t *tx) prepare(edit func(t *tx) error) (other *claim, err error) {
	t.g.mu.Lock()
	defer t.g.mu.Unlock()
	err = edit(t)
	if other = t.inTheWay(err == nil); other != nil {
		err = nil // it may be due to what they are doing
	} else if err == nil {
		t.occupy()
		err = t.permissions()
	}
	if err == errClaimed {
		other, err = t.perms.busy, nil
	}
	if err != nil || other != nil {
		t.abort()
	}
	t.waits(other != nil || err == nil)
	return other, err
}

// waits notes whether the nodes touched wait: for somebody else, or for the consent of drivers.
func (t *tx) waits(so bool) {
	for _, n := range t.touched {
		n.waiting = so
	}
	if so {
		t.g.signalReady()
	}
}

// end commits, or undoes all if err is not nil.
func (t *tx) end(err error) {
	t.g.mu.Lock()
	defer t.g.mu.Unlock()
	if err != nil {
		t.abort()
	} else {
		t.commit()
	}
	t.waits(false)
}

// clear does without locks what is left after the end, which err tells.
func (t *tx) clear(ctx context.Context, err error) error {
	tellResized(t.resized)
	errs := []error{err}
	for _, n := range t.freed {
		errs = append(errs, t.g.Release(ctx, n))
	}
	return errors.Join(errs...)
}

// onAbort has f called if the transaction fails, later ones first.
func (t *tx) onAbort(f func()) { t.undo = append(t.undo, f) }

// onCommit has f called, with Graph.mu held, when the transaction has succeeded.
func (t *tx) onCommit(f func()) { t.done = append(t.done, f) }

// touch notes nodes, nil for none, whose lists of edges change.
func (t *tx) touch(nodes ...*Node) {
	for _, n := range nodes {
		if n != nil {
			t.touched = append(t.touched, n)
		}
	}
}

// recheck has the permissions below n computed, because what n is has changed.
func (t *tx) recheck(n *Node) { t.below = append(t.below, n) }

// inTheWay returns the claim of who else is at work on what the change touches and, if
// deep says so, on what has its permissions computed; nil if nobody is.
func (t *tx) inTheWay(deep bool) *claim {
	for _, n := range t.touched {
		switch {
		case n.claim != nil && n.claim != t.perms.by:
			return n.claim
		case n.tx != nil:
			return n.tx.hold
		}
	}
	if deep {
		for _, n := range topological(t.below...) {
			if n.tx != nil {
				return n.tx.hold
			}
		}
	}
	return nil
}

// occupy takes the nodes that the transaction reads or changes.
func (t *tx) occupy() {
	t.hold = &claim{nodes: slices.Concat(topological(t.below...), t.touched), done: make(chan struct{})}
	for _, n := range t.hold.nodes {
		n.tx = t
	}
}

// vacate gives back what occupy has taken.
func (t *tx) vacate() {
	if t.hold == nil {
		return
	}
	for _, n := range t.hold.nodes {
		n.tx = nil
	}
	close(t.hold.done)
}

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
	for _, f := range t.done {
		f()
	}
	above := ancestors(slices.Concat(t.below, t.touched)...)
	// What lies below was computed before.
	for _, n := range slices.Backward(above) {
		if !n.busy {
			n.refreshLimits()
		}
	}
	t.resized = resizedRoots(above)
	t.vacate()
}

func (t *tx) abort() {
	t.perms.abort()
	for _, f := range slices.Backward(t.undo) {
		f()
	}
	t.freed = t.taken
	t.vacate()
}

// link adds e, whose fields are set, with a reference of its own to the child.
func (t *tx) link(e *Edge) error {
	t.touch(e.parent, e.Node())
	if err := t.mayLink(e, e.Node()); err != nil {
		return err
	}
	if p := e.parent; p != nil {
		t.addChild(e, len(p.children))
		t.onAbort(func() { t.dropChild(e) })
	}
	t.enter(e, e.Node())
	t.edges = append(t.edges, e)
	return nil
}

// unlink takes e away and gives its reference back.
func (t *tx) unlink(e *Edge) {
	t.touch(e.parent) // a user of a claimed child may leave
	if e.parent != nil {
		at := t.dropChild(e)
		t.onAbort(func() { t.addChild(e, at) })
	}
	t.leave(e, e.Node())
}

// errOpening is returned where a node that is being opened, and was not when its
// children were drained, would have a child changed.
var errOpening = refuse(ErrBusy, "a node is being opened")

// move makes e lead to another child. Its place in the parent's list stays.
func (t *tx) move(e *Edge, to *Node) error {
	from := e.Node()
	if p := e.parent; p != nil && p.busy && !p.waiting {
		return refuse(errOpening, "Node '%s' is being opened or closed", p.name)
	}
	t.touch(e.parent, from, to)
	if err := e.mayChange(); err != nil {
		return err
	}
	if e.root != nil && from.Active() && !to.Active() {
		return mixed(e, to)
	}
	if err := t.mayLink(e, to); err != nil {
		return err
	}
	if err := trackFor(e, to); err != nil {
		return err
	}
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
	t.addParent(e, child, len(child.parents))
	child.refs++
	t.onAbort(func() {
		t.dropParent(e, child)
		t.taken = append(t.taken, child)
	})
	t.below = append(t.below, child)
}

// leave takes e out of the parents of child.
func (t *tx) leave(e *Edge, child *Node) {
	at := t.dropParent(e, child)
	t.onAbort(func() { t.addParent(e, child, at) })
	t.freed = append(t.freed, child)
	t.below = append(t.below, child)
}

// addParent puts e into the list of child's parents, as number at. A drain of child
// reaches up through it from now on.
func (t *tx) addParent(e *Edge, child *Node, at int) {
	child.parents = slices.Insert(child.parents, at, e)
	if child.held() {
		t.quiesced.closeParent(e)
	}
}

// dropParent undoes addParent, and tells which number e was.
func (t *tx) dropParent(e *Edge, child *Node) (at int) {
	at = slices.Index(child.parents, e)
	child.parents = slices.Delete(child.parents, at, at+1)
	if child.held() {
		t.quiesced.openParent(e)
	}
	return at
}

// addChild puts e into the list of its parent's children, as number at.
func (t *tx) addChild(e *Edge, at int) {
	p := e.parent
	p.children = slices.Insert(p.children, at, e)
	if e.role&RoleCOW != 0 {
		p.cow.Store(e)
	}
}

// dropChild undoes addChild, and tells which number e was.
func (t *tx) dropChild(e *Edge) (at int) {
	p := e.parent
	at = slices.Index(p.children, e)
	p.children = slices.Delete(p.children, at, at+1)
	p.cow.CompareAndSwap(e, nil)
	return at
}

// mayLink tells why e must not lead to child.
func (t *tx) mayLink(e *Edge, child *Node) error {
	p := e.parent
	if p == nil {
		return e.root.mayUse(child)
	}
	if p == child || child.reaches(p) {
		return refuse(ErrInvalid, "Making '%s' a %s child of '%s' would create a cycle", child.name, e.name, p.name)
	}
	for _, o := range p.children {
		if only := o.role & e.role & (RoleFiltered | RoleCOW | RolePrimary); o != e && only != 0 {
			return refuse(ErrInvalid, "Node '%s' has a %s child already, '%s': '%s' cannot be another one", p.name, only, o.name, e.name)
		}
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
