package block

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// An Activator is a driver that holds something while its node is active: locks, open
// files, caches, background work (rule G22). While the node is inactive another
// process may use, change and replace what is stored; the node keeps nothing that this
// could make wrong, does no I/O of its own, and holds no permission on its children.
// It answers requests with [ErrInactive], but for reads of an opened file below a
// format that looks at its header, see [Peeker].
//
// The calls come with nothing in flight and the node drained, one at a time; but Size,
// Limits and what else tells of the node may be called in parallel. A node that is
// opened with [Config.Inactive] is as after Deactivate.
type Activator interface {
	// Inactivate makes what is stored complete and durable, so that another process
	// can take over. Parents come before children; the node and its children still
	// hold their permissions. Whether it fails or not, the node must be able to go on
	// as if it had not been called: another node may fail, and nothing is called then.
	Inactivate(ctx context.Context) error
	// Deactivate lets go of all that the node holds, at the end of a successful
	// inactivation or of an activation that failed, at whatever point. It cannot fail.
	Deactivate()
	// Activate makes the node ready for requests and reads anew all that it remembers
	// of what is stored. Children come before parents; the permissions are held already.
	// After an error Deactivate follows.
	Activate(ctx context.Context) error
}

// A PreActivator opens what its permissions need (the file that locks are taken on).
type PreActivator interface {
	Activator
	// PreActivate is called before the permissions are taken, and followed by
	// Activate or Deactivate.
	PreActivate(ctx context.Context) error
}

// A BackingFollower opens what its image names as backing file (rule G19).
type BackingFollower interface {
	Activator
	// FollowBacking is called after Activate has returned [ErrBackingChanged], while the
	// node is inactive and has no backing node. It opens, through o, what the image
	// names now. On an error it has no effect.
	FollowBacking(ctx context.Context, o *Opening) error
}

// maxFollowed bounds how often an activation begins again because the image has
// another backing file.
const maxFollowed = 3

// A Peeker can look at what is stored while its node is inactive.
type Peeker interface {
	// Peek reads, read-only and without a lock, what is true now. It keeps nothing
	// open; a protocol node notes the size, so that its parents can read all of it.
	// The children were peeked at before.
	Peek(ctx context.Context) (Peeked, error)
}

// Peeked is what an inactive node tells of itself.
type Peeked struct {
	Size int64 // bytes, exact
	// Info is what [Inspector] would return, nil where there is none.
	Info any
}

// Active tells whether the node serves requests; see [Graph.SetActive].
func (n *Node) Active() bool { return !n.inactive.Load() }

// SetActive activates the nodes and all below them, or makes them inactive (rule G22).
//
// Inactivation goes from parents to children. Below the given nodes it leaves active
// what an active node or a root that refuses (see RootConfig) still uses; if that
// concerns one of the given nodes themselves the error wraps [ErrPermission]. While a
// node is inactive the roots above it keep their place but hold no permission, and
// their requests fail with [ErrInactive].
//
// Activation goes from children to parents. It gives the roots their permissions
// back; the error of a file lock names who holds it. Calls that activate the same
// nodes at the same time share one activation and its error.
//
// Either happens as a whole or not at all, in a drained section. ctx bounds the waits
// for requests in flight and for other changes of the same nodes, and is passed to
// the drivers. The nodes must stay referenced by the caller.
func (g *Graph) SetActive(ctx context.Context, active bool, nodes ...*Node) error {
	return g.setActive(ctx, active, func() []*Node { return nodes })
}

// SetAllActive is SetActive for all open nodes as one change.
func (g *Graph) SetAllActive(ctx context.Context, active bool) error {
	return g.setActive(ctx, active, g.openNodes)
}

func (g *Graph) setActive(ctx context.Context, active bool, pick func() []*Node) error {
	if active {
		return g.activate(ctx, pick)
	}
	return g.inactivate(ctx, pick)
}

