package qcow2

import (
	"math"
	"slices"
)

// A countMap counts references to clusters. Memory follows the clusters that are
// counted, not their numbers: a chunk of clusters exists when one of them is
// counted, and holds a bit a cluster until a count reaches 2, then a byte, then
// eight. About 110 bytes for a cluster far from all others is the worst case.
type countMap struct {
	chunks map[int64]*countChunk
	at     int64 // the chunk used last
	last   *countChunk
}

const (
	chunkBits = 9
	chunkLen  = 1 << chunkBits // clusters
)

// A countChunk holds counts in the first of full and bytes that is not nil, else in bits.
type countChunk struct {
	bits  [chunkLen / 64]uint64
	bytes *[chunkLen]uint8
	full  *[chunkLen]uint64
}

func newCountMap() *countMap { return &countMap{chunks: map[int64]*countChunk{}, at: -1} }

// chunk returns the chunk of a cluster, nil if nothing in it was counted.
func (m *countMap) chunk(cluster int64) *countChunk {
	if at := cluster >> chunkBits; at != m.at {
		m.at, m.last = at, m.chunks[at]
	}
	return m.last
}

func (m *countMap) get(cluster int64) uint64 {
	c := m.chunk(cluster)
	if c == nil {
		return 0
	}
	return c.get(cluster & (chunkLen - 1))
}

func (m *countMap) set(cluster int64, v uint64) {
	c := m.chunk(cluster)
	if c == nil {
		if v == 0 {
			return
		}
		c = new(countChunk)
		m.chunks[cluster>>chunkBits], m.last = c, c
	}
	c.set(cluster&(chunkLen-1), v)
}

// eachCounted yields, in order, the clusters whose count in any of the maps is not zero.
func eachCounted(yield func(cluster int64) bool, maps ...*countMap) {
	var keys []int64
	for _, m := range maps {
		for k := range m.chunks {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	for _, k := range slices.Compact(keys) {
		for i := range int64(chunkLen) {
			cluster := k<<chunkBits | i
			for _, m := range maps {
				if m.get(cluster) != 0 {
					if !yield(cluster) {
						return
					}
					break
				}
			}
		}
	}
}

func (c *countChunk) get(i int64) uint64 {
	switch {
	case c.full != nil:
		return c.full[i]
	case c.bytes != nil:
		return uint64(c.bytes[i])
	}
	return c.bits[i/64] >> (i % 64) & 1
}

func (c *countChunk) set(i int64, v uint64) {
	if c.full == nil && v > math.MaxUint8 {
		c.widenFull()
	}
	if c.full == nil && c.bytes == nil && v > 1 {
		c.widenBytes()
	}
	switch {
	case c.full != nil:
		c.full[i] = v
	case c.bytes != nil:
		c.bytes[i] = uint8(v)
	default:
		c.bits[i/64] = c.bits[i/64]&^(1<<(i%64)) | v<<(i%64)
	}
}

func (c *countChunk) widenBytes() {
	wide := new([chunkLen]uint8)
	for i := range wide {
		wide[i] = uint8(c.get(int64(i)))
	}
	c.bytes = wide
}

func (c *countChunk) widenFull() {
	wide := new([chunkLen]uint64)
	for i := range wide {
		wide[i] = c.get(int64(i))
	}
	c.full, c.bytes = wide, nil
}
