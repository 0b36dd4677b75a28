package export

import (
	"errors"
	"time"

	"github.com/nbdserve/nbdserve/block"
)

// execute runs the worker's request and puts its answer into the output. When the
// answer is there, the request has ended.
func (w *worker) execute() {
	c, r := w.c, &w.r
	began, short := c.s.now(), r.short()
	w.track(r, began)
	moved := int64(0)
	var err error
	switch r.cmd {
	case cmdRead:
		moved, err = w.read()
	case cmdBlockStatus:
		err = w.blockStatus()
	default:
		if moved, err = w.change(); err == nil {
			w.reply.text = appendSimple(w.reply.text, r.cookie, 0)
		}
	}
	r.drop(&c.budget)
	if err != nil {
		w.failed(err)
	}
	w.reply.requests++
	w.reply.bytes += r.charge
	// Counted first, so that the figures show nothing in flight once a drain has begun.
	w.untrack()
	end := c.s.now()
	if short {
		c.brisk.ended(end - began)
	}
	c.stat.Finish(r.op(), err == nil, moved, end-r.arrived)
	c.lane.End(r.adm)
	c.out.put(&w.reply)
}

// failed logs a failure, and answers with it unless the answer is there already.
func (w *worker) failed(err error) {
	c, r := w.c, &w.r
	errno := errnoOf(err, r.flags)
	if errno != nbdENOTSUP && c.export.worthLogging(c.s.now()) {
		c.log.Warn("request failed", "op", r.op().String(), "offset", r.off, "length", r.length, "err", err)
	}
	if w.reply.empty() {
		c.errorReply(&w.reply, r.cookie, errno, err.Error())
	}
}

// change runs the commands that are answered without data.
func (w *worker) change() (moved int64, err error) {
	c, r := w.c, &w.r
	if r.length == 0 && r.cmd != cmdFlush {
		return 0, nil
	}
	var fua block.ReqFlags
	if r.flags&flagFUA != 0 {
		fua = block.FUA
	}
	switch r.cmd {
	case cmdWrite:
		err = w.write(fua)
	case cmdFlush:
		return 0, c.root.Flush(w.ctx)
	case cmdTrim:
		err = c.root.Discard(w.ctx, r.off, r.length)
		if err == nil && fua != 0 {
			err = c.root.Flush(w.ctx)
		}
	case cmdCache:
		err = c.root.Prefetch(w.ctx, r.off, r.length)
	case cmdWriteZeroes:
		if r.flags&flagNoHole == 0 {
			fua |= block.MayUnmap
		}
		if r.flags&flagFastZero != 0 {
			fua |= block.NoFallback
		}
		err = c.root.WriteZeroes(w.ctx, r.off, r.length, fua)
	}
	if err != nil {
		return 0, err
	}
	return r.length, nil
}

// write stores the payload. One in several pieces is made durable once, at its end.
func (w *worker) write(fua block.ReqFlags) error {
	c, r := w.c, &w.r
	if r.payload == nil {
		return c.root.WriteAt(w.ctx, r.data, r.off, fua)
	}
	pieces := r.payload.pieces
	each := fua
	if len(pieces) > 1 {
		each = 0
	}
	off := r.off
	for _, p := range pieces {
		if err := c.root.WriteAt(w.ctx, p, off, each); err != nil {
			return err
		}
		off += int64(len(p))
	}
	if each != fua {
		return c.root.Flush(w.ctx)
	}
	return nil
}

const (
	// seekHoles is the length from which on a READ is asked for holes, in bytes.
	seekHoles = 32 << 10
	// leastHole is the shortest run of zeroes inside a READ that becomes a chunk, in bytes.
	leastHole = 4096
	// salvageBlock is what a piece that cannot be read is divided into, in bytes.
	salvageBlock = 4096
	// maxBad bounds the failures in one READ after which the rest is given up.
	maxBad = 4
)

// read answers a READ. On an error, the answer holds what could be read, or is empty.
func (w *worker) read() (int64, error) {
	c, r := w.c, &w.r
	switch {
	case r.length == 0 && c.structured:
		w.reply.text = appendChunk(w.reply.text, chunkDone, chunkNone, r.cookie, 0)
		return 0, nil
	case !c.structured || r.flags&flagDF != 0:
		return w.readWhole()
	}
	return w.readChunks()
}

// readWhole answers with one run of data.
func (w *worker) readWhole() (int64, error) {
	c, r := w.c, &w.r
	if c.structured {
		w.reply.text = appendData(w.reply.text, chunkDone, r.cookie, r.off, int(r.length))
	} else {
		w.reply.text = appendSimple(w.reply.text, r.cookie, 0)
	}
	for done := int64(0); done < r.length; {
		n := min(r.length-done, pieceSize)
		b := block.GetBuffer(int(n))
		w.reply.add(b, b)
		if err := c.root.ReadAt(w.ctx, b, r.off+done); err != nil {
			w.reply.free()
			return 0, err
		}
		done += n
	}
	return r.length, nil
}

