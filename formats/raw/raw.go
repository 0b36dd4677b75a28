// Package raw is the format driver "raw": the bytes of a file or device as they
// are, or a window of them.
package raw

import (
	"context"
	"fmt"
	"math"
	"sync/atomic"

	"github.com/nbdserve/nbdserve/block"
)

// probeSize is how much of an image tells its format, in bytes (rule G8).
const probeSize = 512

// Options select a window of the file. The zero value is the whole file.
type Options struct {
	Offset int64 `option:"offset,strong"` // bytes at the start that do not belong to the image; not negative
	Size   int64 `option:"size,strong"`   // length of the image in bytes; 0: up to the end of the file, also when that grows
}

// Driver returns the driver "raw". It has one child, "file".
//
// probe tells which format the first 512 bytes of an image look like. It guards
// images whose format was guessed (Config.Probed): there a write that would make
// the next guess come out as something else than "raw" fails with EPERM, because
// a guest could have the host read any file as a backing file that way.
func Driver(probe func(head []byte) string) *block.Driver {
	return &block.Driver{
		Name:       "raw",
		Kind:       block.Format,
		Mutable:    []string{"offset", "size"},
		NewOptions: func() any { return new(Options) },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			n, err := open(ctx, o, probe)
			if err != nil {
				return nil, err
			}
			return n, nil
		},
	}
}

// A node is an open image.
type node struct {
	file   *block.Edge
	window atomic.Pointer[Options]  // changes only with nothing in flight
	probe  func(head []byte) string // nil: the first sector may become anything
}

var (
	_ block.Instance       = (*node)(nil)
	_ block.Zeroer         = (*node)(nil)
	_ block.Discarder      = (*node)(nil)
	_ block.StatusReporter = (*node)(nil)
	_ block.Locator        = (*node)(nil)
	_ block.Prefetcher     = (*node)(nil)
	_ block.Truncater      = (*node)(nil)
	_ block.Reopener       = (*node)(nil)
)

func open(ctx context.Context, o *block.Opening, probe func([]byte) string) (*node, error) {
	opts, ok := o.Config.Options.(*Options)
	if !ok {
		return nil, fmt.Errorf("the 'raw' block driver takes options of type *raw.Options, not %T", o.Config.Options)
	}
	if err := opts.check(); err != nil {
		return nil, err
	}
	role := block.RoleFiltered | block.RolePrimary
	if *opts != (Options{}) {
		role = block.RoleData | block.RolePrimary
	}
	file, err := o.OpenChild(ctx, "file", role, nil)
	if err != nil {
		return nil, err
	}
	if err := opts.inside(file.Size()); err != nil {
		return nil, err
	}
	n := &node{file: file}
	n.window.Store(opts)
	if o.Config.Probed {
		n.probe = probe
	}
	return n, nil
}

func (o *Options) check() error {
	if o.Offset < 0 || o.Size < 0 {
		return fmt.Errorf("Offset (%d) and size (%d) cannot be negative: %w", o.Offset, o.Size, block.ErrInvalid)
	}
	return nil
}

// inside checks the window against the size of the file.
func (o *Options) inside(size int64) error {
	if o.Offset > size {
		return fmt.Errorf("Offset (%d) cannot be greater than size of the containing file (%d)", o.Offset, size)
	}
	if o.Size > size-o.Offset {
		return fmt.Errorf("The sum of offset (%d) and size (%d) has to be smaller or equal to the actual size of the containing file (%d)",
			o.Offset, o.Size, size)
	}
	return nil
}

func (n *node) offset() int64 { return n.window.Load().Offset }

// Limits implements [block.Instance]. They are the child's, as seen through the window.
func (n *node) Limits() block.Limits {
	l := n.file.Limits()
	// The child's seam takes what flags and alignments there are, and pads.
	l.WriteFlags = block.FUA | block.WriteUnchanged
	l.ZeroFlags = block.FUA | block.MayUnmap | block.NoFallback | block.WriteUnchanged
	if n.offset()%l.RequestAlignment != 0 {
		l.RequestAlignment = n.offset() & -n.offset()
	}
	if n.probe != nil {
		l.RequestAlignment = max(l.RequestAlignment, probeSize)
	}
	// Guest blocks do not fall on blocks of the device.
	if n.offset()%max(1, l.DiscardAlignment) != 0 {
		l.DiscardAlignment = 0
	}
	if n.offset()%max(1, l.ZeroAlignment) != 0 {
		l.ZeroAlignment = 0
	}
	return l
}

// Size implements [block.Instance].
func (n *node) Size() int64 {
	w := n.window.Load()
	if w.Size > 0 {
		return w.Size
	}
	return max(0, n.file.Size()-w.Offset)
}

// Flush implements [block.Instance].
func (n *node) Flush(ctx context.Context) error { return n.file.Flush(ctx) }

// Close implements [block.Instance].
func (n *node) Close(context.Context) error { return nil }

