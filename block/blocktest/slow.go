package blocktest

import (
	"context"
	"sync"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/filter"
)

// A Gate holds requests of a slow node until the test lets them go.
type Gate struct {
	mu      sync.Mutex
	hold    [numOps]bool
	held    []*heldRequest // oldest first
	changed chan struct{}  // closed and replaced when held changes
}

type heldRequest struct {
	op    Op
	letGo chan struct{}
}

// NewGate returns a gate that holds nothing yet.
func NewGate() *Gate { return &Gate{changed: make(chan struct{})} }

// Hold makes the requests of these kinds that arrive from now on wait.
func (g *Gate) Hold(ops ...Op) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, op := range ops {
		g.hold[op] = true
	}
}

// Held counts the requests that wait now.
func (g *Gate) Held() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.held)
}

// WaitHeld waits until n requests or more are held at once, or ctx ends.
func (g *Gate) WaitHeld(ctx context.Context, n int) error {
	for {
		g.mu.Lock()
		held, changed := len(g.held), g.changed
		g.mu.Unlock()
		if held >= n {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Release lets the n oldest held requests go, or all if there are fewer; later ones are still held.
func (g *Gate) Release(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	n = min(n, len(g.held))
	for _, h := range g.held[:n] {
		close(h.letGo)
	}
	g.held = g.held[n:]
	g.wake()
}

// ReleaseAll lets all held requests go and holds no more.
func (g *Gate) ReleaseAll() {
	g.mu.Lock()
	g.hold = [numOps]bool{}
	n := len(g.held)
	g.mu.Unlock()
	g.Release(n)
}

func (g *Gate) wake() {
	close(g.changed)
	g.changed = make(chan struct{})
}

// pass returns when a request of kind op may go on.
func (g *Gate) pass(op Op) {
	g.mu.Lock()
	if !g.hold[op] {
		g.mu.Unlock()
		return
	}
	h := &heldRequest{op, make(chan struct{})}
	g.held = append(g.held, h)
	g.wake()
	g.mu.Unlock()
	<-h.letGo
}

// SlowOptions configure a slow node.
type SlowOptions struct{ Gate *Gate }

// SlowConfig describes a writable slow node over child.
func SlowConfig(g *Gate, child *block.Config) *block.Config {
	return &block.Config{Driver: "slow", Unmap: true, Options: &SlowOptions{g}, Children: map[string]*block.Config{"file": child}}
}

// SlowDriver returns the driver "slow", a filter whose requests wait at a [Gate]
// before they reach the child.
func SlowDriver() *block.Driver {
	return &block.Driver{
		Name:       "slow",
		Kind:       block.Filter,
		NewOptions: func() any { return &SlowOptions{NewGate()} },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			f, err := filter.Open(ctx, o, "file")
			if err != nil {
				return nil, err
			}
			gate := o.Config.Options.(*SlowOptions).Gate
			gate.pass(OpOpen)
			return &slow{f, gate}, nil
		},
	}
}

type slow struct {
	filter.Pass
	gate *Gate
}

func (s *slow) ReadAt(ctx context.Context, p []byte, off int64) error {
	s.gate.pass(OpRead)
	return s.Pass.ReadAt(ctx, p, off)
}

func (s *slow) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	s.gate.pass(OpWrite)
	return s.Pass.WriteAt(ctx, p, off, flags)
}

func (s *slow) WriteZeroes(ctx context.Context, off, n int64, flags block.ReqFlags) error {
	s.gate.pass(OpZero)
	return s.Pass.WriteZeroes(ctx, off, n, flags)
}

func (s *slow) Discard(ctx context.Context, off, n int64) error {
	s.gate.pass(OpDiscard)
	return s.Pass.Discard(ctx, off, n)
}

func (s *slow) BlockStatus(ctx context.Context, off, n int64, precise bool) (block.Extent, error) {
	s.gate.pass(OpStatus)
	return s.Pass.BlockStatus(ctx, off, n, precise)
}

// Locate answers "ask me": what it would take is unknown.
func (s *slow) Locate(_ block.Shard, _, n int64) block.Location {
	return block.Location{Kind: block.LocateAsk, Length: n}
}

func (s *slow) Prefetch(ctx context.Context, off, n int64) error {
	s.gate.pass(OpPrefetch)
	return s.Pass.Prefetch(ctx, off, n)
}

func (s *slow) Truncate(ctx context.Context, size int64) error {
	s.gate.pass(OpTruncate)
	return s.Pass.Truncate(ctx, size)
}

func (s *slow) Flush(ctx context.Context) error {
	s.gate.pass(OpFlush)
	return s.Pass.Flush(ctx)
}

func (s *slow) Close(ctx context.Context) error {
	s.gate.pass(OpClose)
	return s.Pass.Close(ctx)
}
