package export

import (
	"context"
	"time"
)

// A queue is a list of requests, first in first out.
type queue struct {
	ring    []request // a power of two of them
	head, n int
}

func (q *queue) push(r *request) {
	if q.n == len(q.ring) {
		grown := make([]request, max(16, 2*len(q.ring)))
		for i := range q.n {
			grown[i] = q.ring[(q.head+i)&(len(q.ring)-1)]
		}
		q.ring, q.head = grown, 0
	}
	q.ring[(q.head+q.n)&(len(q.ring)-1)] = *r
	q.n++
}

func (q *queue) pop(r *request) {
	slot := &q.ring[q.head]
	*r = *slot
	slot.data, slot.buf, slot.payload = nil, nil, nil
	q.head = (q.head + 1) & (len(q.ring) - 1)
	q.n--
}

// maxWorkers bounds Options.Workers, so that each has a place of its own for the
// age of its request.
const maxWorkers = 64

// workerIdle is how long a worker without work stays.
const workerIdle = 5 * time.Second

// A staff is the workers of a connection. conn.mu guards it.
type staff struct {
	idle   []*worker // the one that became idle last is the last
	places uint64    // bit i: worker number i exists
	count  int
	// yielded counts the workers whose request waits for something that needs no
	// worker. They come on top of Options.Workers: as many as requests may be in flight.
	yielded int
	// coming is set while a worker that was called has not looked at the queue yet:
	// nobody else needs to be called, and it will send the answers that are ready.
	coming bool
	// sender is set while somebody sends for the workers, which must not wait; unsent
	// while one of them has left something since.
	sender, unsent bool
}

// A worker runs requests of one connection, one at a time.
type worker struct {
	c     *conn
	ctx   context.Context
	n     int       // its number, the place of its request in the statistics; maxWorkers: it has none
	call  chan bool // capacity 1: true: look at the queue; false: end
	since time.Duration
	turn  uint64 // of the reader, see brisk
	r     request
	reply batch
}

// track notes that the worker runs r since began.
func (w *worker) track(r *request, began time.Duration) {
	if w.n < maxWorkers {
		w.c.stat.Track(w.n, r.op(), r.off, r.length, w.c.s.wall(began))
	}
}

func (w *worker) untrack() {
	if w.n < maxWorkers {
		w.c.stat.Untrack(w.n)
	}
}

// yield is called when the worker's request begins to wait for something that needs no
// worker (1), and when it goes on (-1).
func (w *worker) yield(n int) {
	c := w.c
	c.mu.Lock()
	c.staff.yielded += n
	var next *worker
	if n > 0 {
		next = c.summon()
	}
	c.mu.Unlock()
	next.start()
}

// enqueue hands an admitted request to the workers.
func (c *conn) enqueue(r *request) {
	c.stat.Start(r.op(), 1)
	c.mu.Lock()
	c.busy++
	c.queue.push(r)
	w := c.summon()
	c.mu.Unlock()
	w.start()
}

// summon finds a worker to be called for the queue: nil when it is empty, one is
// coming already, or all are at work. conn.mu is held; start is called without.
func (c *conn) summon() *worker {
	st := &c.staff
	switch {
	case st.coming || c.queue.n == 0:
		return nil
	case len(st.idle) > 0:
		w := st.idle[len(st.idle)-1]
		st.idle = st.idle[:len(st.idle)-1]
		st.coming = true
		return w
	case st.count-st.yielded >= c.s.opt.Workers:
		return nil
	}
	w := &worker{c: c}
	w.ctx = c.lane.YieldingContext(context.Background(), w.yield)
	for st.places&(1<<w.n) != 0 {
		w.n++
	}
	st.places |= 1 << w.n
	st.count++
	st.coming = true
	c.workers.Add(1)
	return w
}

// start calls a worker that summon has returned.
func (w *worker) start() {
	switch {
	case w == nil:
	case w.call == nil:
		w.call = make(chan bool, 1)
		go w.run()
	default:
		w.call <- true
	}
}

func (w *worker) run() {
	c := w.c
	defer c.workers.Done()
	c.mu.Lock()
	c.staff.coming = false
	for {
		if c.queue.n == 0 {
			c.mu.Unlock()
			c.out.flush()
			c.mu.Lock()
		}
		if c.queue.n == 0 {
			if c.ending {
				break
			}
			w.since = c.s.now()
			c.staff.idle = append(c.staff.idle, w)
			c.mu.Unlock()
			if !<-w.call {
				return // whoever dismissed it has struck it off
			}
			c.mu.Lock()
			c.staff.coming = false
			continue
		}
		c.queue.pop(&w.r)
		next := c.summon()
		coming := c.staff.coming
		c.mu.Unlock()
		next.start()
		// Nobody else would send what is ready while this request runs. It must not
		// wait for the client: if that is needed, somebody else does it.
		if !coming && !c.out.tryFlush() {
			c.sendElsewhere()
		}
		w.execute()
		c.mu.Lock()
		c.done(1)
		if c.staff.count-c.staff.yielded > c.s.opt.Workers {
			break // others were called while its request waited
		}
	}
	c.staff.strike(w)
	c.mu.Unlock()
	c.out.flush()
}

