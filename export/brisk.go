package export

import (
	"context"
	"errors"
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/nbdserve/nbdserve/internal/iostat"
)

// While short writes are quick, as with a page cache below, the reader runs them
// itself: to call a worker costs more than the write. When one of them takes long
// after all, another goroutine becomes the reader, so that it holds up nothing.

const (
	// briskMax is the longest WRITE that the reader runs itself, in bytes.
	briskMax = 16 << 10
	// briskTime is the mean duration up to which it does. No disk is as quick.
	briskTime = 10 * time.Microsecond
	// briskClip is the most that one write counts for in the mean: one that only
	// waited for a processor should not change it much.
	briskClip = 100 * time.Microsecond
	// relieveAfter is how long the reader may be at one write, twice that at most.
	relieveAfter = 2 * time.Millisecond
)

// errRelieved ends a reader in whose place another one reads.
var errRelieved = errors.New("relieved")

// A brisk is what the reader needs to run writes itself.
type brisk struct {
	mean  atomic.Int64  // of the duration of short writes, ns; 0: none has ended yet
	self  *worker       // of the reader; nil before it is needed
	turn  atomic.Uint64 // counts up when the reader begins a write and when it ends: odd between
	alarm *time.Timer   // calls relieve
	armed atomic.Bool
	seen  atomic.Uint64 // the turn that relieve has met last
	end   chan error    // capacity 1: why reading ended, from a reader that has relieved another
}

// ended notes how long a short write took.
func (b *brisk) ended(d time.Duration) {
	m := b.mean.Load()
	if m == 0 {
		m = int64(briskClip)
	}
	b.mean.Store(max(1, m+(int64(min(d, briskClip))-m)/16))
}

// short tells whether r is a write that could be quick.
func (r *request) short() bool {
	return r.cmd == cmdWrite && r.buf != nil && r.length <= briskMax && r.flags&flagFUA == 0
}

// brisklyRuns tells whether the reader should run r itself.
func (c *conn) brisklyRuns(r *request) bool {
	m := c.brisk.mean.Load()
	return r.short() && m > 0 && m <= int64(briskTime) && !c.waiting.Load() && c.ownWorker()
}

// ownWorker gives the reader a place for the age of its write.
func (c *conn) ownWorker() bool {
	if c.brisk.self != nil {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if ^c.staff.places == 0 {
		return false
	}
	w := &worker{c: c, n: bits.TrailingZeros64(^c.staff.places)}
	w.ctx = c.lane.YieldingContext(context.Background(), w.relieve)
	c.staff.places |= 1 << w.n
	c.brisk.self = w
	return true
}

// runHere runs an admitted write in the reader, which has made room for the answer.
func (c *conn) runHere(r *request) error {
	b, w := &c.brisk, c.brisk.self
	turn := b.turn.Add(1)
	w.turn = turn
	if !b.armed.Load() {
		b.armed.Store(true)
		if b.alarm == nil {
			b.alarm = time.AfterFunc(relieveAfter, c.relieve)
		} else {
			b.alarm.Reset(relieveAfter)
		}
	}
	c.stat.Start(iostat.Write, 1)
	began := c.s.now()
	w.track(r, began)
	err := c.root.WriteAt(w.ctx, r.data, r.off, 0)
	w.untrack()
	end := c.s.now()
	b.ended(end - began)
	moved := r.length
	if err != nil {
		moved = 0
	}
	c.stat.Finish(iostat.Write, err == nil, moved, end-r.arrived)
	r.drop(&c.budget)
	c.lane.End(r.adm)
	mine := b.turn.CompareAndSwap(turn, turn+1)
	if mine && err == nil {
		in := &c.in
		appendSimple(in.buf[in.used:in.used], r.cookie, 0)
		in.used += simpleSize
		in.count++
		return nil
	}
	if err != nil {
		w.r = *r
		w.failed(err)
	} else {
		w.reply.text = appendSimple(w.reply.text, r.cookie, 0)
	}
	w.reply.requests++
	c.budget.requests.Add(1)
	c.out.put(&w.reply)
	if mine {
		return nil
	}
	c.out.flush()
	c.mu.Lock()
	c.staff.places &^= 1 << w.n
	c.done(1)
	c.mu.Unlock()
	return errRelieved
}

// relieve is called every relieveAfter while the reader runs writes. It puts another
// goroutine in its place if it is at the same one as last time.
func (c *conn) relieve() {
	b := &c.brisk
	turn := b.turn.Load()
	same := b.seen.Swap(turn) == turn
	switch {
	case !same:
		b.alarm.Reset(relieveAfter)
	case turn&1 == 0:
		b.armed.Store(false)
		// A write that began meanwhile may have found it armed.
		if b.turn.Load() != turn && b.armed.CompareAndSwap(false, true) {
			b.alarm.Reset(relieveAfter)
		}
	default:
		c.replaceReader(turn)
	}
}

// relieve is called when the write of the reader, which w is, begins to wait for
// something that needs no worker, and when it goes on.
func (w *worker) relieve(n int) {
	if n > 0 {
		w.c.replaceReader(w.turn)
	}
}

// replaceReader puts another goroutine in the place of the reader, unless the write of
// that turn has ended or it was replaced already.
func (c *conn) replaceReader(turn uint64) {
	b := &c.brisk
	c.mu.Lock()
	if !b.turn.CompareAndSwap(turn, turn+1) {
		c.mu.Unlock()
		b.alarm.Reset(relieveAfter)
		return
	}
	c.busy++
	b.self = nil
	b.mean.Store(int64(briskClip))
	b.armed.Store(false)
	c.workers.Add(1)
	c.mu.Unlock()
	go func() {
		defer c.workers.Done()
		if err := c.readRequests(); err != errRelieved {
			b.end <- err
		}
	}()
}
