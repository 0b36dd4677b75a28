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
		Mutable:    []string{"l2-cache-size", "refcount-cache-size"},
		NewOptions: func() any { return new(Options) },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			return open(ctx, o, host)
		},
		Probe: Probe,
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
	im := makeNode(o.Node(), file, host, opts.broken)
	if o.Config.Inactive {
		return im, im.openInactive(ctx, o)
	}
	writable := isWritable(o.Config)
	h, err := readHeader(ctx, file, writable)
	if err != nil && writable && o.AutoReadOnly(ctx, err) == nil {
		writable = false
		h, err = readHeader(ctx, file, false)
	}
	if err == nil && writable {
		h, err = im.repair(ctx, h)
	}
	if err != nil {
		return nil, err
	}
	if err := openBacking(ctx, o, host, h, name); err != nil {
		return nil, err
	}
	c, info, err := im.load(ctx, h, opts, writable)
	if err != nil {
		return nil, err
	}
	im.become(c, info)
	im.startReaper()
	return im, nil
}

func isWritable(c *block.Config) bool { return !c.ReadOnly && !c.NoIO }

func readHeader(ctx context.Context, file *block.Edge, writable bool) (*Header, error) {
	h, err := ParseHeader(ctx, file, file.Size())
	if err != nil {
		return nil, err
	}
	return h, h.Unsupported(writable)
}

// ready reads the header, and prepares the image for writing if it is to be written.
func (im *image) ready(ctx context.Context, writable bool) (*Header, error) {
	h, err := readHeader(ctx, im.file, writable)
	if err != nil || !writable {
		return h, err
	}
	return im.repair(ctx, h)
}

// repair prepares an image for writing: refcounts that may be wrong are rebuilt
// (rule R5), features that we do not keep up to date are cleared.
func (im *image) repair(ctx context.Context, h *Header) (_ *Header, err error) {
	if h.Dirty() {
		im.log.Warn("qcow2: the image was not closed; its refcounts are rebuilt", "node", im.node.Name())
		var target Target = im.file
		if im.broken&ruleDirtyLast != 0 {
			target = noFlush{im.file}
		}
		if _, err := RepairRefcounts(ctx, target, h); err != nil {
			return nil, fmt.Errorf("Could not repair dirty image: %w", err)
		}
		if h, err = readHeader(ctx, im.file, true); err != nil {
			return nil, err
		}
	}
	if h.Version >= 3 && h.Autoclear != 0 {
		var none [8]byte
		// Durable before anything that the features do not know of is written.
		if err := im.file.WriteAt(ctx, none[:], autoclearOffset, block.FUA); err != nil {
			return nil, fmt.Errorf("clear autoclear features: %w", err)
		}
		h.Autoclear = 0
	}
	return h, nil
}

// noFlush breaks a rule for a test.
type noFlush struct{ *block.Edge }

func (noFlush) Flush(context.Context) error { return nil }

func makeNode(node *block.Node, file *block.Edge, host Host, broken orderingRule) *image {
	im := &image{node: node, log: node.Graph().Log(), file: file, host: host, broken: broken}
	im.allocated.L = &im.mu
	im.reaper.changed.L = &im.reaper.pauseMu
	im.reaper.wake = make(chan struct{}, 1)
	return im
}

// outline is the contents of an image as far as the header tells.
func outline(h *Header) contents {
	c := contents{
		header: h, size: h.Size,
		clusterBits: uint(h.ClusterBits), clusterSize: h.ClusterSize(),
		l2Bits:  uint(h.ClusterBits) - 3,
		badBits: l2Reserved | uint64(h.ClusterSize()-1)&offsetMask,
	}
	c.sliceBits = min(c.l2Bits, maxSliceBits)
	if h.Version < 3 {
		c.badBits |= entryZero
	}
	return c
}

