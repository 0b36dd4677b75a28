package integration

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"time"
)

// honest checks that an honest client is served.
func honest(t testing.TB, c *nbdConn, round int) {
	t.Helper()
	want, got := noise(uint64(round), 8192), make([]byte, 8192)
	if err := errors.Join(c.writeAt(want, 8*mib), c.readAt(got, 8*mib)); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("an honest client is not served any more: %v", err)
	}
}

func raw(t testing.TB, s *server) net.Conn {
	t.Helper()
	nc, err := net.Dial("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(patience))
	return nc
}

func TestGarbageInNegotiation(t *testing.T) {
	t.Parallel()
	s := start(t, "--format", "qcow2", newImage(t))
	c := connect(t, s)
	for i := range rounds(30, 1000) {
		nc := raw(t, s)
		p := noise(uint64(i), mib)
		switch i % 3 {
		case 1: // right flags, then garbage
			binary.BigEndian.PutUint32(p, 3)
		case 2: // a right option header, then garbage
			copy(p, binary.BigEndian.AppendUint64([]byte{0, 0, 0, 3}, optionMagic))
			binary.BigEndian.PutUint32(p[12:], uint32(i))
		}
		nc.Write(p) // the server may close in the middle of it
		nc.(*net.UnixConn).CloseWrite()
		if _, err := io.Copy(io.Discard, nc); err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("the server neither answers nor closes: %v", err)
		}
		nc.Close()
		honest(t, c, i)
	}
}

func TestGarbageInTransmission(t *testing.T) {
	t.Parallel()
	s := start(t, "--format", "qcow2", newImage(t))
	c := connect(t, s)
	r := rand.New(rand.NewPCG(1, 1))
	for i := range rounds(30, 1000) {
		bad := connect(t, s)
		if i%2 == 0 {
			bad.Write(noise(uint64(i), 256*kib))
		} else { // requests of any kind, as far as the magic number makes them
			for range 50 {
				off, length := r.Int64()>>r.IntN(64), int(r.Uint32()>>r.IntN(32))
				bad.requestAs(r.Uint64(), uint16(r.IntN(16)), uint16(r.Uint32()), off+9*mib, length, nil)
			}
			bad.w.Flush()
		}
		bad.Conn.(*net.UnixConn).CloseWrite()
		bad.SetDeadline(time.Now().Add(patience))
		if _, err := io.Copy(io.Discard, bad); err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("the server neither answers nor closes: %v", err)
		}
		bad.Close()
	}
	// Garbage may have been a valid request, so the honest client looks at its own data only.
	honest(t, c, 1)
}

func TestSilentConnections(t *testing.T) {
	t.Parallel()
	s := start(t, "--format", "qcow2", newImage(t))
	c := connect(t, s)
	for range 200 {
		raw(t, s)
	}
	honest(t, c, 1)
	honest(t, connect(t, s), 2) // a new one gets through, too
}

func TestHalfRequests(t *testing.T) {
	t.Parallel()
	disk := newImage(t)
	s := start(t, "--format", "qcow2", disk)
	c := connect(t, s)
	before := make([]byte, mib)
	fill(1, before)
	if err := c.writeAt(before, 0); err != nil {
		t.Fatal(err)
	}
	request := binary.BigEndian.AppendUint32(nil, requestMagic)
	request = append(request, 0, 0, 0, cmdWrite, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0)
	request = binary.BigEndian.AppendUint32(request, mib)
	request = append(request, noise(2, mib)...)
	var open []*nbdConn
	for _, cut := range []int{1, 4, 27, 28, 29, 4096, 100000, len(request) - 1} {
		half := connect(t, s)
		if _, err := half.Write(request[:cut]); err != nil {
			t.Fatal(err)
		}
		open = append(open, half)
	}
	honest(t, c, 1)
	for _, half := range open {
		half.Close()
	}
	honest(t, c, 2)
	after := make([]byte, mib)
	if err := c.readAt(after, 0); err != nil || !bytes.Equal(after, before) {
		t.Errorf("half a write was applied: %v", err)
	}
	// A half request does not hold up the end.
	half := connect(t, s)
	if _, err := half.Write(request[:5000]); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	s.stop()
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("the end took %v", took)
	}
	clean(t, disk)
}
