package qcow2

import (
	"context"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
)

// imageOptions are the options of new images as text gives them, by QEMU's names.
type imageOptions struct {
	ClusterSize     int64           `option:"cluster_size"`
	Compat          compat          `option:"compat"`
	CompressionType compressionType `option:"compression_type"`
	LazyRefcounts   bool            `option:"lazy_refcounts"`
	RefcountBits    int64           `option:"refcount_bits"`
	Preallocation   noPreallocation `option:"preallocation"`
}

// compat is a version of the format by the version of QEMU that it came with.
type compat uint32

func (c compat) String() string {
	if c == 2 {
		return "0.10"
	}
	return "1.1"
}

// UnmarshalText implements [encoding.TextUnmarshaler].
func (c *compat) UnmarshalText(text []byte) error {
	switch string(text) {
	case "0.10", "v2":
		*c = 2
	case "1.1", "v3":
		*c = 3
	default:
		return fmt.Errorf("'%s' is not one of 0.10, 1.1", text)
	}
	return nil
}

type compressionType uint8

func (c compressionType) String() string {
	if c == CompressionZstd {
		return "zstd"
	}
	return "zlib"
}

// UnmarshalText implements [encoding.TextUnmarshaler].
func (c *compressionType) UnmarshalText(text []byte) error {
	for _, t := range []compressionType{CompressionZlib, CompressionZstd} {
		if t.String() == string(text) {
			*c = t
			return nil
		}
	}
	return fmt.Errorf("'%s' is not one of zlib, zstd", text)
}

// noPreallocation takes the name of the mode that there is.
type noPreallocation struct{}

func (noPreallocation) String() string { return "off" }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (*noPreallocation) UnmarshalText(text []byte) error {
	if string(text) != "off" {
		return unsupported("qcow2: preallocation '%s' is not supported", text)
	}
	return nil
}

// images makes images and estimates the size of their files.
type images struct{}

// NewCreateOptions implements [block.Creator].
func (images) NewCreateOptions() any {
	return &imageOptions{ClusterSize: DefaultClusterSize, Compat: 3, RefcountBits: 16}
}

// Create implements [block.Creator].
func (images) Create(ctx context.Context, c *block.Creation) error {
	n, err := newPlan(c.Options, c.Size, c.Backing, c.BackingFormat)
	if err != nil {
		return err
	}
	c.Size = (c.Size + 511) &^ 511
	if err := c.CreateFile(ctx, 0); err != nil {
		return err
	}
	return c.WriteFile(ctx, func(ctx context.Context, f *block.Root) error { return n.write(ctx, f) })
}

func newPlan(options any, size int64, backing, backingFormat string) (*emptyImage, error) {
	o, ok := options.(*imageOptions)
	if !ok {
		return nil, invalid("options of a new image are %T, not %T", options, o)
	}
	if o.RefcountBits > 64 {
		o.RefcountBits = 65 // refused below, with the others
	}
	return plan(CreateOptions{Size: size, Version: uint32(o.Compat), ClusterSize: o.ClusterSize, RefcountBits: int(o.RefcountBits),
		BackingFile: backing, BackingFormat: backingFormat, Compression: uint8(o.CompressionType), LazyRefcounts: o.LazyRefcounts})
}

// Measure implements [block.Sizer] as QEMU does it. The metadata is that of a file
// with data everywhere, so less may be required.
func (images) Measure(ctx context.Context, m *block.Measuring) (block.ImageSizes, error) {
	size := m.Size
	if m.Source != nil {
		size = m.Source.Node().Size()
	}
	backing, format := "", ""
	if m.Backing {
		backing, format = "backing", "raw"
	}
	n, err := newPlan(m.Options, size, backing, format)
	if err != nil {
		return block.ImageSizes{}, err
	}
	cluster := n.h.ClusterSize()
	size = roundUp(size, cluster)
	required := int64(0)
	if m.Source != nil {
		if m.Backing {
			required = size // nobody knows what the backing file will hold
		} else if required, err = dataClusters(ctx, m.Source, cluster); err != nil {
			return block.ImageSizes{}, err
		}
	}
	full := fullSize(n.h, size)
	return block.ImageSizes{Required: full - size + required, FullyAllocated: full}, nil
}

func roundUp(n, align int64) int64 { return (n + align - 1) / align * align }

// dataClusters is the size in bytes of the clusters of that size that hold data of source.
func dataClusters(ctx context.Context, source *block.Root, cluster int64) (int64, error) {
	sum, counted := int64(0), int64(0) // up to counted
	at := int64(0)
	for x, err := range source.Extents(ctx, 0, source.Node().Size(), true, nil) {
		if err != nil {
			return 0, err
		}
		const data = block.StatusData | block.StatusAllocated
		if x.Flags&(data|block.StatusZero) == data {
			first, end := max(counted, at&^(cluster-1)), roundUp(at+x.Length, cluster)
			sum += max(0, end-first)
			counted = end
		}
		at += x.Length
	}
	return sum, nil
}

// fullSize is the size of the file of an image whose disk has size bytes, whole
// clusters, all of it data.
func fullSize(h *Header, size int64) int64 {
	cluster := h.ClusterSize()
	l2 := roundUp(size/cluster, cluster/h.L2EntrySize()) * h.L2EntrySize()
	l1 := roundUp(l2/cluster, cluster/8) * 8
	meta := cluster + l1 + l2
	used := (meta + size) / cluster
	var blocks, table, total int64
	for last := int64(-1); total != last; {
		last = total
		blocks = roundUp(used+table+blocks, h.RefcountBlockEntries()) / h.RefcountBlockEntries()
		table = roundUp(blocks*8, cluster) / cluster
		total = used + blocks + table
	}
	return total * cluster
}
