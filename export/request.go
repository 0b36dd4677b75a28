package export

import (
	"fmt"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/internal/iostat"
)

// A request is one command of a client.
type request struct {
	cmd, flags uint16
	cookie     uint64
	off        int64
	length     int64
	arrived    time.Duration // on the server's clock
	adm        block.Admission

	// The data of a WRITE is in one of them.
	data    []byte // in buf
	buf     *rxBuffer
	payload *payload

	charge int64 // bytes taken from the budget, for the payload or the answer
}

// drop gives back the payload.
func (r *request) drop(b *budget) {
	if r.buf != nil {
		r.buf.release(b)
		r.buf, r.data = nil, nil
	}
	if r.payload != nil {
		r.payload.free()
		r.payload = nil
	}
}

// ops are the kinds that requests are counted as, by command.
var ops = [...]iostat.Op{
	cmdRead: iostat.Read, cmdWrite: iostat.Write, cmdFlush: iostat.Flush, cmdTrim: iostat.Trim,
	cmdCache: iostat.Cache, cmdWriteZeroes: iostat.WriteZeroes, cmdBlockStatus: iostat.BlockStatus,
}

func (r *request) op() iostat.Op { return ops[r.cmd] }

func (r *request) known() bool { return int(r.cmd) < len(ops) && r.cmd != cmdDisc }

// validFlags are the flags that each command knows; FUA goes with all.
var validFlags = [...]uint16{
	cmdRead: flagFUA | flagDF, cmdWrite: flagFUA, cmdFlush: flagFUA, cmdTrim: flagFUA,
	cmdCache: flagFUA, cmdWriteZeroes: flagFUA | flagNoHole | flagFastZero, cmdBlockStatus: flagFUA | flagReqOne,
}

// A rejection is the answer to a request that cannot be admitted.
type rejection struct {
	cookie uint64
	errno  uint32
	text   string
	op     iostat.Op // NumOps for an unknown command
}

// check validates a request. The errno of its result is 0 for a good one.
func (c *conn) check(r *request) rejection {
	bad := func(errno uint32, format string, args ...any) rejection {
		op := iostat.NumOps
		if r.known() {
			op = r.op()
		}
		return rejection{r.cookie, errno, fmt.Sprintf(format, args...), op}
	}
	if !r.known() {
		return bad(nbdEINVAL, "unknown command %d", r.cmd)
	}
	if f := r.flags &^ validFlags[r.cmd]; f != 0 {
		return bad(nbdEINVAL, "flags %#x do not go with command %s", f, r.op())
	}
	write := r.cmd == cmdWrite || r.cmd == cmdTrim || r.cmd == cmdWriteZeroes
	if write && c.readOnly {
		return bad(nbdEPERM, "the export is read-only")
	}
	if r.cmd == cmdFlush {
		if r.off != 0 || r.length != 0 {
			return bad(nbdEINVAL, "a flush has no offset and no length")
		}
		return rejection{}
	}
	if r.off < 0 || r.off > c.size || r.length > c.size-r.off {
		errno := nbdEINVAL
		if r.cmd == cmdWrite || r.cmd == cmdWriteZeroes {
			errno = nbdENOSPC
		}
		return bad(errno, "%d bytes at offset %d reach beyond the end of the export at %d", r.length, uint64(r.off), c.size)
	}
	if (r.off|r.length)&(c.align-1) != 0 {
		return bad(nbdEINVAL, "%d bytes at offset %d are not aligned to the minimum block size %d", r.length, r.off, c.align)
	}
	switch {
	case r.cmd == cmdRead && r.flags&flagDF != 0 && !c.structured:
		return bad(nbdEINVAL, "flag DF needs structured replies")
	case (r.cmd == cmdRead || r.cmd == cmdWrite) && r.length > maxPayload:
		errno := nbdEINVAL
		if r.flags&flagDF != 0 {
			errno = nbdEOVERFLOW
		}
		return bad(errno, "%d bytes are more than the maximum of %d", r.length, maxPayload)
	case r.cmd == cmdCache && r.length > maxPayload:
		return bad(nbdEOVERFLOW, "%d bytes are more than the maximum of %d", r.length, maxPayload)
	case r.cmd == cmdBlockStatus && !c.meta:
		return bad(nbdEINVAL, "no metadata context was selected for this export")
	case r.cmd == cmdBlockStatus && r.length == 0:
		return bad(nbdEINVAL, "the status of no bytes was asked for")
	}
	return rejection{}
}

