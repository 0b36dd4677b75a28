package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
)

// Places of fields in the header that are rewritten alone.
const (
	refcountTableField = 48 // offset and clusters: 12 bytes
	incompatibleOffset = 72
	autoclearOffset    = 88
)

// Options are the options of a qcow2 node. The zero value of each field is the default.
type Options struct {
	// L2CacheSize bounds the L2 cache in bytes; it is never larger than the disk
	// needs. Default and limit: 32 MiB.
	L2CacheSize int64 `option:"l2-cache-size"`
	// RefcountCacheSize bounds the cache of refcount blocks in bytes. Default: 1 MiB.
	RefcountCacheSize int64 `option:"refcount-cache-size"`
	// RefuseBacking refuses an image whose header names a backing file, unless
	// Config.Children["backing"] says what to open. It holds for the whole chain.
	RefuseBacking bool

	broken orderingRule // rules that a test wants broken
}

// Host tells the driver about files, of which it knows nothing itself.
type Host struct {
	// Identity gives equal strings for names of the same file, "" where it cannot
	// tell. nil: names are compared.
	Identity func(name string) string
}

// Driver returns the driver "qcow2", a format. Child "file" holds the image, child
// "backing" what it does not hold itself, if the header or the configuration names
// a backing file.
func Driver(host Host) *block.Driver {
	if host.Identity == nil {
		host.Identity = func(name string) string { return name }
	}
	return &block.Driver{
		Name:       "qcow2",
		Kind:       block.Format,
		Backing:    true,
		NewOptions: func() any { return new(Options) },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			return open(ctx, o, host)
		},
		Probe:   Probe,
		Creator: images{},
		Sizer:   images{},
	}
}

func open(ctx context.Context, o *block.Opening, host Host) (_ block.Instance, err error) {
	opts, ok := o.Config.Options.(*Options)
	if !ok {
		return nil, fmt.Errorf("qcow2 node '%s': options are %T, not %T", o.NodeName, o.Config.Options, opts)
	}
	file, err := o.OpenChild(ctx, "file", block.RoleImage, nil)
	if err != nil {
		return nil, err
	}
	name := file.Node().ExactFilename()
	defer func() {
		if err != nil && name != "" {
			err = fmt.Errorf("%s: %w", name, err)
		}
	}()
	writable := !o.Config.ReadOnly && !o.Config.NoIO
	h, err := readHeader(ctx, file, writable)
	if err != nil && writable && o.AutoReadOnly(ctx, err) == nil {
		writable = false
		h, err = readHeader(ctx, file, false)
	}
	if err != nil {
		return nil, err
	}
	if writable {
		if h, err = repair(ctx, o, file, h, opts.broken); err != nil {
			return nil, err
		}
	}
	if err := openBacking(ctx, o, host, h, name); err != nil {
		return nil, err
	}
	im, err := makeImage(ctx, o.Node(), file, h, opts, writable)
	if err != nil {
		return nil, err
	}
	if writable {
		im.startReaper()
	}
	return im, nil
}

func readHeader(ctx context.Context, file *block.Edge, writable bool) (*Header, error) {
	h, err := ParseHeader(ctx, file, file.Size())
	if err != nil {
		return nil, err
	}
	return h, h.Unsupported(writable)
}

// repair prepares an image for writing: refcounts that may be wrong are rebuilt
// (rule R5), features that we do not keep up to date are cleared.
func repair(ctx context.Context, o *block.Opening, file *block.Edge, h *Header, broken orderingRule) (*Header, error) {
	if h.Dirty() {
		o.Node().Graph().Log().Warn("qcow2: the image was not closed; its refcounts are rebuilt", "node", o.NodeName)
		var target Target = file
		if broken&ruleDirtyLast != 0 {
			target = noFlush{file}
		}
		if _, err := RepairRefcounts(ctx, target, h); err != nil {
			return nil, fmt.Errorf("Could not repair dirty image: %w", err)
		}
		var err error
		if h, err = readHeader(ctx, file, true); err != nil {
			return nil, err
		}
	}
	if h.Version >= 3 && h.Autoclear != 0 {
		var none [8]byte
		// Durable before anything that the features do not know of is written.
		if err := file.WriteAt(ctx, none[:], autoclearOffset, block.FUA); err != nil {
			return nil, fmt.Errorf("clear autoclear features: %w", err)
		}
		h.Autoclear = 0
	}
	return h, nil
}

// noFlush breaks a rule for a test.
type noFlush struct{ *block.Edge }

func (noFlush) Flush(context.Context) error { return nil }

