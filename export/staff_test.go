package export

import (
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block/blocktest"
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
