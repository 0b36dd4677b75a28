package block

import (
	"context"
	"sync"
	"sync/atomic"
)

// Flushes of a protocol node are skipped while nothing was written since the last one
// that succeeded (rule G35). A change counts in its shard when the driver has returned,
// whether it succeeded or not, so a flush covers at least what its sum counts.

// flushes remembers what the flushes of a node cover.
type flushes struct {
	covered atomic.Int64 // 1 more than the changes that are durable; 0: unknown

	mu     sync.Mutex // held to change covered
	resets int        // how often covered became unknown; guarded by mu
}

// flush makes every write that has ended durable. Formats and filters are always
// asked: what they hold back need not come of requests, and their children skip.
func (n *Node) flush(ctx context.Context) error {
	if n.cfg().ReadOnly || n.cfg().NoIO {
		return nil
	}
	if n.driver.Kind != Protocol {
		n.debug(EventFlushToDisk)
		return n.inst.Flush(ctx)
	}
	if n.cfg().Cache.NoFlush {
		return nil
	}
	// Loaded before the sum: what a flush covers was counted before it is stored, so
	// equal sums are equal in each shard.
	f := &n.flushes
	covered := f.covered.Load()
	changes := n.changes() + 1
	if covered == changes {
		return nil
	}
	f.mu.Lock()
	resets := f.resets
	f.mu.Unlock()
	n.debug(EventFlushToDisk)
	if err := n.inst.Flush(ctx); err != nil {
		f.forget()
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if resets == f.resets { // else a flush failed meanwhile, and the next one is to tell
		f.covered.Store(max(changes, f.covered.Load()))
	}
	return nil
}

// forget makes the next flush a real one.
func (f *flushes) forget() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resets++
	f.covered.Store(0)
}

// changes counts the requests that ended and whose effects may not be durable.
func (n *Node) changes() int64 {
	var sum int64
	for i := range n.stats {
		sum += n.stats[i].changes.Load()
	}
	return sum
}

// changed notes that a request that changes [off, off+length) has ended. durable says
// that its effects are on stable storage already.
func (n *Node) changed(ctx context.Context, off, length int64, durable bool) {
	if !durable {
		n.stats[ShardOf(ctx)%NumShards].changes.Add(1)
	}
	if b := n.bitmaps.Load(); b != nil {
		b.mark(n, off, length)
	}
}

// unsafe tells whether nothing is ever made durable here (cache.no-flush).
func (n *Node) unsafe() bool { return n.driver.Kind == Protocol && n.cfg().Cache.NoFlush }

// othersMayHaveWritten makes certain again what is known of the data of a node that
// another process may have used meanwhile. Nothing is in flight.
func (n *Node) othersMayHaveWritten() {
	n.flushes.forget()
	if b := n.bitmaps.Load(); b != nil {
		b.mark(n, 0, n.inst.Size())
	}
}
