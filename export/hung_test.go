package export

import (
	"context"
	"regexp"
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block/blocktest"
)

// TestClientThatLeftGivesUpItsTurnInThePool: the disk still works on a request of a
// client that was the next to get memory when it left. Others must not wait for that.
func TestClientThatLeftGivesUpItsTurnInThePool(t *testing.T) {
	r := newRig(t, setup{size: 40 << 20, options: Options{Memory: 34 << 20}})
	half := func() *client {
		c := r.connect().attach(false)
		go c.nc.Write(requestBytes(cmdWrite, 0, 1, 0, 32<<20, make([]byte, 20<<20)...))
		return c
	}
	queued := func(n int) func() bool {
		return func() bool {
			r.s.pool.mu.Lock()
			defer r.s.pool.mu.Unlock()
			return len(r.s.pool.queue) >= n
		}
	}
	hogs := []*client{half(), half()} // 38 of 34 MiB: one is favoured
	waitFor(t, "overdrawn pool", func() bool {
		r.s.pool.mu.Lock()
		defer r.s.pool.mu.Unlock()
		return r.s.pool.free < 0 && r.s.pool.favour != nil
	})
	r.gate.Hold(blocktest.OpRead)
	leaver := r.connect().attach(true)
	leaver.send(requestBytes(cmdRead, 0, 1, 0, 512), requestBytes(cmdRead, 0, 2, 0, 512))
	must(t, r.gate.WaitHeld(soon(t), 2))
	go leaver.nc.Write(requestBytes(cmdWrite, 0, 3, 0, 32<<20, make([]byte, 4<<20)...))
	waitFor(t, "leaver in the queue", queued(1))
	good := r.connect().attach(false)
	answered := make(chan uint32, 1)
	go func() { answered <- good.do(cmdWrite, 0, 0, 3<<20, make([]byte, 3<<20)...).errno }()
	waitFor(t, "next in the queue", queued(2))

	leaver.nc.Close()
	r.gate.Release(1) // its answer finds nobody; the other one stays with the disk
	waitFor(t, "end of the leaver's reader", func() bool { return r.s.Stats().Clients == 3 })
	for _, h := range hogs {
		h.nc.Close()
	}
	r.waitServed(len(hogs))
	select {
	case errno := <-answered:
		if errno != 0 {
			t.Errorf("WRITE: error %d", errno)
		}
	case <-soon(t).Done():
		t.Error("the client behind it in the queue gets no memory")
	}
}

// TestPlaceOfAClientThatLeftWithAFullBudgetIsFreed: the reader waits for a place for
// one more request, and so does not read to the end of the stream.
func TestPlaceOfAClientThatLeftWithAFullBudgetIsFreed(t *testing.T) {
	r := newRig(t, setup{options: Options{MaxClients: 1, MaxInFlight: 20}})
	c := r.connect().attach(true)
	r.gate.Hold(blocktest.OpWrite)
	for range 30 {
		c.send(requestBytes(cmdWrite, 0, 1, 0, 4, 9, 9, 9, 9))
	}
	waitFor(t, "full budget", r.onlyConn().budget.starving.Load)
	c.nc.Close()
	waitFor(t, "free place", func() bool { return r.s.Stats().Clients == 0 })
	next := r.connect().attach(true)
	wantErrno(t, "READ of the next client", next.do(cmdRead, 0, 0, 10), 0)
}

// TestPayloadTimeoutDoesNotCountOurOwnDelay: what the server made the client wait is
// no slowness of the client.
func TestPayloadTimeoutDoesNotCountOurOwnDelay(t *testing.T) {
	const limit = time.Second
	r := newRig(t, setup{size: 40 << 20, options: Options{MaxBytes: 33 << 20, PayloadTimeout: limit}})
	c := r.connect().attach(false)
	must(t, r.graph.DrainBegin(soon(t), r.node))
	c.send(requestBytes(cmdWrite, 0, 1, 0, 32<<20, make([]byte, 32<<20)...)) // takes nearly all the budget
	waitFor(t, "parking", r.onlyConn().waiting.Load)
	// Of the next one a piece fits. A second time limit has begun when its last part comes.
	c.send(requestBytes(cmdWrite, 0, 2, 0, 2<<20, make([]byte, 900<<10)...))
	<-time.After(limit + limit/4)
	sent := make(chan error, 1)
	go func() {
		_, err := c.nc.Write(make([]byte, 2<<20-900<<10))
		sent <- err
	}()
	waitFor(t, "full budget", r.onlyConn().budget.starving.Load)
	<-time.After(limit)
	r.graph.DrainEnd(r.node)
	must(t, <-sent)
	for range 2 {
		wantErrno(t, "WRITE", c.result(dataOf(0)), 0)
	}
}

// TestAnswersAreSentWhileAllWorkersHang: an answer did not fit into the socket when
// its worker went on to a request that hangs. The client gets it when it receives.
func TestAnswersAreSentWhileAllWorkersHang(t *testing.T) {
	const length = 4 << 20 // more than a socket holds
	r := newRig(t, setup{size: length, options: Options{Workers: 2}})
	c := r.connect().attach(false)
	r.gate.Hold(blocktest.OpWrite)
	write := requestBytes(cmdWrite, 0, 2, 0, 1, 9)
	c.send(requestBytes(cmdRead, 0, 1, 0, length), write, write)
	must(t, r.gate.WaitHeld(soon(t), 2))
	if res := c.result(dataOf(length)); res.cookie != 1 || res.errno != 0 {
		t.Errorf("reply to %d, error %d", res.cookie, res.errno)
	}
	r.gate.ReleaseAll()
	for range 2 {
		if res := c.result(dataOf(0)); res.cookie != 2 || res.errno != 0 {
			t.Errorf("reply to %d, error %d", res.cookie, res.errno)
		}
	}
}

// TestG16UnfinishedDrainNamesTheRequests: operation, length, offset and age of what
// the disk still works on, the oldest first, and whose it is.
func TestG16UnfinishedDrainNamesTheRequests(t *testing.T) {
	r := newRig(t, setup{})
	c := r.connect().attach(true)
	r.gate.Hold(blocktest.OpRead, blocktest.OpZero)
	c.send(requestBytes(cmdRead, 0, 1, 4096, 512))
	must(t, r.gate.WaitHeld(soon(t), 1))
	c.send(requestBytes(cmdWriteZeroes, 0, 2, 8192, 1024))
	must(t, r.gate.WaitHeld(soon(t), 2))
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	err := r.graph.DrainBegin(ended, r.node)
	want := regexp.MustCompile(`^drain of node '.*' did not finish: export '.*' still has 2 requests in flight ` +
		`\(read of 512 bytes at offset 4096 for [0-9.]+m?s, write_zeroes of 1024 bytes at offset 8192 for [0-9.]+m?s\): context canceled$`)
	if err == nil || !want.MatchString(err.Error()) {
		t.Errorf("the error is %q", err)
	}
	if r.e.Drained() {
		t.Error("still drained after the drain was given up")
	}
	r.gate.ReleaseAll()
}