// reject answers a request that is not admitted. It fails when the connection ends.
func (c *conn) reject(bad rejection) error {
	if err := c.takePlace(); err != nil {
		return err
	}
	c.budget.requests.Add(1)
	c.log.Debug("bad request", "err", bad.text)
	if bad.op < iostat.NumOps {
		c.stat.Start(bad.op, 1)
		c.stat.Finish(bad.op, false, 0, c.s.now()-c.in.now)
	}
	c.in.rejections.requests++
	c.errorReply(&c.in.rejections, bad.cookie, bad.errno, bad.text)
	c.out.put(&c.in.rejections)
	return nil
}

// errorReply appends the answer to a request that failed.
func (c *conn) errorReply(b *batch, cookie uint64, errno uint32, text string) {
	if c.structured {
		b.text = appendError(b.text, chunkDone, cookie, errno, clip(text, maxErrorText))
	} else {
		b.text = appendSimple(b.text, cookie, errno)
	}
}

// takePlace waits until the connection may have one more request. What it has
// answered itself is sent first.
func (c *conn) takePlace() error {
	if c.hasPlace() {
		return nil
	}
	return c.await(c.hasPlace)
}

func (c *conn) hasPlace() bool {
	return c.budget.requests.Load()+c.in.count < c.budget.maxRequests
}

// takeBytes waits until the connection may hold n more bytes.
func (c *conn) takeBytes(n int64) error {
	if n == 0 || c.budget.tryBytes(n) {
		return nil
	}
	return c.await(func() bool { return c.budget.tryBytes(n) })
}

// await waits until the budget allows try to succeed. The client is not to blame
// for that time, so the limit for its payload starts anew.
func (c *conn) await(try func() bool) error {
	c.sendInline()
	c.out.flush()
	if !c.budget.wait(try, c.hopeless) {
		return errCut
	}
	if c.rx.deadline {
		c.rx.deadline = false
		c.readBy(time.Time{})
	}
	return nil
}

// answerSize is the memory for the answer to r.
func (r *request) answerSize() int64 {
	switch r.cmd {
	case cmdRead:
		whole := r.length / pieceSize * pieceSize
		if r.length == whole {
			return whole
		}
		return whole + bufferSize(r.length-whole)
	case cmdBlockStatus:
		return bufferSize(min(8*maxExtents, r.length/512))
	}
	return 0
}

// admit takes a complete request: it is answered at once, put in the queue, or
// parked while the export is drained. It fails when the connection ends.
//
// The budget is asked before the gate: a request that waits for memory is not in
// flight, so that a client that does not receive cannot hold up a drain.
func (c *conn) admit(r *request) error {
	err := c.takePlace()
	if err == nil && !c.waiting.Load() {
		var done bool
		if done, err = c.admitHere(r); done {
			return err
		}
	}
	if n := r.answerSize(); n > 0 && err == nil {
		if err = c.takeBytes(n); err == nil {
			r.charge = n
		}
	}
	c.budget.settled()
	if err != nil {
		r.drop(&c.budget)
		c.budget.give(0, r.charge)
		return err
	}
	c.budget.requests.Add(1)
	if !c.waiting.Load() {
		if adm, ok := c.lane.Begin(); ok {
			r.adm = adm
			c.enqueue(r)
			return nil
		}
	}
	c.park(r)
	return nil
}

// admitHere lets the reader do r itself if that is quick. done is false when it was not.
func (c *conn) admitHere(r *request) (done bool, err error) {
	reads := c.in.takes(r)
	if !reads && !c.brisklyRuns(r) {
		return false, nil
	}
	c.makeInline(r.inlineSize())
	adm, ok := c.lane.Begin()
	if !ok {
		return false, nil
	}
	if reads {
		done = c.answerInline(r)
		c.lane.End(adm)
		if done {
			c.budget.settled()
		}
		return done, nil
	}
	r.adm = adm
	c.budget.settled()
	return true, c.runHere(r)
}
