package hostdev

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"time"
)

const (
	nodeSlots = 64   // blocking system calls in flight of one node, at most
	ownSlots  = 8    // of these, those that no other node can take
	allTokens = 1024 // blocking system calls in flight beyond the nodes' own slots, of all nodes
)

// An opKind is the kind of a blocking system call.
type opKind uint8

const (
	opRead opKind = iota
	opWrite
	opSync
	opZero
	opDiscard
	opSeek
	opTruncate
	opPrefetch
)

var opNames = [...]string{"read", "write", "flush", "zero", "discard", "seek", "truncate", "prefetch"}

// tokens are what the nodes of the process compete for. A node that waits for
// one is woken when one comes back.
type tokens struct {
	limit    int32
	used     atomic.Int32
	starving atomic.Int32 // len(waiting)

	mu      sync.Mutex // below workers.mu
	waiting []*workers // may hold some that wait no more
}

var processTokens = &tokens{limit: allTokens}

func (t *tokens) try() bool {
	for {
		used := t.used.Load()
		if used >= t.limit {
			return false
		}
		if t.used.CompareAndSwap(used, used+1) {
			return true
		}
	}
}

// put gives a token back. It must be called without workers.mu.
func (t *tokens) put() {
	t.used.Add(-1)
	for t.starving.Load() > 0 && t.used.Load() < t.limit {
		if w := t.pop(); w != nil {
			w.mu.Lock()
			w.serve()
			w.mu.Unlock()
		}
	}
}

func (t *tokens) pop() *workers {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.waiting) == 0 {
		return nil
	}
	w := t.waiting[0]
	t.waiting = t.waiting[:copy(t.waiting, t.waiting[1:])]
	t.starving.Store(int32(len(t.waiting)))
	return w
}

// register makes the next put serve w. Whoever registers must try once more
// afterwards, for a token that came back just before.
func (t *tokens) register(w *workers) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waiting = append(t.waiting, w)
	t.starving.Store(int32(len(t.waiting)))
}

// workers bounds the blocking system calls of one node: at most nodeSlots at a
// time, of which ownSlots are always the node's and the others need a token of
// the process. Who finds none waits in order of arrival.
type workers struct {
	tokens *tokens

	mu     sync.Mutex
	busy   uint64 // bit i: slot i is in use
	shared uint64 // bit i: slot i holds a token
	kind   [nodeSlots]opKind
	start  [nodeSlots]time.Time
	queue  []waiter
}

type waiter struct {
	kind opKind
	got  chan int // receives the slot; holds one value
}

// Channels of waiters are reused.
var waiterChannels = sync.Pool{New: func() any { return make(chan int, 1) }}

// begin returns a slot, to be given back with end. It must not be called while holding one.
func (w *workers) begin(kind opKind) int {
	w.mu.Lock()
	if len(w.queue) == 0 {
		if slot, ok := w.take(kind); ok {
			w.mu.Unlock()
			return slot
		}
	}
	got := waiterChannels.Get().(chan int)
	w.queue = append(w.queue, waiter{kind, got})
	w.serve()
	w.mu.Unlock()
	slot := <-got
	waiterChannels.Put(got)
	return slot
}

// end gives a slot back, to the next in the queue if there is one.
func (w *workers) end(slot int) {
	bit := uint64(1) << slot
	w.mu.Lock()
	if len(w.queue) > 0 {
		w.hand(slot)
		w.mu.Unlock()
		return
	}
	token := w.shared&bit != 0
	w.busy &^= bit
	w.shared &^= bit
	w.mu.Unlock()
	if token {
		w.tokens.put()
	}
}

// take finds a free slot. mu is held.
func (w *workers) take(kind opKind) (int, bool) {
	slot := bits.TrailingZeros64(^w.busy)
	if slot == nodeSlots {
		return 0, false
	}
	bit := uint64(1) << slot
	if bits.OnesCount64(w.busy&^w.shared) >= ownSlots {
		if !w.tokens.try() {
			return 0, false
		}
		w.shared |= bit
	}
	w.busy |= bit
	w.kind[slot], w.start[slot] = kind, time.Now()
	return slot, true
}

// hand gives a slot that is in use to the first in the queue. mu is held.
func (w *workers) hand(slot int) {
	next := w.queue[0]
	w.queue = w.queue[:copy(w.queue, w.queue[1:])]
	w.kind[slot], w.start[slot] = next.kind, time.Now()
	next.got <- slot
}

// serve hands free slots to the queue, and registers for a token if one is missing. mu is held.
func (w *workers) serve() {
	registered := false
	for len(w.queue) > 0 {
		slot, ok := w.take(w.queue[0].kind)
		switch {
		case ok:
			w.hand(slot)
		case registered || w.busy == ^uint64(0):
			return
		default:
			w.tokens.register(w)
			registered = true
		}
	}
}

// inFlight tells how many calls run and how many wait for a slot.
func (w *workers) inFlight() (running, waiting int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return bits.OnesCount64(w.busy), len(w.queue)
}

// oldest names the call that has been running longest.
func (w *workers) oldest() (what string, age time.Duration, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	first := -1
	for busy := w.busy; busy != 0; busy &= busy - 1 {
		i := bits.TrailingZeros64(busy)
		if first < 0 || w.start[i].Before(w.start[first]) {
			first = i
		}
	}
	if first < 0 {
		return "", 0, false
	}
	return opNames[w.kind[first]], time.Since(w.start[first]), true
}
