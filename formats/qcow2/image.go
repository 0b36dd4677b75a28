package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/nbdserve/nbdserve/block"
)

// An image is the instance of a qcow2 node.
//
// Reads, and writes to clusters that are allocated already, take no lock: L1
// entries and cached L2 entries are atomic words. The locks are, in their order:
//
//	flushMu   one writer of metadata at a time (flush.go)
//	mu        everything below it: the tables' changes, the allocator, what is in
//	          flight. It is not held while guest data is read or written, nor while
//	          L2 slices are read or dirty metadata is written; it is held while
//	          refcount blocks are read and while a new table is zeroed or copied.
//	pauseMu   whether background work may run (limbo.go)
//
// decompressed.mu is on its own.
type image struct {
	// Constant after open.
	node   *block.Node
	log    *slog.Logger
	file   *block.Edge
	host   Host
	broken orderingRule

	contents                       // changes only with nothing in flight
	facts    atomic.Pointer[facts] // what is told of contents at any time
	fatal    atomic.Pointer[error] // what every request returns: fatal corruption was found, or the node is inactive
	dirty    atomic.Int64          // metadata items changed or being written

	hits, misses, allocations block.Counter

	flushMu   sync.Mutex
	begun     atomic.Int64 // rounds of writing metadata begun; changed under flushMu
	completed int64        // last round that succeeded; guarded by flushMu

	mu        sync.Mutex
	barrier   bool // L2 changes depend on data or refcounts that were not flushed
	inflight  []*allocation
	allocated sync.Cond // an allocation in flight ended
	limbo     limbo

	reaper reaper
}

// contents is what a node knows of its image while it is active, all of it read from
// the file by [image.load].
type contents struct {
	writable    bool
	header      *Header // but for the refcount table's place, which mu guards
	size        int64
	clusterBits uint
	clusterSize int64
	l2Bits      uint   // log2 of entries in an L2 table
	sliceBits   uint   // log2 of entries in a slice of one
	badBits     uint64 // bits that must not be set in an entry that is not compressed
	maxDirty    int64  // dirty items from which on writers write metadata themselves

	l1           wordArray // active L1 table; written under mu
	l2           *l2Cache
	decompressed *clusterCache

	// fixed knows the metadata of the image but for active L2 tables, which tables knows.
	fixed, tables *guard

	// Guarded by mu.
	refs    *refcounts
	dirtyL1 map[int64]struct{}
	loading map[uint32]chan struct{} // slices being read; closed at the end
}

// release gives the tables' memory back.
func (c *contents) release() error {
	err := c.l1.free()
	if c.l2 != nil {
		err = errors.Join(err, c.l2.entries.free())
	}
	return err
}

// facts are what callers may ask for at any time. They are never changed.
type facts struct {
	size, clusterSize          int64
	l2Size                     int64 // of the cache
	backingFile, backingFormat string
	info                       *Info
}

// backing is what clusters that are not allocated are read from, nil for zeroes.
func (im *image) backing() *block.Edge { return im.node.Backing() }

func (im *image) Size() int64 { return im.facts.Load().size }

func (im *image) Limits() block.Limits {
	file, clusterSize := im.file.Limits(), im.facts.Load().clusterSize
	l := block.Limits{
		RequestAlignment:  1,
		MemAlignment:      file.MemAlignment,
		PreferredTransfer: clusterSize,
		DiscardAlignment:  clusterSize,
		ZeroAlignment:     clusterSize,
		WriteFlags:        block.FUA,
		ZeroFlags:         block.FUA | block.MayUnmap | block.NoFallback,
		LogicalBlockSize:  file.LogicalBlockSize,
		PhysicalBlockSize: file.PhysicalBlockSize,
		Rotational:        file.Rotational,
	}
	return l
}

// Inspect implements [block.Inspector].
func (im *image) Inspect() any { return im.facts.Load().info }

// Measurements implements [block.Measurer].
func (im *image) Measurements() []block.Measurement {
	counter := func(name, help string, c *block.Counter) block.Measurement {
		return block.Measurement{Name: name, Help: help, Value: float64(c.Load()), Counter: true}
	}
	gauge := func(name, help string, v int64) block.Measurement {
		return block.Measurement{Name: name, Help: help, Value: float64(v)}
	}
	im.mu.Lock()
	limbo := im.limbo.clusters << im.clusterBits
	im.mu.Unlock()
	return []block.Measurement{
		counter("l2_cache_hits_total", "Lookups of clusters that the L2 cache answered.", &im.hits),
		counter("l2_cache_misses_total", "Lookups of clusters that had to read an L2 table.", &im.misses),
		counter("allocations_total", "Host clusters allocated.", &im.allocations),
		gauge("l2_cache_bytes", "Size of the L2 cache.", im.facts.Load().l2Size),
		gauge("metadata_dirty", "Pieces of metadata that are not written yet.", im.dirty.Load()),
		gauge("limbo_bytes", "Freed host clusters that cannot be reused yet.", limbo),
	}
}

// failed returns why the node serves no requests, if it does not.
func (im *image) failed() error {
	if e := im.fatal.Load(); e != nil {
		return *e
	}
	return nil
}

// corrupted reports invalid metadata. A writable image is marked as corrupt and
// answers every later request with an error (rule R7); one that is only read goes
// on (R14). It returns err as an error that wraps [block.ErrCorrupt]. It may be
// called with im.mu held.
func (im *image) corrupted(err error) error {
	if !errors.Is(err, block.ErrCorrupt) {
		err = fmt.Errorf("%w: %w", block.ErrCorrupt, err)
	}
	if !im.writable {
		return err
	}
	all := fmt.Errorf("fatal corruption was found, the node is disabled: %w", err)
	if !im.fatal.CompareAndSwap(nil, &all) {
		return err
	}
	im.log.Error("qcow2: Marking image as corrupt; further corruption events will be suppressed", "node", im.node.Name(), "error", err)
	if im.header.Version >= 3 {
		var b [8]byte
		binary.BigEndian.PutUint64(b[:], im.header.Incompatible|IncompatCorrupt)
		werr := im.file.WriteAt(context.Background(), b[:], incompatibleOffset, block.FUA)
		if werr != nil {
			im.log.Error("qcow2: the image could not be marked as corrupt", "node", im.node.Name(), "error", werr)
		}
	}
	return err
}

// Close writes what is cached, frees what is in limbo and stops the background work.
func (im *image) Close(ctx context.Context) error {
	var err error
	if im.writable {
		im.stopReaper()
		if im.failed() == nil {
			err = im.finish(ctx)
		}
	}
	return errors.Join(err, im.release())
}

// finish brings the file to rest. Nothing is in flight.
func (im *image) finish(ctx context.Context) error {
	err := im.flushMetadata(ctx)
	if err != nil {
		return err
	}
	for b := im.nextBatch(); b != nil; b = im.nextBatch() {
		err = errors.Join(err, im.reclaim(ctx, b))
	}
	return errors.Join(err, im.flushMetadata(ctx))
}
