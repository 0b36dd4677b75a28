package export

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"github.com/nbdserve/nbdserve/internal/iostat"
)

// waitFor waits until ok says true. It is for states that nothing announces.
func waitFor(t blocktest.TB, what string, ok func() bool) {
	t.Helper()
	ctx := soon(t)
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("not in %v: %s", patience, what)
		case <-time.After(time.Millisecond):
		}
	}
}

func (r *rig) inFlight() int64 {
	n := int64(0)
	snapshot := r.e.Stats()
	for _, f := range snapshot.Ops {
		n += f.InFlight
	}
	return n
}

// onlyConn is the connection of the only client.
func (r *rig) onlyConn() *conn {
	r.t.Helper()
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	if len(r.s.conns) != 1 {
		r.t.Fatalf("%d connections", len(r.s.conns))
	}
	for c := range r.s.conns {
		return c
	}
	return nil
}

// TestDrainDoesNotWaitForClients: whatever a client does, a drain ends as soon as the disk is done.
func TestDrainDoesNotWaitForClients(t *testing.T) {
	read := func(n int64) []byte { return requestBytes(cmdRead, 0, 1, 0, n) }
	for _, row := range []struct {
		name    string
		begin   []byte // sent before the drain
		admits  int64  // requests of it that are complete
		rest    []byte // sent in the drain
		answers int
	}{
		{"idle client", nil, 0, nil, 0},
		{"half header", read(512)[:13], 0, read(512)[13:], 1},
		{"header but a byte", read(512)[:27], 0, read(512)[27:], 1},
		{"half payload", requestBytes(cmdWrite, 0, 1, 0, 4096, make([]byte, 2000)...), 0, make([]byte, 2096), 1},
		{"half of a long payload", requestBytes(cmdWrite, 0, 1, 0, 1<<20, make([]byte, 300000)...), 0, make([]byte, 1<<20-300000), 1},
		{"rejected half payload", requestBytes(cmdWrite, 0x80, 1, 0, 4096, make([]byte, 2000)...), 0, make([]byte, 2096), 1},
		{"request and a half header", append(read(512), read(512)[:20]...), 1, read(512)[20:], 2},
	} {
		for _, direct := range []bool{false, true} {
			t.Run(row.name, func(t *testing.T) {
				r := newRig(t, setup{direct: direct})
				c := r.connect().attach(true)
				c.send(row.begin)
				conn := r.onlyConn()
				waitFor(t, "arrival", func() bool { return r.e.Stats().Ops[iostat.Read].OK == row.admits && conn.waitsForMore(len(row.begin)) })
				began := time.Now()
				must(t, r.graph.DrainBegin(soon(t), r.node))
				if d := time.Since(began); d > 100*time.Millisecond {
					t.Errorf("the drain took %v", d)
				}
				c.send(row.rest)
				r.graph.DrainEnd(r.node)
				for range row.answers {
					if res := c.result(dataOf(0)); res.cookie != 1 {
						t.Fatalf("%+v", res)
					}
				}
				wantErrno(t, "READ afterwards", c.do(cmdRead, 0, 0, 512), 0)
			})
		}
	}
}

// waitsForMore tells that the reader has taken in n bytes. It looks from outside
// without a lock, by asking the kernel how much of the stream is unread.
func (c *conn) waitsForMore(n int) bool {
	raw, err := c.nc.(syscall.Conn).SyscallConn()
	if err != nil {
		return false
	}
	unread := -1
	err = raw.Control(func(fd uintptr) { unread = unreadBytes(int(fd)) })
	return err == nil && unread == 0
}

