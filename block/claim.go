package block

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// A claim is the right to change nodes as wholes, with I/O, while Graph.mu is not
// held: activation, inactivation, reopen. A node has one claim at a time. Under it
// the links of the node stay, but for users that leave.
type claim struct {
	nodes      []*Node       // with a reference each, but in a transaction
	activating bool          // what it is for
	failed     *Node         // whose driver could not be activated
	done       chan struct{} // closed at its end
	err        error         // how it went; to be read when done is closed
}

// claimed is a claim on one of the nodes, or nil; a transaction that asks drivers has
// one too. Graph.mu is held.
func claimed(nodes []*Node) *claim {
	for _, n := range nodes {
		switch {
		case n.claim != nil:
			return n.claim
		case n.tx != nil:
			return n.tx.hold
		}
	}
	return nil
}

// claim takes nodes that nobody is at work on. Graph.mu is held.
func (g *Graph) claim(nodes []*Node) *claim {
	c := &claim{nodes: slices.Clone(nodes), done: make(chan struct{})}
	for _, n := range nodes {
		n.claim = c
		n.refs++
	}
	return c
}

// claimWhenFree waits until nobody is at work on what pick lists, and takes it.
// pick is called with Graph.mu held, perhaps several times.
func (g *Graph) claimWhenFree(ctx context.Context, pick func() []*Node) (*claim, error) {
	for {
		g.mu.Lock()
		nodes := pick()
		busy := claimed(nodes)
		if busy == nil {
			c := g.claim(nodes)
			g.mu.Unlock()
			return c, nil
		}
		g.mu.Unlock()
		if err := busy.wait(ctx); err != nil {
			return nil, err
		}
	}
}

// wait waits for the end of somebody else's claim.
func (c *claim) wait(ctx context.Context) error {
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("another change of node '%s' did not end: %w", c.nodes[0].name, ctx.Err())
	}
}

// end gives the claim up and returns err, which is how it went, with what went wrong
// in closing nodes that nobody uses any more.
func (g *Graph) end(c *claim, err error) error {
	g.mu.Lock()
	for _, n := range c.nodes {
		n.claim = nil
	}
	g.mu.Unlock()
	c.err = err
	close(c.done)
	errs := []error{err}
	for _, n := range c.nodes {
		errs = append(errs, g.Release(context.Background(), n))
	}
	return errors.Join(errs...)
}
