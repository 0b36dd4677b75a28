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
	sending bool // somebody is in send
	dead    bool // sending has failed

	// Of whoever is sending.
	out  batch
	bufs [][]byte
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

// flush sends what is there, unless somebody is at it already: then it is sent by
// that one, before it stops.
func (o *output) flush() {
	o.mu.Lock()
	if o.sending {
		o.mu.Unlock()
		return
	}
	o.sending = true
	for !o.pending.empty() && !o.dead {
		o.pending, o.out = o.out, o.pending
		o.mu.Unlock()
		o.bufs = o.out.buffers(o.bufs[:0])
		err := o.t.send(o.bufs)
		clear(o.bufs)
		o.out.free()
		o.budget.give(o.out.requests, o.out.bytes)
		o.out.reset()
		if err != nil {
			o.failed()
		}
		o.mu.Lock()
		if err != nil {
			o.die()
		}
	}
	o.sending = false
	o.mu.Unlock()
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
	if o.sending || !o.pending.empty() {
		o.mu.Unlock()
		return false
	}
	o.sending = true
	o.mu.Unlock()
	o.bufs = append(o.bufs[:0], buf)
	err := o.t.send(o.bufs)
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
