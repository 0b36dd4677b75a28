package qcow2

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/nbdserve/nbdserve/block"
)

const (
	maxFreed             = 1 << 16 // extents remembered as free below the hint
	defaultRefcountCache = 1 << 20 // bytes
)

// An extent is a run of host clusters.
type extent struct{ first, n int64 }

func (e extent) end() int64 { return e.first + e.n }

// tableFullError says that the refcount table has no entry for a refcount block; see [image.update].
type tableFullError struct{ block int64 }

func (e *tableFullError) Error() string {
	return fmt.Sprintf("the refcount table has no entry for block %d", e.block)
}

// A refSlice is a cached part of a refcount block, as on disk.
type refSlice struct {
	data           []byte
	dirty, writing bool
	used           uint64 // tick of the last use
}

// refcounts is the cached refcount structure and the allocator of host clusters. A
// cluster is free iff its refcount is 0. All methods are called with image.mu held,
// and read the file with it held.
//
// Refcounts are changed here only where the order of writing allows it at any
// time: they rise for clusters that nothing on disk refers to yet, and fall for
// clusters that nothing on disk refers to any more (see limbo).
type refcounts struct {
	file        *block.Edge
	order       uint32
	clusterBits uint
	blockBits   uint // log2 of refcounts in a block
	sliceBits   uint // log2 of refcounts in a slice
	sliceBytes  int64

	table       []uint64
	tableOffset int64
	dirtyTable  map[int64]struct{} // entries to be written

	slices map[int64]*refSlice // by cluster >> sliceBits
	most   int                 // slices cached
	tick   uint64
	dirty  *atomic.Int64 // counts what is to be written; the image's

	// fixed and tables hold the metadata that a free cluster must not be part of.
	fixed, tables *guard
	corrupted     func(error) error
	// end is the host offset from which on nothing was ever written: it reads as zero. Read without image.mu too.
	end atomic.Int64

	hint  int64    // no cluster from 1 to hint is free but for those in freed and from lost on
	freed []extent // below hint
	lost  int64    // first cluster that did not fit in freed; 0: none
}

func newRefcounts(file *block.Edge, h *Header, cacheSize int64) *refcounts {
	r := &refcounts{
		file: file, order: h.RefcountOrder, clusterBits: uint(h.ClusterBits),
		blockBits:   uint(h.ClusterBits) + 3 - uint(h.RefcountOrder),
		sliceBytes:  min(h.ClusterSize(), 4096),
		tableOffset: h.RefcountTableOffset,
		dirtyTable:  make(map[int64]struct{}), slices: make(map[int64]*refSlice),
		hint: 1,
	}
	r.end.Store(h.Clusters(file.Size()) << h.ClusterBits)
	r.sliceBits = r.blockBits
	if r.clusterBits > 12 {
		r.sliceBits -= r.clusterBits - 12
	}
	r.most = int(max(4, cacheSize/r.sliceBytes))
	return r
}

// blockOffset is where refcount block b lies; 0: there is none.
func (r *refcounts) blockOffset(b int64) (int64, error) {
	if b >= int64(len(r.table)) {
		return 0, nil
	}
	entry := r.table[b]
	off := int64(entry &^ 511)
	switch {
	case off == 0:
		return 0, nil
	case entry&511 != 0 || off&(1<<r.clusterBits-1) != 0 || off < 0:
		return 0, r.corrupted(corrupt("refcount table entry %d is 0x%x, not the offset of a cluster", b, entry))
	case off >= r.file.Size():
		return 0, r.corrupted(corrupt("refcount block %d at 0x%x is past the end of the file", b, off))
	}
	return off, nil
}

// sliceOffset is where a slice lies in the file, given its block's place.
func (r *refcounts) sliceOffset(slice, blockOff int64) int64 {
	in := slice & (1<<(r.blockBits-r.sliceBits) - 1)
	return blockOff + in*r.sliceBytes
}