func TestDrainWaitsForTheDiskOnly(t *testing.T) {
	r := newRig(t, setup{})
	c := r.connect().attach(true)
	r.gate.Hold(blocktest.OpRead, blocktest.OpWrite)
	for i := range 5 {
		c.send(requestBytes(cmdRead, 0, uint64(i), 0, 4096))
	}
	must(t, r.gate.WaitHeld(soon(t), 5))
	drained := make(chan time.Time, 1)
	go func() {
		if r.graph.DrainBegin(soon(t), r.node) == nil {
			drained <- time.Now()
		}
	}()
	waitFor(t, "gate", r.e.Drained)
	c.send(requestBytes(cmdWrite, 0, 100, 0, 3, 1, 2, 3)) // waits for the end of the drain
	c.send(requestBytes(cmdRead, 0, 101, 0, 3))
	waitFor(t, "parking", r.onlyConn().waiting.Load)
	r.gate.Release(4)
	select {
	case <-drained:
		t.Fatal("drained with a request in the disk")
	case <-time.After(10 * time.Millisecond):
	}
	released := time.Now()
	r.gate.ReleaseAll()
	if d := (<-drained).Sub(released); d > 100*time.Millisecond {
		t.Errorf("the drain ended %v after the last request", d)
	}
	if n := r.inFlight(); n != 0 {
		t.Errorf("%d in flight in the drain", n)
	}
	for range 5 {
		if res := c.result(dataOf(0)); res.errno != 0 || res.cookie >= 5 {
			t.Fatalf("%+v", res)
		}
	}
	if !bytes.Equal(r.store.Bytes()[:3], pattern(0, 3)) {
		t.Error("a write ran in the drain")
	}
	r.graph.DrainEnd(r.node)
	for range 2 {
		if res := c.result(dataOf(0)); res.errno != 0 || res.cookie < 100 {
			t.Fatalf("%+v", res)
		}
	}
	if !bytes.Equal(r.store.Bytes()[:3], []byte{1, 2, 3}) {
		t.Error("the parked write is not there")
	}
}

// TestClientThatNeverReceives fills every buffer with answers: a drain still ends at once, and memory is bounded.
func TestClientThatNeverReceivesHoldsUpNothing(t *testing.T) {
	for _, length := range []int64{4096, 60000, 1 << 20} {
		for _, direct := range []bool{false, true} {
			r := newRig(t, setup{size: 4 << 20, direct: direct})
			r.store.Write(pattern(0, 4<<20), 0)
			c := r.connect().attach(true)
			conn := r.onlyConn()
			stuck := make(chan int, 1)
			go func() { // sends until nobody reads any more
				n := 0
				for {
					if _, err := c.nc.Write(requestBytes(cmdRead, 0, uint64(n), 0, length)); err != nil {
						break
					}
					n++
				}
				stuck <- n
			}()
			var last int64
			t.Logf("reads of %d bytes, inline %v", length, direct)
			waitFor(t, "standstill", func() bool {
				f := r.e.Stats().Ops[iostat.Read]
				still := f.OK == last && f.OK > 0 && f.InFlight == 0
				last = f.OK
				if still {
					<-time.After(20 * time.Millisecond)
					still = r.e.Stats().Ops[iostat.Read].OK == last
				}
				return still
			})
			if n := conn.budget.requests.Load(); n > int64(r.s.opt.MaxInFlight) {
				t.Errorf("%d requests unanswered", n)
			}
			conn.budget.mu.Lock()
			if n := conn.budget.bytes; n > r.s.opt.MaxBytes+txSize {
				t.Errorf("%d bytes held", n)
			}
			conn.budget.mu.Unlock()
			began := time.Now()
			must(t, r.graph.DrainBegin(soon(t), r.node))
			if d := time.Since(began); d > 100*time.Millisecond {
				t.Errorf("the drain took %v", d)
			}
			r.graph.DrainEnd(r.node)
			other := r.connect().attach(false)
			wantErrno(t, "READ of another client", other.do(cmdRead, 0, 0, 512), 0)
			c.nc.Close()
			<-stuck
			r.waitServed(1)
		}
	}
}

func TestStatsShowExactlyWhatIsInFlight(t *testing.T) {
	const n = 40 // more than there are workers
	r := newRig(t, setup{options: Options{Workers: 16}})
	c := r.connect().attach(true)
	r.gate.Hold(blocktest.OpRead, blocktest.OpWrite)
	for i := range int64(n) {
		if i%2 == 0 {
			c.send(requestBytes(cmdRead, 0, 1, i*4096, 4096))
		} else {
			c.send(requestBytes(cmdWrite, 0, 1, i*4096, 100, make([]byte, 100)...))
		}
	}
	must(t, r.gate.WaitHeld(soon(t), 16))
	waitFor(t, "admission", func() bool { return r.inFlight() == n })
	snapshot := r.e.Stats()
	if f := snapshot.Ops; f[iostat.Read].InFlight != n/2 || f[iostat.Write].InFlight != n/2 || snapshot.Connections != 1 || len(snapshot.Slow) != 16 {
		t.Fatalf("%+v", f)
	}
	if snapshot.Oldest(time.Now()) <= 0 {
		t.Error("no oldest request")
	}
	c.nc.Close()
	r.gate.ReleaseAll()
	r.waitServed(1)
	snapshot = r.e.Stats()
	f := snapshot.Ops
	if r.inFlight() != 0 || f[iostat.Read].OK != n/2 || f[iostat.Write].OK != n/2 || len(snapshot.Slow) != 0 || snapshot.Connections != 0 {
		t.Fatalf("after the client: %+v", f)
	}
}

