package qcow2

import (
	"context"
	"errors"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
)

// zeroBytes is what the ends of a zero request are written with. It is never changed.
var zeroBytes = make([]byte, 64<<10)

// Discard implements [block.Discarder] (rule R9). Whole clusters read as zero
// afterwards; parts of clusters are left alone.
func (im *image) Discard(ctx context.Context, off, n int64) error {
	if im.header.Version < 3 && im.backing() != nil {
		return block.ErrNotSupported
	}
	first := (off + im.clusterSize - 1) >> im.clusterBits
	return im.unmap(ctx, first, im.wholeUntil(off+n), false)
}

// wholeUntil is the end of the whole clusters before end. The last cluster of the disk is whole.
func (im *image) wholeUntil(end int64) int64 {
	if end == im.size {
		end += im.clusterSize - 1
	}
	return end >> im.clusterBits
}

// WriteZeroes implements [block.Zeroer] (rule R10). Version 2 can only deallocate
// whole clusters, and that only without a backing file.
func (im *image) WriteZeroes(ctx context.Context, off, n int64, flags block.ReqFlags) error {
	if im.header.Version < 3 && (im.backing() != nil || flags&block.MayUnmap == 0) {
		return block.ErrNotSupported
	}
	first, last := (off+im.clusterSize-1)>>im.clusterBits, im.wholeUntil(off+n)
	var err error
	if first > last { // inside one cluster
		err = im.zeroPart(ctx, off, n, flags)
	} else {
		if flags&block.MayUnmap != 0 {
			err = im.unmap(ctx, first, last, true)
		} else {
			err = im.provision(ctx, first, last)
		}
		if start := first << im.clusterBits; err == nil && off < start {
			err = im.zeroPart(ctx, off, min(n, start-off), flags)
		}
		if end := last << im.clusterBits; err == nil && end < off+n {
			err = im.zeroPart(ctx, end, off+n-end, flags)
		}
	}
	if err == nil && flags&block.FUA != 0 && im.dirty.Load() != 0 {
		err = im.flushMetadata(ctx)
	}
	return err
}

