package block

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
)

// writeRanges are the writes in flight on a node whose request alignment is larger
// than 1, or that is tracked. A write that rewrites bytes that it was not asked to,
// because it is not aligned, and one with [Serialising] exclude all that overlap.
type writeRanges struct {
	tracked  atomic.Bool // writes are entered whatever the alignment
	complete atomic.Bool // all in flight were entered

	mu      sync.Mutex
	active  *writeRange // list of those in flight
	serials int         // those in flight that exclude others
}

type writeRange struct {
	off, end   int64 // aligned, bytes
	serial     bool
	done       chan struct{} // made by the first that waits for this one
	prev, next *writeRange
}

var writeRangePool = sync.Pool{New: func() any { return new(writeRange) }}

// beginWrite waits until no conflicting write is in flight in [off, off+n), and
// enters this one. serial says that it excludes all that overlap.
func (n *Node) beginWrite(off, length int64, serial bool) *writeRange {
	r := &n.writes
	w := writeRangePool.Get().(*writeRange)
	*w = writeRange{off: off, end: off + length, serial: serial}
	r.mu.Lock()
	for {
		other := r.conflict(w)
		if other == nil {
			break
		}
		// A waiting request is not entered, so that two never wait for each other.
		if other.done == nil {
			other.done = make(chan struct{})
		}
		done := other.done
		r.mu.Unlock()
		<-done
		r.mu.Lock()
	}
	if w.next = r.active; w.next != nil {
		w.next.prev = w
	}
	r.active = w
	if serial {
		r.serials++
	}
	r.mu.Unlock()
	return w
}

func (n *Node) endWrite(w *writeRange) {
	r := &n.writes
	r.mu.Lock()
	if w.prev != nil {
		w.prev.next = w.next
	} else {
		r.active = w.next
	}
	if w.next != nil {
		w.next.prev = w.prev
	}
	if w.serial {
		r.serials--
	}
	if w.done != nil {
		close(w.done)
	}
	r.mu.Unlock()
	writeRangePool.Put(w)
}

// conflict returns a write in flight that w must wait for, or nil. r.mu is held.
func (r *writeRanges) conflict(w *writeRange) *writeRange {
	if !w.serial && r.serials == 0 {
		return nil
	}
	for o := r.active; o != nil; o = o.next {
		if (w.serial || o.serial) && w.off < o.end && o.off < w.end {
			return o
		}
	}
	return nil
}

// TrackWrites makes n know of the writes in flight, which [Serialising] needs; it stays
// so. It waits until the requests have ended that were in flight at the roots above n
// when it did not yet; ctx bounds that.
func (g *Graph) TrackWrites(ctx context.Context, n *Node) error {
	if n.writes.complete.Load() {
		return nil
	}
	n.writes.tracked.Store(true)
	if err := n.Grace().Wait(ctx); err != nil {
		return fmt.Errorf("requests to node '%s' did not end: %w", n.name, err)
	}
	n.writes.complete.Store(true)
	return nil
}

// ReadSerialised is [Edge.ReadAt] while no write to these bytes is in flight, so that
// what it returns is of one moment. The node must be tracked.
func (e *Edge) ReadSerialised(ctx context.Context, p []byte, off int64) error {
	n, length := e.Node(), int64(len(p))
	if err := n.readable(off, length); err != nil {
		return n.fail("read", off, length, err)
	}
	w, err := n.enter(off, length, Serialising)
	if err != nil {
		return n.fail("read", off, length, err)
	}
	defer n.endWrite(w)
	return e.ReadAt(ctx, p, off)
}
