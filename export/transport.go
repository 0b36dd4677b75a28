package export

import (
	"io"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A room is where received bytes go.
type room interface {
	// space gives up to two pieces of memory to be filled in order; the second may be empty.
	space() (a, b []byte)
	// waits is told that nothing has arrived yet. It tells whether the peer sends one
	// request at a time, so that the next is likely to come at once.
	waits() (soon bool)
	// idle is told that space is not needed until something has arrived. It is not
	// called by transports that cannot wait without memory.
	idle()
}

// A transport carries the bytes of one connection. One goroutine may receive and
// one may send at a time.
type transport interface {
	// receive waits until something has arrived and puts it where r says. n is at
	// least 1 without an error. At the end of the stream the error is io.EOF.
	receive(r room) (n int, err error)
	// send sends bufs, whose elements it changes, and returns what is left of them:
	// nothing, unless it fails or would have to wait for the peer and wait is false.
	// It fails with os.ErrDeadlineExceeded when the peer takes nothing for the send
	// timeout.
	send(bufs [][]byte, wait bool) (rest [][]byte, err error)
	// readBy makes receive fail with os.ErrDeadlineExceeded from t on; the zero time: never.
	readBy(t time.Time)
	// abort makes everything fail from now on. It may be called at any time.
	abort()
	// aborted tells whether abort was called.
	aborted() bool
	// hungUp tells whether the peer is known to be gone for both directions, even if
	// not all that it sent was received. It may be called at any time.
	hungUp() bool
}

func newTransport(nc net.Conn, timeout time.Duration) transport {
	switch c := nc.(type) {
	case *net.UnixConn:
		if raw, err := c.SyscallConn(); err == nil {
			return newSocket(nc, raw, timeout)
		}
	case *net.TCPConn:
		if raw, err := c.SyscallConn(); err == nil {
			return newSocket(nc, raw, timeout)
		}
	}
	s := new(stream)
	s.nc, s.timeout = nc, timeout
	return s
}

// deadlines are what both transports have in common.
type deadlines struct {
	nc      net.Conn
	timeout time.Duration // for send
	dead    atomic.Bool
}

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

func (d *deadlines) abort() {
	d.dead.Store(true)
	d.nc.SetDeadline(longAgo)
}

func (d *deadlines) aborted() bool { return d.dead.Load() }

func (d *deadlines) readBy(t time.Time) {
	d.nc.SetReadDeadline(t)
	if d.dead.Load() {
		d.nc.SetReadDeadline(longAgo)
	}
}

func (d *deadlines) writeBy(t time.Time) {
	d.nc.SetWriteDeadline(t)
	if d.dead.Load() {
		d.nc.SetWriteDeadline(longAgo)
	}
}

// A stream is a transport over any net.Conn.
type stream struct{ deadlines }

func (s *stream) receive(r room) (int, error) {
	r.waits()
	a, _ := r.space()
	n, err := s.nc.Read(a)
	if n > 0 {
		return n, nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return 0, err
}

// hungUp cannot be found out.
func (s *stream) hungUp() bool { return false }

// send has no way to find out whether it would wait.
func (s *stream) send(bufs [][]byte, wait bool) ([][]byte, error) {
	if !wait {
		return bufs, nil
	}
	for _, b := range bufs {
		for len(b) > 0 {
			part := b[:min(len(b), 256<<10)] // each part shows progress
			s.writeBy(time.Now().Add(s.timeout))
			if _, err := s.nc.Write(part); err != nil {
				return nil, err
			}
			b = b[len(part):]
		}
	}
	return nil, nil
}

// maxIovecs is the kernel's limit of one call.
const maxIovecs = 1024

// A socket is a transport over the descriptor of a socket: it waits in the runtime's
// poller without holding memory, and moves many buffers with one system call. The
// calls do not block, so the scheduler need not be told of them.
type socket struct {
	deadlines
	raw syscall.RawConn

	// Of receive. The callbacks are made once: they would be an allocation each.
	readable func(fd uintptr) bool
	room     room
	riov     [2]unix.Iovec
	rn       int
	rerr     error
	parked   time.Time // when the wait in the runtime's poller began, or zero
	eager    bool      // the last wait was shorter than spinTime
	pfd      [1]unix.PollFd

	// Of send.
	writable func(fd uintptr) bool
	bufs     [][]byte
	wait     bool
	wiov     []unix.Iovec
	msg      unix.Msghdr
	timed    bool // a write deadline is set
	stuck    bool // nothing was sent since it was set
	werr     error
}

func newSocket(nc net.Conn, raw syscall.RawConn, timeout time.Duration) *socket {
	s := &socket{raw: raw}
	s.nc, s.timeout = nc, timeout
	s.readable, s.writable = s.tryReceive, s.trySend
	return s
}

func (s *socket) receive(r room) (int, error) {
	s.room, s.rn, s.rerr = r, 0, nil
	if err := s.raw.Read(s.readable); err != nil {
		return 0, err
	}
	return s.rn, s.rerr
}

// tryReceive is called until it says true, each time when the socket may be readable.
func (s *socket) tryReceive(fd uintptr) bool {
	a, b := s.room.space()
	s.riov[0].Base = unsafe.SliceData(a)
	s.riov[0].SetLen(len(a))
	s.riov[1].Base = unsafe.SliceData(b)
	s.riov[1].SetLen(len(b))
	count := uintptr(2)
	if len(b) == 0 {
		count = 1
	}
	for {
		n, _, errno := syscall.RawSyscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&s.riov[0])), count)
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN:
			if s.room.waits() && s.spin(int32(fd)) {
				continue
			}
			s.riov[0].Base, s.riov[1].Base = nil, nil
			s.room.idle()
			s.parked = time.Now()
			return false
		case errno != 0:
			s.rerr = os.NewSyscallError("readv", errno)
		case n == 0:
			s.rerr = io.EOF
		default:
			s.rn = int(n)
			if !s.parked.IsZero() {
				s.eager = time.Since(s.parked) < spinTime
				s.parked = time.Time{}
			}
		}
		return true
	}
}

