package qcow2

import (
	"cmp"
	"context"
	"encoding/binary"
	"slices"

	"github.com/nbdserve/nbdserve/block"
)

// Metadata is written in rounds, one at a time. A round copies all changes at one
// moment and then writes them in this order:
//
//  1. refcount blocks
//  2. flush, entries of the refcount table, if there are new blocks (R4)
//  3. flush, if what follows depends on data or refcounts (R1, R2)
//  4. L2 slices and L1 entries; new L2 tables were zeroed or copied before (R3)
//  5. flush
//
// Refcounts rise in the round, or before it, of the entries that need them. They
// fall in a later round than the one that removes the last reference (limbo.go).

// A patch is a piece of metadata to be written.
type patch struct {
	off  int64
	data []byte
}

// A round is what one round writes.
type round struct {
	refs, table, l2, l1 []patch
	barrier             bool // the entries depend on data or refcounts that were not flushed
	freed               []extent

	// What is marked as being written.
	refSlices []*refSlice
	slots     []int
	tableAt   []int64 // indices of the refcount table
	l1At      []int64 // indices of the L1 table
}

// Flush implements [block.Instance].
func (im *image) Flush(ctx context.Context) error {
	if err := im.failed(); err != nil {
		return err
	}
	if !im.writable {
		return nil
	}
	if im.dirty.Load() == 0 {
		return im.file.Flush(ctx)
	}
	return im.flushMetadata(ctx)
}

// flushMetadata makes all metadata and data durable that was written before the
// call. Calls that wait for one another share rounds.
func (im *image) flushMetadata(ctx context.Context) error {
	want := im.begun.Load() + 1
	im.flushMu.Lock()
	defer im.flushMu.Unlock()
	if im.completed >= want {
		return nil
	}
	if err := im.failed(); err != nil {
		return err
	}
	this := im.begun.Add(1)
	im.mu.Lock()
	r, err := im.collect()
	im.mu.Unlock()
	if err != nil {
		return err
	}
	err = im.writeRound(ctx, r)
	im.mu.Lock()
	im.settle(r, err)
	if err == nil && len(r.freed) > 0 {
		im.limbo.ready = append(im.limbo.ready, r.freed)
	}
	im.mu.Unlock()
	if err != nil {
		return err
	}
	im.completed = this
	if len(r.freed) > 0 {
		im.wakeReaper()
	}
	return nil
}

// collect takes copies of all changes, and marks them as being written. im.mu is held.
func (im *image) collect() (*round, error) {
	r := &round{barrier: im.barrier}
	var refs, l2 []place
	for i, s := range im.refs.slices {
		if s.dirty {
			off, err := im.refs.blockOffset(i >> (im.refs.blockBits - im.refs.sliceBits))
			if err != nil {
				return nil, err
			}
			refs = append(refs, place{off: im.refs.sliceOffset(i, off), ref: s})
		}
	}
	for _, slot := range im.l2.dirty {
		off, err := im.sliceOffset(im.l2.slotSlice(slot))
		if err != nil {
			return nil, err
		}
		l2 = append(l2, place{off: off, slot: slot})
	}
	// Nothing fails from here on.
	r.refs = layOut(refs, int(im.refs.sliceBytes), func(p place, dst []byte) {
		copy(dst, p.ref.data)
		p.ref.dirty, p.ref.writing = false, true
		r.refSlices = append(r.refSlices, p.ref)
	})
	r.l2 = layOut(l2, 8<<im.sliceBits, func(p place, dst []byte) {
		im.l2.copyOut(p.slot, dst)
		im.l2.state[p.slot] = slotWriting
		r.slots = append(r.slots, p.slot)
	})
	im.l2.dirty = im.l2.dirty[:0]
	for b := range im.refs.dirtyTable {
		r.tableAt = append(r.tableAt, b)
		r.table = append(r.table, patch{im.refs.tableOffset + b*8, bigEndian(im.refs.table[b])})
	}
	clear(im.refs.dirtyTable)
	for i := range im.dirtyL1 {
		r.l1At = append(r.l1At, i)
		r.l1 = append(r.l1, patch{im.header.L1Offset + i*8, bigEndian(im.l1.w[i].Load())})
	}
	clear(im.dirtyL1)
	im.barrier = false
	r.freed = im.limbo.takeOpen()
	return r, nil
}

