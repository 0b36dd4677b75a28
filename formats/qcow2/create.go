package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"syscall"

	"github.com/nbdserve/nbdserve/block"
)

// A Target is what an image is written to: a [block.Edge] or [block.Root] with
// permission to write and to resize.
type Target interface {
	Reader
	// WriteAt stores p at byte off, growing the file where it must.
	WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error
	// Flush makes what was written before durable.
	Flush(ctx context.Context) error
	// Truncate sets the length in bytes; block.ErrNotSupported on devices.
	Truncate(ctx context.Context, size int64) error
}

var (
	_ Target = (*block.Edge)(nil)
	_ Target = (*block.Root)(nil)
)

// CreateOptions say what image [Create] makes. The zero value of each field but
// Size is the default.
type CreateOptions struct {
	Size         int64  // of the virtual disk in bytes, rounded up to 512
	Version      uint32 // 2 (compat 0.10) or 3 (compat 1.1, the default)
	ClusterSize  int64  // bytes, a power of two of 512 to 2 MiB; default 64 KiB
	RefcountBits int    // a power of two up to 64, 16 in version 2; default 16
	// BackingFile is stored as it is and not opened. BackingFormat goes with it: "raw", "qcow2", ...
	BackingFile, BackingFormat string
	// Compression is the type of compressed clusters: CompressionZlib, or CompressionZstd (version 3).
	Compression   uint8
	LazyRefcounts bool // version 3
}

// DefaultClusterSize is the cluster size of images that are created without one, in bytes.
const DefaultClusterSize = 64 << 10

// errTooLarge is for sizes that the format cannot have.
var errTooLarge = errors.Join(block.ErrInvalid, syscall.EFBIG)

// createChunk bounds the buffer that [Create] zeroes a device with.
const createChunk = 1 << 20

// Create writes a new, empty image over the whole of f. An image that was there
// is gone when it returns; one cut short leaves no valid header. Nothing else may
// use f meanwhile. Errors wrap [block.ErrInvalid] for options that do not fit, or
// are what f returned.
func Create(ctx context.Context, f Target, opts CreateOptions) error {
	n, err := plan(opts)
	if err != nil {
		return err
	}
	return n.write(ctx, f)
}

// An emptyImage is an image that is not written yet.
type emptyImage struct {
	h    *Header
	lay  layout
	head []byte
}

// plan checks options.
func plan(opts CreateOptions) (*emptyImage, error) {
	h, err := newHeader(opts)
	if err != nil {
		return nil, err
	}
	lay, err := h.place()
	if err != nil {
		return nil, err
	}
	head, err := h.Marshal()
	return &emptyImage{h, lay, head}, err
}

func (n *emptyImage) write(ctx context.Context, f Target) error {
	h, lay := n.h, n.lay
	if err := clearFile(ctx, f, lay.total<<h.ClusterBits); err != nil {
		return fmt.Errorf("create qcow2 image: %w", err)
	}
	if err := writeRefcounts(ctx, f, h, lay); err != nil {
		return fmt.Errorf("create qcow2 image: write refcounts: %w", err)
	}
	// The header last: without it there is no image.
	if err := f.Flush(ctx); err != nil {
		return fmt.Errorf("create qcow2 image: flush: %w", err)
	}
	if err := f.WriteAt(ctx, n.head, 0, 0); err != nil {
		return fmt.Errorf("create qcow2 image: write header: %w", err)
	}
	if err := f.Flush(ctx); err != nil {
		return fmt.Errorf("create qcow2 image: flush: %w", err)
	}
	return nil
}