// spinTime bounds the wait without sleeping for a request. To sleep and be woken
// takes about as long as a quick client needs to send the next one.
const spinTime = 50 * time.Microsecond

// spinners bounds how many connections wait without sleeping: half the processors
// stay free of them.
var spinners atomic.Int32

// spin waits for input without sleeping, if the last wait was short. It tells whether there is some.
func (s *socket) spin(fd int32) (ready bool) {
	if !s.eager {
		return false
	}
	if int(spinners.Add(1)) <= runtime.GOMAXPROCS(0)/2 {
		s.pfd[0] = unix.PollFd{Fd: fd, Events: unix.POLLIN}
		for began := time.Now(); !ready && time.Since(began) < spinTime; {
			n, _, _ := syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&s.pfd[0])), 1, uintptr(unsafe.Pointer(&noTime)), 0, 0, 0)
			ready = n == 1
		}
	}
	spinners.Add(-1)
	s.eager = ready
	return ready
}

var noTime unix.Timespec

func (s *socket) hungUp() (gone bool) {
	// On an error the descriptor is closed: the connection ends without us.
	_ = s.raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}} // hang-up and error are always told
		n, err := unix.Poll(fds, 0)
		gone = err == nil && n > 0
	})
	return gone
}

func (s *socket) send(bufs [][]byte, wait bool) ([][]byte, error) {
	s.bufs, s.wait, s.werr = bufs, wait, nil
	err := s.raw.Write(s.writable)
	rest := s.bufs
	s.bufs = nil
	clear(s.wiov)
	if s.timed {
		s.timed, s.stuck = false, false
		s.writeBy(time.Time{})
	}
	if err != nil {
		return rest, err
	}
	return rest, s.werr
}

// trySend is called until it says true, each time when the socket may be writable.
func (s *socket) trySend(fd uintptr) bool {
	for len(s.bufs) > 0 {
		s.wiov = s.wiov[:0]
		for _, b := range s.bufs[:min(len(s.bufs), maxIovecs)] {
			v := unix.Iovec{Base: unsafe.SliceData(b)}
			v.SetLen(len(b))
			s.wiov = append(s.wiov, v)
		}
		s.msg.Iov = &s.wiov[0]
		s.msg.SetIovlen(len(s.wiov))
		n, _, errno := syscall.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&s.msg)), unix.MSG_NOSIGNAL)
		switch {
		case errno == unix.EINTR:
		case errno == unix.EAGAIN && !s.wait:
			return true
		case errno == unix.EAGAIN:
			if !s.stuck {
				s.timed, s.stuck = true, true
				s.writeBy(time.Now().Add(s.timeout))
			}
			return false
		case errno != 0:
			s.werr = os.NewSyscallError("sendmsg", errno)
			return true
		default:
			s.stuck = false
			s.sent(int(n))
		}
	}
	return true
}

// sent takes n bytes off the front of what is to be sent.
func (s *socket) sent(n int) {
	for len(s.bufs) > 0 && n >= len(s.bufs[0]) {
		n -= len(s.bufs[0])
		s.bufs = s.bufs[1:]
	}
	if n > 0 {
		s.bufs[0] = s.bufs[0][n:]
	}
}
