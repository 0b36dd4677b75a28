package export

import (
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"github.com/nbdserve/nbdserve/block/filter/throttle"
)

// TestRequestsMeetDismissedWorkers: a worker that was told to end must not count as
// one that will look at the queue, or a request that comes just then waits for ever.
func TestRequestsMeetDismissedWorkers(t *testing.T) {
	const workers = 2
	r := newRig(t, setup{options: Options{Workers: workers}})
	c := r.connect().attach(true)
	conn := r.onlyConn()
	for range 200 {
		r.gate.Hold(blocktest.OpRead)
		for range workers {
			c.send(requestBytes(cmdRead, 0, 1, 0, 512))
		}
		must(t, r.gate.WaitHeld(soon(t), workers))
		r.gate.ReleaseAll()
		for range workers {
			c.result(dataOf(0))
		}
		waitFor(t, "idle workers", func() bool {
			conn.mu.Lock()
			defer conn.mu.Unlock()
			return len(conn.staff.idle) == workers
		})
		c.send(requestBytes(cmdRead, 0, 2, 0, 512))
		conn.dismissIdle(r.s.now() + workerIdle + time.Second)
		c.result(dataOf(0))
	}
}

// throttledRig serves a disk on which one write passes, and then none in the time of a test.
func throttledRig(t *testing.T, o Options) *rig {
	return newRig(t, setup{options: o, direct: true, graph: blocktest.NewGraph(t, throttle.Driver(new(throttle.Groups))),
		above: func(c *block.Config) *block.Config {
			l := throttle.None()
			l.BpsWrite = 1
			return &block.Config{Driver: "throttle", Unmap: true, Options: &throttle.Options{Limits: l}, Children: map[string]*block.Config{"file": c}}
		}})
}

// throttled is how many requests wait in the throttle.
func (r *rig) throttled() float64 {
	for _, m := range r.node.Instance().(block.Measurer).Measurements() {
		if m.Name == "throttled_requests" {
			return m.Value
		}
	}
	return -1
}

// TestWaitingForALimitHoldsNoWorker: requests that wait in a throttle do not keep
// others from being run, however many they are, and a drain lets them go.
func TestWaitingForALimitHoldsNoWorker(t *testing.T) {
	const workers, writes = 2, 100
	r := throttledRig(t, Options{Workers: workers})
	c := r.connect().attach(true)
	conn := r.onlyConn()
	wantErrno(t, "first WRITE", c.do(cmdWrite, flagFUA, 0, 4096, pattern(0, 4096)...), 0)
	for range 3 {
		for i := range int64(writes) {
			c.send(requestBytes(cmdWrite, flagFUA, 7, i*512, 512, pattern(i*512, 512)...))
		}
		waitFor(t, "all writes in the throttle", func() bool { return r.throttled() == writes })
		for range 20 { // by workers
			res := c.do(cmdRead, 0, 0, 256<<10)
			wantErrno(t, "READ beside the writes", res, 0)
		}
		conn.mu.Lock()
		if st := &conn.staff; st.yielded != writes || st.count > writes+workers {
			t.Errorf("%d workers wait, of %d", st.yielded, st.count)
		}
		conn.mu.Unlock()
		began := time.Now()
		must(t, r.graph.DrainBegin(soon(t), r.node))
		if took := time.Since(began); took > time.Second {
			t.Errorf("the drain took %v", took)
		}
		r.graph.DrainEnd(r.node)
		for range writes {
			if res := c.result(dataOf(0)); res.errno != 0 || res.cookie != 7 {
				t.Fatalf("%+v", res)
			}
		}
		waitFor(t, "idle workers", func() bool {
			conn.mu.Lock()
			defer conn.mu.Unlock()
			if conn.staff.yielded > 0 || len(conn.staff.idle) < conn.staff.count {
				return false
			}
			if conn.staff.count > workers {
				t.Errorf("%d workers are left", conn.staff.count)
			}
			return true
		})
	}
}

// TestReaderThatWaitsForALimitIsRelievedAtOnce: not only when it has been at its write for long.
func TestReaderThatWaitsForALimitIsRelievedAtOnce(t *testing.T) {
	r := throttledRig(t, Options{})
	c := r.connect().attach(true)
	b := &r.onlyConn().brisk
	wantErrno(t, "first WRITE", c.do(cmdWrite, flagFUA, 0, 4096, pattern(0, 4096)...), 0)
	b.armed.Store(true) // so that it does not set its alarm
	for i := range uint64(3) {
		b.mean.Store(1)
		c.send(requestBytes(cmdWrite, 0, 7, 0, 1, 1))
		waitFor(t, "the write in the throttle", func() bool { return r.throttled() == 1 })
		wantErrno(t, "READ beside it", c.do(cmdRead, 0, 0, 4096), 0)
		if turn := b.turn.Load(); turn != 2*i+2 {
			t.Fatalf("turn %d: the reader did not run the write", turn)
		}
		b.armed.Store(true)
		must(t, r.graph.DrainBegin(soon(t), r.node))
		r.graph.DrainEnd(r.node)
		if res := c.result(dataOf(0)); res.errno != 0 || res.cookie != 7 {
			t.Fatalf("%+v", res)
		}
	}
}