// newHeader checks options and makes a header of them that places nothing yet.
func newHeader(o CreateOptions) (*Header, error) {
	if o.Version == 0 {
		o.Version = 3
	}
	if o.ClusterSize == 0 {
		o.ClusterSize = DefaultClusterSize
	}
	if o.RefcountBits == 0 {
		o.RefcountBits = 16
	}
	switch {
	case o.Version != 2 && o.Version != 3:
		return nil, invalid("qcow2 version is %d; it must be 2 (compat 0.10) or 3 (compat 1.1)", o.Version)
	case o.ClusterSize < 1<<MinClusterBits || o.ClusterSize > 1<<MaxClusterBits || o.ClusterSize&(o.ClusterSize-1) != 0:
		return nil, invalid("Cluster size must be a power of two between 512 and 2048k, not %d", o.ClusterSize)
	case o.RefcountBits < 1 || o.RefcountBits > 64 || o.RefcountBits&(o.RefcountBits-1) != 0:
		return nil, invalid("Refcount width must be a power of two and may not exceed 64 bits, not %d", o.RefcountBits)
	case o.Version == 2 && o.RefcountBits != 16:
		return nil, invalid("Different refcount widths than 16 bits require compatibility level 1.1 or above, refcount bits is %d", o.RefcountBits)
	case o.Compression > CompressionZstd:
		return nil, invalid("unknown compression type %d", o.Compression)
	case o.Version == 2 && o.Compression != CompressionZlib:
		return nil, invalid("Non-zlib compression type is only supported with compatibility level 1.1 and above")
	case o.Version == 2 && o.LazyRefcounts:
		return nil, invalid("Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)")
	case o.Size < 0 || o.Size > 1<<62:
		return nil, invalid("image size %d is out of range", o.Size)
	case o.BackingFile != "" && o.BackingFormat == "":
		return nil, invalid("backing file %q needs its format stated, e.g. raw or qcow2", o.BackingFile)
	case o.BackingFile == "" && o.BackingFormat != "":
		return nil, invalid("backing format %q without a backing file", o.BackingFormat)
	}
	h := &Header{
		Version:         o.Version,
		ClusterBits:     uint32(bits.TrailingZeros64(uint64(o.ClusterSize))),
		Size:            (o.Size + 511) &^ 511,
		RefcountOrder:   uint32(bits.TrailingZeros(uint(o.RefcountBits))),
		CompressionType: o.Compression,
		BackingFile:     o.BackingFile,
		BackingFormat:   o.BackingFormat,
		HeaderLength:    headerLenV2,
	}
	if o.Version >= 3 {
		h.HeaderLength = headerLenV3
		if o.LazyRefcounts {
			h.Compatible |= CompatLazyRefcounts
		}
		h.Unknown = make([]byte, headerLenV3-headerLenV3Min-1)
		if o.Compression != CompressionZlib {
			h.Incompatible |= IncompatCompression
		}
		// The names are left out where they would push the header over one
		// sector, which disks write all or nothing.
		if o.BackingFile == "" {
			h.FeatureNames = standardFeatureNames
		}
	}
	return h, nil
}

// A layout says where the parts of a new image lie, in clusters: the header, the
// refcount table, the refcount blocks, the L1 table, in this order.
type layout struct{ table, blocks, l1, total int64 }

// place decides where the tables of a new image lie and enters them into h.
func (h *Header) place() (layout, error) {
	l1Entries := h.L1Needed(h.Size)
	if l1Entries > MaxL1Bytes/8 {
		return layout{}, &formatError{fmt.Sprintf("The image size is too large (try using a larger cluster size): %d bytes with clusters of %d", h.Size, h.ClusterSize()), errTooLarge}
	}
	lay := layout{table: 1, blocks: 1, l1: h.Clusters(l1Entries * 8)}
	for {
		lay.total = 1 + lay.table + lay.blocks + lay.l1
		blocks := (lay.total + h.RefcountBlockEntries() - 1) / h.RefcountBlockEntries()
		table := h.Clusters(blocks * 8)
		if blocks == lay.blocks && table == lay.table {
			break
		}
		lay.blocks, lay.table = blocks, table
	}
	h.RefcountTableOffset = 1 << h.ClusterBits
	h.RefcountTableClusters = uint32(lay.table)
	h.L1Offset = (1 + lay.table + lay.blocks) << h.ClusterBits
	h.L1Size = uint32(l1Entries)
	return lay, nil
}

// clearFile makes f a file of n zero bytes. A device keeps its size, and what lies
// past n.
func clearFile(ctx context.Context, f Target, n int64) error {
	err := f.Truncate(ctx, 0)
	if err == nil {
		return f.Truncate(ctx, n)
	}
	if !errors.Is(err, block.ErrNotSupported) {
		return err
	}
	if f.Size() < n {
		return fmt.Errorf("%w: the device has %d bytes, an empty image needs %d", block.ErrNoSpace, f.Size(), n)
	}
	zeroes := make([]byte, min(n, createChunk))
	for off := int64(0); off < n; off += int64(len(zeroes)) {
		if err := f.WriteAt(ctx, zeroes[:min(n-off, int64(len(zeroes)))], off, 0); err != nil {
			return err
		}
	}
	return f.Flush(ctx)
}

// writeRefcounts writes the refcount table and blocks: every cluster is used once.
func writeRefcounts(ctx context.Context, f Target, h *Header, lay layout) error {
	table := make([]byte, lay.table<<h.ClusterBits)
	for i := range lay.blocks {
		binary.BigEndian.PutUint64(table[i*8:], uint64(1+lay.table+i)<<h.ClusterBits)
	}
	if err := f.WriteAt(ctx, table, h.RefcountTableOffset, 0); err != nil {
		return err
	}
	buf := make([]byte, h.ClusterSize())
	per := h.RefcountBlockEntries()
	for i := range lay.blocks {
		for j := range per {
			used := uint64(0)
			if i*per+j < lay.total {
				used = 1
			}
			RefcountSet(buf, h.RefcountOrder, j, used)
		}
		if err := f.WriteAt(ctx, buf, (1+lay.table+i)<<h.ClusterBits, 0); err != nil {
			return err
		}
	}
	return nil
}