func makeImage(ctx context.Context, node *block.Node, file *block.Edge, h *Header, opts *Options, writable bool) (_ *image, err error) {
	im := &image{
		node: node, log: node.Graph().Log(), file: file,
		writable: writable, header: h, size: h.Size, broken: opts.broken,
		clusterBits: uint(h.ClusterBits), clusterSize: h.ClusterSize(),
		l2Bits:  uint(h.ClusterBits) - 3,
		badBits: l2Reserved | uint64(h.ClusterSize()-1)&offsetMask,
		fixed:   newGuard(), tables: newGuard(),
		dirtyL1: make(map[int64]struct{}), loading: make(map[uint32]chan struct{}),
	}
	im.allocated.L = &im.mu
	im.reaper.changed.L = &im.reaper.pauseMu
	im.reaper.wake = make(chan struct{}, 1)
	im.sliceBits = min(im.l2Bits, maxSliceBits)
	if h.Version < 3 {
		im.badBits |= entryZero
	}
	im.decompressed.init(h)
	if im.info, err = Inspect(ctx, file, h); err != nil {
		im.log.Warn("qcow2: the image cannot be described in full", "node", node.Name(), "error", err)
	}
	cacheSize := opts.L2CacheSize
	if cacheSize <= 0 || cacheSize > maxL2Cache {
		cacheSize = maxL2Cache
	}
	slices := (h.Clusters(h.Size) + 1<<im.sliceBits - 1) >> im.sliceBits
	if im.l2, err = newL2Cache(im.sliceBits, slices, cacheSize); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, im.releaseMemory())
		}
	}()
	im.maxDirty = min(1024, int64(len(im.l2.tags)))
	if err := im.loadL1(ctx); err != nil {
		return nil, err
	}
	if !writable {
		return im, nil
	}
	refCache := opts.RefcountCacheSize
	if refCache <= 0 {
		refCache = defaultRefcountCache
	}
	im.refs = newRefcounts(file, h, refCache)
	im.refs.dirty, im.refs.fixed, im.refs.tables, im.refs.corrupted = &im.dirty, im.fixed, im.tables, im.corrupted
	if err := im.loadRefcountTable(ctx); err != nil {
		return nil, err
	}
	return im, im.guardMetadata(ctx)
}

// loadL1 reads the entries of the active L1 table that the disk's size needs.
func (im *image) loadL1(ctx context.Context) (err error) {
	n := im.header.L1Needed(im.size)
	if im.l1, err = newWordArray(int(n)); err != nil {
		return err
	}
	err = readTable(ctx, im.file, im.header.L1Offset, n, func(i int64, entry uint64) { im.l1.w[i].Store(entry) })
	if err != nil {
		return fmt.Errorf("read L1 table: %w", err)
	}
	return nil
}

func (im *image) loadRefcountTable(ctx context.Context) error {
	n := im.header.RefcountTableEntries()
	im.refs.table = make([]uint64, n)
	im.file.Debug(block.EventReftableLoad)
	// Past the end of the file the table is empty.
	there := min(n, max(0, im.file.Size()-im.header.RefcountTableOffset)/8)
	err := readTable(ctx, im.file, im.header.RefcountTableOffset, there, func(i int64, entry uint64) { im.refs.table[i] = entry })
	if err != nil {
		return fmt.Errorf("read refcount table: %w", err)
	}
	return nil
}

// readTable reads n entries of 8 bytes in pieces.
func readTable(ctx context.Context, r Reader, off, n int64, f func(i int64, entry uint64)) error {
	buf := block.GetBuffer(int(min(n*8, 1<<20)))
	defer block.PutBuffer(buf)
	for done := int64(0); done < n; {
		part := buf[:min(n-done, 1<<17)*8]
		if err := r.ReadAt(ctx, part, off+done*8); err != nil {
			return err
		}
		for ; len(part) > 0; part = part[8:] {
			f(done, binary.BigEndian.Uint64(part))
			done++
		}
	}
	return nil
}

// guardMetadata notes where metadata lies. Parts that overlap are refused: writing
// one would destroy the other, and a refcount block in many places would make the
// search for a free cluster endless.
func (im *image) guardMetadata(ctx context.Context) error {
	h := im.header
	var err error
	table := func(what string, off, n int64) {
		first, n := off>>im.clusterBits, h.Clusters(n)
		if err != nil || n == 0 || im.fixed.live >= maxGuarded {
			return
		}
		if im.fixed.overlaps(first, n) >= 0 {
			err = corrupt("%s at 0x%x overlaps other metadata; use 'qemu-img check -r all' on a copy", what, off)
			return
		}
		im.fixed.add(first, n)
	}
	table("header", 0, im.clusterSize)
	table("L1 table", h.L1Offset, int64(h.L1Size)*8)
	table("refcount table", h.RefcountTableOffset, int64(h.RefcountTableClusters)<<im.clusterBits)
	for _, entry := range im.refs.table {
		if off := int64(entry & offsetMask); off != 0 {
			table("refcount block", off, im.clusterSize)
		}
	}
	snapshots, length, e := readSnapshots(ctx, im.file, h)
	if e != nil {
		return e
	}
	table("snapshot table", h.SnapshotsOffset, length)
	for i := range snapshots {
		if err := snapshots[i].Validate(h, im.file.Size()); err != nil {
			return err
		}
		table("L1 table of a snapshot", int64(snapshots[i].L1Offset), int64(snapshots[i].L1Size)*8)
	}
	if err != nil {
		return err
	}
	for i := range im.l1.w {
		if off := L1Entry(im.l1.w[i].Load()).Offset(); off != 0 {
			im.tables.add(off>>im.clusterBits, 1)
		}
	}
	return nil
}

var _ interface {
	block.Instance
	block.Zeroer
	block.Discarder
	block.StatusReporter
	block.Locator
	block.Prefetcher
	block.Quiescer
	block.Inspector
	block.Measurer
} = (*image)(nil)
