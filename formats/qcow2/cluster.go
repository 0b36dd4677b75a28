package qcow2

import (
	"context"
	"errors"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
)

// clusterInvalid is the kind of an entry that the format does not allow.
const clusterInvalid ClusterKind = 0xff

// errCacheFull says that nothing can be evicted from a cache of metadata before
// its changes are written. It never leaves the package; see [image.update].
var errCacheFull = errors.New("metadata cache is full of unwritten changes")

// errRetry makes [image.update] run its function again.
var errRetry = errors.New("state has changed while waiting")

// A mapping says where a run of guest bytes lies.
type mapping struct {
	kind   ClusterKind
	copied bool   // the clusters belong to this image state alone
	entry  uint64 // of the first cluster
	host   int64  // ClusterData, ClusterZeroAlloc: host offset of the first byte; the run is contiguous there
	length int64  // bytes
}

// decode classifies an L2 entry. cluster is the host offset of its cluster.
func (im *image) decode(entry uint64) (kind ClusterKind, cluster int64) {
	switch {
	case entry&entryCompressed != 0:
		return ClusterCompressed, 0
	case entry&im.badBits != 0:
		return clusterInvalid, 0
	}
	cluster = int64(entry & offsetMask)
	switch {
	case entry&entryZero != 0 && cluster != 0:
		return ClusterZeroAlloc, cluster
	case entry&entryZero != 0:
		return ClusterZero, 0
	case cluster != 0:
		return ClusterData, cluster
	}
	return ClusterUnallocated, 0
}

// mapEntries describes up to n bytes from off on by the entries of their slice.
func (im *image) mapEntries(slot int, off, n int64) mapping {
	entries := im.l2.slice(slot)
	i := int(off>>im.clusterBits) & (len(entries) - 1)
	in := off & (im.clusterSize - 1)
	entry := entries[i].Load()
	kind, cluster := im.decode(entry)
	m := mapping{kind: kind, copied: entry&entryCopied != 0, entry: entry, length: min(n, im.clusterSize-in)}
	if cluster != 0 {
		m.host = cluster + in
	}
	if kind == ClusterCompressed || kind == clusterInvalid {
		return m
	}
	for i++; m.length < n && i < len(entries); i++ {
		entry := entries[i].Load()
		k, c := im.decode(entry)
		if k != kind || cluster != 0 && (c != m.host+m.length || entry&entryCopied != m.entry&entryCopied) {
			break
		}
		m.length += min(im.clusterSize, n-m.length)
	}
	return m
}

// noTable describes the range of an L1 entry without a table.
func (im *image) noTable(off, n int64) mapping {
	span := int64(1) << (im.l2Bits + im.clusterBits)
	return mapping{kind: ClusterUnallocated, length: min(n, span-off&(span-1))}
}

// lookup maps from memory, without a lock. hit is false if the slice is not cached.
func (im *image) lookup(off, n int64) (m mapping, hit bool) {
	cluster := off >> im.clusterBits
	if im.l1.w[cluster>>im.l2Bits].Load()&offsetMask == 0 {
		return im.noTable(off, n), true
	}
	slot, tag := im.l2.find(uint32(cluster >> im.sliceBits))
	if slot < 0 {
		return mapping{}, false
	}
	m = im.mapEntries(slot, off, n)
	return m, im.l2.holds(slot, tag)
}

// mapAt maps at least the cluster at off, and at most n bytes, loading what is not cached.
func (im *image) mapAt(ctx context.Context, off, n int64) (mapping, error) {
	m, hit := im.lookup(off, n)
	if hit {
		im.hits.Add(block.ShardOf(ctx), 1)
	} else {
		im.misses.Add(block.ShardOf(ctx), 1)
		err := im.update(ctx, func() error {
			slot, err := im.loadSlice(ctx, uint32(off>>im.clusterBits>>im.sliceBits))
			if err == nil {
				m = im.mapEntries(slot, off, n)
			}
			return err
		})
		if err != nil {
			return m, err
		}
	}
	if m.kind == clusterInvalid {
		err := L2Entry(m.entry).Check(im.header)
		return m, im.corrupted(fmt.Errorf("guest cluster at offset %d: %w", off&^(im.clusterSize-1), err))
	}
	return m, nil
}

// update runs f with im.mu held. If f finds a cache full of changes or the
// refcount table too small, that is mended and f is run again, so it must have
// changed nothing by then.
func (im *image) update(ctx context.Context, f func() error) error {
	for {
		im.mu.Lock()
		err := f()
		im.mu.Unlock()
		var full *tableFullError
		switch {
		case err == errRetry:
			continue
		case err == errCacheFull:
			err = im.flushMetadata(ctx)
		case errors.As(err, &full):
			err = im.growRefcountTable(ctx, full.block)
		default:
			return err
		}
		if err != nil {
			return err
		}
	}
}

