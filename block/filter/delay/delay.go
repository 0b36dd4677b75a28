// Package delay is the filter driver "delay": requests take longer. It is named after
// nbdkit's filter; QEMU has none.
package delay

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/filter"
)

// A Duration is an option: "50ms", "10us", "1.5s", and a plain number is in seconds.
type Duration time.Duration

// UnmarshalText implements [encoding.TextUnmarshaler].
func (d *Duration) UnmarshalText(text []byte) error {
	s := string(text)
	if _, err := strconv.ParseFloat(s, 64); err == nil {
		s += "s"
	}
	v, err := time.ParseDuration(s)
	if err != nil || v < 0 {
		return fmt.Errorf("'%s' is no delay: give seconds, or a number with ns, us, ms, s, m or h", text)
	}
	*d = Duration(v)
	return nil
}

// String implements [fmt.Stringer].
func (d Duration) String() string { return time.Duration(d).String() }

// Options say for how long each kind of request waits before it goes on.
type Options struct {
	Read    Duration `option:"delay-read"`
	Write   Duration `option:"delay-write"`
	Zero    Duration `option:"delay-zero"`
	Trim    Duration `option:"delay-trim"`
	Flush   Duration `option:"delay-flush"`
	Extents Duration `option:"delay-extents"` // block status
	Cache   Duration `option:"delay-cache"`
	Open    Duration `option:"delay-open"`
	Close   Duration `option:"delay-close"`
}

// Driver returns the driver "delay". It has one child, "file".
func Driver() *block.Driver {
	return &block.Driver{
		Name:       "delay",
		Kind:       block.Filter,
		NewOptions: func() any { return new(Options) },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			opts, ok := o.Config.Options.(*Options)
			if !ok {
				return nil, fmt.Errorf("the 'delay' block driver takes options of type *delay.Options, not %T", o.Config.Options)
			}
			p, err := filter.Open(ctx, o, "file")
			if err != nil {
				return nil, err
			}
			wait(ctx, opts.Open)
			return &node{p, *opts}, nil
		},
	}
}

type node struct {
	filter.Pass
	opts Options
}

// wait holds a request up. It is over the same whether others wait too, so it needs no worker.
func wait(ctx context.Context, d Duration) {
	if d > 0 {
		block.Yield(ctx, func() { time.Sleep(time.Duration(d)) })
	}
}

// ReadAt implements [block.Instance].
func (n *node) ReadAt(ctx context.Context, p []byte, off int64) error {
	wait(ctx, n.opts.Read)
	return n.Pass.ReadAt(ctx, p, off)
}

// WriteAt implements [block.Instance].
func (n *node) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	wait(ctx, n.opts.Write)
	return n.Pass.WriteAt(ctx, p, off, flags)
}

// WriteZeroes implements [block.Zeroer].
func (n *node) WriteZeroes(ctx context.Context, off, length int64, flags block.ReqFlags) error {
	wait(ctx, n.opts.Zero)
	return n.Pass.WriteZeroes(ctx, off, length, flags)
}

// Discard implements [block.Discarder].
func (n *node) Discard(ctx context.Context, off, length int64) error {
	wait(ctx, n.opts.Trim)
	return n.Pass.Discard(ctx, off, length)
}

// Flush implements [block.Instance].
func (n *node) Flush(ctx context.Context) error {
	wait(ctx, n.opts.Flush)
	return n.Pass.Flush(ctx)
}

// BlockStatus implements [block.StatusReporter].
func (n *node) BlockStatus(ctx context.Context, off, length int64, precise bool) (block.Extent, error) {
	wait(ctx, n.opts.Extents)
	return n.Pass.BlockStatus(ctx, off, length, precise)
}

// Prefetch implements [block.Prefetcher].
func (n *node) Prefetch(ctx context.Context, off, length int64) error {
	wait(ctx, n.opts.Cache)
	return n.Pass.Prefetch(ctx, off, length)
}

// Locate implements [block.Locator]. Where reads are delayed, it does not know.
func (n *node) Locate(shard block.Shard, off, length int64) block.Location {
	if n.opts.Read > 0 {
		return block.Location{Kind: block.LocateAsk, Length: length}
	}
	return n.Pass.Locate(shard, off, length)
}

// Close implements [block.Instance].
func (n *node) Close(ctx context.Context) error {
	wait(ctx, n.opts.Close)
	return n.Pass.Close(ctx)
}
