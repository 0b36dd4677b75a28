package export

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nbdserve/nbdserve/block"
)

// An rxBuffer is memory that requests arrive in. Payloads of WRITE stay in it until
// they are written, so it is counted who uses it; the reader is one of them.
type rxBuffer struct {
	data []byte
	refs atomic.Int32
	held int64 // bytes charged to the budget once the reader has left it
}

var rxBuffers = sync.Pool{New: func() any { return new(rxBuffer) }}

func getRxBuffer() *rxBuffer {
	b := rxBuffers.Get().(*rxBuffer)
	b.data = block.GetBuffer(rxSize)
	b.held = 0
	b.refs.Store(1)
	return b
}

func (b *rxBuffer) release(budget *budget) {
	if b.refs.Add(-1) > 0 {
		return
	}
	held := b.held
	block.PutBuffer(b.data)
	b.data = nil
	rxBuffers.Put(b)
	if held > 0 {
		budget.give(0, held)
	}
}

// A payload is data of a WRITE that is too long for the receive buffer.
type payload struct {
	pieces [][]byte // of pieceSize, but for the last
}

var payloads = sync.Pool{New: func() any { return &payload{pieces: make([][]byte, 0, maxPayload/pieceSize)} }}

func (p *payload) free() {
	for _, b := range p.pieces {
		block.PutBuffer(b)
	}
	clear(p.pieces)
	p.pieces = p.pieces[:0]
	payloads.Put(p)
}

// A reception is what has arrived and is no complete request yet.
type reception struct {
	buf        *rxBuffer // nil while nothing is there
	start, end int       // of the bytes in buf that are not taken

	long   request // a WRITE with a long payload of which a part is missing, if payload is set
	filled int     // bytes of its last piece that are there
	want   int     // bytes of its payload behind that piece
	offer  int     // bytes offered to receive for the last piece

	skip   int64 // bytes of the payload of a refused WRITE that are to be dropped
	answer rejection

	arrived  int64 // bytes ever
	taken    int64 // requests ever
	waited   int64 // taken, when nothing more was there last
	deadline bool  // a time limit runs since
	sinceN   int64 // arrived
	sinceReq int64 // taken
}

func (x *reception) unread() []byte { return x.buf.data[x.start:x.end] }

// space says where bytes go that arrive.
func (c *conn) space() (a, b []byte) {
	x := &c.rx
	if x.long.payload == nil {
		c.makeRoom()
		return x.buf.data[x.end:], nil
	}
	piece := x.long.payload.pieces[len(x.long.payload.pieces)-1]
	a = piece[x.filled:]
	x.offer = len(a)
	if x.want > 0 {
		return a, nil
	}
	c.makeRoom()
	return a, x.buf.data[x.end:min(x.end+ahead, len(x.buf.data))]
}

// makeRoom makes the receive buffer able to take more.
func (c *conn) makeRoom() {
	x := &c.rx
	if x.buf == nil {
		x.buf, x.start, x.end = getRxBuffer(), 0, 0
		return
	}
	alone := x.buf.refs.Load() == 1
	if x.start == x.end && alone {
		x.start, x.end = 0, 0
		return
	}
	// What has begun must fit as a whole.
	need := requestSize
	if x.end-x.start >= requestSize && be.Uint16(x.unread()[6:]) == cmdWrite {
		need += int(min(be.Uint32(x.unread()[24:]), smallPayload))
	}
	free, have := len(x.buf.data)-x.end, x.end-x.start
	if free > 0 && x.start+need <= len(x.buf.data) && (free >= leastRoom || have >= leastRoom) {
		return
	}
	if alone {
		x.end = copy(x.buf.data, x.unread())
		x.start = 0
		return
	}
	fresh := getRxBuffer()
	n := copy(fresh.data, x.unread())
	c.leaveBuffer()
	x.buf, x.start, x.end = fresh, 0, n
}

// leaveBuffer gives up the reader's use of the receive buffer.
func (c *conn) leaveBuffer() {
	b := c.rx.buf
	c.rx.buf = nil
	if b.refs.Load() > 1 {
		b.held = rxSize
		c.budget.charge(rxSize)
	}
	b.release(&c.budget)
}

// idle gives memory back while nothing arrives.
func (c *conn) idle() {
	if c.rx.buf != nil && c.rx.start == c.rx.end {
		c.leaveBuffer()
	}
	c.in.rest()
}

// waits limits the time for the rest of a payload.
func (c *conn) waits() (soon bool) {
	c.sendAll()
	x := &c.rx
	soon = x.taken-x.waited <= 1
	x.waited = x.taken
	if x.deadline || !x.inPayload() {
		return soon
	}
	x.deadline, x.sinceN, x.sinceReq = true, x.arrived, x.taken
	c.readBy(time.Now().Add(c.s.opt.PayloadTimeout))
	return soon
}