// A place is a cached slice of a table, and its offset in the file.
type place struct {
	off  int64
	ref  *refSlice
	slot int
}

// layOut copies slices of size bytes, in the order of their offsets; neighbours become one patch.
func layOut(places []place, size int, copyOut func(p place, dst []byte)) []patch {
	slices.SortFunc(places, func(a, b place) int { return cmp.Compare(a.off, b.off) })
	buf := make([]byte, len(places)*size)
	var list []patch
	for i := 0; i < len(places); {
		j := i
		for ; j < len(places) && places[j].off == places[i].off+int64((j-i)*size); j++ {
			copyOut(places[j], buf[j*size:(j+1)*size])
		}
		list = append(list, patch{places[i].off, buf[i*size : j*size]})
		i = j
	}
	return list
}

func bigEndian(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

func (im *image) write(ctx context.Context, list []patch) error {
	for _, c := range list {
		if err := im.file.WriteAt(ctx, c.data, c.off, 0); err != nil {
			return err
		}
	}
	return nil
}

// writeEvent is write, and tells of it if there is anything.
func (im *image) writeEvent(ctx context.Context, e block.DebugEvent, list []patch) error {
	if len(list) > 0 {
		im.file.Debug(e)
	}
	return im.write(ctx, list)
}

// A step is a part of a round.
type step uint8

const (
	stepRefcounts step = iota
	stepRefcountTable
	stepL2
	stepL1
	stepFlush
)

// writeRound writes a round in the order given at the top of this file.
func (im *image) writeRound(ctx context.Context, r *round) error {
	steps := []step{stepRefcounts}
	if len(r.table) > 0 {
		steps = append(steps, stepFlush, stepRefcountTable)
	}
	if r.barrier || len(r.refs) > 0 {
		steps = append(steps, stepFlush)
	}
	steps = append(steps, stepL2, stepL1, stepFlush)
	for _, s := range im.broken.rearrange(steps) {
		var err error
		switch s {
		case stepRefcounts:
			err = im.writeEvent(ctx, block.EventRefblockUpdatePart, r.refs)
		case stepRefcountTable:
			err = im.writeEvent(ctx, block.EventReftableUpdate, r.table)
		case stepL2:
			err = im.writeEvent(ctx, block.EventL2Update, r.l2)
		case stepL1:
			err = im.writeEvent(ctx, block.EventL1Update, r.l1)
		case stepFlush:
			err = im.file.Flush(ctx)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// settle ends the writing state of what a round wrote. If it failed, all of it is dirty again. im.mu is held.
func (im *image) settle(r *round, err error) {
	for _, s := range r.refSlices {
		s.writing = false
		if err != nil {
			im.refs.markDirty(s)
		}
	}
	for _, slot := range r.slots {
		im.l2.state[slot] &^= slotWriting
		if err != nil && im.l2.markDirty(slot) {
			im.dirty.Add(1)
		}
	}
	im.dirty.Add(-int64(len(r.refSlices) + len(r.slots) + len(r.tableAt) + len(r.l1At)))
	if err == nil {
		return
	}
	for _, b := range r.tableAt {
		im.refs.markTable(b)
	}
	for _, i := range r.l1At {
		im.markL1(i)
	}
	im.barrier = true
	im.limbo.putBack(r.freed)
}

// markL1 notes that an L1 entry is to be written. im.mu is held.
func (im *image) markL1(i int64) {
	if _, there := im.dirtyL1[i]; !there {
		im.dirtyL1[i] = struct{}{}
		im.dirty.Add(1)
	}
}