func TestHalfWriteIsNeverApplied_156(t *testing.T) {
	for _, length := range []int64{4096, 60000, 1 << 20, 3 << 20} {
		full := requestBytes(cmdWrite, 0, 1, 0, length, bytes.Repeat([]byte{0xee}, int(length))...)
		for _, missing := range []int{1, int(length) / 2, int(length)} {
			r := newRig(t, setup{size: 4 << 20})
			before := r.store.Bytes()
			c := r.connect().attach(true)
			c.send(full[:len(full)-missing])
			c.nc.Close()
			r.waitServed(1)
			if !bytes.Equal(before, r.store.Bytes()) {
				t.Fatalf("a WRITE of %d without its last %d bytes changed the disk", length, missing)
			}
		}
	}
}

func TestCutAtEveryByteOfRequests_156(t *testing.T) {
	r := newRig(t, setup{size: 4 << 20})
	before := r.store.Bytes()
	var all []byte
	for _, cmd := range []uint16{cmdRead, cmdFlush, cmdCache, cmdBlockStatus} {
		n := int64(4096)
		if cmd == cmdFlush {
			n = 0
		}
		all = append(all, requestBytes(cmd, 0, 3, 0, n)...)
	}
	all = append(all, requestBytes(cmdWrite, 0, 4, 0, 40, bytes.Repeat([]byte{0xee}, 40)...)...)
	for n := range len(all) {
		c := r.connect().attach(true)
		c.send(all[:n])
		c.nc.Close()
		r.waitServed(1)
	}
	if !bytes.Equal(before, r.store.Bytes()) {
		t.Error("the disk has changed")
	}
	if n := r.inFlight(); n != 0 {
		t.Errorf("%d in flight", n)
	}
}

func TestRequestsOfAClientThatLeftFinishAndItsPlaceIsFreeAtOnce(t *testing.T) {
	r := newRig(t, setup{options: Options{MaxClients: 1}})
	c := r.connect().attach(true)
	r.gate.Hold(blocktest.OpWrite)
	for i := range int64(20) {
		c.send(requestBytes(cmdWrite, 0, 1, i*1000, 4, 9, 9, 9, 9))
	}
	waitFor(t, "admission", func() bool { return r.inFlight() == 20 })
	c.nc.Close()
	waitFor(t, "free place", func() bool { return r.s.Stats().Clients == 0 })
	next := r.connect().attach(true)
	wantErrno(t, "FLUSH of the next client", next.do(cmdFlush, 0, 0, 0), 0)
	r.gate.ReleaseAll()
	r.waitServed(1)
	for i := range 20 {
		if !bytes.Equal(r.store.Bytes()[i*1000:][:4], []byte{9, 9, 9, 9}) {
			t.Fatalf("write %d is not there", i)
		}
	}
}

func TestParkedRequestsOfAClientThatLeftAreDropped(t *testing.T) {
	for _, disc := range []bool{false, true} {
		r := newRig(t, setup{})
		c := r.connect().attach(true)
		must(t, r.graph.DrainBegin(soon(t), r.node))
		c.send(requestBytes(cmdWrite, 0, 1, 0, 4, 9, 9, 9, 9))
		waitFor(t, "parking", r.onlyConn().waiting.Load)
		if disc {
			c.send(requestBytes(cmdDisc, 0, 1, 0, 0))
		}
		if !disc {
			c.nc.Close()
		}
		waitFor(t, "leaving", func() bool { return r.s.Stats().Clients == 0 })
		r.graph.DrainEnd(r.node)
		if disc {
			wantErrno(t, "WRITE before DISC", c.result(dataOf(0)), 0)
			c.expectEnd()
		}
		r.waitServed(1)
		if written := r.store.Bytes()[0] == 9; written != disc {
			t.Errorf("DISC %v: written %v", disc, written)
		}
	}
}

