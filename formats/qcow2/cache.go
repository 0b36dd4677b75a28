package qcow2

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"
)

const (
	ways         = 8        // slots a set
	maxSliceBits = 9        // log2 of entries in a slice: 4 KiB
	maxL2Cache   = 32 << 20 // bytes
)

// slotState says why a slot must not be evicted.
type slotState uint8

const (
	slotDirty   slotState = 1 << iota // changed since it was last copied for writing
	slotWriting                       // being written; the file may hold the old contents
	slotLoading                       // being read from the file
)

// An l2Cache holds slices of active L2 tables, found by guest position: slice i has
// the entries of guest clusters [i<<sliceBits, (i+1)<<sliceBits).
//
// Lookups take no lock. Each slot has a tag, the slice's number plus one in the
// upper half and a version in the lower; a slot whose contents are being replaced
// has no number. A reader that finds the same tag before and after it loaded
// entries has loaded them from that slice. All changes are made with image.mu held.
type l2Cache struct {
	sliceBits uint
	sets      uint32 // a power of two
	tags      []atomic.Uint64
	used      []atomic.Bool // second chance for eviction
	entries   wordArray

	// Guarded by image.mu.
	state []slotState
	hand  []uint8 // where the search for a victim goes on, by set
	dirty []int   // slots with slotDirty
}

// newL2Cache makes a cache of at most size bytes, and no more than slices slices need.
func newL2Cache(sliceBits uint, slices, size int64) (*l2Cache, error) {
	most := max(1, size>>(sliceBits+3)/ways)
	sets := int64(1) << bits.Len64(uint64((slices+ways-1)/ways-1))
	if slices <= ways {
		sets = 1
	}
	for sets > most {
		sets >>= 1
	}
	c := &l2Cache{sliceBits: sliceBits, sets: uint32(sets)}
	n := int(sets * ways)
	c.tags = make([]atomic.Uint64, n)
	c.used = make([]atomic.Bool, n)
	c.state = make([]slotState, n)
	c.hand = make([]uint8, sets)
	var err error
	c.entries, err = newWordArray(n << sliceBits)
	return c, err
}

// find returns the slot of a slice and its tag, or -1. It takes no lock.
func (c *l2Cache) find(slice uint32) (slot int, tag uint64) {
	base := int(slice&(c.sets-1)) * ways
	tags := c.tags[base : base+ways]
	for i := range tags {
		if tag := tags[i].Load(); tag>>32 == uint64(slice)+1 {
			if used := &c.used[base+i]; !used.Load() {
				used.Store(true)
			}
			return base + i, tag
		}
	}
	return -1, 0
}

// holds tells whether a slot still has the contents that it had when find returned tag.
func (c *l2Cache) holds(slot int, tag uint64) bool { return c.tags[slot].Load() == tag }

// slice returns the entries of a slot.
func (c *l2Cache) slice(slot int) []atomic.Uint64 {
	return c.entries.w[slot<<c.sliceBits : (slot+1)<<c.sliceBits]
}

func (c *l2Cache) sameSet(a, b uint32) bool { return a&(c.sets-1) == b&(c.sets-1) }

// reserve evicts a clean slice from the set of slice and returns the free slot,
// marked as loading, or -1 if none can be evicted.
func (c *l2Cache) reserve(slice uint32) int {
	set := slice & (c.sets - 1)
	for try := range 2 * ways {
		slot := int(set)*ways + int(c.hand[set])
		c.hand[set] = (c.hand[set] + 1) % ways
		if c.state[slot] != 0 {
			continue
		}
		tag := c.tags[slot].Load()
		// One second chance each: readers may mark slots faster than this looks at them.
		if tag>>32 != 0 && c.used[slot].Swap(false) && try < ways {
			continue
		}
		c.tags[slot].Store(uint64(uint32(tag) + 1))
		c.state[slot] = slotLoading
		return slot
	}
	return -1
}

// publish makes a reserved slot hold a slice, whose entries are given as on disk.
func (c *l2Cache) publish(slot int, slice uint32, table []byte) {
	entries := c.slice(slot)
	for i := range entries {
		entries[i].Store(binary.BigEndian.Uint64(table[i*8:]))
	}
	c.state[slot] = 0
	c.used[slot].Store(true)
	version := uint64(uint32(c.tags[slot].Load()) + 1)
	c.tags[slot].Store((uint64(slice)+1)<<32 | version)
}

// unreserve leaves a reserved slot empty.
func (c *l2Cache) unreserve(slot int) { c.state[slot] = 0 }

// slotSlice is the number of the slice in a slot.
func (c *l2Cache) slotSlice(slot int) uint32 { return uint32(c.tags[slot].Load()>>32) - 1 }

// markDirty notes that a slot is about to change. It tells whether it was not dirty before.
func (c *l2Cache) markDirty(slot int) bool {
	if c.state[slot]&slotDirty != 0 {
		return false
	}
	c.state[slot] |= slotDirty
	c.dirty = append(c.dirty, slot)
	return true
}

// copyOut writes a slot's entries to table as on disk.
func (c *l2Cache) copyOut(slot int, table []byte) {
	entries := c.slice(slot)
	for i := range entries {
		binary.BigEndian.PutUint64(table[i*8:], entries[i].Load())
	}
}

// size is the length of the cached entries in bytes.
func (c *l2Cache) size() int64 { return int64(len(c.tags)) << (c.sliceBits + 3) }
