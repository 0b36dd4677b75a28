package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"

	"github.com/nbdserve/nbdserve/block"
)

// CheckResult is what [Check] found.
type CheckResult = block.CheckResult

// Check counts the references to every cluster of an image and compares them with
// its refcounts. It writes nothing. The image must not change meanwhile. Time
// follows the size of the metadata, memory is a bit to eight bytes for each
// cluster in use.
//
// Report, if not nil, is called with a line for each finding. What cannot be read
// counts as a check error; only the end of ctx is returned as an error, with what
// was found until then.
func Check(ctx context.Context, r Reader, h *Header, report func(line string)) (*CheckResult, error) {
	c := newChecker(ctx, r, h, report)
	err := c.run()
	return &c.res, err
}

// A checker recounts the references of an image. L2 tables are read once, however
// many L1 entries point to one; what is found in a table counts as often as it is
// pointed to.
type checker struct {
	ctx    context.Context
	r      Reader
	h      *Header
	report func(string) // or nil
	size   int64        // of the file, bytes
	end    int64        // of the file, clusters

	table  []uint64  // the refcount table; 0 for entries that are not usable
	disk   *countMap // refcounts as stored, of clusters inside the file and one more
	truth  *countMap // references counted
	active *countMap // references to L2 tables by the active L1 table
	shared *countMap // references to L2 tables by snapshots

	tableBytes int64 // of L1 tables and bitmap tables seen, to notice overlapping ones
	mismatches int64 // corruptions that are too low refcounts, or COPIED flags: not structural
	buf        []byte
	res        CheckResult
}

func newChecker(ctx context.Context, r Reader, h *Header, report func(string)) *checker {
	size := r.Size()
	return &checker{
		ctx: ctx, r: r, h: h, report: report, size: size, end: h.Clusters(size),
		disk: newCountMap(), truth: newCountMap(), active: newCountMap(), shared: newCountMap(),
		buf: make([]byte, max(h.ClusterSize(), tableReaderBuf)),
		res: CheckResult{TotalClusters: h.Clusters(h.Size)},
	}
}

// run does the whole check. Its error is that of the context.
func (c *checker) run() error {
	for _, step := range []func(){
		c.loadRefcounts, c.countHeader, c.countL1s, c.countL2s, c.countBitmaps, c.countRefcountStructures, c.compare,
	} {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		step()
	}
	return c.ctx.Err()
}

// corruptf counts a corruption of the structure.
func (c *checker) corruptf(weight uint64, format string, args ...any) {
	c.res.Corruptions += int64(min(weight, math.MaxInt32))
	c.reportf("ERROR "+format, args...)
}

// failf counts something that could not be checked.
func (c *checker) failf(format string, args ...any) {
	c.res.CheckErrors++
	c.reportf("ERROR "+format, args...)
}

func (c *checker) reportf(format string, args ...any) {
	if c.report != nil {
		c.report(fmt.Sprintf(format, args...))
	}
}

// read fills p from the file, with zeroes past its end and where it is known to
// be a hole. It tells whether there is anything but zeroes to expect.
func (c *checker) read(p []byte, off int64) (bool, error) {
	clear(p)
	n := min(int64(len(p)), c.size-off)
	if n <= 0 {
		return false, nil
	}
	if s, ok := c.r.(interface {
		BlockStatus(ctx context.Context, off, n int64, precise bool) (block.Extent, error)
	}); ok && n >= tableReaderBuf {
		e, err := s.BlockStatus(c.ctx, off, n, true)
		if err == nil && e.Flags&block.StatusZero != 0 && e.Length >= n {
			return false, nil
		}
	}
	return true, c.r.ReadAt(c.ctx, p[:n], off)
}

// count adds weight references to the clusters that [off, off+n) touches. A range
// may end in a last cluster that the file holds in part; further out is corrupt.
func (c *checker) count(off, n int64, weight uint64, what string) {
	if n <= 0 {
		return
	}
	if off < 0 || n > math.MaxInt64-off || off+n-c.size >= c.h.ClusterSize() {
		c.corruptf(weight, "%s at 0x%x, %d bytes, lies past the end of the file of %d bytes", what, uint64(off), n, c.size)
		return
	}
	most := RefcountMax(c.h.RefcountOrder)
	for i := off >> c.h.ClusterBits; i <= (off+n-1)>>c.h.ClusterBits; i++ {
		now := c.truth.get(i)
		if weight > most-now {
			c.corruptf(weight-(most-now), "overflow cluster offset=0x%x: more references than refcounts of %d bits can count; use 'qemu-img convert' to make a clean copy", i<<c.h.ClusterBits, 1<<c.h.RefcountOrder)
			c.truth.set(i, most)
			continue
		}
		c.truth.set(i, now+weight)
	}
}

