package export

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"github.com/nbdserve/nbdserve/hostdev"
)

// fileRig serves a file of size bytes.
func fileRig(t blocktest.TB, dir string, size int64) *rig {
	path := filepath.Join(dir, "disk.raw")
	f, err := os.Create(path)
	must(t, err)
	_, err = f.Write(pattern(0, size))
	must(t, err)
	must(t, f.Close())
	r := &rig{t: t, gate: blocktest.NewGate(), faults: new(blocktest.Faults), graph: blocktest.NewGraph(t, hostdev.FileDriver()), served: make(chan struct{}, 1000)}
	r.node, err = r.graph.Open(soon(t), &block.Config{Driver: "file", Unmap: true, Options: &hostdev.Options{Filename: path}})
	must(t, err)
	r.s = NewServer(Options{})
	r.e, err = r.s.AddExport(soon(t), Config{Name: "disk", Graph: r.graph, Node: r.node})
	must(t, err)
	t.Cleanup(r.end)
	return r
}

// A volley is a burst of requests and room for all their replies.
type volley struct {
	nc       net.Conn
	requests []byte
	replies  []byte
}

func newVolley(r *rig, cmd uint16, size, depth int64) *volley {
	c := r.connect().attach(false)
	v := &volley{nc: c.nc}
	for i := range depth {
		if cmd == cmdWrite {
			v.requests = append(v.requests, requestBytes(cmd, 0, uint64(i), i*size, size, make([]byte, size)...)...)
			v.replies = append(v.replies, make([]byte, simpleSize)...)
		} else {
			v.requests = append(v.requests, requestBytes(cmd, 0, uint64(i), i*size, size)...)
			v.replies = append(v.replies, make([]byte, simpleSize+size)...)
		}
	}
	return v
}

func (v *volley) fire(t blocktest.TB) {
	if _, err := v.nc.Write(v.requests); err != nil {
		t.Fatalf("%v", err)
	}
	if _, err := io.ReadFull(v.nc, v.replies); err != nil {
		t.Fatalf("%v", err)
	}
}

// TestNoAllocationPerRequest counts the whole process, so it allows a few for its own machinery.
func TestNoAllocationPerRequest(t *testing.T) {
	r := fileRig(t, t.TempDir(), 8<<20)
	for _, row := range []struct {
		name        string
		cmd         uint16
		size, depth int64
		calls       float64 // requests to the node, of which each may allocate once
	}{
		{"inline READ", cmdRead, 4096, 16, 0}, {"READ by a worker", cmdRead, 128 << 10, 8, 1}, {"READ in pieces", cmdRead, 3 << 20, 2, 3},
		{"WRITE", cmdWrite, 4096, 16, 1}, {"long WRITE", cmdWrite, 256 << 10, 4, 1}, {"WRITE in pieces", cmdWrite, 3 << 20, 2, 3},
	} {
		v := newVolley(r, row.cmd, row.size, row.depth)
		for range 50 {
			v.fire(t)
		}
		perRequest := testing.AllocsPerRun(200, func() { v.fire(t) }) / float64(row.depth)
		// The race detector makes pools forget on purpose.
		if perRequest > row.calls+0.25 && !raceEnabled {
			t.Errorf("%s: %.2f allocations a request", row.name, perRequest)
		}
		v.nc.Close()
		r.waitServed(1)
	}
}

func BenchmarkRequests(b *testing.B) {
	for _, row := range []struct {
		name        string
		cmd         uint16
		size, depth int64
	}{
		{"read-4k-q1", cmdRead, 4096, 1}, {"read-4k-q16", cmdRead, 4096, 16}, {"read-64k-q16", cmdRead, 64 << 10, 16}, {"read-1m-q4", cmdRead, 1 << 20, 4},
		{"write-4k-q1", cmdWrite, 4096, 1}, {"write-4k-q16", cmdWrite, 4096, 16}, {"write-1m-q4", cmdWrite, 1 << 20, 4},
	} {
		b.Run(row.name, func(b *testing.B) {
			r := fileRig(b, b.TempDir(), 8<<20)
			v := newVolley(r, row.cmd, row.size, row.depth)
			must(b, v.nc.SetDeadline(noDeadline))
			b.SetBytes(row.size)
			b.ReportAllocs()
			b.ResetTimer()
			for n := 0; n < b.N; n += int(row.depth) {
				v.fire(b)
			}
		})
	}
}