// inPayload tells whether a part of a payload has arrived, or at least its head.
func (x *reception) inPayload() bool {
	return x.long.payload != nil || x.skip > 0 || (x.buf != nil && x.end-x.start >= requestSize)
}

// stalled tells, when the time limit has passed, whether the client was too slow.
func (x *reception) stalled() bool {
	x.deadline = false
	return x.inPayload() && x.taken == x.sinceReq && x.arrived-x.sinceN < payloadStep
}

// received notes that n bytes have arrived where space said.
func (x *reception) received(n int) {
	x.arrived += int64(n)
	if x.long.payload != nil {
		k := min(n, x.offer)
		x.filled += k
		n -= k
	}
	x.end += n
}

// consume takes everything complete out of what has arrived. more is false when
// the client said NBD_CMD_DISC.
func (c *conn) consume() (more bool, err error) {
	x := &c.rx
	for {
		if x.long.payload != nil {
			done, err := c.fillLong()
			if !done || err != nil {
				return true, err
			}
			continue
		}
		if x.skip > 0 && !c.skipRejected() {
			return true, nil
		}
		if x.buf == nil || x.end-x.start < requestSize {
			return true, nil
		}
		head := x.unread()
		if magic := be.Uint32(head); magic != magicRequest {
			return true, fmt.Errorf("request magic is %#x", magic)
		}
		r := request{
			flags: be.Uint16(head[4:]), cmd: be.Uint16(head[6:]), cookie: be.Uint64(head[8:]),
			off: int64(be.Uint64(head[16:])), arrived: c.in.now,
		}
		length := be.Uint32(head[24:])
		r.length = int64(length)
		if r.cmd == cmdDisc {
			return false, nil
		}
		if bad := c.check(&r); bad.errno != 0 {
			x.start += requestSize
			x.skip, x.answer = 0, bad
			if r.cmd == cmdWrite && length > 0 {
				x.skip = int64(length)
				continue
			}
			x.taken++
			if err := c.reject(bad); err != nil {
				return true, err
			}
			continue
		}
		if r.cmd == cmdWrite {
			if length > smallPayload {
				x.start += requestSize
				if err := c.beginLong(r); err != nil {
					return true, err
				}
				continue
			}
			if x.end-x.start < requestSize+int(length) {
				return true, nil
			}
			r.data = x.buf.data[x.start+requestSize:][:length:length]
			r.buf = x.buf
			r.buf.refs.Add(1)
		}
		x.start += requestSize + len(r.data)
		x.taken++
		if err := c.admit(&r); err != nil {
			return true, err
		}
	}
}

// skipRejected drops what has arrived of a refused payload. It tells whether all of it has.
func (c *conn) skipRejected() bool {
	x := &c.rx
	if x.buf == nil {
		return false
	}
	n := min(x.skip, int64(x.end-x.start))
	x.start += int(n)
	x.skip -= n
	if x.skip > 0 {
		return false
	}
	x.taken++
	return c.reject(x.answer) == nil
}

// beginLong starts to receive a long payload.
func (c *conn) beginLong(r request) error {
	x := &c.rx
	r.payload = payloads.Get().(*payload)
	x.long, x.want = r, int(r.length)
	return c.nextPiece()
}

// nextPiece gets memory for the next part of a long payload.
func (c *conn) nextPiece() error {
	x := &c.rx
	n := min(x.want, pieceSize)
	size := bufferSize(int64(n))
	if err := c.takeBytes(size); err != nil {
		return err
	}
	x.long.charge += size
	x.long.payload.pieces = append(x.long.payload.pieces, block.GetBuffer(n))
	x.want -= n
	x.filled = 0
	return nil
}

// fillLong moves what has arrived of a long payload to its place. It tells whether the request is complete and taken.
func (c *conn) fillLong() (done bool, err error) {
	x := &c.rx
	for {
		p := x.long.payload.pieces
		last := p[len(p)-1]
		if x.buf != nil {
			k := copy(last[x.filled:], x.unread())
			x.filled += k
			x.start += k
		}
		if x.filled < len(last) {
			return false, nil
		}
		if x.want == 0 {
			break
		}
		if err := c.nextPiece(); err != nil {
			return false, err
		}
	}
	r := x.long
	x.long = request{}
	x.taken++
	r.arrived = c.in.now
	return true, c.admit(&r)
}

// dropReception gives back what was received in vain.
func (c *conn) dropReception() {
	x := &c.rx
	if x.long.payload != nil {
		x.long.payload.free()
		c.budget.give(0, x.long.charge)
		x.long = request{}
	}
	if x.buf != nil {
		c.leaveBuffer()
	}
	c.in.rest()
	c.budget.settled()
}

// bufferSize is the memory that block.GetBuffer takes for n bytes.
func bufferSize(n int64) int64 {
	size := int64(block.PageSize)
	for size < n {
		size <<= 1
	}
	return size
}
