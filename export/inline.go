package export

import (
	"errors"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/internal/iostat"
)

// errCut ends the reader of a connection that was cut.
var errCut = errors.New("the connection was cut")

// inlineMax is the longest READ that the reader answers itself, in bytes.
const inlineMax = 64 << 10

// inlineMost is how many answers of the reader go out together at least, while more
// requests arrive.
const inlineMost = 8

// An inline holds the answers that the reader gives itself and has not sent yet.
type inline struct {
	now   time.Duration // when the reader last received, on the server's clock
	since time.Duration // when the first request answered in buf had arrived
	buf   []byte        // of txSize, or nil
	used  int           // bytes of answers in buf
	count int64         // requests answered there
	reads int64         // READs among them, which are not counted yet
	bytes int64         // read for them

	rejections batch // scratch
}

// takes tells whether the reader should try to answer r itself.
func (in *inline) takes(r *request) bool {
	return r.cmd == cmdRead && r.length > 0 && r.length <= inlineMax
}

// rest gives the memory back.
func (in *inline) rest() {
	if in.buf != nil && in.used == 0 {
		block.PutBuffer(in.buf)
		in.buf = nil
	}
}

// inlineSize bounds the answer to r, in bytes.
func (r *request) inlineSize() int {
	if r.cmd == cmdRead {
		return dataChunkSize + int(r.length)
	}
	return simpleSize
}

// makeInline makes room for an answer of n bytes. It may send, so it is called before the request is admitted.
func (c *conn) makeInline(n int) {
	in := &c.in
	if in.used+n > txSize {
		c.sendInline()
	}
	if in.buf == nil {
		in.buf = block.GetBuffer(txSize)
	}
}

// answerInline answers an admitted READ that makeInline made room for, if the data
// can be had without waiting.
func (c *conn) answerInline(r *request) bool {
	in := &c.in
	n := int(r.length)
	head := simpleSize
	if c.structured {
		head = dataChunkSize
	}
	out := in.buf[in.used : in.used : in.used+head+n]
	data := in.buf[in.used+head:][:n]
	for done := 0; done < n; {
		l := c.root.Locate(c.shard, r.off+int64(done), int64(n-done))
		part := data[done:][:l.Length]
		switch l.Kind {
		case block.LocateZero:
			if len(part) == n && c.structured && r.flags&flagDF == 0 && n >= holeChunkSize {
				appendHole(out, chunkDone, r.cookie, r.off, n)
				in.took(holeChunkSize, n)
				return true
			}
			clear(part)
		case block.LocateData:
			if l.File.ReadNowait(part, l.Offset) < len(part) {
				return false
			}
		default:
			return false
		}
		done += len(part)
	}
	if c.structured {
		appendData(out, chunkDone, r.cookie, r.off, n)
	} else {
		appendSimple(out, r.cookie, 0)
	}
	in.took(head+n, n)
	return true
}

func (in *inline) took(bytes, data int) {
	if in.reads == 0 {
		in.since = in.now
	}
	in.used += bytes
	in.count++
	in.reads++
	in.bytes += int64(data)
}

// sendInline sends the answers that the reader has given, after what others have
// ready. If somebody is sending already, they are left to that one.
func (c *conn) sendInline() {
	in := &c.in
	if in.count == 0 {
		return
	}
	if in.reads > 0 {
		c.stat.FinishInline(iostat.Read, in.reads, in.bytes, c.s.now()-in.since)
	}
	if !c.out.direct(in.buf[:in.used]) {
		b := &in.rejections
		b.add(in.buf[:in.used], in.buf)
		b.requests, b.bytes = in.count, txSize
		c.budget.requests.Add(in.count)
		c.budget.charge(txSize)
		in.buf = nil
		c.out.put(b)
		c.out.flush()
	}
	in.used, in.count, in.reads, in.bytes = 0, 0, 0, 0
}