// sendElsewhere sends what is ready while the caller, a worker, does something else.
func (c *conn) sendElsewhere() {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := &c.staff
	st.unsent = true
	if st.sender {
		return
	}
	st.sender = true
	c.workers.Add(1)
	go func() {
		defer c.workers.Done()
		c.mu.Lock()
		defer c.mu.Unlock()
		for st.unsent {
			st.unsent = false
			c.mu.Unlock()
			c.out.flush()
			c.mu.Lock()
		}
		st.sender = false
	}()
}

// strike takes w off the staff: it will not look at the queue any more, so it must
// not be counted on. conn.mu is held.
func (st *staff) strike(w *worker) {
	st.count--
	st.places &^= 1 << w.n
}

// done notes that n requests have ended. conn.mu is held.
func (c *conn) done(n int) {
	c.busy -= n
	if c.busy == 0 {
		c.hush()
	}
}

// hush wakes finish.
func (c *conn) hush() {
	select {
	case c.quiet <- struct{}{}:
	default:
	}
}

// dismissAll ends the workers. Nothing is queued any more.
func (c *conn) dismissAll() { c.dismiss(func(*worker) bool { return true }) }

// dismissIdle ends the workers that had nothing to do for long.
func (c *conn) dismissIdle(now time.Duration) {
	c.dismiss(func(w *worker) bool { return now-w.since > workerIdle })
}

// dismiss ends the idle workers up to the first, in the order in which they became
// idle, that is not to go.
func (c *conn) dismiss(goes func(*worker) bool) {
	c.mu.Lock()
	var gone []*worker
	for len(c.staff.idle) > 0 && goes(c.staff.idle[0]) {
		w := c.staff.idle[0]
		gone = append(gone, w)
		c.staff.idle = append(c.staff.idle[:0], c.staff.idle[1:]...)
		c.staff.strike(w)
	}
	c.mu.Unlock()
	for _, w := range gone {
		w.call <- false
	}
}

// park puts a request that was not admitted behind those that wait already.
func (c *conn) park(r *request) {
	c.mu.Lock()
	if c.gone || c.expired {
		refuse := c.expired && !c.gone
		c.mu.Unlock()
		c.discard(r, refuse)
		return
	}
	c.busy++
	c.parked.push(r)
	c.waiting.Store(true)
	// The gate may have opened since it was asked; then nobody will call resume.
	w := c.admitParked()
	c.mu.Unlock()
	w.start()
}

// resume is called when a drain has ended.
func (c *conn) resume() {
	c.mu.Lock()
	w := c.admitParked()
	c.mu.Unlock()
	w.start()
}

// admitParked admits waiting requests in their order, and returns the worker to be
// called. conn.mu is held.
func (c *conn) admitParked() *worker {
	for c.parked.n > 0 {
		adm, ok := c.lane.Begin()
		if !ok {
			return c.summon()
		}
		var r request
		c.parked.pop(&r)
		r.adm = adm
		c.stat.Start(r.op(), 1)
		c.queue.push(&r)
	}
	c.waiting.Store(false)
	return c.summon()
}

// discard ends a request that was not begun, with NBD_ESHUTDOWN or without an answer.
func (c *conn) discard(r *request, answer bool) {
	r.drop(&c.budget)
	if !answer {
		c.budget.give(1, r.charge)
		return
	}
	b := batch{requests: 1, bytes: r.charge}
	c.errorReply(&b, r.cookie, nbdESHUTDOWN, ErrStopped.Error())
	c.out.put(&b)
}

// leaveParked drops what waits for the end of a drain: the client has left.
func (c *conn) leaveParked() {
	c.mu.Lock()
	c.gone = true
	parked := c.takeAll(&c.parked)
	c.waiting.Store(false)
	c.mu.Unlock()
	c.discardAll(parked, false)
}

// expire refuses what is not begun, because the server cannot wait any more.
func (c *conn) expire() {
	c.mu.Lock()
	c.expired = true
	parked := c.takeAll(&c.parked)
	queued := c.takeAll(&c.queue)
	c.waiting.Store(false)
	c.mu.Unlock()
	for i := range queued {
		c.stat.Finish(queued[i].op(), false, 0, c.s.now()-queued[i].arrived)
		c.lane.End(queued[i].adm)
	}
	c.discardAll(append(parked, queued...), true)
	c.budget.poke()
	c.hush()
}

// takeAll empties a queue. conn.mu is held.
func (c *conn) takeAll(q *queue) []request {
	rs := make([]request, q.n)
	for i := range rs {
		q.pop(&rs[i])
	}
	return rs
}

func (c *conn) discardAll(rs []request, answer bool) {
	for i := range rs {
		c.discard(&rs[i], answer)
	}
	if len(rs) > 0 {
		c.mu.Lock()
		c.done(len(rs))
		c.mu.Unlock()
	}
}

// hopeless tells that the reader waits in vain.
func (c *conn) hopeless() bool {
	if c.t.aborted() {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.expired
}
