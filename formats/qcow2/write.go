package qcow2

import (
	"context"
	"slices"

	"github.com/nbdserve/nbdserve/block"
)

// mergeLimit is how much of guest data and what is copied around it is joined to
// one write of the file, in bytes.
const mergeLimit = 256 << 10

// A wish says what an allocation is for.
type wish uint8

const (
	wantData    wish = iota // to be written
	wantZeroes              // to read as zero, whatever is there
	wantReserve             // reads as zero already; to be provisioned
)

// An allocation is a run of guest clusters that get host clusters, while their
// data is being written. Other requests that would change these clusters wait
// until it has ended (rule R6).
type allocation struct {
	first, n   int64 // guest clusters
	host       int64 // bytes
	reused     bool  // the host clusters were there already, in reserve
	fresh      bool  // the host clusters read as zero: nothing was ever there
	head, tail bool  // the first and the last cluster read as zero now
	ended      bool
}

// WriteAt implements [block.Instance].
func (im *image) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	for len(p) > 0 {
		if err := im.failed(); err != nil {
			return err
		}
		m, err := im.mapAt(ctx, off, int64(len(p)))
		if err != nil {
			return err
		}
		n := m.length
		if m.kind == ClusterData && m.copied {
			if err = im.mayWrite(m.host, n); err == nil {
				im.file.Debug(block.EventWriteAIO)
				err = im.file.WriteAt(ctx, p[:n], m.host, flags&block.FUA)
			}
		} else {
			n, err = im.writeNew(ctx, p, off)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	if flags&block.FUA != 0 && im.dirty.Load() != 0 {
		return im.flushMetadata(ctx)
	}
	return nil
}

// mayWrite refuses to write guest data over metadata or at a place that was never allocated (rule R7).
func (im *image) mayWrite(host, n int64) error {
	first := host >> im.clusterBits
	count := (host+n-1)>>im.clusterBits - first + 1
	for _, g := range []*guard{im.fixed, im.tables} {
		if c := g.overlaps(first, count); c >= 0 {
			return im.corrupted(corrupt("Preventing invalid write on metadata: a guest cluster is mapped to host offset 0x%x", c<<im.clusterBits))
		}
	}
	if first<<im.clusterBits >= im.refs.end.Load() {
		return im.corrupted(corrupt("a guest cluster is mapped to host offset 0x%x, past the end of the file", host))
	}
	return nil
}

// writeNew writes the start of p where it cannot be written in place, as far as
// that is one allocation, and returns the number of bytes, which is 0 if the first
// cluster can be written in place by now.
func (im *image) writeNew(ctx context.Context, p []byte, off int64) (int64, error) {
	if im.dirty.Load() >= im.maxDirty {
		if err := im.flushMetadata(ctx); err != nil {
			return 0, err
		}
	}
	first := off >> im.clusterBits
	last := (off + int64(len(p)) - 1) >> im.clusterBits
	a, err := im.allocate(ctx, first, last-first+1, wantData)
	if a == nil || err != nil {
		return 0, err
	}
	n := min(int64(len(p)), (a.first+a.n)<<im.clusterBits-off)
	if im.broken&ruleDataFirst != 0 {
		if err := im.link(ctx, a, false); err != nil {
			return 0, err
		}
		return n, im.fill(ctx, a, p[:n], off)
	}
	err = im.fill(ctx, a, p[:n], off)
	if err == nil {
		err = im.link(ctx, a, false)
	}
	if err != nil {
		im.abandon(ctx, a)
	}
	return n, err
}

// needsCluster tells whether a guest cluster has no host cluster of its own.
func needsCluster(kind ClusterKind, copied bool) bool {
	return !copied || kind != ClusterData && kind != ClusterZeroAlloc
}

// allocate begins an allocation for up to n guest clusters from first on. It
// returns nil if the first does not need one: it can be written in place, or, where
// zeroes are wanted, has a host cluster of its own, or does not read as zero any more.
//
// All clusters of an allocation lie in one slice, and their host clusters are adjacent.
func (im *image) allocate(ctx context.Context, first, n int64, want wish) (*allocation, error) {
	slice := uint32(first >> im.sliceBits)
	n = min(n, (int64(slice)+1)<<im.sliceBits-first)
	var a *allocation
	err := im.update(ctx, func() error {
		if err := im.ownTable(ctx, first>>im.l2Bits); err != nil {
			return err
		}
		slot, err := im.loadSlice(ctx, slice)
		if err != nil {
			return err
		}
		if im.wait(first, 1) {
			return errRetry
		}
		n := im.freeUntil(first, n)
		a, err = im.begin(ctx, slot, first, n, want)
		return err
	})
	return a, err
}

// begin decides what the run at first needs, and takes host clusters for it. im.mu is held.
func (im *image) begin(ctx context.Context, slot int, first, n int64, want wish) (*allocation, error) {
	entries := im.l2.slice(slot)
	at := func(i int64) (ClusterKind, int64, bool) {
		e := entries[(first+i)&int64(len(entries)-1)].Load()
		kind, host := im.decode(e)
		return kind, host, e&entryCopied != 0
	}
	a := &allocation{first: first, n: 1}
	kind, host, copied := at(0)
	switch {
	case want == wantReserve && !im.readsZero(first, kind):
		return nil, nil
	case needsCluster(kind, copied):
		for ; a.n < n; a.n++ {
			k, _, c := at(a.n)
			if !needsCluster(k, c) || want == wantReserve && !im.readsZero(first+a.n, k) {
				break
			}
		}
		e, fresh, err := im.refs.alloc(ctx, a.n)
		if err != nil {
			return nil, err
		}
		a.n, a.host, a.fresh = e.n, e.first<<im.clusterBits, fresh
		im.allocations.Add(block.ShardOf(ctx), e.n)
	case kind == ClusterZeroAlloc && want == wantData:
		for ; a.n < n; a.n++ {
			if k, h, c := at(a.n); k != kind || !c || h != host+a.n<<im.clusterBits {
				break
			}
		}
		if err := im.mayWrite(host, a.n<<im.clusterBits); err != nil {
			return nil, err
		}
		a.host, a.reused = host, true
	default:
		return nil, nil
	}
	a.head = im.readsZero(first, kind)
	kind, _, _ = at(a.n - 1)
	a.tail = im.readsZero(first+a.n-1, kind)
	im.inflight = append(im.inflight, a)
	return a, nil
}

// readsZero tells whether a guest cluster certainly reads as zero.
func (im *image) readsZero(cluster int64, kind ClusterKind) bool {
	switch kind {
	case ClusterZero, ClusterZeroAlloc:
		return true
	case ClusterUnallocated:
		return im.backingEnds(cluster << im.clusterBits)
	}
	return false
}

// wait waits for an allocation in flight among n clusters from first on, and tells
// whether it did; then all that was looked up before is stale. im.mu is held, and
// released meanwhile.
func (im *image) wait(first, n int64) bool {
	if im.broken&ruleWaitAllocation != 0 {
		return false
	}
	for _, a := range im.inflight {
		if a.first < first+n && first < a.first+a.n {
			for !a.ended {
				im.allocated.Wait()
			}
			return true
		}
	}
	return false
}

// freeUntil cuts a run of clusters at the next allocation in flight. im.mu is held.
func (im *image) freeUntil(first, n int64) int64 {
	for _, a := range im.inflight {
		if a.first > first && a.first < first+n {
			n = a.first - first
		}
	}
	return n
}

// end takes an allocation off the list and wakes those that wait for it. im.mu is held.
func (im *image) end(a *allocation) {
	a.ended = true
	im.inflight = slices.DeleteFunc(im.inflight, func(o *allocation) bool { return o == a })
	im.allocated.Broadcast()
}

// abandon ends an allocation whose data could not be written.
func (im *image) abandon(ctx context.Context, a *allocation) {
	im.mu.Lock()
	defer im.mu.Unlock()
	if !a.reused {
		im.refs.unalloc(ctx, extent{a.host >> im.clusterBits, a.n})
	}
	im.end(a)
}

// link makes the guest clusters of an allocation refer to their new host clusters, and ends it.
func (im *image) link(ctx context.Context, a *allocation, zero bool) error {
	return im.update(ctx, func() error {
		slot, err := im.loadSlice(ctx, uint32(a.first>>im.sliceBits))
		if err != nil {
			return err
		}
		entries := im.l2.slice(slot)
		for i := range a.n {
			at := (a.first + i) & int64(len(entries)-1)
			entry := MakeL2Entry(a.host+i<<im.clusterBits, true)
			if zero {
				entry = entry.Zero()
			}
			if !a.reused {
				im.freeEntry(entries[at].Load())
			}
			im.setEntry(slot, at, uint64(entry))
		}
		im.barrier = true
		im.end(a)
		return nil
	})
}

// freeEntry gives up the reference that an L2 entry holds. im.mu is held.
func (im *image) freeEntry(entry uint64) {
	kind, host := im.decode(entry)
	switch kind {
	case ClusterData, ClusterZeroAlloc:
		im.free(extent{host >> im.clusterBits, 1})
	case ClusterCompressed:
		off, n := L2Entry(entry).CompressedRange(im.header.ClusterBits)
		first := off >> im.clusterBits
		im.free(extent{first, (off+n-1)>>im.clusterBits - first + 1})
	}
}

// fill writes p, which is at guest offset off, to the host clusters of an
// allocation, and around it what the first and the last cluster hold now.
func (im *image) fill(ctx context.Context, a *allocation, p []byte, off int64) error {
	start, end := a.first<<im.clusterBits, (a.first+a.n)<<im.clusterBits
	headLen, tailLen := off-start, end-off-int64(len(p))
	host := a.host
	if headLen == 0 && tailLen == 0 {
		im.file.Debug(block.EventWriteAIO)
		return im.file.WriteAt(ctx, p, host, 0)
	}
	zeroHost := a.fresh
	if !zeroHost && (a.head || a.tail) {
		var err error
		if zeroHost, err = im.hostReadsZero(ctx, host, end-start); err != nil {
			return err
		}
	}
	if a.head && zeroHost {
		host, headLen = host+headLen, 0
	}
	if a.tail && zeroHost {
		tailLen = 0
	}
	if total := headLen + int64(len(p)) + tailLen; total <= mergeLimit {
		buf := block.GetBuffer(int(total))
		defer block.PutBuffer(buf)
		if err := im.readOld(ctx, buf[:headLen], off-headLen); err != nil {
			return err
		}
		copy(buf[headLen:], p)
		if err := im.readOld(ctx, buf[headLen+int64(len(p)):], off+int64(len(p))); err != nil {
			return err
		}
		im.file.Debug(block.EventWriteAIO)
		return im.file.WriteAt(ctx, buf, host, 0)
	}
	if err := im.copyOld(ctx, off-headLen, headLen, host, a.head); err != nil {
		return err
	}
	im.file.Debug(block.EventWriteAIO)
	if err := im.file.WriteAt(ctx, p, host+headLen, 0); err != nil {
		return err
	}
	return im.copyOld(ctx, off+int64(len(p)), tailLen, host+headLen+int64(len(p)), a.tail)
}

// readOld reads guest data that is about to be copied; past the end of the disk there are zeroes.
func (im *image) readOld(ctx context.Context, p []byte, off int64) error {
	there := min(int64(len(p)), max(0, im.size-off))
	clear(p[there:])
	if there > 0 {
		im.file.Debug(block.EventCowRead)
	}
	return im.ReadAt(ctx, p[:there], off)
}

// copyOld copies n bytes of guest data from off on to the host offset host.
func (im *image) copyOld(ctx context.Context, off, n, host int64, zero bool) error {
	if n == 0 {
		return nil
	}
	if zero {
		return im.file.WriteZeroes(ctx, host, n, 0)
	}
	buf := block.GetBuffer(int(min(n, mergeLimit)))
	defer block.PutBuffer(buf)
	for n > 0 {
		part := buf[:min(n, int64(len(buf)))]
		if err := im.readOld(ctx, part, off); err != nil {
			return err
		}
		im.file.Debug(block.EventCowWrite)
		if err := im.file.WriteAt(ctx, part, host, 0); err != nil {
			return err
		}
		off, host, n = off+int64(len(part)), host+int64(len(part)), n-int64(len(part))
	}
	return nil
}

// hostReadsZero tells whether a range of the file is known to read as zero.
func (im *image) hostReadsZero(ctx context.Context, off, n int64) (bool, error) {
	n = min(n, im.file.Size()-off)
	if n <= 0 {
		return true, nil
	}
	x, err := im.file.BlockStatus(ctx, off, n, true)
	return err == nil && x.Flags&block.StatusZero != 0 && x.Length == n, err
}
