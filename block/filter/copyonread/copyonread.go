// Package copyonread is the filter driver "copy-on-read": what is read and not held by
// the image below, but by its backing files, is copied into the image.
//
// A read that has to copy fails if the copy cannot be written, because the disk is full
// for example. That is QEMU's rule: a copy that was asked for and fails in silence would
// leave an image that seems to be independent of its backing files and is not.
package copyonread

import (
	"context"
	"fmt"
	"math"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/filter"
)

// Options of a copy-on-read node.
type Options struct {
	// Bottom is the name of the last node of the backing chain that is copied from;
	// what lies below it is read and not copied. It stays in the chain while the
	// copy-on-read node is open. "": all is copied.
	Bottom string `option:"bottom,strong"`
}

// Driver returns the driver "copy-on-read". It has one child, "file".
func Driver() *block.Driver {
	return &block.Driver{
		Name:       "copy-on-read",
		Kind:       block.Filter,
		NewOptions: func() any { return new(Options) },
		Needs:      func(*block.Config) (perm, unshared block.Perm) { return block.PermWriteUnchanged, 0 },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			return open(ctx, o)
		},
	}
}

func open(ctx context.Context, o *block.Opening) (_ block.Instance, err error) {
	opts, ok := o.Config.Options.(*Options)
	if !ok {
		return nil, fmt.Errorf("the 'copy-on-read' block driver takes options of type *copyonread.Options, not %T", o.Config.Options)
	}
	if o.Config.ReadOnly {
		return nil, errReadOnly
	}
	p, err := filter.Open(ctx, o, "file")
	if err != nil {
		return nil, err
	}
	if o.Config.ReadOnly {
		return nil, errReadOnly // by auto-read-only
	}
	n := &node{Pass: p, depth: math.MaxInt}
	if opts.Bottom != "" {
		if err := n.freeze(o, opts.Bottom); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				n.thaw()
			}
		}()
	}
	// Requests that are in flight now do not keep out of the way of copies.
	if err := p.Child.Node().Grace().Wait(ctx); err != nil {
		return nil, err
	}
	return n, nil
}

// errReadOnly is returned when an image cannot be copied to.
var errReadOnly = &refusal{"Can't use copy-on-read on read-only device", block.ErrReadOnly}

type refusal struct {
	text string
	err  error
}

func (r *refusal) Error() string { return r.text }
func (r *refusal) Unwrap() error { return r.err }

// A node is a copy-on-read node.
type node struct {
	filter.Pass
	depth int    // of the last layer that is copied from
	thaw  func() // nil: nothing is frozen

	copied block.Counter // bytes
}

var _ interface {
	block.Instance
	block.Zeroer
	block.Discarder
	block.StatusReporter
	block.Locator
	block.Prefetcher
	block.Truncater
	block.Reopener
	block.Measurer
} = (*node)(nil)

// freeze keeps the chain down to the node called name, and finds out how deep that is.
func (n *node) freeze(o *block.Opening, name string) error {
	refuse := func(format string) error {
		return &refusal{fmt.Sprintf(format, name), block.ErrInvalid}
	}
	bottom := o.Node().Graph().Lookup(name)
	switch {
	case bottom == nil:
		return refuse("Bottom node '%s' not found")
	case bottom.SkipFilters() != bottom:
		return refuse("Bottom node '%s' is a filter")
	}
	thaw, err := o.Node().Graph().Freeze(n.Child.Node(), bottom)
	if err != nil {
		return err
	}
	n.thaw, n.depth = thaw, 0
	for _, l := range n.Child.Node().Chain() {
		if l == bottom {
			break
		}
		if l.SkipFilters() == l {
			n.depth++
		}
	}
	return nil
}

// copyUp copies what is missing in the image.
func (n *node) copyUp(ctx context.Context, off, length int64) error {
	k, err := n.Child.CopyUp(ctx, off, length, n.depth)
	n.copied.Add(block.ShardOf(ctx), k)
	return err
}

// ReadAt implements [block.Instance].
func (n *node) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := n.copyUp(ctx, off, n.Inside(off, int64(len(p)))); err != nil {
		return err
	}
	return n.Pass.ReadAt(ctx, p, off)
}

// Prefetch implements [block.Prefetcher]: it copies, too.
func (n *node) Prefetch(ctx context.Context, off, length int64) error {
	if err := n.copyUp(ctx, off, length); err != nil {
		return err
	}
	return n.Pass.Prefetch(ctx, off, length)
}

// Locate implements [block.Locator]. What is to be copied has to be read.
func (n *node) Locate(shard block.Shard, off, length int64) block.Location {
	l := n.Pass.Locate(shard, off, length)
	if l.Depth > 0 && int(l.Depth) <= n.depth {
		return block.Location{Kind: block.LocateAsk, Length: l.Length}
	}
	return l
}

// PrepareReopen implements [block.Reopener].
func (n *node) PrepareReopen(_ context.Context, r *block.Reopening) (block.Switch, error) {
	if r.Config.ReadOnly {
		return nil, &refusal{fmt.Sprintf("Can't set node '%s' to r/o with copy-on-read enabled", r.Node.Name()), block.ErrReadOnly}
	}
	return block.NoSwitch{}, nil
}

// Measurements implements [block.Measurer].
func (n *node) Measurements() []block.Measurement {
	return []block.Measurement{{Name: "copy_on_read_bytes_total", Help: "Bytes that were copied into the image.", Value: float64(n.copied.Load()), Counter: true}}
}

// Close implements [block.Instance].
func (n *node) Close(ctx context.Context) error {
	if n.thaw != nil {
		n.thaw()
	}
	return n.Pass.Close(ctx)
}