func (g *Graph) activate(ctx context.Context, pick func() []*Node) error {
	for followed := 0; ; {
		g.mu.Lock()
		tree := topological(pick()...)
		busy := claimed(tree)
		if busy == nil {
			set := slices.DeleteFunc(slices.Clone(tree), (*Node).Active)
			c := g.claim(set)
			c.activating = true
			g.mu.Unlock()
			err := g.activateSet(ctx, c)
			if again := errors.Is(err, ErrBackingChanged) && followed < maxFollowed; !again {
				return g.end(c, err)
			}
			followed++
			if err := g.end(c, g.followBacking(ctx, c)); err != nil {
				return err
			}
			continue
		}
		g.mu.Unlock()
		if err := busy.wait(ctx); err != nil {
			return err
		}
		if busy.failedFor(tree) {
			return busy.err
		}
	}
}

// failedFor tells whether an activation of the nodes would have failed as c, which has
// ended, did, unless that was given up.
func (c *claim) failedFor(nodes []*Node) bool {
	if !c.activating || c.err == nil || errors.Is(c.err, context.Canceled) || errors.Is(c.err, context.DeadlineExceeded) {
		return false
	}
	for _, n := range c.nodes {
		if !slices.Contains(nodes, n) {
			return false
		}
	}
	return true
}

// activateSet activates inactive nodes, claimed in the order of parents first, whose
// children are among them or active.
func (g *Graph) activateSet(ctx context.Context, c *claim) error {
	if len(c.nodes) == 0 {
		return nil
	}
	return g.drained(ctx, func() error {
		err := g.wake(ctx, c)
		if err != nil {
			err = errors.Join(err, g.setInactive(context.WithoutCancel(ctx), c, true))
			for _, n := range c.nodes {
				n.deactivate()
			}
			return err
		}
		for _, n := range c.nodes {
			n.SizeChanged()
		}
		return nil
	}, c.nodes...)
}

func (g *Graph) wake(ctx context.Context, c *claim) error {
	for _, n := range slices.Backward(c.nodes) {
		if a, ok := n.inst.(PreActivator); ok {
			if err := a.PreActivate(ctx); err != nil {
				return n.activationError(err)
			}
		}
	}
	if err := g.setInactive(ctx, c, false); err != nil {
		return err
	}
	for _, n := range slices.Backward(c.nodes) {
		if a, ok := n.inst.(Activator); ok {
			if err := a.Activate(ctx); err != nil {
				c.failed = n
				return n.activationError(err)
			}
		}
		n.refreshLimits()
	}
	return nil
}

// followBacking gives the node whose activation has failed the backing node that its
// image names now. On an error it has the old one.
func (g *Graph) followBacking(ctx context.Context, c *claim) error {
	n := c.failed
	f, ok := n.inst.(BackingFollower)
	if !ok {
		return n.activationError(ErrBackingChanged)
	}
	old, around := n.Backing(), []*Node{n}
	if old != nil {
		around = append(around, old.Node())
	}
	cfg := *n.cfg()
	cfg.Inactive = true
	return g.drained(ctx, func() error {
		err := g.changeBy(ctx, c, func(t *tx) error {
			if old == nil {
				return nil
			}
			t.unlink(old)
			return old.mayChange()
		})
		if err != nil {
			return n.activationError(err)
		}
		err = f.FollowBacking(ctx, &Opening{Config: &cfg, NodeName: n.name, graph: g, node: n, by: c})
		if err == nil {
			return nil
		}
		return errors.Join(n.activationError(err), g.changeBy(context.WithoutCancel(ctx), c, func(t *tx) error {
			if old == nil {
				return nil
			}
			return t.link(old)
		}))
	}, around...)
}

func (n *Node) activationError(err error) error {
	return fmt.Errorf("Could not activate node '%s': %w", n.name, err)
}

func (n *Node) deactivate() {
	if a, ok := n.inst.(Activator); ok {
		a.Deactivate()
	}
}

// setInactive changes the state of claimed nodes and the permissions that follow from it.
func (g *Graph) setInactive(ctx context.Context, c *claim, inactive bool) error {
	return g.changeBy(ctx, c, func(t *tx) error {
		for _, n := range c.nodes {
			was := n.inactive.Swap(inactive)
			t.onAbort(func() { n.inactive.Store(was) })
			t.recheck(n)
			for _, e := range n.parents {
				if e.root != nil {
					t.edges = append(t.edges, e)
				}
			}
		}
		return nil
	})
}