// zeroPart zeroes a part of one cluster.
func (im *image) zeroPart(ctx context.Context, off, n int64, flags block.ReqFlags) error {
	for n > 0 {
		if err := im.failed(); err != nil {
			return err
		}
		m, err := im.mapAt(ctx, off, n)
		if err != nil {
			return err
		}
		cluster := off >> im.clusterBits
		step := m.length
		switch {
		case im.readsZero(cluster, m.kind):
			if flags&block.MayUnmap == 0 && needsCluster(m.kind, m.copied) {
				var done int64
				if done, err = im.allocateZero(ctx, cluster, 1, true); done == 0 {
					step = 0 // it has changed meanwhile
				}
			}
		case m.kind == ClusterData && m.copied:
			if err = im.mayWrite(m.host, m.length); err == nil {
				err = im.file.WriteZeroes(ctx, m.host, m.length, flags&(block.FUA|block.MayUnmap))
			}
		default:
			step = min(m.length, int64(len(zeroBytes)))
			err = im.WriteAt(ctx, zeroBytes[:step], off, flags&block.FUA)
		}
		if err != nil {
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}

// unmap gives up the host clusters of the guest clusters [first, last), which read
// as zero afterwards. Unless must is set it is a hint. It goes slice by slice, so
// that other requests get in between.
func (im *image) unmap(ctx context.Context, first, last int64, must bool) error {
	for first < last {
		if err := im.failed(); err != nil {
			return err
		}
		if im.dirty.Load() >= im.maxDirty {
			if err := im.flushMetadata(ctx); err != nil {
				return err
			}
		}
		end := min(last, (first>>im.l2Bits+1)<<im.l2Bits)
		if im.l1.w[first>>im.l2Bits].Load()&offsetMask == 0 && im.staysZero(first, must) {
			// No table, so zeroes already. A write may make one at any moment, but then it came after.
			first = end
			continue
		}
		end = min(end, (first>>im.sliceBits+1)<<im.sliceBits)
		if err := im.unmapSlice(ctx, first, end, must); err != nil {
			return err
		}
		first = end
	}
	return nil
}

// staysZero tells whether an unallocated guest cluster may be left so. One past the end
// of a backing file reads as zero, but if it must do so it should with another backing
// file, too.
func (im *image) staysZero(cluster int64, must bool) bool {
	return im.backing() == nil || !must && im.backingEnds(cluster<<im.clusterBits)
}

// unmapSlice is unmap for guest clusters of one slice.
func (im *image) unmapSlice(ctx context.Context, first, last int64, must bool) error {
	return im.update(ctx, func() error {
		if err := im.ownTable(ctx, first>>im.l2Bits); err != nil {
			return err
		}
		slot, err := im.loadSlice(ctx, uint32(first>>im.sliceBits))
		if err != nil {
			return err
		}
		if im.wait(first, last-first) {
			return errRetry
		}
		entries := im.l2.slice(slot)
		for c := first; c < last; c++ {
			i := c & int64(len(entries)-1)
			old := entries[i].Load()
			kind, _ := im.decode(old)
			entry := uint64(0)
			if im.header.Version >= 3 {
				entry = uint64(L2ZeroPlain)
			}
			switch {
			case kind == clusterInvalid && must:
				return im.corrupted(fmt.Errorf("guest cluster at offset %d: %w", c<<im.clusterBits, L2Entry(old).Check(im.header)))
			case kind == ClusterZero, kind == clusterInvalid,
				kind == ClusterUnallocated && im.staysZero(c, must):
				continue
			case kind == ClusterUnallocated:
			case !im.mayFree():
				if !must || kind == ClusterZeroAlloc {
					continue
				}
				if im.header.Version >= 3 && kind == ClusterData {
					entry = old | entryZero
					break
				}
				im.freeEntry(old)
			default:
				im.freeEntry(old)
			}
			im.setEntry(slot, i, entry)
		}
		return nil
	})
}

// provision makes the guest clusters [first, last) read as zero and gives each a
// host cluster of its own (version 3).
func (im *image) provision(ctx context.Context, first, last int64) error {
	for first < last {
		if err := im.failed(); err != nil {
			return err
		}
		if im.dirty.Load() >= im.maxDirty {
			if err := im.flushMetadata(ctx); err != nil {
				return err
			}
		}
		n, err := im.zeroAllocated(ctx, first, last-first)
		if err != nil {
			return err
		}
		if n == 0 {
			if n, err = im.allocateZero(ctx, first, last-first, false); err != nil {
				return err
			}
		}
		first += n
	}
	return nil
}

// zeroAllocated marks guest clusters that have a host cluster of their own as zero,
// as far as there are such from first on, and tells how many there were.
func (im *image) zeroAllocated(ctx context.Context, first, n int64) (int64, error) {
	n = min(n, (first>>im.sliceBits+1)<<im.sliceBits-first)
	done := int64(0)
	err := im.update(ctx, func() error {
		if im.l1.w[first>>im.l2Bits].Load()&entryCopied == 0 {
			return nil
		}
		slot, err := im.loadSlice(ctx, uint32(first>>im.sliceBits))
		if err != nil {
			return err
		}
		if im.wait(first, n) {
			return errRetry
		}
		entries := im.l2.slice(slot)
		for done = 0; done < n; done++ {
			i := (first + done) & int64(len(entries)-1)
			entry := entries[i].Load()
			kind, _ := im.decode(entry)
			if needsCluster(kind, entry&entryCopied != 0) {
				break
			}
			if kind == ClusterData {
				im.setEntry(slot, i, entry|entryZero)
			}
		}
		return nil
	})
	return done, err
}

// allocateZero gives the first of up to n guest clusters new host clusters, and
// tells how many. The file is asked to provide space for them where it can without
// writing zeroes; else it is made to reach to their end. With part, only clusters
// that read as zero already are taken.
func (im *image) allocateZero(ctx context.Context, first, n int64, part bool) (int64, error) {
	want := wantZeroes
	if part {
		want = wantReserve
	}
	a, err := im.allocate(ctx, first, n, want)
	if a == nil || err != nil {
		return 0, err
	}
	size := a.n << im.clusterBits
	err = im.file.WriteZeroes(ctx, a.host, size, block.NoFallback)
	if errors.Is(err, block.ErrNotSupported) {
		err = im.file.WriteAt(ctx, zeroBytes[:512], a.host+size-512, 0)
	}
	if err == nil {
		err = im.link(ctx, a, true)
	}
	if err != nil {
		im.abandon(ctx, a)
	}
	return a.n, err
}