// sliceOffset is where a slice lies in the file. im.mu is held.
func (im *image) sliceOffset(slice uint32) (int64, error) {
	table := int64(slice) >> (im.l2Bits - im.sliceBits)
	entry := L1Entry(im.l1.w[table].Load())
	if err := im.checkL1(table, entry); err != nil {
		return 0, err
	}
	in := int64(slice) & (1<<(im.l2Bits-im.sliceBits) - 1)
	return entry.Offset() + in<<(im.sliceBits+3), nil
}

// checkL1 returns an error if the table that an L1 entry points to cannot be one.
func (im *image) checkL1(table int64, entry L1Entry) error {
	err := entry.Check(im.header)
	switch {
	case err != nil:
	case entry.Offset() >= im.file.Size():
		err = corrupt("L2 table offset 0x%x is past the end of the file", entry.Offset())
	case im.writable && entry.Copied() && im.fixed.overlaps(entry.Offset()>>im.clusterBits, 1) >= 0:
		err = corrupt("L2 table offset 0x%x overlaps other metadata", entry.Offset())
	default:
		return nil
	}
	return im.corrupted(fmt.Errorf("L1 entry %d: %w", table, err))
}

// loadSlice returns the slot of a slice whose L1 entry has a table, reading it if
// it is not cached. im.mu is held, and released while it reads or waits; there is
// one read of a slice at a time.
func (im *image) loadSlice(ctx context.Context, slice uint32) (int, error) {
	var slot int
	for {
		if slot, _ = im.l2.find(slice); slot >= 0 {
			return slot, nil
		}
		busy := im.loading[slice]
		if busy == nil {
			if slot = im.l2.reserve(slice); slot >= 0 {
				break
			}
			for other, c := range im.loading {
				if im.l2.sameSet(slice, other) {
					busy = c
				}
			}
			if busy == nil {
				return 0, errCacheFull
			}
		}
		im.mu.Unlock()
		<-busy
		im.mu.Lock()
	}
	off, err := im.sliceOffset(slice)
	if err == nil {
		done := make(chan struct{})
		im.loading[slice] = done
		im.mu.Unlock()
		im.file.Debug(block.EventL2Load)
		buf := block.GetBuffer(8 << im.sliceBits)
		err = im.readHost(ctx, buf, off)
		im.mu.Lock()
		delete(im.loading, slice)
		close(done)
		if err == nil {
			im.l2.publish(slot, slice, buf)
			block.PutBuffer(buf)
			return slot, nil
		}
		block.PutBuffer(buf)
	}
	im.l2.unreserve(slot)
	return 0, err
}

// readHost reads from the file; past its end there are zeroes.
func (im *image) readHost(ctx context.Context, p []byte, off int64) error {
	there := min(int64(len(p)), max(0, im.file.Size()-off))
	clear(p[there:])
	if there == 0 {
		return nil
	}
	return im.file.ReadAt(ctx, p[:there], off)
}

// setEntry changes an entry of a cached slice. im.mu is held.
func (im *image) setEntry(slot int, i int64, entry uint64) {
	if im.l2.markDirty(slot) {
		im.dirty.Add(1)
	}
	im.l2.slice(slot)[i].Store(entry)
}

// ownTable makes sure that there is an L2 table for an L1 entry and that it belongs
// to the active state alone, allocating or copying it (rule R3). im.mu is held.
func (im *image) ownTable(ctx context.Context, table int64) error {
	old := L1Entry(im.l1.w[table].Load())
	if old.Offset() != 0 {
		if err := im.checkL1(table, old); err != nil {
			return err
		}
		if old.Copied() {
			return nil
		}
	}
	e, _, err := im.refs.alloc(ctx, 1)
	if err != nil {
		return err
	}
	off := e.first << im.clusterBits
	im.file.Debug(block.EventL2AllocWrite)
	if old.Offset() == 0 {
		err = im.file.WriteZeroes(ctx, off, im.clusterSize, 0)
	} else {
		err = im.copyHost(ctx, old.Offset(), off)
	}
	if err != nil {
		im.refs.unalloc(ctx, e)
		return err
	}
	if old.Offset() != 0 {
		im.tables.remove(old.Offset()>>im.clusterBits, 1)
		im.free(extent{old.Offset() >> im.clusterBits, 1})
	}
	im.tables.add(e.first, 1)
	im.barrier = true
	im.markL1(table)
	im.l1.w[table].Store(uint64(MakeL1Entry(off, true)))
	im.allocations.Add(block.ShardOf(ctx), 1)
	return nil
}

// copyHost copies a cluster inside the file.
func (im *image) copyHost(ctx context.Context, from, to int64) error {
	buf := block.GetBuffer(int(min(im.clusterSize, mergeLimit)))
	defer block.PutBuffer(buf)
	for done := int64(0); done < im.clusterSize; done += int64(len(buf)) {
		if err := im.readHost(ctx, buf, from+done); err != nil {
			return err
		}
		if err := im.file.WriteAt(ctx, buf, to+done, 0); err != nil {
			return err
		}
	}
	return nil
}