func (g *Graph) inactivate(ctx context.Context, pick func() []*Node) error {
	verdicts := make(map[*Root]error)
	for {
		g.mu.Lock()
		set, ask, err := inactivable(pick(), verdicts)
		busy := claimed(set)
		if len(ask) == 0 && err == nil && busy == nil {
			c := g.claim(set)
			g.mu.Unlock()
			return g.end(c, g.inactivateSet(ctx, c))
		}
		g.mu.Unlock()
		switch {
		case len(ask) > 0:
			for _, r := range ask {
				verdicts[r] = r.mayInactivate()
			}
		case err != nil:
			return err
		default:
			if err := busy.wait(ctx); err != nil {
				return err
			}
			clear(verdicts)
		}
	}
}

// inactivable lists the nodes that an inactivation of nodes makes inactive, parents
// first, and the roots above whose verdict is missing. Graph.mu is held.
func inactivable(nodes []*Node, verdicts map[*Root]error) (set []*Node, ask []*Root, err error) {
	for _, n := range topological(nodes...) {
		if !n.Active() {
			continue
		}
		var held error
		for _, e := range n.parents {
			switch {
			case e.root == nil:
				if e.parent.Active() && !slices.Contains(set, e.parent) {
					held = refuse(ErrPermission, "Node has active parent node")
				}
			default:
				verdict, asked := verdicts[e.root]
				if !asked {
					ask = append(ask, e.root)
				}
				if verdict != nil {
					held = verdict
				}
			}
		}
		switch {
		case held == nil:
			set = append(set, n)
		case slices.Contains(nodes, n):
			return nil, ask, held
		}
	}
	return set, ask, nil
}

// mayInactivate returns why the node must stay active, or nil.
func (r *Root) mayInactivate() error {
	if r.allowInactive == nil {
		return refuse(ErrPermission, "Failed to inactivate node: Operation not permitted: %s needs it", r.user)
	}
	if err := r.allowInactive(); err != nil {
		return refuse(errors.Join(ErrPermission, err), "Failed to inactivate node: Operation not permitted: %s: %v", r.user, err)
	}
	return nil
}

// inactivateSet makes nodes inactive, claimed in the order of parents first, whose
// parents are inactive or among them.
func (g *Graph) inactivateSet(ctx context.Context, c *claim) error {
	if len(c.nodes) == 0 {
		return nil
	}
	return g.drained(ctx, func() error {
		for _, n := range c.nodes {
			if a, ok := n.inst.(Activator); ok {
				if err := a.Inactivate(ctx); err != nil {
					return fmt.Errorf("Failed to inactivate node '%s': %w", n.name, err)
				}
			}
		}
		if err := g.setInactive(context.WithoutCancel(ctx), c, true); err != nil {
			return err
		}
		for _, n := range c.nodes {
			n.deactivate()
		}
		return nil
	}, c.nodes...)
}

// Peek tells what the node would be if it were active now. It opens nothing for
// good and takes no lock. It waits while the node is being activated or inactivated.
func (n *Node) Peek(ctx context.Context) (Peeked, error) {
	g := n.graph
	c, err := g.claimWhenFree(ctx, func() []*Node { return storage(n) })
	if err != nil {
		return Peeked{}, err
	}
	var p Peeked
	for _, below := range slices.Backward(c.nodes) {
		if err == nil {
			p, err = below.peek(ctx)
		}
	}
	return p, g.end(c, err)
}

// peek is Peek for a node whose children were peeked at.
func (n *Node) peek(ctx context.Context) (Peeked, error) {
	if p, ok := n.inst.(Peeker); ok && !n.Active() {
		return p.Peek(ctx)
	}
	p := Peeked{Size: n.Size()}
	if i, ok := n.inst.(Inspector); ok {
		p.Info = i.Inspect()
	}
	return p, nil
}

// PeekSize is what [Root.Size] would be if the node were active now; see [Node.Peek].
func (r *Root) PeekSize(ctx context.Context) (int64, error) {
	p, err := r.Node().Peek(ctx)
	a := r.Limits().RequestAlignment
	return (p.Size + a - 1) &^ (a - 1), err
}