// slice returns a slice, or nil if its block does not exist.
func (r *refcounts) slice(ctx context.Context, i int64) (*refSlice, error) {
	r.tick++
	if s := r.slices[i]; s != nil {
		s.used = r.tick
		return s, nil
	}
	off, err := r.blockOffset(i >> (r.blockBits - r.sliceBits))
	if off == 0 || err != nil {
		return nil, err
	}
	if err := r.room(); err != nil {
		return nil, err
	}
	r.file.Debug(block.EventRefblockLoad)
	s := &refSlice{data: make([]byte, r.sliceBytes), used: r.tick}
	off = r.sliceOffset(i, off)
	there := min(r.sliceBytes, max(0, r.file.Size()-off))
	if err := r.file.ReadAt(ctx, s.data[:there], off); err != nil {
		return nil, err
	}
	r.slices[i] = s
	return s, nil
}

// room evicts until there is place for one slice more, or fails with errCacheFull.
func (r *refcounts) room() error {
	for len(r.slices) >= r.most {
		oldest, at := uint64(1<<64-1), int64(-1)
		for i, s := range r.slices {
			if !s.dirty && !s.writing && s.used < oldest {
				oldest, at = s.used, i
			}
		}
		if at < 0 {
			return errCacheFull
		}
		delete(r.slices, at)
	}
	return nil
}

func (r *refcounts) markDirty(s *refSlice) {
	if !s.dirty {
		s.dirty = true
		r.dirty.Add(1)
	}
}

// get returns the refcount of a cluster.
func (r *refcounts) get(ctx context.Context, cluster int64) (uint64, error) {
	s, err := r.slice(ctx, cluster>>r.sliceBits)
	if s == nil || err != nil {
		return 0, err
	}
	return RefcountGet(s.data, r.order, cluster&(1<<r.sliceBits-1)), nil
}

// set changes the refcounts of clusters that lie in one slice, whose block exists.
func (r *refcounts) set(ctx context.Context, e extent, v uint64) error {
	s, err := r.slice(ctx, e.first>>r.sliceBits)
	if err != nil {
		return err
	}
	r.fill(s, e, v)
	return nil
}

func (r *refcounts) fill(s *refSlice, e extent, v uint64) {
	r.markDirty(s)
	for c := e.first; c < e.end(); c++ {
		RefcountSet(s.data, r.order, c&(1<<r.sliceBits-1), v)
	}
}

// inSlice cuts a run of n clusters at the end of its first slice.
func (r *refcounts) inSlice(cluster, n int64) int64 {
	return min(n, 1<<r.sliceBits-cluster&(1<<r.sliceBits-1))
}

// claim checks that free clusters hold no metadata, and notes that they are in use.
// fresh tells that they certainly read as zero because nothing was ever there.
func (r *refcounts) claim(e extent) (fresh bool, err error) {
	for _, g := range []*guard{r.fixed, r.tables} {
		if c := g.overlaps(e.first, e.n); c >= 0 {
			return false, r.corrupted(corrupt("Preventing invalid allocation at offset 0x%x: the refcount is 0 but metadata lies there", c<<r.clusterBits))
		}
	}
	fresh = e.first<<r.clusterBits >= r.end.Load()
	if end := e.end() << r.clusterBits; end > r.end.Load() {
		r.end.Store(end)
	}
	return fresh, nil
}

// alloc takes up to want adjacent free clusters and gives each a refcount of one;
// fresh is that of claim. It returns errCacheFull or a *tableFullError, having
// taken nothing, where that has to be mended first.
func (r *refcounts) alloc(ctx context.Context, want int64) (e extent, fresh bool, err error) {
	r.file.Debug(block.EventClusterAlloc)
	for {
		c, s, err := r.find(ctx)
		if err != nil {
			return extent{}, false, err
		}
		if s == nil {
			if err := r.newBlock(ctx, c>>r.blockBits); err != nil {
				return extent{}, false, err
			}
			continue // the block took one of the clusters
		}
		e := extent{c, 1}
		for most := r.inSlice(c, want); e.n < most; e.n++ {
			if RefcountGet(s.data, r.order, e.end()&(1<<r.sliceBits-1)) != 0 {
				break
			}
		}
		if e.end()<<r.clusterBits > MaxHostOffset {
			return extent{}, false, fmt.Errorf("the image file has reached 2^56 bytes: %w", block.ErrNoSpace)
		}
		fresh, err := r.claim(e)
		if err != nil {
			return extent{}, false, err
		}
		r.fill(s, e, 1)
		if c >= r.hint {
			r.hint = e.end()
		}
		return e, fresh, nil
	}
}

