// Package blkdebug is the filter driver "blkdebug": requests fail and stop where a test
// wants it.
package blkdebug

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"syscall"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/filter"
)

// Options of a blkdebug node. The subset of QEMU's that makes sense here; others are
// refused by name.
type Options struct {
	// Align is the request alignment, a power of two; 0: the child's.
	Align int64 `option:"align"`
	// The limits of the node in bytes, multiples of its alignment; 0: the child's.
	MaxTransfer  int64 `option:"max-transfer"`
	OptWriteZero int64 `option:"opt-write-zero"`
	MaxWriteZero int64 `option:"max-write-zero"`
	OptDiscard   int64 `option:"opt-discard"`
	MaxDiscard   int64 `option:"max-discard"`

	InjectError []InjectError `option:"inject-error"`
	SetState    []SetState    `option:"set-state"`
}

// An InjectError has requests fail once an event has happened.
type InjectError struct {
	Event       block.DebugEvent `option:"event"`
	State       int64            `option:"state"`       // the event counts only in this state; 0: in any
	IOType      IOType           `option:"iotype"`      // only requests of this kind
	Errno       int64            `option:"errno"`       // 0: EIO
	Sector      *int64           `option:"sector"`      // only requests that touch byte Sector*512; nil: all
	Once        bool             `option:"once"`        // only the first such request
	Immediately bool             `option:"immediately"` // QEMU: before other requests run; requests do not wait for each other here
}

// A SetState changes the state, which is 1 at first, when an event happens.
type SetState struct {
	Event    block.DebugEvent `option:"event"`
	State    int64            `option:"state"` // only in this state; 0: in any
	NewState int64            `option:"new_state"`
}

// An IOType is a kind of request.
type IOType uint8

const (
	AnyIO IOType = iota // all but block status
	Read
	Write
	WriteZeroes
	Discard
	Flush
	BlockStatus
)

var ioTypeNames = [...]string{"", "read", "write", "write-zeroes", "discard", "flush", "block-status"}

// String is QEMU's name of the kind.
func (t IOType) String() string { return ioTypeNames[t] }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (t *IOType) UnmarshalText(text []byte) error {
	for i, name := range ioTypeNames {
		if i > 0 && name == string(text) {
			*t = IOType(i)
			return nil
		}
	}
	return fmt.Errorf("Invalid iotype '%s': %w", text, block.ErrInvalid)
}

// Driver returns the driver "blkdebug". It has one child, "image". Its nodes are
// [block.Debugger]s.
func Driver() *block.Driver {
	return &block.Driver{
		Name:       "blkdebug",
		Kind:       block.Filter,
		Children:   []string{"image"},
		NewOptions: func() any { return new(Options) },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			opts, ok := o.Config.Options.(*Options)
			if !ok {
				return nil, fmt.Errorf("the 'blkdebug' block driver takes options of type *blkdebug.Options, not %T", o.Config.Options)
			}
			p, err := filter.Open(ctx, o, "image")
			if err != nil {
				return nil, err
			}
			if err := opts.check(p.Limits().RequestAlignment); err != nil {
				return nil, err
			}
			p.Align = opts.Align
			n := &node{Pass: p, opts: opts, state: 1}
			for i := range opts.InjectError {
				n.inject = append(n.inject, &opts.InjectError[i])
			}
			n.DebugEvent(block.EventNone)
			return n, nil
		},
	}
}

// maxAlign bounds a request alignment.
const maxAlign = 64 << 10

// check tells which limit cannot be, above a child of that alignment.
func (o *Options) check(childAlign int64) error {
	if o.Align < 0 || o.Align > maxAlign || o.Align&(o.Align-1) != 0 {
		return fmt.Errorf("Cannot meet constraints with align %d: %w", o.Align, block.ErrInvalid)
	}
	a := max(childAlign, o.Align)
	for _, l := range []struct {
		name      string
		value, of int64
	}{
		{"max-transfer", o.MaxTransfer, a},
		{"opt-write-zero", o.OptWriteZero, a},
		{"max-write-zero", o.MaxWriteZero, max(a, o.OptWriteZero)},
		{"opt-discard", o.OptDiscard, a},
		{"max-discard", o.MaxDiscard, max(a, o.OptDiscard)},
	} {
		if l.value < 0 || l.value%l.of != 0 {
			return fmt.Errorf("Cannot meet constraints with %s %d: %w", l.name, l.value, block.ErrInvalid)
		}
	}
	return nil
}

// A node is a blkdebug node.
type node struct {
	filter.Pass
	opts *Options // fixed

	mu          sync.Mutex // guards what follows
	state       int64
	inject      []*InjectError // those that were not used up
	active      []*InjectError // those whose event was the last that had any; later ones first
	breakpoints []breakpoint
	stopped     []stop // oldest first
}

type breakpoint struct {
	event block.DebugEvent
	tag   string
}

type stop struct {
	tag   string
	letGo chan struct{}
}

var _ interface {
	block.Instance
	block.Zeroer
	block.Discarder
	block.StatusReporter
	block.Locator
	block.Prefetcher
	block.Truncater
	block.Debugger
} = (*node)(nil)

