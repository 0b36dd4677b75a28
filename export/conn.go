package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/internal/iostat"
)

const (
	rxSize = 128 << 10 // bytes of a receive buffer
	txSize = 128 << 10 // bytes of the buffer that inline answers gather in
	// smallPayload is the longest payload that stays in the receive buffer; longer
	// ones are received into buffers of their own.
	smallPayload = 64 << 10
	// pieceSize is how a longer payload, or the data of a READ, is divided. At most
	// this much of a payload is paid for before it arrives.
	pieceSize = 1 << 20
	// leastRoom is how much the receive buffer should take at once, unless that much would have to be moved.
	leastRoom = 4 << 10
	// ahead is how much may be received behind a long payload with the same call.
	ahead = 16 << 10
	// payloadStep is what has to arrive of a payload in Options.PayloadTimeout.
	payloadStep = 256 << 10
)

// A conn is one connection.
type conn struct {
	s    *Server
	id   int64
	nc   net.Conn
	peer string
	log  *slog.Logger
	t    transport

	here     context.Context // ends when the connection is cut, or closed
	leave    context.CancelFunc
	awaiting atomic.Bool // an activation
	evicted  bool        // guarded by Server.mu
	export   *Export     // in transmission; written by the reader under Server.mu
	stopping atomic.Bool // nothing more is read
	closing  atomic.Bool // all is answered: the client is waited for to close

	// What was agreed; fixed in transmission.
	structured bool
	meta       bool  // base:allocation was selected
	align      int64 // offsets and lengths must be multiples of it
	size       int64 // bytes
	readOnly   bool

	root  *block.Root
	lane  *block.Lane
	shard block.Shard
	stat  *iostat.Conn

	budget budget
	out    output

	rx    reception // of the reader
	in    inline    // of the reader
	brisk brisk

	waiting atomic.Bool // there are parked requests
	mu      sync.Mutex  // guards what follows
	queue   queue       // admitted, not begun
	parked  queue       // wait for the end of a drain
	busy    int         // requests queued, parked and running
	gone    bool        // the client has left without a word: what is parked is dropped
	expired bool        // what is not begun is refused
	ending  bool        // workers end when the queue is empty
	staff   staff

	quiet   chan struct{} // capacity 1: busy became 0
	workers sync.WaitGroup
}

func newConn(s *Server, nc net.Conn) *conn {
	c := &conn{s: s, id: s.accepted.Load(), nc: nc, peer: peerName(nc), quiet: make(chan struct{}, 1)}
	c.here, c.leave = context.WithCancel(context.Background())
	c.brisk.end = make(chan error, 1)
	c.log = s.log.With("client", c.peer)
	c.t = newTransport(nc, s.opt.SendTimeout)
	c.budget.init(&s.pool, s.opt.MaxInFlight, s.opt.MaxBytes)
	c.out.t, c.out.budget, c.out.failed = c.t, &c.budget, c.cut
	return c
}

// peerName is how a client is called in logs.
func peerName(nc net.Conn) string {
	if a := nc.RemoteAddr(); a != nil && a.String() != "" && a.String() != "@" {
		return a.String()
	}
	if a := nc.LocalAddr(); a != nil {
		return "a client of " + a.String()
	}
	return "?"
}

// begin prepares transmission.
func (c *conn) begin(e *Export, structured, meta, toldSizes bool) {
	c.structured, c.meta = structured, meta
	c.align = 1
	c.root = e.root
	if toldSizes {
		c.align = e.root.Limits().RequestAlignment
	}
	c.size = e.root.Size()
	c.readOnly = !e.root.MayWrite()
	c.shard = c.s.nextShard()
	c.lane = c.root.NewLane(c.shard, c.resume)
	c.stat = e.stat.NewConn()
	c.log = c.log.With("export", e.name)
}

// stop makes the connection read no more: at once in transmission; in negotiation
// the client gets a moment to hear that the server ends. Server.mu may be held.
func (c *conn) stop() {
	c.stopping.Store(true)
	switch {
	case c.closing.Load():
	case c.export != nil:
		c.t.readBy(longAgo)
	default:
		c.t.readBy(time.Now().Add(c.s.opt.CloseTimeout))
	}
}

// abort makes sending and receiving fail, and waiting for activation end.
func (c *conn) abort() {
	c.t.abort()
	c.leave()
}

// cut ends the connection without answers.
func (c *conn) cut() {
	c.abort()
	c.leaveParked()
	c.budget.poke()
}