// loadRefcounts reads the refcount table and the refcounts of the file's clusters.
func (c *checker) loadRefcounts() {
	h := c.h
	raw := make([]byte, h.RefcountTableEntries()*8)
	if _, err := c.read(raw, h.RefcountTableOffset); err != nil {
		c.failf("refcount table at 0x%x: %v", h.RefcountTableOffset, err)
		return
	}
	c.table = make([]uint64, h.RefcountTableEntries())
	seen := newCountMap()
	for i := range c.table {
		c.table[i] = binary.BigEndian.Uint64(raw[i*8:])
		off, ok := c.refcountBlock(i)
		first := int64(i) * h.RefcountBlockEntries()
		if !ok || off == 0 || first > c.end || seen.get(off>>h.ClusterBits) != 0 {
			continue
		}
		seen.set(off>>h.ClusterBits, 1)
		block := c.buf[:h.ClusterSize()]
		data, err := c.read(block, off)
		if err != nil {
			c.failf("refcount block %d at 0x%x: %v", i, off, err)
		} else if data {
			c.loadBlock(block, first)
		}
		if c.ctx.Err() != nil {
			return
		}
	}
}

// loadBlock takes over the refcounts of clusters from first on.
func (c *checker) loadBlock(block []byte, first int64) {
	perWord := int64(64) >> c.h.RefcountOrder
	n := min(c.h.RefcountBlockEntries(), c.end+1-first)
	for at := int64(0); at < n; at += perWord {
		if binary.NativeEndian.Uint64(block[at/perWord*8:]) == 0 {
			continue
		}
		for i := at; i < min(at+perWord, n); i++ {
			c.disk.set(first+i, RefcountGet(block, c.h.RefcountOrder, i))
		}
	}
}

// refcountBlock gives the offset of refcount block i, 0 for none; false if the entry is not usable.
func (c *checker) refcountBlock(i int) (int64, bool) {
	e := c.table[i]
	if e&(uint64(c.h.ClusterSize())-1) != 0 || e > math.MaxInt64 || int64(e)>>c.h.ClusterBits >= c.end {
		return 0, false
	}
	return int64(e), true
}

func (c *checker) countHeader() {
	c.count(0, c.h.ClusterSize(), 1, "header")
	if x := c.h.Crypto(); x != nil && c.h.CryptMethod == CryptLUKS {
		if x.Length > 1<<30 || x.Offset > math.MaxInt64 || x.Offset&uint64(c.h.ClusterSize()-1) != 0 {
			c.corruptf(1, "LUKS header of %d bytes at 0x%x: offset or length invalid", x.Length, x.Offset)
			return
		}
		c.count(int64(x.Offset), int64(x.Length), 1, "LUKS header")
	}
}

// countL1s counts the L1 tables and the L2 tables that they point to.
func (c *checker) countL1s() {
	h := c.h
	c.countL1(h.L1Offset, h.L1Size, c.active, true)
	snapshots, tableLen, err := readSnapshots(c.ctx, c.r, h)
	if err != nil {
		c.failf("%v", err)
	}
	c.count(h.SnapshotsOffset, tableLen, 1, "snapshot table")
	for i := range snapshots {
		s := &snapshots[i]
		if c.ctx.Err() != nil {
			return
		}
		switch bytes := int64(s.L1Size) * 8; {
		case s.L1Offset > math.MaxInt64 || s.L1Offset&uint64(h.ClusterSize()-1) != 0:
			c.corruptf(1, "snapshot %s (%s) l1_offset=0x%x: L1 table is not cluster aligned; snapshot table entry corrupted", s.ID, s.Name, s.L1Offset)
		case bytes > MaxL1Bytes:
			c.corruptf(1, "snapshot %s (%s) l1_size=%d: L1 table is too large; snapshot table entry corrupted", s.ID, s.Name, s.L1Size)
		case bytes > c.size-c.tableBytes:
			c.corruptf(1, "snapshot %s (%s): the L1 tables of the snapshots hold more than the file; they overlap", s.ID, s.Name)
		default:
			c.tableBytes += bytes
			c.countL1(int64(s.L1Offset), s.L1Size, c.shared, false)
		}
	}
}

