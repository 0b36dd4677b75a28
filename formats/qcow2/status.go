package qcow2

import (
	"context"

	"github.com/nbdserve/nbdserve/block"
)

// statusSlices bounds the slices of L2 tables that one BlockStatus looks at.
const statusSlices = 1024

// BlockStatus implements [block.StatusReporter].
func (im *image) BlockStatus(ctx context.Context, off, n int64, _ bool) (block.Extent, error) {
	var x block.Extent
	sliceSpan := im.clusterSize << im.sliceBits
	for at, slices := off, 0; at < off+n && slices < statusSlices; {
		if err := im.failed(); err != nil {
			return x, err
		}
		m, err := im.mapAt(ctx, at, off+n-at)
		if err != nil {
			return x, err
		}
		if m.kind == ClusterData {
			// Past the end of the file there are zeroes.
			if there := im.file.Size() - m.host; there <= 0 {
				m.kind = ClusterZero
			} else {
				m.length = min(m.length, there)
			}
		}
		flags := im.statusFlags(m.kind)
		switch {
		case x.Length == 0:
			x.Flags = flags
			if m.kind == ClusterData {
				x.Flags |= block.StatusOffset
				x.Offset, x.File = m.host, im.file.Node()
			}
		case flags != x.Flags&^block.StatusOffset:
			return x, nil
		case x.Flags&block.StatusOffset != 0 && m.host != x.Offset+x.Length:
			// One extent in several places: no place is told.
			x.Flags &^= block.StatusOffset
			x.Offset, x.File = 0, nil
		}
		x.Length += m.length
		if end := at + m.length; end/sliceSpan != at/sliceSpan && im.hasTable(at) {
			slices++
		}
		at += m.length
	}
	if off+x.Length == im.size {
		x.Flags |= block.StatusEOF
	}
	return x, nil
}

func (im *image) hasTable(off int64) bool {
	return im.l1.w[off>>im.clusterBits>>im.l2Bits].Load()&offsetMask != 0
}

func (im *image) statusFlags(kind ClusterKind) block.StatusFlags {
	switch kind {
	case ClusterData:
		return block.StatusData | block.StatusAllocated
	case ClusterCompressed:
		return block.StatusData | block.StatusAllocated | block.StatusCompressed
	case ClusterUnallocated:
		if im.backing() == nil {
			return block.StatusZero
		}
		return 0
	case ClusterZeroAlloc:
		return block.StatusData | block.StatusZero | block.StatusAllocated
	}
	return block.StatusZero | block.StatusAllocated
}