// noticeHangUp cuts a client that has left while the reader, which would have met
// the end of the stream, waits for the budget or for an activation. Its place is for
// others.
func (c *conn) noticeHangUp() {
	if (c.budget.starving.Load() || c.awaiting.Load()) && c.t.hungUp() {
		c.cut()
	}
}

// transmit serves the client until it leaves, then ends the connection.
func (c *conn) transmit() {
	c.log.Debug("client connected", "structured", c.structured, "block status", c.meta)
	c.nc.SetWriteDeadline(time.Time{})
	c.readBy(time.Time{})
	if c.t.aborted() {
		c.t.abort()
	}
	err := c.readRequests()
	if err == errRelieved {
		err = <-c.brisk.end
	}
	c.s.left(c)
	polite := err == nil
	if !polite {
		c.leaveParked()
		if !goneAway(err) {
			c.log.Info("client lost", "err", err)
		}
	}
	c.finish()
	c.close()
	c.log.Debug("client disconnected")
}

// readBy sets the time limit of receiving, but for what ends the connection.
func (c *conn) readBy(t time.Time) {
	c.t.readBy(t)
	if c.stopping.Load() {
		c.t.readBy(longAgo)
	}
}

// readRequests is the reader. It returns nil when the client said NBD_CMD_DISC or
// the server ends, else why the connection ends; errRelieved when another one reads on.
func (c *conn) readRequests() error {
	for {
		// A reader that has relieved another finds what that one had received.
		more, err := c.consume()
		if err == errRelieved {
			return err
		}
		// What has arrived meanwhile is looked at first, so that a busy client gets
		// several answers with one call; but it shall have work while we have.
		if !more || err != nil || c.in.count >= inlineMost {
			c.sendAll()
		}
		if !more || err != nil {
			return err
		}
		if more, err = c.receive(); !more || err != nil {
			c.sendAll()
			return err
		}
	}
}

// receive waits until something has arrived. more is false when the server ends.
func (c *conn) receive() (more bool, err error) {
	for {
		n, err := c.t.receive(c)
		if err == nil {
			c.in.now = c.s.now()
			c.rx.received(n)
			return true, nil
		}
		if err = c.interrupted(err); err != nil || c.stopping.Load() {
			return false, err
		}
	}
}

// sendAll sends the answers that are ready.
func (c *conn) sendAll() {
	c.sendInline()
	c.out.flush()
}

// goneAway tells that the client closed the connection, which is no news.
func goneAway(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}

// interrupted judges an error of receive; nil means to go on.
func (c *conn) interrupted(err error) error {
	switch {
	case c.t.aborted():
		return errCut
	case !errors.Is(err, os.ErrDeadlineExceeded):
		return err
	case c.stopping.Load():
		return nil
	case c.rx.stalled():
		return fmt.Errorf("less than %d KiB of a payload arrived in %v", payloadStep>>10, c.s.opt.PayloadTimeout)
	}
	c.readBy(time.Time{})
	return nil
}

// finish waits for the requests of a client that has left, answers them and gives
// back what the connection has.
func (c *conn) finish() {
	// First, as requests may take long: what the reader holds, and its turn in the pool, are for others.
	c.dropReception()
	c.mu.Lock()
	c.ending = true
	busy := c.busy
	c.mu.Unlock()
	for busy > 0 {
		c.out.flush()
		<-c.quiet
		c.mu.Lock()
		busy = c.busy
		c.mu.Unlock()
	}
	c.dismissAll()
	c.workers.Wait()
	c.out.flush()
	c.lane.Close()
	c.export.stat.Remove(c.stat)
	if c.export.clients.Add(-1) == 0 {
		if err := c.export.flush(c.s.hurry); err != nil {
			c.s.log.Error("flush after the last client failed", "export", c.export.name, "err", err)
		}
	}
	c.export.release()
}

// close ends the connection so that answers under way arrive: closing with unread
// input would destroy them, so the input is read until the client closes, for a moment.
func (c *conn) close() {
	defer c.leave()
	defer c.nc.Close()
	c.closing.Store(true)
	half, ok := c.nc.(interface{ CloseWrite() error })
	if c.t.aborted() || !ok || half.CloseWrite() != nil {
		return
	}
	c.t.readBy(time.Now().Add(c.s.opt.CloseTimeout))
	b := block.GetBuffer(block.PageSize)
	defer block.PutBuffer(b)
	for limit := 64 << 20; limit > 0; {
		n, err := c.nc.Read(b)
		if err != nil {
			return
		}
		limit -= n
	}
}
