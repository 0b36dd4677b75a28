package export

import (
	"sync"

	"github.com/nbdserve/nbdserve/block"
)

// A part is data that goes between the bytes of a batch's text.
type part struct {
	after int    // bytes of text in front of it
	data  []byte // not empty
	whole []byte // buffer of block.GetBuffer to give back when data is sent, or nil
}

// A batch is answers in the order in which they are sent.
type batch struct {
	text            []byte // heads, statuses, error texts
	parts           []part
	requests, bytes int64 // to give back to the budget
}

func (b *batch) add(data, whole []byte) {
	b.parts = append(b.parts, part{len(b.text), data, whole})
}

func (b *batch) empty() bool { return len(b.text) == 0 && len(b.parts) == 0 }

// merge moves everything from o to the end of b.
func (b *batch) merge(o *batch) {
	base := len(b.text)
	b.text = append(b.text, o.text...)
	for _, p := range o.parts {
		p.after += base
		b.parts = append(b.parts, p)
	}
	b.requests += o.requests
	b.bytes += o.bytes
	o.reset()
}

// keepText is how much memory for texts a batch keeps for the next use, bytes.
const keepText = 64 << 10

func (b *batch) reset() {
	b.text = b.text[:0]
	if cap(b.text) > keepText {
		b.text = nil
	}
	clear(b.parts)
	b.parts = b.parts[:0]
	b.requests, b.bytes = 0, 0
}

// free gives the buffers back and forgets everything but what is owed to the budget.
func (b *batch) free() {
	for _, p := range b.parts {
		if p.whole != nil {
			block.PutBuffer(p.whole)
		}
	}
	clear(b.parts)
	b.text, b.parts = b.text[:0], b.parts[:0]
}

// buffers appends the pieces to send, in order.
func (b *batch) buffers(bufs [][]byte) [][]byte {
	from := 0
	for _, p := range b.parts {
		if p.after > from {
			bufs = append(bufs, b.text[from:p.after])
			from = p.after
		}
		bufs = append(bufs, p.data)
	}
	if len(b.text) > from {
		bufs = append(bufs, b.text[from:])
	}
	return bufs
}

// An output gathers the answers of a connection and sends them.
type output struct {
	t      transport
	budget *budget
	failed func() // called once when sending has failed

	mu      sync.Mutex
	pending batch
	sending bool // somebody is in transmit
	dead    bool // sending has failed

	// Of whoever is sending.
	out  batch    // what is being sent
	rest [][]byte // what is left of it; not empty between two sends if the first did not wait
	bufs [][]byte // memory for rest
}

// put adds the answers in b, and empties it.
func (o *output) put(b *batch) {
	o.mu.Lock()
	if o.dead {
		o.mu.Unlock()
		b.free()
		o.budget.give(b.requests, b.bytes)
		b.reset()
		return
	}
	o.pending.merge(b)
	o.mu.Unlock()
}

// flush sends what is there, waiting for the client if need be. If somebody is
// sending already, it is left to that one. It must not be called with an admitted
// request in hand: that would hold up a drain.
func (o *output) flush() { o.transmit(true) }

// tryFlush sends what can be sent without waiting. False means that something is
// left, and that somebody has to call flush.
func (o *output) tryFlush() bool { return o.transmit(false) }

func (o *output) transmit(wait bool) bool {
	o.mu.Lock()
	if o.sending {
		o.mu.Unlock()
		return true
	}
	o.sending = true
	for !o.dead && (len(o.rest) > 0 || !o.pending.empty()) {
		if len(o.rest) == 0 {
			o.pending, o.out = o.out, o.pending
			o.bufs = o.out.buffers(o.bufs[:0])
			o.rest = o.bufs
		}
		o.mu.Unlock()
		var err error
		o.rest, err = o.t.send(o.rest, wait)
		left := len(o.rest) > 0 && err == nil
		if !left {
			o.finishOut(err)
		}
		o.mu.Lock()
		if left {
			o.sending = false
			o.mu.Unlock()
			return false
		}
		if err != nil {
			o.die()
		}
	}
	o.sending = false
	o.mu.Unlock()
	return true
}

// finishOut gives back what belonged to the batch that was sent, or could not be.
func (o *output) finishOut(err error) {
	clear(o.bufs)
	o.rest = nil
	o.out.free()
	o.budget.give(o.out.requests, o.out.bytes)
	o.out.reset()
	if err != nil {
		o.failed()
	}
}

// die drops what is pending. output.mu is held.
func (o *output) die() {
	o.dead = true
	o.pending.free()
	o.budget.give(o.pending.requests, o.pending.bytes)
	o.pending.reset()
}

// direct sends buf at once and says true, if nobody is sending and nothing waits.
// buf stays the caller's.
func (o *output) direct(buf []byte) bool {
	o.mu.Lock()
	if o.dead {
		o.mu.Unlock()
		return true
	}
	if o.sending || len(o.rest) > 0 || !o.pending.empty() {
		o.mu.Unlock()
		return false
	}
	o.sending = true
	o.mu.Unlock()
	o.bufs = append(o.bufs[:0], buf)
	_, err := o.t.send(o.bufs, true)
	clear(o.bufs)
	if err != nil {
		o.failed()
	}
	o.mu.Lock()
	if err != nil {
		o.die()
	}
	o.sending = false
	again := !o.pending.empty()
	o.mu.Unlock()
	if again {
		o.flush()
	}
	return true
}