func TestDiscFinishesWhatIsOutstandingThenCloses_155(t *testing.T) {
	r := newRig(t, setup{})
	c := r.connect().attach(true)
	r.gate.Hold(blocktest.OpWrite)
	c.send(requestBytes(cmdWrite, 0, 1, 0, 4, 9, 9, 9, 9), requestBytes(cmdRead, 0, 2, 100, 512), requestBytes(cmdDisc, 0, 3, 0, 0))
	must(t, r.gate.WaitHeld(soon(t), 1))
	if res := c.result(dataOf(0)); res.cookie != 2 {
		t.Fatalf("%+v", res)
	}
	r.gate.ReleaseAll()
	if res := c.result(dataOf(0)); res.cookie != 1 || res.errno != 0 {
		t.Fatalf("%+v", res)
	}
	c.expectEnd()
}

// TestAnswersSurviveUnreadInput: closing with unread input must not destroy answers under way.
func TestAnswersSurviveUnreadInput(t *testing.T) {
	r := newRig(t, setup{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	serving := make(chan error, 1)
	go func() { serving <- r.s.Serve(l) }()
	for range 20 {
		nc, err := net.Dial("tcp", l.Addr().String())
		must(t, err)
		c := (&client{t: t, nc: nc}).attach(true)
		c.send(requestBytes(cmdRead, 0, 1, 0, 300000), be.AppendUint32(nil, 0xbadbad), make([]byte, 200000))
		if res := c.result(dataOf(0)); !bytes.Equal(c.assemble(res, 0, 300000), pattern(0, 300000)) {
			t.Fatal("wrong data")
		}
		c.expectEnd()
		nc.Close()
	}
	must(t, r.s.Shutdown(soon(t)))
	must(t, <-serving)
}

func TestSlowReceiverIsCut(t *testing.T) {
	r := newRig(t, setup{size: 4 << 20, options: Options{SendTimeout: 50 * time.Millisecond}})
	r.store.Write(pattern(0, 4<<20), 0)
	c := r.connect().attach(true)
	c.send(requestBytes(cmdRead, 0, 1, 0, 4<<20))
	r.waitServed(1)
	if n := r.inFlight(); n != 0 {
		t.Errorf("%d in flight", n)
	}
}

func TestSlowPayloadIsCut(t *testing.T) {
	for _, pipe := range []bool{false, true} {
		r := newRig(t, setup{options: Options{PayloadTimeout: 30 * time.Millisecond}})
		idle := r.connect().attach(true)
		for _, payload := range []int{0, 100, 200 << 10} {
			c := r.connect()
			if pipe {
				a, b := net.Pipe()
				c = r.connectOver(a, b)
			}
			c.attach(true)
			c.send(requestBytes(cmdWrite, 0, 1, 0, 300<<10, make([]byte, payload)...))
			r.waitServed(1)
		}
		half := r.connect().attach(true)
		half.send(requestBytes(cmdRead, 0, 1, 0, 10)[:20])
		<-time.After(100 * time.Millisecond)
		half.send(requestBytes(cmdRead, 0, 1, 0, 10)[20:])
		wantErrno(t, "half header", half.result(dataOf(0)), 0)
		wantErrno(t, "idle client", idle.do(cmdRead, 0, 0, 10), 0)
	}
}

func TestPayloadInStepsIsNotCut(t *testing.T) {
	r := newRig(t, setup{size: 4 << 20, options: Options{PayloadTimeout: 400 * time.Millisecond}})
	c := r.connect().attach(true)
	payload := pattern(5, 2<<20)
	c.send(requestBytes(cmdWrite, 0, 1, 0, 2<<20))
	for rest := payload; len(rest) > 0; rest = rest[256<<10:] {
		<-time.After(100 * time.Millisecond)
		c.send(rest[:256<<10])
	}
	wantErrno(t, "WRITE", c.result(dataOf(0)), 0)
	if !bytes.Equal(r.store.Bytes()[:2<<20], payload) {
		t.Fatal("wrong data")
	}
}

// TestHalfSentPayloadsStarveNobody: clients that hold all of the pool with half a payload each.
func TestHalfSentPayloadsStarveNobody(t *testing.T) {
	r := newRig(t, setup{size: 40 << 20, options: Options{Memory: 34 << 20}})
	for range 6 { // 6 times 20 of 34 MiB
		c := r.connect().attach(false)
		go c.nc.Write(requestBytes(cmdWrite, 0, 1, 0, 32<<20, make([]byte, 20<<20)...))
	}
	waitFor(t, "full pool", func() bool {
		r.s.pool.mu.Lock()
		defer r.s.pool.mu.Unlock()
		return len(r.s.pool.queue) > 2
	})
	good := r.connect().attach(true)
	for range 20 {
		wantErrno(t, "READ", good.do(cmdRead, 0, 0, 100000), 0)
		wantErrno(t, "WRITE", good.do(cmdWrite, 0, 0, 100000, make([]byte, 100000)...), 0)
	}
}

// TestFullPoolMovesOn: all clients want more than there is, and all get done.
func TestFullPoolMovesOn(t *testing.T) {
	r := newRig(t, setup{size: 40 << 20, options: Options{Memory: 34 << 20}})
	done := make(chan error, 6)
	for range 6 {
		c := r.connect().attach(false)
		go func() {
			_, err := c.nc.Write(requestBytes(cmdWrite, 0, 1, 0, 30<<20, make([]byte, 30<<20)...))
			if err == nil {
				_, err = io.ReadFull(c.nc, make([]byte, 16))
			}
			done <- err
		}()
	}
	for range 6 {
		must(t, <-done)
	}
}

func TestLastClientFlushes(t *testing.T) {
	gone := make(chan bool, 10)
	r := newRig(t, setup{options: Options{OnClientsGone: func() { gone <- true }}})
	r.faults.Add(blocktest.Fault{Op: blocktest.OpFlush, Err: errInjected})
	a, b := r.connect().attach(true), r.connect().attach(true)
	a.nc.Close()
	r.waitServed(1)
	if r.faults.Fired() != 0 || len(gone) != 0 {
		t.Fatal("flushed or told with a client left")
	}
	b.send(requestBytes(cmdDisc, 0, 0, 0, 0))
	b.expectEnd()
	if r.faults.Fired() != 1 {
		t.Fatal("closed before the flush")
	}
	b.nc.Close()
	<-gone
	look := r.connect() // one that only looks is no client
	look.greet(3)
	look.final(optList, nil)
	look.nc.Close()
	r.waitServed(2)
	if len(gone) != 0 {
		t.Fatal("told of somebody who was no client")
	}
	r.faults.Clear()
}

func TestShutdownMayBeCalledWhenClientsAreGone(t *testing.T) {
	var r *rig
	ended := make(chan error, 1)
	r = newRig(t, setup{options: Options{OnClientsGone: func() { ended <- r.s.Shutdown(soon(t)) }}})
	r.connect().attach(true).nc.Close()
	must(t, <-ended)
}

func TestShutdownAnswersWhatWasReadAndRefusesNegotiation_45_157(t *testing.T) {
	r := newRig(t, setup{options: Options{CloseTimeout: time.Second}})
	early := r.connect()
	early.greet(3)
	early.final(optList, nil)
	c := r.connect().attach(true)
	idle := r.connect().attach(true)
	r.gate.Hold(blocktest.OpWrite)
	c.send(requestBytes(cmdWrite, 0, 1, 0, 4, 9, 9, 9, 9))
	must(t, r.gate.WaitHeld(soon(t), 1))
	ended := make(chan error, 1)
	go func() { ended <- r.s.Shutdown(soon(t)) }()
	idle.expectEnd()
	idle.nc.Close()
	for _, opt := range []uint32{optList, optGo, optStructuredReply, 99} {
		rs := early.option(opt, nil)
		if len(rs) != 1 || rs[0].typ != repErrShutdown {
			t.Fatalf("option %d: %x", opt, rs)
		}
	}
	if typ := early.final(optAbort, nil); typ != repAck {
		t.Fatalf("ABORT: %#x", typ)
	}
	early.nc.Close()
	select {
	case err := <-ended:
		t.Fatalf("ended with a write in the disk: %v", err)
	default:
	}
	r.gate.ReleaseAll()
	wantErrno(t, "WRITE", c.result(dataOf(0)), 0)
	c.expectEnd()
	c.nc.Close()
	must(t, <-ended)
	if !bytes.Equal(r.store.Bytes()[:4], []byte{9, 9, 9, 9}) {
		t.Fatal("the write is not there")
	}
	late := r.connect()
	late.expectEnd()
	if _, err := r.s.AddExport(soon(t), Config{Name: "x", Graph: r.graph, Node: r.node}); !errors.Is(err, ErrStopped) {
		t.Fatalf("AddExport: %v", err)
	}
}

func TestShutdownIsNotHeldUpBySilentNegotiation_CVE_2024_7409(t *testing.T) {
	r := newRig(t, setup{})
	for i := range 20 {
		c := r.connect()
		if i%2 == 0 {
			c.greet(3)
			c.final(optList, nil)
		}
	}
	began := time.Now()
	must(t, r.s.Shutdown(soon(t)))
	if d := time.Since(began); d > 5*time.Second {
		t.Fatalf("it took %v", d)
	}
}

// TestExpiredShutdown: at the deadline, what was begun finishes, what was not is refused, and the connections are cut.
func TestShutdownAtItsDeadlineRefusesWhatWasNotBegun(t *testing.T) {
	r := newRig(t, setup{options: Options{Workers: 2, CloseTimeout: 30 * time.Millisecond}})
	c := r.connect().attach(true)
	r.gate.Hold(blocktest.OpWrite)
	for i := range int64(6) {
		c.send(requestBytes(cmdWrite, 0, uint64(i), i*100, 1, 9))
	}
	must(t, r.gate.WaitHeld(soon(t), 2))
	waitFor(t, "admission", func() bool { return r.inFlight() == 6 })
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- r.s.Shutdown(ctx) }()
	for range 4 {
		res := c.result(dataOf(0))
		if res.cookie < 2 || res.text == "" {
			t.Fatalf("%+v", res)
		}
		wantErrno(t, "WRITE", res, nbdESHUTDOWN)
	}
	waitFor(t, "the cut", r.onlyConn().t.aborted)
	select {
	case <-ended:
		t.Fatal("ended with writes in the disk")
	default:
	}
	r.gate.ReleaseAll()
	must(t, <-ended)
	for i := range 6 {
		if written := r.store.Bytes()[i*100] == 9; written != (i < 2) {
			t.Errorf("write %d: done is %v", i, written)
		}
	}
}

func TestShutdownAtItsDeadlineRefusesWhatWaitsForADrain(t *testing.T) {
	r := newRig(t, setup{})
	c := r.connect().attach(true)
	must(t, r.graph.DrainBegin(soon(t), r.node))
	c.send(requestBytes(cmdWrite, 0, 5, 0, 1, 9))
	waitFor(t, "parking", r.onlyConn().waiting.Load)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- r.s.Shutdown(ctx) }()
	wantErrno(t, "WRITE", c.result(dataOf(0)), nbdESHUTDOWN)
	r.graph.DrainEnd(r.node) // the export is flushed afterwards
	must(t, <-ended)
	if r.store.Bytes()[0] == 9 {
		t.Error("a refused write was done")
	}
}

