// Package filter has what the drivers of kind filter share.
package filter

import (
	"context"

	"github.com/nbdserve/nbdserve/block"
)

// Pass passes every request on to a child. Filters embed it and replace what they change.
type Pass struct {
	// Child is the node filtered. It is set once.
	Child *block.Edge
	// Align is the request alignment of the filter where that is larger than the child's.
	Align int64
}

// Open opens the child called name that the new node filters.
func Open(ctx context.Context, o *block.Opening, name string) (Pass, error) {
	e, err := o.OpenChild(ctx, name, block.RoleFiltered|block.RolePrimary, nil)
	return Pass{Child: e}, err
}

// Inside tells how much of n bytes at off is not padding of the last block, which the
// child does not have.
func (p Pass) Inside(off, n int64) int64 {
	size, a := p.Child.Size(), p.Limits().RequestAlignment
	if off+n > size && off+n <= (size+a-1)&^(a-1) {
		return max(0, size-off)
	}
	return n
}

// ReadAt implements [block.Instance].
func (p Pass) ReadAt(ctx context.Context, b []byte, off int64) error {
	n := p.Inside(off, int64(len(b)))
	clear(b[n:])
	if n == 0 {
		return nil
	}
	return p.Child.ReadAt(ctx, b[:n], off)
}

// WriteAt implements [block.Instance].
func (p Pass) WriteAt(ctx context.Context, b []byte, off int64, flags block.ReqFlags) error {
	n := p.Inside(off, int64(len(b)))
	if n == 0 {
		return nil
	}
	return p.Child.WriteAt(ctx, b[:n], off, flags)
}

// WriteZeroes implements [block.Zeroer].
func (p Pass) WriteZeroes(ctx context.Context, off, n int64, flags block.ReqFlags) error {
	if n = p.Inside(off, n); n == 0 {
		return nil
	}
	return p.Child.WriteZeroes(ctx, off, n, flags)
}

// Discard implements [block.Discarder].
func (p Pass) Discard(ctx context.Context, off, n int64) error {
	if n = p.Inside(off, n); n == 0 {
		return nil
	}
	return p.Child.Discard(ctx, off, n)
}

// BlockStatus implements [block.StatusReporter].
func (p Pass) BlockStatus(ctx context.Context, off, n int64, precise bool) (block.Extent, error) {
	return p.Child.BlockStatus(ctx, off, n, precise)
}

// Locate implements [block.Locator].
func (p Pass) Locate(shard block.Shard, off, n int64) block.Location {
	return p.Child.Locate(shard, off, n)
}

// Prefetch implements [block.Prefetcher].
func (p Pass) Prefetch(ctx context.Context, off, n int64) error {
	return p.Child.Prefetch(ctx, off, n)
}

// Truncate implements [block.Truncater].
func (p Pass) Truncate(ctx context.Context, size int64) error { return p.Child.Truncate(ctx, size) }

// Flush implements [block.Instance].
func (p Pass) Flush(ctx context.Context) error { return p.Child.Flush(ctx) }

// Size implements [block.Instance].
func (p Pass) Size() int64 { return p.Child.Size() }

// Limits implements [block.Instance].
func (p Pass) Limits() block.Limits {
	l := p.Child.Limits()
	l.RequestAlignment = max(l.RequestAlignment, p.Align)
	l.WriteFlags |= block.WriteUnchanged
	l.ZeroFlags |= block.WriteUnchanged
	return l
}

// PrepareReopen implements [block.Reopener] for filters whose own options do not change.
func (p Pass) PrepareReopen(context.Context, *block.Reopening) (block.Switch, error) {
	return block.NoSwitch{}, nil
}

// Close implements [block.Instance].
func (p Pass) Close(context.Context) error { return nil }
