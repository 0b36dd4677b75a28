package export

import (
	"sync"
	"sync/atomic"
)

// reserveBytes is what each connection may hold without asking the pool.
const reserveBytes = 1 << 20

// A pool is memory that the connections of a server share, counted in bytes.
//
// Payloads are charged as they arrive, so connections could come to wait for each
// other with half a payload each. Therefore the one that has waited longest may
// overdraw until it has a whole request; nobody else may before that is paid back.
// A client that holds this right and sends nothing is cut by the payload timeout.
type pool struct {
	mu     sync.Mutex
	free   int64 // negative by what favour has overdrawn
	queue  []*budget
	favour *budget
}

// take charges n bytes to b, or puts b in the queue and says false.
func (p *pool) take(b *budget, n int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	first := len(p.queue) == 0 || p.queue[0] == b
	if first && p.free < n && p.free >= 0 && p.favour == nil {
		p.favour = b
	}
	if p.favour != b && (!first || p.free < n) {
		if !b.queued {
			b.queued = true
			p.queue = append(p.queue, b)
		}
		return false
	}
	p.free -= n
	p.unqueue(b)
	p.wakeFirst()
	return true
}

// unqueue takes b out of the queue. pool.mu is held.
func (p *pool) unqueue(b *budget) {
	if !b.queued {
		return
	}
	b.queued = false
	for i, o := range p.queue {
		if o == b {
			p.queue = append(p.queue[:i], p.queue[i+1:]...)
			return
		}
	}
}

// give returns n bytes and wakes the first who waits.
func (p *pool) give(n int64) {
	p.mu.Lock()
	p.free += n
	p.wakeFirst()
	p.mu.Unlock()
}

// leave says that b does not wait any more: it has got by without.
func (p *pool) leave(b *budget) {
	p.mu.Lock()
	p.unqueue(b)
	p.wakeFirst()
	p.mu.Unlock()
}

// settle says that b does not wait any more and is favoured no longer.
func (p *pool) settle(b *budget) {
	p.mu.Lock()
	p.unqueue(b)
	if p.favour == b {
		p.favour = nil
	}
	p.wakeFirst()
	p.mu.Unlock()
}

func (p *pool) wakeFirst() {
	if len(p.queue) > 0 {
		p.queue[0].poke()
	}
}

// A budget is what one connection holds: requests that are not answered yet, and
// bytes for their data. The reader takes and waits; whoever sends gives back.
type budget struct {
	pool        *pool
	maxRequests int64
	maxBytes    int64

	requests atomic.Int64
	starving atomic.Bool   // the reader waits on wake
	wake     chan struct{} // capacity 1

	mu    sync.Mutex
	bytes int64

	queued bool // guarded by pool.mu
	asked  bool // of the reader: it has been in need of the pool
}

func (b *budget) init(p *pool, maxRequests int, maxBytes int64) {
	b.pool, b.maxRequests, b.maxBytes = p, int64(maxRequests), maxBytes
	b.wake = make(chan struct{}, 1)
}

func (b *budget) poke() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// beyond tells how much of n bytes the pool has to lend.
func beyond(n int64) int64 { return max(0, n-reserveBytes) }

// tryBytes takes n bytes if they can be had now.
func (b *budget) tryBytes(n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.bytes+n > b.maxBytes && b.bytes > 0 {
		return false
	}
	if lend := beyond(b.bytes+n) - beyond(b.bytes); lend > 0 {
		b.asked = true
		if !b.pool.take(b, lend) {
			return false
		}
	} else if b.asked {
		b.pool.leave(b)
	}
	b.bytes += n
	return true
}

// wait makes the reader wait until try succeeds. It is tried again whenever
// something was given back, or poke was called; false means that hopeless said so.
func (b *budget) wait(try, hopeless func() bool) bool {
	for {
		if try() {
			return true
		}
		b.starving.Store(true)
		done := try() // what was given back before starving was set
		if !done && !hopeless() {
			<-b.wake
		}
		b.starving.Store(false)
		if done || hopeless() {
			return done
		}
	}
}

// charge takes n bytes whether they can be had or not, for what is held already.
func (b *budget) charge(n int64) {
	b.mu.Lock()
	lend := beyond(b.bytes+n) - beyond(b.bytes)
	b.bytes += n
	b.mu.Unlock()
	if lend > 0 {
		b.pool.mu.Lock()
		b.pool.free -= lend
		b.pool.mu.Unlock()
	}
}

// settled tells that the reader holds no part of a request.
func (b *budget) settled() {
	if b.asked {
		b.asked = false
		b.pool.settle(b)
	}
}

// give returns requests and bytes.
func (b *budget) give(requests, bytes int64) {
	if bytes > 0 {
		b.mu.Lock()
		lent := beyond(b.bytes) - beyond(b.bytes-bytes)
		b.bytes -= bytes
		b.mu.Unlock()
		if lent > 0 {
			b.pool.give(lent)
		}
	}
	if requests > 0 {
		b.requests.Add(-requests)
	}
	if b.starving.Load() {
		b.poke()
	}
}
