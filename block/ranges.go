package block

import "sync/atomic"

// writeRanges are the writes in flight on a node whose request alignment is
// larger than 1. An unaligned write reads and rewrites its first and last block,
// and must not do so while another write changes them: it is serialised with all
// that overlap.
type writeRanges struct {
	tracked atomic.Bool // writes are entered whatever the alignment

	active map[*writeRange]struct{}
}

type writeRange struct {
	off, end int64 // aligned, bytes
	serial   bool
	done     chan struct{}
}

// beginWrite waits until no conflicting write is in flight in [off, off+n), and
// enters this one. serial says that it rewrites bytes that it was not asked to.
func (n *Node) beginWrite(off, length int64, serial bool) *writeRange {
	w := &writeRange{off: off, end: off + length, serial: serial, done: make(chan struct{})}
	for {
		n.rmu.Lock()
		other := n.writes.conflict(w)
		if other == nil {
			if n.writes.active == nil {
				n.writes.active = make(map[*writeRange]struct{})
			}
			n.writes.active[w] = struct{}{}
			n.rmu.Unlock()
			return w
		}
		n.rmu.Unlock()
		// A waiting request is not entered, so that two never wait for each other.
		<-other.done
	}
}

func (n *Node) endWrite(w *writeRange) {
	n.rmu.Lock()
	delete(n.writes.active, w)
	n.rmu.Unlock()
	close(w.done)
}

func (r *writeRanges) conflict(w *writeRange) *writeRange {
	for o := range r.active {
		if (w.serial || o.serial) && w.off < o.end && o.off < w.end {
			return o
		}
	}
	return nil
}