// DebugEvent implements [block.Debugger].
func (n *node) DebugEvent(e block.DebugEvent) {
	n.mu.Lock()
	state := n.state
	var active []*InjectError
	for _, r := range n.inject {
		if r.Event == e && (r.State == 0 || r.State == state) {
			active = append(active, r)
		}
	}
	if active != nil {
		slices.Reverse(active)
		n.active = active
	}
	for _, r := range n.opts.SetState {
		if r.Event == e && (r.State == 0 || r.State == state) {
			n.state = r.NewState
		}
	}
	s := n.stopAt(e)
	n.mu.Unlock()
	if s != nil {
		<-s
	}
}

// stopAt uses a breakpoint up. mu is held.
func (n *node) stopAt(e block.DebugEvent) chan struct{} {
	for i, b := range n.breakpoints {
		if b.event == e {
			n.breakpoints = slices.Delete(n.breakpoints, i, i+1)
			s := stop{b.tag, make(chan struct{})}
			n.stopped = append(n.stopped, s)
			return s.letGo
		}
	}
	return nil
}

// Breakpoint implements [block.Debugger].
func (n *node) Breakpoint(e block.DebugEvent, tag string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.breakpoints = append(n.breakpoints, breakpoint{e, tag})
}

// RemoveBreakpoint implements [block.Debugger].
func (n *node) RemoveBreakpoint(tag string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	before := len(n.breakpoints)
	n.breakpoints = slices.DeleteFunc(n.breakpoints, func(b breakpoint) bool { return b.tag == tag })
	found := len(n.breakpoints) < before
	for n.resume(tag) {
		found = true
	}
	if !found {
		return fmt.Errorf("there is no breakpoint '%s': %w", tag, syscall.ENOENT)
	}
	return nil
}

// Resume implements [block.Debugger].
func (n *node) Resume(tag string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.resume(tag) {
		return fmt.Errorf("no request has stopped at breakpoint '%s': %w", tag, syscall.ENOENT)
	}
	return nil
}

// resume lets the oldest request that tag has stopped go on. mu is held.
func (n *node) resume(tag string) bool {
	i := slices.IndexFunc(n.stopped, func(s stop) bool { return s.tag == tag })
	if i < 0 {
		return false
	}
	close(n.stopped[i].letGo)
	n.stopped = slices.Delete(n.stopped, i, i+1)
	return true
}

// Suspended implements [block.Debugger].
func (n *node) Suspended(tag string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.ContainsFunc(n.stopped, func(s stop) bool { return s.tag == tag })
}

// fault is the error that a request is to fail with, or nil.
func (n *node) fault(t IOType, off, length int64) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i, r := range n.active {
		if r.IOType == AnyIO && t == BlockStatus || r.IOType != AnyIO && r.IOType != t {
			continue
		}
		if r.Sector != nil && (*r.Sector*512 < off || *r.Sector*512 >= off+length) {
			continue
		}
		if r.Once {
			n.active = slices.Delete(n.active, i, i+1)
			n.inject = slices.DeleteFunc(n.inject, func(o *InjectError) bool { return o == r })
		}
		errno := syscall.EIO
		if r.Errno != 0 {
			errno = syscall.Errno(r.Errno)
		}
		return fmt.Errorf("injected error: %w", errno)
	}
	return nil
}

// ReadAt implements [block.Instance].
func (n *node) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := n.fault(Read, off, int64(len(p))); err != nil {
		return err
	}
	return n.Pass.ReadAt(ctx, p, off)
}

// WriteAt implements [block.Instance].
func (n *node) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	if err := n.fault(Write, off, int64(len(p))); err != nil {
		return err
	}
	return n.Pass.WriteAt(ctx, p, off, flags)
}

// WriteZeroes implements [block.Zeroer].
func (n *node) WriteZeroes(ctx context.Context, off, length int64, flags block.ReqFlags) error {
	if err := n.fault(WriteZeroes, off, length); err != nil {
		return err
	}
	return n.Pass.WriteZeroes(ctx, off, length, flags)
}

// Discard implements [block.Discarder].
func (n *node) Discard(ctx context.Context, off, length int64) error {
	if err := n.fault(Discard, off, length); err != nil {
		return err
	}
	return n.Pass.Discard(ctx, off, length)
}

// Flush implements [block.Instance].
func (n *node) Flush(ctx context.Context) error {
	if err := n.fault(Flush, 0, 0); err != nil {
		return err
	}
	return n.Pass.Flush(ctx)
}

// BlockStatus implements [block.StatusReporter].
func (n *node) BlockStatus(ctx context.Context, off, length int64, precise bool) (block.Extent, error) {
	if err := n.fault(BlockStatus, off, length); err != nil {
		return block.Extent{}, err
	}
	return n.Pass.BlockStatus(ctx, off, length, precise)
}

// Locate implements [block.Locator]. It does not know, so that every read meets the faults.
func (n *node) Locate(_ block.Shard, _, length int64) block.Location {
	return block.Location{Kind: block.LocateAsk, Length: length}
}

// Limits implements [block.Instance].
func (n *node) Limits() block.Limits {
	l := n.Pass.Limits()
	for _, v := range []struct {
		of  *int64
		set int64
	}{
		{&l.MaxTransfer, n.opts.MaxTransfer}, {&l.ZeroAlignment, n.opts.OptWriteZero}, {&l.MaxZero, n.opts.MaxWriteZero},
		{&l.DiscardAlignment, n.opts.OptDiscard}, {&l.MaxDiscard, n.opts.MaxDiscard},
	} {
		if v.set != 0 {
			*v.of = v.set
		}
	}
	return l
}