// load reads what is needed to serve an image. The node is as before until [image.become].
func (im *image) load(ctx context.Context, h *Header, opts *Options, writable bool) (c contents, info *Info, err error) {
	c = outline(h)
	c.writable = writable
	c.fixed, c.tables = newGuard(), newGuard()
	c.dirtyL1, c.loading = make(map[int64]struct{}), make(map[uint32]chan struct{})
	c.decompressed = newClusterCache(h)
	info = im.inspect(ctx, h)
	cacheSize := opts.L2CacheSize
	if cacheSize <= 0 || cacheSize > maxL2Cache {
		cacheSize = maxL2Cache
	}
	slices := (h.Clusters(h.Size) + 1<<c.sliceBits - 1) >> c.sliceBits
	defer func() {
		if err != nil {
			err = errors.Join(err, c.release())
		}
	}()
	if c.l2, err = newL2Cache(c.sliceBits, slices, cacheSize); err != nil {
		return c, nil, err
	}
	c.maxDirty = min(1024, int64(len(c.l2.tags)))
	if err := c.loadL1(ctx, im.file); err != nil {
		return c, nil, err
	}
	if !writable {
		return c, info, nil
	}
	refCache := opts.RefcountCacheSize
	if refCache <= 0 {
		refCache = defaultRefcountCache
	}
	c.refs = newRefcounts(im.file, h, refCache)
	c.refs.dirty, c.refs.fixed, c.refs.tables, c.refs.corrupted = &im.dirty, c.fixed, c.tables, im.corrupted
	if err := c.loadRefcountTable(ctx, im.file); err != nil {
		return c, nil, err
	}
	return c, info, c.guardMetadata(ctx, im.file)
}

// inspect describes the image as far as it can.
func (im *image) inspect(ctx context.Context, h *Header) *Info {
	info, err := Inspect(ctx, im.file, h)
	if err != nil {
		im.log.Warn("qcow2: the image cannot be described in full", "node", im.node.Name(), "error", err)
	}
	return info
}

// become makes c what the node serves. Nothing is in flight.
func (im *image) become(c contents, info *Info) {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.contents = c
	f := &facts{size: c.size, clusterSize: c.clusterSize, backingFile: c.header.BackingFile, backingFormat: c.header.BackingFormat, info: info}
	if c.l2 != nil {
		f.l2Size = c.l2.size()
	}
	im.facts.Store(f)
}

// loadL1 reads the entries of the active L1 table that the disk's size needs.
func (c *contents) loadL1(ctx context.Context, file *block.Edge) (err error) {
	n := c.header.L1Needed(c.size)
	if c.l1, err = newWordArray(int(n)); err != nil {
		return err
	}
	err = readTable(ctx, file, c.header.L1Offset, n, func(i int64, entry uint64) { c.l1.w[i].Store(entry) })
	if err != nil {
		return fmt.Errorf("read L1 table: %w", err)
	}
	return nil
}

func (c *contents) loadRefcountTable(ctx context.Context, file *block.Edge) error {
	n := c.header.RefcountTableEntries()
	c.refs.table = make([]uint64, n)
	file.Debug(block.EventReftableLoad)
	// Past the end of the file the table is empty.
	there := min(n, max(0, file.Size()-c.header.RefcountTableOffset)/8)
	err := readTable(ctx, file, c.header.RefcountTableOffset, there, func(i int64, entry uint64) { c.refs.table[i] = entry })
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
func (c *contents) guardMetadata(ctx context.Context, file *block.Edge) error {
	h := c.header
	var err error
	table := func(what string, off, n int64) {
		first, n := off>>c.clusterBits, h.Clusters(n)
		if err != nil || n == 0 || c.fixed.live >= maxGuarded {
			return
		}
		if c.fixed.overlaps(first, n) >= 0 {
			err = corrupt("%s at 0x%x overlaps other metadata; use 'qemu-img check -r all' on a copy", what, off)
			return
		}
		c.fixed.add(first, n)
	}
	table("header", 0, c.clusterSize)
	table("L1 table", h.L1Offset, int64(h.L1Size)*8)
	table("refcount table", h.RefcountTableOffset, int64(h.RefcountTableClusters)<<c.clusterBits)
	for _, entry := range c.refs.table {
		if off := int64(entry & offsetMask); off != 0 {
			table("refcount block", off, c.clusterSize)
		}
	}
	snapshots, length, e := readSnapshots(ctx, file, h)
	if e != nil {
		return e
	}
	table("snapshot table", h.SnapshotsOffset, length)
	for i := range snapshots {
		if err := snapshots[i].Validate(h, file.Size()); err != nil {
			return err
		}
		table("L1 table of a snapshot", int64(snapshots[i].L1Offset), int64(snapshots[i].L1Size)*8)
	}
	if err != nil {
		return err
	}
	for i := range c.l1.w {
		if off := L1Entry(c.l1.w[i].Load()).Offset(); off != 0 {
			c.tables.add(off>>c.clusterBits, 1)
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
	block.BackingFollower
	block.Peeker
	block.Reopener
} = (*image)(nil)