func (c *checker) countL1(off int64, entries uint32, refs *countMap, active bool) {
	c.count(off, int64(entries)*8, 1, "L1 table")
	c.eachEntry(off, int64(entries), "L1 table", func(i int64, v uint64) {
		e := L1Entry(v)
		if v&l1Reserved != 0 {
			c.corruptf(1, "found L1 entry with reserved bits set: 0x%016x", v)
		}
		l2 := e.Offset()
		if l2 == 0 {
			return
		}
		c.count(l2, c.h.ClusterSize(), 1, "L2 table")
		if l2&(c.h.ClusterSize()-1) != 0 {
			c.corruptf(1, "l2_offset=0x%x: Table is not cluster aligned; L1 entry corrupted", l2)
			return
		}
		if active {
			c.checkCopied(l2, e.Copied(), 1, func() string {
				return fmt.Sprintf("OFLAG_COPIED L2 cluster: l1_index=%d l1_entry=0x%016x", i, v)
			})
		}
		if l2 < c.size {
			cluster := l2 >> c.h.ClusterBits
			refs.set(cluster, refs.get(cluster)+1)
		}
	})
}

// checkCopied compares a COPIED flag with the refcount that is stored.
func (c *checker) checkCopied(off int64, copied bool, weight uint64, what func() string) {
	if refcount := c.disk.get(off >> c.h.ClusterBits); copied != (refcount == 1) {
		c.mismatches += int64(weight)
		c.corruptf(weight, "%s refcount=%d", what(), refcount)
	}
}

// eachEntry reads a table of 64-bit entries and calls f with each that is not zero.
func (c *checker) eachEntry(off, entries int64, what string, f func(i int64, v uint64)) {
	buf := make([]byte, min(entries*8, tableReaderBuf))
	for at := int64(0); at < entries*8; at += tableReaderBuf {
		if c.ctx.Err() != nil {
			return
		}
		part := buf[:min(entries*8-at, tableReaderBuf)]
		data, err := c.read(part, off+at)
		if err != nil {
			c.failf("%s at 0x%x: %v", what, off, err)
			return
		}
		if !data {
			continue
		}
		for i := 0; i < len(part); i += 8 {
			if v := binary.BigEndian.Uint64(part[i:]); v != 0 {
				f((at+int64(i))/8, v)
			}
		}
	}
}

// countL2s counts what the L2 tables point to.
func (c *checker) countL2s() {
	eachCounted(func(cluster int64) bool {
		table := c.buf[:c.h.ClusterSize()]
		off := cluster << c.h.ClusterBits
		if data, err := c.read(table, off); err != nil {
			c.failf("L2 table at 0x%x: %v", off, err)
		} else if data {
			c.countL2(table, c.active.get(cluster), c.shared.get(cluster))
		}
		return c.ctx.Err() == nil
	}, c.active, c.shared)
}

// countL2 counts the references of one L2 table, which as many L1 entries of the
// active table and of snapshots point to.
func (c *checker) countL2(table []byte, active, shared uint64) {
	h, weight := c.h, active+shared
	step := int(h.L2EntrySize())
	external := h.Incompatible&IncompatDataFile != 0
	next := int64(0) // where a cluster would follow the one before it
	for i := 0; i < len(table); i += step {
		v := binary.BigEndian.Uint64(table[i:])
		if v == 0 {
			continue
		}
		e := L2Entry(v)
		if e.Compressed() {
			off, n := e.CompressedRange(h.ClusterBits)
			if e.Copied() {
				c.corruptf(weight, "coffset=0x%x: copied flag must never be set for compressed clusters", off)
			}
			if external {
				c.corruptf(weight, "coffset=0x%x: compressed cluster in an image with an external data file", off)
				continue
			}
			c.count(off, n, weight, "compressed cluster")
			c.res.AllocatedClusters += int64(active)
			c.res.CompressedClusters += int64(active)
			c.res.FragmentedClusters += int64(active) // by nature
			continue
		}
		if v&l2ReservedBits(h) != 0 {
			c.corruptf(weight, "found l2 entry with reserved bits set: 0x%016x", v)
		}
		off := e.Offset()
		if off == 0 {
			continue
		}
		c.res.AllocatedClusters += int64(active)
		if next != 0 && off != next {
			c.res.FragmentedClusters += int64(active)
		}
		next = off + h.ClusterSize()
		if off&(h.ClusterSize()-1) != 0 {
			c.corruptf(weight, "offset=0x%x: Cluster is not properly aligned; L2 entry corrupted", off)
		}
		if external {
			continue
		}
		c.count(off, h.ClusterSize(), weight, "cluster")
		if active > 0 {
			c.checkCopied(off, e.Copied(), active, func() string {
				return fmt.Sprintf("OFLAG_COPIED data cluster: l2_entry=0x%016x", v)
			})
		}
	}
}