// unalloc gives clusters of alloc back that nothing has ever referred to.
// Where their slice cannot be read again they leak.
func (r *refcounts) unalloc(ctx context.Context, e extent) {
	if s, err := r.slice(ctx, e.first>>r.sliceBits); s != nil && err == nil {
		r.fill(s, e, 0)
		r.release(e)
	}
}

// find returns a free cluster and its slice, or no slice if its block does not exist.
func (r *refcounts) find(ctx context.Context) (int64, *refSlice, error) {
	for len(r.freed) > 0 {
		e := &r.freed[len(r.freed)-1]
		s, err := r.slice(ctx, e.first>>r.sliceBits)
		if err != nil {
			return 0, nil, err
		}
		if s != nil {
			part := r.inSlice(e.first, e.n)
			used := r.leadingUsed(s, e.first, part)
			e.first, e.n = e.first+used, e.n-used
			if used < part {
				return e.first, s, nil
			}
		}
		if s == nil || e.n == 0 {
			r.freed = r.freed[:len(r.freed)-1]
		}
	}
	if r.lost != 0 {
		r.hint, r.lost = min(r.hint, r.lost), 0
	}
	for {
		s, err := r.slice(ctx, r.hint>>r.sliceBits)
		if s == nil || err != nil {
			return r.hint, nil, err
		}
		rest := r.inSlice(r.hint, 1<<r.sliceBits)
		used := r.leadingUsed(s, r.hint, rest)
		r.hint += used
		if used < rest {
			return r.hint, s, nil
		}
	}
}

// leadingUsed counts the clusters in use at the start of a run inside a slice.
func (r *refcounts) leadingUsed(s *refSlice, cluster, n int64) int64 {
	in := cluster & (1<<r.sliceBits - 1)
	for i := range n {
		if RefcountGet(s.data, r.order, in+i) == 0 {
			return i
		}
	}
	return n
}

// release tells the allocator that the refcounts of e became 0.
func (r *refcounts) release(e extent) {
	if e.first >= r.hint {
		return
	}
	if last := len(r.freed) - 1; last >= 0 && r.freed[last].end() == e.first {
		r.freed[last].n += e.n
		return
	}
	if len(r.freed) < maxFreed {
		r.freed = append(r.freed, e)
	} else if r.lost == 0 || e.first < r.lost {
		r.lost = e.first
	}
}

// newBlock makes refcount block b. It lies in the first cluster that it describes
// itself (rule R4); nothing refers to that one, as no block means no references.
func (r *refcounts) newBlock(ctx context.Context, b int64) error {
	if b >= int64(len(r.table)) {
		return &tableFullError{b}
	}
	cluster := b << r.blockBits
	if cluster == 0 {
		return r.corrupted(corrupt("there is no refcount block for the header: Preventing invalid allocation of refcount block at offset 0"))
	}
	if err := r.room(); err != nil {
		return err
	}
	off := cluster << r.clusterBits
	if _, err := r.claim(extent{cluster, 1}); err != nil {
		return err
	}
	r.file.Debug(block.EventRefblockAlloc)
	if err := r.file.WriteZeroes(ctx, off, 1<<r.clusterBits, 0); err != nil {
		return err
	}
	r.tick++
	s := &refSlice{data: make([]byte, r.sliceBytes), used: r.tick}
	r.slices[cluster>>r.sliceBits] = s
	r.fill(s, extent{cluster, 1}, 1)
	r.fixed.add(cluster, 1)
	r.table[b] = uint64(off)
	r.markTable(b)
	return nil
}

// markTable notes that an entry of the refcount table is to be written.
func (r *refcounts) markTable(b int64) {
	if _, there := r.dirtyTable[b]; !there {
		r.dirtyTable[b] = struct{}{}
		r.dirty.Add(1)
	}
}