func TestCutEndsAllAtOnceButIOFinishes(t *testing.T) {
	r := newRig(t, setup{})
	c, idle := r.connect().attach(true), r.connect()
	r.gate.Hold(blocktest.OpWrite)
	c.send(requestBytes(cmdWrite, 0, 1, 0, 1, 9))
	must(t, r.gate.WaitHeld(soon(t), 1))
	idle.read(18)
	r.s.Cut()
	idle.expectEnd()
	r.waitServed(1)
	r.gate.ReleaseAll()
	r.waitServed(1)
	c.expectEnd()
	if r.store.Bytes()[0] != 9 {
		t.Error("the write was cancelled")
	}
}

func TestShutdownTellsOfAFailedFlush(t *testing.T) {
	r := newRig(t, setup{})
	r.faults.Add(blocktest.Fault{Op: blocktest.OpFlush, Times: 1, Err: errInjected})
	if err := r.s.Shutdown(soon(t)); !errors.Is(err, errInjected) || !strings.Contains(err.Error(), `export "disk"`) {
		t.Fatalf("error %v", err)
	}
}

func TestServeOnSeveralListeners(t *testing.T) {
	r := newRig(t, setup{})
	dir := t.TempDir()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	unix, err := net.Listen("unix", filepath.Join(dir, "s"))
	must(t, err)
	serving := make(chan error, 2)
	for _, l := range []net.Listener{tcp, unix} {
		go func() { serving <- r.s.Serve(l) }()
	}
	for _, l := range []net.Listener{tcp, unix, tcp} {
		nc, err := net.Dial(l.Addr().Network(), l.Addr().String())
		must(t, err)
		defer nc.Close()
		c := (&client{t: t, nc: nc}).attach(true)
		if res := c.do(cmdRead, 0, 0, 200000); !bytes.Equal(res.data, pattern(0, 200000)) {
			t.Fatal("wrong data")
		}
	}
	must(t, r.s.Shutdown(soon(t)))
	must(t, <-serving)
	must(t, <-serving)
	if _, err := os.Stat(filepath.Join(dir, "s")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	must(t, err)
	must(t, r.s.Serve(l)) // after Shutdown: returns at once
}

func TestServeTellsOfABrokenListener(t *testing.T) {
	r := newRig(t, setup{})
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	must(t, err)
	l.Close()
	if err := r.s.Serve(l); err == nil || !strings.Contains(err.Error(), "accept on") {
		t.Fatalf("error %v", err)
	}
}

func TestIdleWorkersEnd(t *testing.T) {
	r := newRig(t, setup{})
	c := r.connect().attach(true)
	r.gate.Hold(blocktest.OpRead)
	for range 8 {
		c.send(requestBytes(cmdRead, 0, 1, 0, 512))
	}
	must(t, r.gate.WaitHeld(soon(t), 8))
	r.gate.ReleaseAll()
	for range 8 {
		c.result(dataOf(0))
	}
	conn := r.onlyConn()
	count := func() int {
		conn.mu.Lock()
		defer conn.mu.Unlock()
		return conn.staff.count
	}
	if n := count(); n < 8 {
		t.Fatalf("%d workers ran 8 requests at once", n)
	}
	waitFor(t, "end of idle workers", func() bool {
		conn.dismissIdle(r.s.now() + workerIdle + time.Second)
		return count() == 0
	})
	wantErrno(t, "READ", c.do(cmdRead, 0, 0, 512), 0)
}

// A logWatch collects what is logged.
type logWatch struct{ lines chan string }

func (w logWatch) Write(p []byte) (int, error) {
	select {
	case w.lines <- string(p):
	default:
	}
	return len(p), nil
}

func TestSlowRequestsAreLoggedOnce(t *testing.T) {
	w := logWatch{make(chan string, 100)}
	r := newRig(t, setup{options: Options{SlowAfter: 20 * time.Millisecond, Log: slog.New(slog.NewTextHandler(w, nil))}})
	c := r.connect().attach(true)
	r.gate.Hold(blocktest.OpRead)
	c.send(requestBytes(cmdRead, 0, 1, 4096, 512))
	c.send(requestBytes(cmdRead, 0, 1, 12288, 512))
	got := (<-w.lines) + (<-w.lines)
	for _, want := range []string{"slow request", "op=read", "offset=4096", "offset=12288", "export=disk", "node=#block0"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in %q", want, got)
		}
	}
	<-time.After(50 * time.Millisecond)
	r.gate.ReleaseAll()
	c.result(dataOf(0))
	c.result(dataOf(0))
	select {
	case line := <-w.lines:
		t.Errorf("logged again: %s", line)
	default:
	}
}

