package qcow2

import "sync/atomic"

// maxGuarded bounds the clusters that a guard remembers, and with them its memory (16 MiB).
const maxGuarded = 1 << 20

// A guard knows which host clusters hold metadata, so that no data is written over
// them (rule R7). Header, L1 table, refcount table and refcount blocks are always
// in it, active L2 tables up to maxGuarded clusters in all.
//
// Contains takes no lock; add and remove are serialised by image.mu. It is a hash
// table with open addressing: 0 is a free place, and a removed cluster leaves a
// tombstone until the table grows.
type guard struct {
	table atomic.Pointer[[]atomic.Uint64]
	used  int // places taken, tombstones included
	live  int
}

const tombstone = ^uint64(0)

func newGuard() *guard {
	g := new(guard)
	t := make([]atomic.Uint64, 256)
	g.table.Store(&t)
	return g
}

func guardHash(key uint64) uint64 { return key * 0x9e3779b97f4a7c15 >> 20 }

func (g *guard) contains(cluster int64) bool {
	t := *g.table.Load()
	mask := uint64(len(t) - 1)
	key := uint64(cluster) + 1
	for i := guardHash(key) & mask; ; i = (i + 1) & mask {
		switch t[i].Load() {
		case key:
			return true
		case 0:
			return false
		}
	}
}

// overlaps returns the first of n clusters that holds metadata, or -1.
func (g *guard) overlaps(cluster, n int64) int64 {
	for c := cluster; c < cluster+n; c++ {
		if g.contains(c) {
			return c
		}
	}
	return -1
}

func (g *guard) add(cluster, n int64) {
	for c := cluster; c < cluster+n && g.live < maxGuarded; c++ {
		if !g.contains(c) {
			if g.used*2 >= len(*g.table.Load()) {
				g.grow()
			}
			insert(*g.table.Load(), uint64(c)+1)
			g.used++
			g.live++
		}
	}
}

func (g *guard) remove(cluster, n int64) {
	t := *g.table.Load()
	mask := uint64(len(t) - 1)
	for c := cluster; c < cluster+n; c++ {
		key := uint64(c) + 1
		for i := guardHash(key) & mask; t[i].Load() != 0; i = (i + 1) & mask {
			if t[i].Load() == key {
				t[i].Store(tombstone)
				g.live--
				break
			}
		}
	}
}

func insert(t []atomic.Uint64, key uint64) {
	mask := uint64(len(t) - 1)
	i := guardHash(key) & mask
	for t[i].Load() != 0 {
		i = (i + 1) & mask
	}
	t[i].Store(key)
}

// grow moves the live clusters to a table at most a quarter full.
func (g *guard) grow() {
	size := 256
	for size < 4*(g.live+1) {
		size *= 2
	}
	t := make([]atomic.Uint64, size)
	for i := range *g.table.Load() {
		if key := (*g.table.Load())[i].Load(); key != 0 && key != tombstone {
			insert(t, key)
		}
	}
	g.used = g.live
	g.table.Store(&t)
}
