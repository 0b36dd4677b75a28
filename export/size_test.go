package export

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// toldSize asks with a client of its own how large the export is and what can be done with it.
func (r *rig) toldSize() (size int64, flags uint16) {
	r.t.Helper()
	c := r.connect()
	c.greet(3)
	for _, reply := range c.option(optInfo, infoData("disk")) {
		if reply.typ == repInfo && be.Uint16(reply.data) == infoExport {
			size, flags = int64(be.Uint64(reply.data[2:])), be.Uint16(reply.data[10:])
		}
	}
	c.nc.Close()
	return size, flags
}

// The size of a connection is that at its begin. Where the node has become shorter
// requests fail, whatever they are; the connection goes on.
func TestP10ClientsKeepTheSizeTheyWereTold(t *testing.T) {
	for _, structured := range []bool{false, true} {
		for _, direct := range []bool{false, true} {
			t.Run(fmt.Sprintf("structured %t direct %t", structured, direct), func(t *testing.T) {
				r := newRig(t, setup{direct: direct})
				old := r.connect().attach(structured)
				resize := func(size int64) {
					t.Helper()
					r.store.Truncate(size)
					if got, err := r.graph.RefreshSize(context.Background(), r.node); err != nil || got != size {
						t.Fatalf("refresh: %d, %v", got, err)
					}
					if got, _ := r.toldSize(); got != size {
						t.Errorf("a new client is told %d, want %d", got, size)
					}
				}
				resize(2 << 20)
				wantErrno(t, "a read of what is new", old.do(cmdRead, 0, 1<<20, 512), nbdEINVAL)
				wantErrno(t, "a write to what is new", old.do(cmdWrite, 0, 1<<20-1, 2, 1, 2), nbdENOSPC)
				young := r.connect().attach(structured)
				wantErrno(t, "a write by who knows", young.do(cmdWrite, 0, 1<<20, 2, 1, 2), 0)
				wantErrno(t, "a read by who knows", young.do(cmdRead, 0, 1<<20, 512), 0)

				resize(64 << 10)
				for _, off := range []int64{64<<10 - 512, 64 << 10, 512 << 10} {
					for _, cmd := range []uint16{cmdRead, cmdCache, cmdTrim, cmdWriteZeroes, cmdWrite, cmdBlockStatus} {
						if cmd == cmdBlockStatus && !structured {
							continue
						}
						var payload []byte
						if cmd == cmdWrite {
							payload = make([]byte, 1024)
						}
						what := fmt.Sprintf("command %d at %d", cmd, off)
						if got := old.do(cmd, 0, off, 1024, payload...); got.errno == 0 {
							t.Errorf("%s succeeded", what)
						}
					}
				}
				got := old.do(cmdRead, 0, 0, 64<<10)
				wantErrno(t, "a read of what is left", got, 0)
				if !bytes.Equal(got.data, pattern(0, 64<<10)) {
					t.Errorf("what is left has changed")
				}
				wantErrno(t, "flush", old.do(cmdFlush, 0, 0, 0), 0)
			})
		}
	}
}

// Write access is fixed when a client comes. One that had it meets errors when the node
// is made read-only by force; one that came then is told, and stays without.
func TestG21ClientsOfANodeThatBecomesReadOnly(t *testing.T) {
	r := newRig(t, setup{})
	reopen := func(readOnly bool) {
		t.Helper()
		c := *r.node.ExplicitConfig()
		c.ReadOnly, c.Children = readOnly, nil
		must(t, r.graph.Reopen(soon(t), block.ReopenRequest{Node: r.node, Config: &c, Force: true}))
	}
	write := func(c *client) result { return c.do(cmdWrite, 0, 0, 4, 1, 2, 3, 4) }
	old := r.connect().attach(true)
	wantErrno(t, "write", write(old), 0)
	if _, flags := r.toldSize(); flags&flagReadOnly != 0 {
		t.Errorf("flags %#x", flags)
	}
	reopen(true)
	wantErrno(t, "write", write(old), nbdEPERM)
	wantErrno(t, "trim", old.do(cmdTrim, 0, 0, 4096), nbdEPERM)
	wantErrno(t, "read", old.do(cmdRead, 0, 0, 512), 0)
	if _, flags := r.toldSize(); flags&flagReadOnly == 0 || flags&(flagSendTrim|flagSendWriteZeroes) != 0 {
		t.Errorf("flags %#x", flags)
	}
	young := r.connect().attach(true)
	wantErrno(t, "write", write(young), nbdEPERM)
	reopen(false)
	wantErrno(t, "write", write(old), 0)
	wantErrno(t, "write of who came when it was read-only", write(young), nbdEPERM)
}

// A reopen that waits for a request in flight holds up no reader, and loses nothing.
func TestG21ReopenWithRequestsInFlight(t *testing.T) {
	r := newRig(t, setup{})
	c := r.connect().attach(true)
	r.gate.Hold(blocktest.OpWrite)
	c.send(requestBytes(cmdWrite, 0, 1, 0, 4, 1, 2, 3, 4))
	must(t, r.gate.WaitHeld(soon(t), 1))
	done := make(chan error, 1)
	cfg := *r.node.ExplicitConfig()
	cfg.Children, cfg.DetectZeroes = nil, block.DetectZeroesOn
	go func() { done <- r.graph.Reopen(soon(t), block.ReopenRequest{Node: r.node, Config: &cfg}) }()
	for !r.e.Drained() {
		if t.Context().Err() != nil {
			t.Fatal("no drain")
		}
	}
	c.send(requestBytes(cmdRead, 0, 2, 0, 4))
	r.gate.ReleaseAll()
	must(t, <-done)
	for range 2 {
		got := c.result(dataOf(0)) // a simple one is of the write
		wantErrno(t, "request", got, 0)
		if got.cookie == 2 && !bytes.Equal(c.assemble(got, 0, 4), []byte{1, 2, 3, 4}) {
			t.Errorf("read something else than what was written before")
		}
	}
	if r.node.Config().DetectZeroes != block.DetectZeroesOn {
		t.Errorf("not reopened")
	}
}
