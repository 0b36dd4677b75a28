package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	"github.com/nbdserve/nbdserve/block"
)

// RepairRefcounts makes the refcounts and the COPIED flags of an image what its
// tables say, and clears the dirty bit in the file and in h. It is for images that
// were not closed (dirty): nothing but refcounts and flags may be wrong. An image
// with other corruptions, with tables that cannot be read, or whose refcounts are
// too narrow is left as it is, and the error wraps [block.ErrCorrupt].
//
// Nothing else may use f meanwhile. The result tells what was fixed. If the
// process or the machine ends in between, the image is still dirty and can be
// repaired again: new refcount blocks and tables go to clusters that nothing
// refers to, and are durable before anything points to them; the dirty bit is
// cleared when all else is durable.
func RepairRefcounts(ctx context.Context, f Target, h *Header) (*CheckResult, error) {
	if err := h.Unsupported(true); err != nil {
		return nil, err
	}
	return repairRefcounts(ctx, f, h, newChecker(ctx, f, h, nil), block.FixAll)
}

// Repair is [Check], and then repairs what fix allows: what [RepairRefcounts] repairs,
// or leaks, if there is nothing else. An image that is marked as corrupt is not any more
// when nothing is left. Nothing else may use f meanwhile.
func Repair(ctx context.Context, f Target, h *Header, fix block.CheckFix, report func(line string)) (*CheckResult, error) {
	c := newChecker(ctx, f, h, report)
	if fix == block.FixNothing {
		err := c.run()
		return &c.res, err
	}
	writable := *h
	writable.Incompatible &^= IncompatCorrupt
	if err := writable.Unsupported(true); err != nil {
		return nil, err
	}
	return repairRefcounts(ctx, f, h, c, fix)
}

func repairRefcounts(ctx context.Context, f Target, h *Header, c *checker, fix block.CheckFix) (*CheckResult, error) {
	if err := c.run(); err != nil {
		return &c.res, err
	}
	if bad := c.res.Corruptions - c.mismatches; bad != 0 || c.res.CheckErrors != 0 {
		return &c.res, corrupt("cannot repair the refcounts: the image has %d other corruptions and %d errors; use 'qemu-img check -r all' on a copy", bad, c.res.CheckErrors)
	}
	if fix == block.FixLeaks && c.res.Corruptions != 0 {
		return &c.res, corrupt("cannot repair leaks alone: the image has %d corruptions, too", c.res.Corruptions)
	}
	r := newRepairer(c, f)
	if err := r.repair(); err != nil {
		return &c.res, fmt.Errorf("repair refcounts: %w", err)
	}
	res := c.res
	res.CorruptionsFixed, res.Corruptions = res.Corruptions, 0
	res.LeaksFixed, res.Leaks = res.Leaks, 0
	return &res, nil
}

// A repairer writes the references counted by a checker as refcounts.
type repairer struct {
	*checker
	f     Target
	dirty map[int64]bool // refcount blocks to write, by index
	queue []int64        // those of them that may be missing
	fresh map[int64]bool // those of them that are new
	scan  int64          // no cluster before it is free

	// Where the refcount table is to be: in the header's place unless it grew.
	tableOffset, tableClusters int64
}

func newRepairer(c *checker, f Target) *repairer {
	return &repairer{
		checker: c, f: f, dirty: map[int64]bool{}, fresh: map[int64]bool{},
		tableOffset: c.h.RefcountTableOffset, tableClusters: int64(c.h.RefcountTableClusters),
	}
}

func (r *repairer) repair() error {
	eachCounted(func(cluster int64) bool {
		if r.disk.get(cluster) != r.truth.get(cluster) {
			r.touch(cluster)
		}
		return true
	}, r.disk, r.truth)
	if err := r.allocate(); err != nil {
		return err
	}
	if len(r.fresh) > 0 {
		if err := r.writeBlocks(true); err != nil {
			return err
		}
		if err := r.writeTable(); err != nil {
			return err
		}
	}
	if err := r.writeBlocks(false); err != nil {
		return err
	}
	if len(r.dirty) > 0 || r.mismatches > 0 {
		if err := r.fixCopied(); err != nil {
			return err
		}
	}
	return markGood(r.ctx, r.f, r.h)
}

// touch notes that a cluster's refcount has to be written.
func (r *repairer) touch(cluster int64) {
	if i := cluster / r.h.RefcountBlockEntries(); !r.dirty[i] {
		r.dirty[i] = true
		r.queue = append(r.queue, i)
	}
}

// take uses n clusters in a row that nothing refers to.
func (r *repairer) take(n int64) int64 {
	for r.truth.get(r.scan) != 0 {
		r.scan++
	}
	first, run := r.scan, int64(0)
	for i := first; run < n; i++ {
		run++
		if r.truth.get(i) != 0 {
			first, run = i+1, 0
		}
	}
	for i := range n {
		r.truth.set(first+i, 1)
		r.touch(first + i)
	}
	return first
}

// allocate places the refcount blocks that are missing, and the refcount table
// where it is too short. Each of them takes a cluster that needs a refcount itself.
func (r *repairer) allocate() error {
	slices.Sort(r.queue) // the largest is taken first: the table grows once
	for len(r.queue) > 0 {
		i := r.queue[len(r.queue)-1]
		r.queue = r.queue[:len(r.queue)-1]
		if i >= int64(len(r.table)) {
			if err := r.growTable(i + 1); err != nil {
				return err
			}
		}
		if r.table[i] == 0 {
			r.table[i] = uint64(r.take(1)) << r.h.ClusterBits
			r.fresh[i] = true
		}
	}
	if r.tableOffset == r.h.RefcountTableOffset {
		return nil
	}
	// The old table becomes free only now, so that nothing was placed over it.
	for i := range int64(r.h.RefcountTableClusters) {
		cluster := r.h.RefcountTableOffset>>r.h.ClusterBits + i
		r.truth.set(cluster, r.truth.get(cluster)-1)
		r.dirty[cluster/r.h.RefcountBlockEntries()] = true
	}
	return nil
}

