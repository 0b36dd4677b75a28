package integration

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"testing"
	"time"
)

// Constants of the NBD protocol, as far as the tests' own client uses them.
const (
	optionMagic  = 0x49484156454F5054 // "IHAVEOPT"
	replyMagic   = 0x3e889045565a9
	requestMagic = 0x25609513
	simpleMagic  = 0x67446698

	optGo       = 7
	repAck      = 1
	repInfo     = 3
	infoExport  = 0
	cmdRead     = 0
	cmdWrite    = 1
	cmdDisc     = 2
	cmdFlush    = 3
	cmdTrim     = 4
	cmdZeroes   = 6
	flagFUA     = 1 << 0
	flagNoHole  = 1 << 1
	errPermNBD  = 1
	errInvalNBD = 22
)

// An nbdConn is a plain NBD client: simple replies, any number of requests in flight.
// Sending and receiving may be done by two goroutines.
type nbdConn struct {
	net.Conn
	r      *bufio.Reader
	w      *bufio.Writer
	size   int64
	flags  uint16
	cookie uint64
}

// dialNBD connects to the default export of a unix socket.
func dialNBD(socket string) (*nbdConn, error) {
	nc, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	c := &nbdConn{Conn: nc, r: bufio.NewReaderSize(nc, 256*kib), w: bufio.NewWriterSize(nc, 64*kib)}
	nc.SetDeadline(time.Now().Add(patience))
	if err := c.negotiate(); err != nil {
		nc.Close()
		return nil, fmt.Errorf("negotiate: %w", err)
	}
	return c, nil
}

func connect(t testing.TB, s *server) *nbdConn {
	t.Helper()
	c, err := dialNBD(s.socket)
	if err != nil {
		t.Fatalf("%v\n%s", err, s.stderr)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// An optionError is an error reply in negotiation.
type optionError struct {
	code uint32
	text string
}

func (e *optionError) Error() string { return fmt.Sprintf("option error %#x: %s", e.code, e.text) }

func (c *nbdConn) negotiate() error {
	greeting := make([]byte, 18)
	if _, err := io.ReadFull(c.r, greeting); err != nil {
		return err
	}
	if string(greeting[:16]) != "NBDMAGICIHAVEOPT" {
		return fmt.Errorf("greeting %q", greeting)
	}
	option := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	option = binary.BigEndian.AppendUint64(option, optionMagic)
	option = binary.BigEndian.AppendUint32(option, optGo)
	option = binary.BigEndian.AppendUint32(option, 6)
	option = append(option, 0, 0, 0, 0, 0, 0) // name "", no information asked for
	if _, err := c.Write(option); err != nil {
		return err
	}
	for {
		var head struct {
			Magic                uint64
			Option, Type, Length uint32
		}
		if err := binary.Read(c.r, binary.BigEndian, &head); err != nil {
			return err
		}
		if head.Magic != replyMagic || head.Option != optGo || head.Length > 64*kib {
			return fmt.Errorf("option reply %+v", head)
		}
		payload := make([]byte, head.Length)
		if _, err := io.ReadFull(c.r, payload); err != nil {
			return err
		}
		switch {
		case head.Type == repAck:
			return nil
		case head.Type&(1<<31) != 0:
			return &optionError{head.Type, string(payload)}
		case head.Type == repInfo && len(payload) == 12 && binary.BigEndian.Uint16(payload) == infoExport:
			c.size = int64(binary.BigEndian.Uint64(payload[2:]))
			c.flags = binary.BigEndian.Uint16(payload[10:])
		}
	}
}

// request queues a request; flush sends what is queued.
func (c *nbdConn) request(cmd, flags uint16, off int64, length int, payload []byte) error {
	c.cookie++
	return c.requestAs(c.cookie, cmd, flags, off, length, payload)
}

func (c *nbdConn) requestAs(cookie uint64, cmd, flags uint16, off int64, length int, payload []byte) error {
	head := binary.BigEndian.AppendUint32(make([]byte, 0, 28), requestMagic)
	head = binary.BigEndian.AppendUint16(head, flags)
	head = binary.BigEndian.AppendUint16(head, cmd)
	head = binary.BigEndian.AppendUint64(head, cookie)
	head = binary.BigEndian.AppendUint64(head, uint64(off))
	head = binary.BigEndian.AppendUint32(head, uint32(length))
	if _, err := c.w.Write(head); err != nil {
		return err
	}
	_, err := c.w.Write(payload)
	return err
}

// reply receives the head of the next reply; the data of a read follows it.
func (c *nbdConn) reply() (cookie uint64, code uint32, err error) {
	head := make([]byte, 16)
	if _, err := io.ReadFull(c.r, head); err != nil {
		return 0, 0, err
	}
	if m := binary.BigEndian.Uint32(head); m != simpleMagic {
		return 0, 0, fmt.Errorf("reply magic %#x", m)
	}
	return binary.BigEndian.Uint64(head[8:]), binary.BigEndian.Uint32(head[4:]), nil
}

// A requestError is an error that the server answered.
type requestError uint32

func (e requestError) Error() string { return fmt.Sprintf("NBD error %d", uint32(e)) }

// do sends one request and waits for its answer. data receives what a read returns.
func (c *nbdConn) do(cmd, flags uint16, off int64, length int, payload, data []byte) error {
	c.SetDeadline(time.Now().Add(patience))
	if err := c.request(cmd, flags, off, length, payload); err != nil {
		return err
	}
	if err := c.w.Flush(); err != nil {
		return err
	}
	cookie, code, err := c.reply()
	switch {
	case err != nil:
		return err
	case cookie != c.cookie:
		return fmt.Errorf("the answer has cookie %d, not %d", cookie, c.cookie)
	case code != 0:
		return requestError(code)
	}
	_, err = io.ReadFull(c.r, data)
	return err
}

func (c *nbdConn) readAt(p []byte, off int64) error {
	return c.do(cmdRead, 0, off, len(p), nil, p)
}

func (c *nbdConn) writeAt(p []byte, off int64) error {
	return c.do(cmdWrite, 0, off, len(p), p, nil)
}

func (c *nbdConn) flush() error { return c.do(cmdFlush, 0, 0, 0, nil, nil) }
