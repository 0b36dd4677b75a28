// Package null is the protocol drivers "null-co" and "null-aio": a disk that stores
// nothing and reads as zero, to test and measure what lies above it. The two names are
// one driver; QEMU has both.
package null

import (
	"context"
	"fmt"
	"time"

	"github.com/nbdserve/nbdserve/block"
)

// Options of a null node.
type Options struct {
	// Size is the size in bytes. [1 GiB]
	Size int64 `option:"size,strong"`
	// LatencyNs is how long each request takes, in nanoseconds.
	LatencyNs int64 `option:"latency-ns"`
	// ReadZeroes says that the disk is known to be zero: it is one hole, and holes are
	// served without reading. Without it the disk is data, which happens to be zero:
	// QEMU leaves there in the buffer what was in it, and so tells clients of each other.
	ReadZeroes bool `option:"read-zeroes"`
}

// Drivers returns the drivers "null-co" and "null-aio".
func Drivers() []*block.Driver {
	var list []*block.Driver
	for _, name := range []string{"null-co", "null-aio"} {
		list = append(list, &block.Driver{
			Name:       name,
			Kind:       block.Protocol,
			NewOptions: func() any { return &Options{Size: 1 << 30} },
			Open:       open,
		})
	}
	return list
}

func open(_ context.Context, o *block.Opening) (block.Instance, error) {
	opts, ok := o.Config.Options.(*Options)
	switch {
	case !ok:
		return nil, fmt.Errorf("the '%s' block driver takes options of type *null.Options, not %T", o.Config.Driver, o.Config.Options)
	case opts.LatencyNs < 0:
		return nil, fmt.Errorf("latency-ns is invalid: %w", block.ErrInvalid)
	case opts.Size < 0:
		return nil, fmt.Errorf("size is invalid: %w", block.ErrInvalid)
	}
	return &disk{node: o.Node(), size: opts.Size, latency: time.Duration(opts.LatencyNs), zeroes: opts.ReadZeroes}, nil
}

// A disk is a null node. Its fields are fixed.
type disk struct {
	node    *block.Node
	size    int64
	latency time.Duration
	zeroes  bool
}

var _ interface {
	block.Instance
	block.Zeroer
	block.Discarder
	block.StatusReporter
	block.Locator
	block.HostFile
	block.Reopener
} = (*disk)(nil)

// wait takes the time that a request takes.
func (d *disk) wait(ctx context.Context) {
	if d.latency > 0 {
		block.Yield(ctx, func() { time.Sleep(d.latency) })
	}
}

// ReadAt implements [block.Instance].
func (d *disk) ReadAt(ctx context.Context, p []byte, _ int64) error {
	clear(p)
	d.wait(ctx)
	return nil
}

// WriteAt implements [block.Instance].
func (d *disk) WriteAt(ctx context.Context, _ []byte, _ int64, _ block.ReqFlags) error {
	d.wait(ctx)
	return nil
}

// WriteZeroes implements [block.Zeroer].
func (d *disk) WriteZeroes(ctx context.Context, _, _ int64, _ block.ReqFlags) error {
	d.wait(ctx)
	return nil
}

// Discard implements [block.Discarder].
func (d *disk) Discard(ctx context.Context, _, _ int64) error {
	d.wait(ctx)
	return nil
}

// Flush implements [block.Instance].
func (d *disk) Flush(ctx context.Context) error {
	d.wait(ctx)
	return nil
}

// BlockStatus implements [block.StatusReporter].
func (d *disk) BlockStatus(_ context.Context, off, n int64, _ bool) (block.Extent, error) {
	x := block.Extent{Flags: block.StatusAllocated | block.StatusOffset | block.StatusData, Length: n, Offset: off, File: d.node}
	if d.zeroes {
		x.Flags ^= block.StatusData | block.StatusZero
	}
	return x, nil
}

// Locate implements [block.Locator].
func (d *disk) Locate(_ block.Shard, off, n int64) block.Location {
	l := block.Location{Length: n}
	switch {
	case d.latency > 0:
	case d.zeroes:
		l.Kind = block.LocateZero
	default:
		l.Kind, l.Stable, l.Offset, l.File = block.LocateData, true, off, d
	}
	return l
}

// ReadNowait implements [block.HostFile].
func (d *disk) ReadNowait(p []byte, _ int64) int {
	clear(p)
	return len(p)
}

// Fd implements [block.HostFile].
func (d *disk) Fd() int { return -1 }

// Size implements [block.Instance].
func (d *disk) Size() int64 { return d.size }

// Limits implements [block.Instance].
func (d *disk) Limits() block.Limits {
	return block.Limits{
		RequestAlignment: 1, MemAlignment: 1,
		WriteFlags: block.FUA, ZeroFlags: block.FUA | block.MayUnmap | block.NoFallback,
	}
}

// PrepareReopen implements [block.Reopener]: no option of its own can change.
func (d *disk) PrepareReopen(context.Context, *block.Reopening) (block.Switch, error) {
	return block.NoSwitch{}, nil
}

// Close implements [block.Instance].
func (d *disk) Close(context.Context) error { return nil }