func TestGoneClientsAreNoNews(t *testing.T) {
	w := logWatch{make(chan string, 100)}
	r := newRig(t, setup{options: Options{Log: slog.New(slog.NewTextHandler(w, nil))}})
	probe := r.connect() // a port scan
	probe.nc.Close()
	c := r.connect().attach(true)
	c.nc.Close()
	d := r.connect().attach(true)
	d.send(requestBytes(cmdDisc, 0, 0, 0, 0))
	d.expectEnd()
	d.nc.Close()
	r.waitServed(3)
	select {
	case line := <-w.lines:
		t.Errorf("logged: %s", line)
	default:
	}
}

func TestWriteLimitsOfAGraphBehindTheExport(t *testing.T) {
	// MaxTransfer of the node is the graph's affair: clients see 32 MiB.
	r := newRig(t, setup{size: 4 << 20, limits: block.Limits{RequestAlignment: 1, MemAlignment: 1, MaxTransfer: 64 << 10}, direct: true})
	c := r.connect().attach(true, infoBlockSize)
	wantErrno(t, "WRITE", c.do(cmdWrite, flagFUA, 0, 3<<20, pattern(1, 3<<20)...), 0)
	if !bytes.Equal(r.store.Bytes()[:3<<20], pattern(1, 3<<20)) {
		t.Fatal("wrong data")
	}
}
