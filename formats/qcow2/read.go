package qcow2

import (
	"context"

	"github.com/nbdserve/nbdserve/block"
)

// ReadAt implements [block.Instance].
func (im *image) ReadAt(ctx context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		if err := im.failed(); err != nil {
			return err
		}
		m, err := im.mapAt(ctx, off, int64(len(p)))
		if err != nil {
			return err
		}
		if err := im.readMapped(ctx, p[:m.length], off, m); err != nil {
			return err
		}
		p, off = p[m.length:], off+m.length
	}
	return nil
}

func (im *image) readMapped(ctx context.Context, p []byte, off int64, m mapping) error {
	switch m.kind {
	case ClusterData:
		im.file.Debug(block.EventReadAIO)
		return im.readHost(ctx, p, m.host)
	case ClusterCompressed:
		data, err := im.decompressed.get(ctx, im, m.entry)
		if err != nil {
			return err
		}
		copy(p, data[off&(im.clusterSize-1):])
	case ClusterUnallocated:
		return im.readBacking(ctx, p, off)
	default:
		clear(p)
	}
	return nil
}

// readBacking reads from the backing file; past its end, and without one, there are zeroes.
func (im *image) readBacking(ctx context.Context, p []byte, off int64) error {
	there := int64(0)
	if im.backing() != nil {
		there = min(int64(len(p)), max(0, im.backing().Size()-off))
	}
	clear(p[there:])
	if there == 0 {
		return nil
	}
	im.file.Debug(block.EventReadBackingAIO)
	return im.backing().ReadAt(ctx, p[:there], off)
}

// backingEnds tells that the backing file holds nothing from off on.
func (im *image) backingEnds(off int64) bool {
	return im.backing() == nil || off >= im.backing().Size()
}

// Prefetch implements [block.Prefetcher].
func (im *image) Prefetch(ctx context.Context, off, n int64) error {
	for n > 0 {
		if err := im.failed(); err != nil {
			return err
		}
		m, err := im.mapAt(ctx, off, n)
		if err != nil {
			return err
		}
		from, at, there := im.file, m.host, int64(0)
		switch {
		case m.kind == ClusterData:
			there = im.file.Size() - m.host
		case m.kind == ClusterCompressed:
			at, there = L2Entry(m.entry).CompressedRange(im.header.ClusterBits)
			there = min(there, im.file.Size()-at)
			if there > 0 {
				err = im.file.Prefetch(ctx, at, there)
				there = 0
			}
		case m.kind == ClusterUnallocated && im.backing() != nil:
			from, at, there = im.backing(), off, im.backing().Size()-off
		}
		if there > 0 {
			err = from.Prefetch(ctx, at, min(m.length, there))
		}
		if err != nil {
			return err
		}
		off, n = off+m.length, n-m.length
	}
	return nil
}