// clip tells how much of length bytes at off lies before the end. The rest is
// padding up to the request alignment.
func (n *node) clip(off, length int64) int64 { return max(0, min(length, n.Size()-off)) }

// room tells how much of a write of length bytes at off is to be done: not the
// padding of the last block. A window cannot grow.
func (n *node) room(off, length int64) (int64, error) {
	inside := n.clip(off, length)
	if inside == length {
		return length, nil
	}
	a := n.Limits().RequestAlignment
	if off+length <= (n.Size()+a-1)&^(a-1) {
		return inside, nil
	}
	if n.window.Load().Size > 0 {
		return 0, fmt.Errorf("the image is a window of fixed size, %d bytes: %w", n.window.Load().Size, block.ErrNoSpace)
	}
	return length, nil
}

// ReadAt implements [block.Instance].
func (n *node) ReadAt(ctx context.Context, p []byte, off int64) error {
	inside := n.clip(off, int64(len(p)))
	clear(p[inside:])
	if inside == 0 {
		return nil
	}
	n.file.Debug(block.EventReadAIO)
	return n.file.ReadAt(ctx, p[:inside], n.offset()+off)
}

// WriteAt implements [block.Instance].
func (n *node) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	// Requests are aligned to the probed sector, so they hold all of it or nothing.
	if n.probe != nil && off == 0 && len(p) > 0 {
		if format := n.probe(p[:min(len(p), probeSize)]); format != "raw" {
			return &probeError{format}
		}
	}
	inside, err := n.room(off, int64(len(p)))
	if err != nil || inside == 0 {
		return err
	}
	n.file.Debug(block.EventWriteAIO)
	return n.file.WriteAt(ctx, p[:inside], n.offset()+off, flags)
}

// A probeError refuses a write that would turn a guessed raw image into something else.
type probeError struct{ format string }

func (e *probeError) Error() string {
	return fmt.Sprintf("write would make the first sector look like format '%s', and the format of the image was guessed to be raw; name the format to allow this", e.format)
}

func (e *probeError) Unwrap() error { return block.ErrPermission }

// WriteZeroes implements [block.Zeroer].
func (n *node) WriteZeroes(ctx context.Context, off, length int64, flags block.ReqFlags) error {
	inside, err := n.room(off, length)
	if err != nil || inside == 0 {
		return err
	}
	return n.file.WriteZeroes(ctx, n.offset()+off, inside, flags)
}

// Discard implements [block.Discarder].
func (n *node) Discard(ctx context.Context, off, length int64) error {
	inside := n.clip(off, length)
	if inside == 0 {
		return nil
	}
	return n.file.Discard(ctx, n.offset()+off, inside)
}

// Prefetch implements [block.Prefetcher].
func (n *node) Prefetch(ctx context.Context, off, length int64) error {
	return n.file.Prefetch(ctx, n.offset()+off, n.clip(off, length))
}

// BlockStatus implements [block.StatusReporter]. Where the data lies is what the file says.
func (n *node) BlockStatus(ctx context.Context, off, length int64, precise bool) (block.Extent, error) {
	x, err := n.file.BlockStatus(ctx, n.offset()+off, length, precise)
	// The end of the file need not be the end of the image; the seam knows that one.
	x.Flags &^= block.StatusEOF
	return x, err
}

// Locate implements [block.Locator].
func (n *node) Locate(shard block.Shard, off, length int64) block.Location {
	return n.file.Locate(shard, n.offset()+off, length)
}

// Truncate implements [block.Truncater]. A window of fixed size keeps it.
func (n *node) Truncate(ctx context.Context, size int64) error {
	if n.window.Load().Size > 0 {
		return fmt.Errorf("Cannot resize fixed-size raw disks: %w", block.ErrNotSupported)
	}
	if size > math.MaxInt64-n.offset() {
		return fmt.Errorf("Disk size too large for this driver: %w", block.ErrRange)
	}
	return n.file.Truncate(ctx, n.offset()+size)
}

// PrepareReopen implements [block.Reopener]. A window can move and change its size. The
// whole file stays the whole file, because what the node is to it is fixed.
func (n *node) PrepareReopen(_ context.Context, r *block.Reopening) (block.Switch, error) {
	was, now := n.window.Load(), r.Config.Options.(*Options)
	if err := now.check(); err != nil {
		return nil, err
	}
	if whole := (Options{}); (*now == whole) != (*was == whole) {
		if now.Offset != was.Offset {
			return nil, block.CannotChange("offset")
		}
		return nil, block.CannotChange("size")
	}
	return &move{n, was, now}, nil
}

// A move gives a node another window.
type move struct {
	node     *node
	was, now *Options
}

// Apply implements [block.Switch].
func (m *move) Apply(context.Context) error {
	m.node.window.Store(m.now)
	return m.now.inside(m.node.file.Size())
}

// Commit implements [block.Switch].
func (m *move) Commit() {}

// Abort implements [block.Switch].
func (m *move) Abort() { m.node.window.Store(m.was) }