// growTable finds a place for a refcount table of n entries or more.
func (r *repairer) growTable(n int64) error {
	h := r.h
	clusters := h.Clusters(n * 8)
	if clusters<<h.ClusterBits > MaxRefcountTableBytes {
		return corrupt("the refcount table would need %d bytes, at most %d", clusters<<h.ClusterBits, MaxRefcountTableBytes)
	}
	if r.tableOffset != h.RefcountTableOffset { // the place found before was too small
		for i := range r.tableClusters {
			r.truth.set(r.tableOffset>>h.ClusterBits+i, 0)
		}
	}
	r.tableOffset, r.tableClusters = r.take(clusters)<<h.ClusterBits, clusters
	r.table = append(r.table, make([]uint64, clusters<<h.ClusterBits/8-int64(len(r.table)))...)
	return nil
}

// writeBlocks writes the refcount blocks that changed, the new ones or the others, and flushes.
func (r *repairer) writeBlocks(fresh bool) error {
	per := r.h.RefcountBlockEntries()
	for _, i := range slices.Sorted(maps.Keys(r.dirty)) {
		if r.fresh[i] != fresh {
			continue
		}
		buf := r.buf[:r.h.ClusterSize()]
		for j := range per {
			RefcountSet(buf, r.h.RefcountOrder, j, r.truth.get(i*per+j))
		}
		if err := r.f.WriteAt(r.ctx, buf, int64(r.table[i]), 0); err != nil {
			return fmt.Errorf("write refcount block %d: %w", i, err)
		}
	}
	return r.f.Flush(r.ctx)
}

// writeTable writes the refcount table and, if it moved, makes the header point to it.
func (r *repairer) writeTable() error {
	be, h := binary.BigEndian, r.h
	buf := make([]byte, len(r.table)*8)
	for i, e := range r.table {
		be.PutUint64(buf[i*8:], e)
	}
	if err := r.f.WriteAt(r.ctx, buf, r.tableOffset, 0); err != nil {
		return fmt.Errorf("write refcount table: %w", err)
	}
	if err := r.f.Flush(r.ctx); err != nil {
		return err
	}
	if r.tableOffset == h.RefcountTableOffset {
		return nil
	}
	var field [12]byte
	be.PutUint64(field[:], uint64(r.tableOffset))
	be.PutUint32(field[8:], uint32(r.tableClusters))
	if err := r.f.WriteAt(r.ctx, field[:], headerOffRefcountTable, 0); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	h.RefcountTableOffset, h.RefcountTableClusters = r.tableOffset, uint32(r.tableClusters)
	return r.f.Flush(r.ctx)
}

// fixCopied makes the COPIED flags of the active tables say which refcounts are one.
func (r *repairer) fixCopied() error {
	h := r.h
	for at := int64(0); at < int64(h.L1Size)*8; at += tableReaderBuf {
		part := r.buf[:min(int64(h.L1Size)*8-at, tableReaderBuf)]
		if err := r.fixTable(part, h.L1Offset+at, func(v uint64) bool { return v&offsetMask != 0 }); err != nil {
			return err
		}
	}
	var err error
	eachCounted(func(cluster int64) bool {
		err = r.fixTable(r.buf[:h.ClusterSize()], cluster<<h.ClusterBits, func(v uint64) bool {
			return v&entryCompressed == 0 && v&offsetMask != 0
		})
		return err == nil
	}, r.active)
	if err != nil {
		return err
	}
	return r.f.Flush(r.ctx)
}

// fixTable sets the COPIED flags of the entries at off that can have one, using buf.
func (r *repairer) fixTable(buf []byte, off int64, counted func(v uint64) bool) error {
	if err := r.ctx.Err(); err != nil {
		return err
	}
	data, err := r.read(buf, off)
	if err != nil || !data {
		return err
	}
	changed := false
	for i := 0; i < len(buf); i += 8 {
		v := binary.BigEndian.Uint64(buf[i:])
		if !counted(v) {
			continue
		}
		want := v &^ entryCopied
		if r.truth.get(int64(v&offsetMask)>>r.h.ClusterBits) == 1 {
			want |= entryCopied
		}
		if want != v {
			binary.BigEndian.PutUint64(buf[i:], want)
			changed = true
		}
	}
	if !changed {
		return nil
	}
	if err := r.f.WriteAt(r.ctx, buf[:min(int64(len(buf)), r.size-off)], off, 0); err != nil {
		return fmt.Errorf("write table at 0x%x: %w", off, err)
	}
	return nil
}

// markGood clears the dirty and the corrupt bit of the image and of h, durably. All
// else must be durable before.
func markGood(ctx context.Context, f Target, h *Header) error {
	const bits = IncompatDirty | IncompatCorrupt
	if h.Incompatible&bits == 0 {
		return nil
	}
	var field [8]byte
	binary.BigEndian.PutUint64(field[:], h.Incompatible&^bits)
	if err := f.WriteAt(ctx, field[:], headerOffIncompatible, 0); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	if err := f.Flush(ctx); err != nil {
		return err
	}
	h.Incompatible &^= bits
	return nil
}