// countBitmaps counts the directory, the tables and the data of persistent bitmaps.
func (c *checker) countBitmaps() {
	ext := c.h.Bitmaps()
	if ext == nil {
		return
	}
	bitmaps, err := readBitmapDirectory(c.ctx, c.r, c.h)
	if err != nil {
		c.corruptf(1, "%v", err)
		if len(bitmaps) == 0 {
			return
		}
	}
	c.count(int64(ext.DirectoryOffset), int64(ext.DirectorySize), 1, "bitmap directory")
	for _, b := range bitmaps {
		if c.ctx.Err() != nil {
			return
		}
		bytes := int64(b.tableSize) * 8
		if b.tableOffset > math.MaxInt64 || b.tableOffset&uint64(c.h.ClusterSize()-1) != 0 || bytes > c.size-c.tableBytes {
			c.corruptf(1, "bitmap %q: table of %d entries at 0x%x: offset or size invalid", b.name, b.tableSize, b.tableOffset)
			continue
		}
		c.tableBytes += bytes
		c.count(int64(b.tableOffset), bytes, 1, "bitmap table")
		c.eachEntry(int64(b.tableOffset), int64(b.tableSize), "bitmap table", func(_ int64, v uint64) {
			off := int64(v & offsetMask)
			if v&bitmapTableReserved != 0 || off != 0 && (v&1 != 0 || off&(c.h.ClusterSize()-1) != 0) {
				c.corruptf(1, "bitmap %q: table entry 0x%016x is invalid", b.name, v)
				return
			}
			if off != 0 {
				c.count(off, c.h.ClusterSize(), 1, "bitmap data")
			}
		})
	}
}

// countRefcountStructures counts the refcount table and its blocks. It comes last,
// so that a block that is something else too is noticed.
func (c *checker) countRefcountStructures() {
	h := c.h
	c.count(h.RefcountTableOffset, int64(len(c.table))*8, 1, "refcount table")
	for i, v := range c.table {
		off, ok := c.refcountBlock(i)
		switch {
		case !ok && v&511 != 0:
			c.corruptf(1, "refcount table entry %d has reserved bits set", i)
		case !ok && v&uint64(h.ClusterSize()-1) != 0:
			c.corruptf(1, "refcount block %d is not cluster aligned; refcount table entry corrupted", i)
		case !ok:
			c.corruptf(1, "refcount block %d is outside image", i)
		case off != 0:
			c.count(off, h.ClusterSize(), 1, "refcount block")
			if n := c.truth.get(off >> h.ClusterBits); n != 1 {
				c.corruptf(1, "refcount block %d refcount=%d", i, n)
			}
		}
	}
}

// compare sets what was counted against what is stored.
func (c *checker) compare() {
	last := int64(0)
	eachCounted(func(cluster int64) bool {
		stored, counted := c.disk.get(cluster), c.truth.get(cluster)
		if cluster >= c.end && counted == 0 {
			return true // allocated, but never written
		}
		last = cluster
		switch {
		case stored > counted:
			c.res.Leaks++
			c.reportf("Leaked cluster %d refcount=%d reference=%d", cluster, stored, counted)
		case stored < counted:
			c.mismatches++
			c.corruptf(1, "cluster %d refcount=%d reference=%d", cluster, stored, counted)
		}
		return true
	}, c.disk, c.truth)
	c.res.ImageEndOffset = (last + 1) << c.h.ClusterBits
}
