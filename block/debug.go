package block

import (
	"fmt"
	"slices"
)

// A DebugEvent is a point in the work of a node at which a test may have errors happen
// or requests stop (rule G27). The names are QEMU's; those that nothing here tells of
// are left out.
type DebugEvent uint8

const (
	EventNone DebugEvent = iota // when the node that is told was opened
	EventL1Update
	EventL2Load
	EventL2Update
	EventL2AllocWrite
	EventReadAIO
	EventReadBackingAIO
	EventReadCompressed
	EventWriteAIO
	EventCowRead
	EventCowWrite
	EventReftableLoad
	EventReftableUpdate
	EventReftableGrow
	EventRefblockLoad
	EventRefblockUpdatePart
	EventRefblockAlloc
	EventClusterAlloc
	EventClusterFree
	EventFlushToDisk // of the node that is told
	EventPwritevRMWHead
	EventPwritevRMWAfterHead
	EventPwritevRMWTail
	EventPwritevRMWAfterTail
	EventPwritev
	EventPwritevZero
	EventPwritevDone
	EventCorWrite
	NumDebugEvents
)

var debugEventNames = [NumDebugEvents]string{
	"none", "l1_update", "l2_load", "l2_update", "l2_alloc_write", "read_aio", "read_backing_aio", "read_compressed", "write_aio",
	"cow_read", "cow_write", "reftable_load", "reftable_update", "reftable_grow", "refblock_load", "refblock_update_part",
	"refblock_alloc", "cluster_alloc", "cluster_free", "flush_to_disk", "pwritev_rmw_head",
	"pwritev_rmw_after_head", "pwritev_rmw_tail", "pwritev_rmw_after_tail", "pwritev", "pwritev_zero", "pwritev_done", "cor_write",
}

// String is QEMU's name of the event.
func (e DebugEvent) String() string { return debugEventNames[e] }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (e *DebugEvent) UnmarshalText(text []byte) error {
	i := slices.Index(debugEventNames[:], string(text))
	if i < 0 {
		return fmt.Errorf("no event '%s' is told here: %w", text, ErrInvalid)
	}
	*e = DebugEvent(i)
	return nil
}

// A Debugger is told of events; the driver blkdebug is one.
type Debugger interface {
	// DebugEvent is called in the middle of the work of a request. It may block.
	DebugEvent(e DebugEvent)
	// Breakpoint has the next request that meets e stop, once, until Resume(tag).
	Breakpoint(e DebugEvent, tag string)
	// RemoveBreakpoint takes the breakpoints of a tag away, and the requests that they
	// have stopped go on. The error wraps ENOENT if there are neither.
	RemoveBreakpoint(tag string) error
	// Resume lets a request go on that has stopped at a breakpoint. The error wraps
	// ENOENT if there is none.
	Resume(tag string) error
	// Suspended tells whether a request has stopped at a breakpoint.
	Suspended(tag string) bool
}

// Debug tells the child of an event. It costs nothing unless the child is a [Debugger].
func (e *Edge) Debug(ev DebugEvent) { e.Node().debug(ev) }

func (n *Node) debug(ev DebugEvent) {
	if n.debugger != nil {
		n.debugger.DebugEvent(ev)
	}
}

func (n *Node) debugModify(head bool, h DebugEvent, tail bool, t DebugEvent) {
	if head {
		n.debug(h)
	}
	if tail {
		n.debug(t)
	}
}

// Debugger finds the first node that takes breakpoints from n down, along the children
// that stand for their parents. It is nil if there is none.
func (n *Node) Debugger() Debugger {
	if n.debugger != nil {
		return n.debugger
	}
	for _, e := range n.Children() {
		if e.role&RolePrimary != 0 {
			return e.Node().Debugger()
		}
	}
	return nil
}