// readChunks answers with chunks of data and holes.
func (w *worker) readChunks() (int64, error) {
	c, r := w.c, &w.r
	var failure error
	last, bad, moved := 0, 0, int64(0) // last: where the head of the last chunk is
	for done := int64(0); done < r.length && bad < maxBad; {
		off, left := r.off+done, r.length-done
		n, hole := w.extent(off, left)
		last = len(w.reply.text)
		if hole {
			w.reply.text = appendHole(w.reply.text, 0, r.cookie, off, int(n))
			moved += n
		} else {
			b := block.GetBuffer(int(n))
			err := c.root.ReadAt(w.ctx, b, off)
			if err == nil {
				w.reply.text = appendData(w.reply.text, 0, r.cookie, off, int(n))
				w.reply.add(b, b)
				moved += n
			} else {
				var read int64
				last, read = w.salvage(b, off, err, &bad)
				moved += read
				failure = errors.Join(failure, err)
			}
		}
		done += n
	}
	w.reply.text[last+5] |= byte(chunkDone)
	return moved, failure
}

// extent tells how far a hole reaches, or data that one chunk should hold.
func (w *worker) extent(off, left int64) (n int64, hole bool) {
	c := w.c
	most := min(left, pieceSize)
	if left < seekHoles {
		return most, false
	}
	for n < most {
		x, err := c.root.BlockStatus(w.ctx, off+n, left-n, false)
		if err != nil || x.Length <= 0 {
			return most, false // reading finds out
		}
		if x.Flags&block.StatusZero != 0 && x.Length >= leastHole {
			if n == 0 {
				return x.Length, true
			}
			return n, false
		}
		n += x.Length
	}
	return most, false
}

// salvage reads what can be read of a range whose reading failed, block by block,
// into b: chunks of data, and an error chunk for each block that fails. It returns
// where the last chunk's head is, and how much was read.
func (w *worker) salvage(b []byte, off int64, err error, bad *int) (last int, read int64) {
	c, r := w.c, &w.r
	from := 0 // start of the good run
	emit := func(to int) {
		if to > from {
			last = len(w.reply.text)
			w.reply.text = appendData(w.reply.text, 0, r.cookie, off+int64(from), to-from)
			w.reply.add(b[from:to], nil)
			read += int64(to - from)
		}
	}
	at := 0
	for at < len(b) && *bad < maxBad {
		next := min(len(b), int((off+int64(at))&^(salvageBlock-1)+salvageBlock-off))
		// A failure of a single block need not be tried again.
		if next-at < len(b) {
			err = c.root.ReadAt(w.ctx, b[at:next], off+int64(at))
		}
		if err != nil {
			emit(at)
			last = len(w.reply.text)
			w.reply.text = appendErrorOffset(w.reply.text, 0, r.cookie, errnoOf(err, r.flags), clip(err.Error(), maxErrorText), off+int64(at))
			*bad++
			from = next
		}
		at = next
	}
	emit(at)
	w.release(b)
	return last, read
}

// release gives b back when the answer has been sent, or at once if no part of it is in the answer.
func (w *worker) release(b []byte) {
	if n := len(w.reply.parts); n > 0 {
		p := &w.reply.parts[n-1]
		if p.whole == nil {
			p.whole = b
			return
		}
	}
	block.PutBuffer(b)
}

// statusTime bounds the time for one answer to BLOCK_STATUS; it ends early then.
const statusTime = time.Second

// blockStatus answers with the extents of base:allocation.
func (w *worker) blockStatus() error {
	c, r := w.c, &w.r
	most := min(maxExtents, int(r.answerSize()/8))
	if r.flags&flagReqOne != 0 {
		most = 1
	}
	list := block.GetBuffer(most * 8)[:0]
	var length, state uint32 // of the extent that is not in the list yet
	began := c.s.now()
	for done, calls := int64(0), 1; done < r.length; calls++ {
		x, err := c.root.BlockStatus(w.ctx, r.off+done, r.length-done, true)
		if err != nil {
			if done > 0 {
				break // what is known is an answer; the next request will fail
			}
			block.PutBuffer(list)
			return err
		}
		s := stateOf(x.Flags)
		if length > 0 && s != state {
			if (len(list)+8)/8 == most {
				break
			}
			list = appendExtent(list, length, state)
			length = 0
		}
		state = s
		length += uint32(x.Length)
		done += x.Length
		if calls%64 == 0 && c.s.now()-began > statusTime {
			break
		}
	}
	list = appendExtent(list, length, state)
	w.reply.text = appendChunk(w.reply.text, chunkDone, chunkBlockStatus, r.cookie, uint32(4+len(list)))
	w.reply.text = be.AppendUint32(w.reply.text, contextID)
	w.reply.add(list, list)
	return nil
}

func appendExtent(list []byte, length, state uint32) []byte {
	return be.AppendUint32(be.AppendUint32(list, length), state)
}

// stateOf gives the flags of base:allocation. A hole is told only where it reads as
// zero: clients take the rest of what is not data for unimportant.
func stateOf(f block.StatusFlags) uint32 {
	switch {
	case f&block.StatusZero == 0:
		return 0
	case f&block.StatusData == 0:
		return stateHole | stateZero
	}
	return stateZero
}
