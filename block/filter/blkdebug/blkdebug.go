// Package blkdebug is the filter driver "blkdebug": requests fail and stop where a test
// wants it.
package blkdebug

import (
	"context"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/filter"
)

// Options of a blkdebug node.
type Options struct {
	// Align is the request alignment, a power of two of at least 512; 0: the child's.
	Align int64 `option:"align"`
	// The limits of the node, multiples of its alignment; 0: the child's.
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
	State       int64            `option:"state"`       // only in this state; 0: in any
	IOType      IOType           `option:"iotype"`      // only requests of this kind
	Errno       int64            `option:"errno"`       // 0: EIO
	Sector      *int64           `option:"sector"`      // only requests that touch these 512 bytes; nil: all
	Once        bool             `option:"once"`        // the first such request only
	Immediately bool             `option:"immediately"` // QEMU: before others run; no meaning here
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

// Driver returns the driver "blkdebug". It has one child, "image".
func Driver() *block.Driver {
	return &block.Driver{
		Name:       "blkdebug",
		Kind:       block.Filter,
		NewOptions: func() any { return new(Options) },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			opts, ok := o.Config.Options.(*Options)
			if !ok {
				return nil, fmt.Errorf("the 'blkdebug' block driver takes options of type *blkdebug.Options, not %T", o.Config.Options)
			}
			_ = opts
			return filter.Open(ctx, o, "image")
		},
	}
}
