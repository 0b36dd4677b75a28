package qcow2

import (
	"sync"
	"sync/atomic"
	"testing"
)

// A clean slice can always be evicted, however many readers use the others: a
// read-only image has no changes to write that would make room.
func TestL2CacheEvictsACleanSliceWhileReadersUseAll(t *testing.T) {
	c, err := newL2Cache(3, 100, 1)
	if err != nil {
		t.Fatal(err)
	}
	table := make([]byte, 8<<3)
	for i := range uint32(ways) {
		c.publish(c.reserve(i), i, table)
	}
	var readers sync.WaitGroup
	var stop atomic.Bool
	readers.Go(func() {
		for !stop.Load() {
			for i := range uint32(1000) {
				c.find(i)
			}
		}
	})
	full := 0
	for i := range uint32(1_000_000) {
		slot := c.reserve(i % 1000)
		if slot < 0 {
			full++
			continue
		}
		c.publish(slot, i%1000, table)
	}
	stop.Store(true)
	readers.Wait()
	if full > 0 {
		t.Errorf("no slot was found %d times, but all were clean", full)
	}
	if err := c.entries.free(); err != nil {
		t.Fatal(err)
	}
}
