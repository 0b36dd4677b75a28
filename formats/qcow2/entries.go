package qcow2

import "encoding/binary"

const (
	entryCopied     = 1 << 63
	entryCompressed = 1 << 62
	entryZero       = 1
	offsetMask      = 0x00fffffffffffe00
	l1Reserved      = 0x7f000000000001ff
	l2Reserved      = 0x3f000000000001fe

	// snapshotEntryLen is the fixed part of an entry of the snapshot table.
	snapshotEntryLen = 40
)

// An L1Entry points to an L2 table.
type L1Entry uint64

// MakeL1Entry makes the entry for the L2 table at off.
func MakeL1Entry(off int64, copied bool) L1Entry {
	e := L1Entry(off)
	if copied {
		e |= entryCopied
	}
	return e
}

// Offset is where the L2 table lies; 0: there is none.
func (e L1Entry) Offset() int64 { return int64(e & offsetMask) }

// Copied tells that the table's refcount is one. It is accurate in the active L1 table only.
func (e L1Entry) Copied() bool { return e&entryCopied != 0 }

// Check returns an error for reserved bits and for an offset that is not cluster aligned.
func (e L1Entry) Check(h *Header) error {
	if r := uint64(e) & l1Reserved; r != 0 {
		return corrupt("L1 entry 0x%016x has reserved bits 0x%x set", uint64(e), r)
	}
	if e.Offset()&(h.ClusterSize()-1) != 0 {
		return corrupt("L2 table offset 0x%x is not a multiple of the cluster size %d", e.Offset(), h.ClusterSize())
	}
	return nil
}

// A ClusterKind says where the contents of a guest cluster come from.
type ClusterKind uint8

const (
	ClusterUnallocated ClusterKind = iota // the backing file, else zero
	ClusterZero                           // zero, without a host cluster
	ClusterZeroAlloc                      // zero, with a host cluster in reserve
	ClusterData                           // a host cluster
	ClusterCompressed                     // compressed data
)

func (k ClusterKind) String() string {
	return [...]string{"unallocated", "zero", "allocated zero", "data", "compressed"}[k]
}

// An L2Entry (its first 64 bits, where entries are extended) describes a guest cluster.
type L2Entry uint64

// MakeL2Entry makes the entry for the data cluster at off.
func MakeL2Entry(off int64, copied bool) L2Entry { return L2Entry(MakeL1Entry(off, copied)) }

// L2ZeroPlain is the entry for a cluster that reads as zero and has no host cluster (version 3).
const L2ZeroPlain L2Entry = entryZero

// Zero returns the entry that keeps e's host cluster in reserve and reads as zero (version 3). e is not compressed.
func (e L2Entry) Zero() L2Entry { return e | entryZero }

// Copied tells that the cluster's refcount is one, so that it may be written in
// place. It is accurate in active tables only.
func (e L2Entry) Copied() bool { return e&entryCopied != 0 }

// Compressed tells that the cluster is compressed; see [L2Entry.CompressedRange].
func (e L2Entry) Compressed() bool { return e&entryCompressed != 0 }

// Offset is the host cluster's offset of an entry that is not compressed; 0: none.
func (e L2Entry) Offset() int64 { return int64(e & offsetMask) }

// Kind classifies an entry that is not extended. In version 2 bit 0 is reserved; it is taken
// for the zero flag only in version 3.
func (e L2Entry) Kind(version uint32) ClusterKind {
	switch {
	case e&entryCompressed != 0:
		return ClusterCompressed
	case e&entryZero != 0 && version >= 3:
		if e&offsetMask != 0 {
			return ClusterZeroAlloc
		}
		return ClusterZero
	case e&offsetMask != 0:
		return ClusterData
	}
	return ClusterUnallocated
}

// CompressedRange gives the host bytes [off, off+n) that hold a compressed
// cluster, and perhaps the start of the next one: n ends at a multiple of 512.
// off is below 1<<61 and n at most twice the cluster size.
func (e L2Entry) CompressedRange(clusterBits uint32) (off, n int64) {
	x := 62 - (clusterBits - 8)
	off = int64(uint64(e) & (1<<x - 1))
	sectors := int64(uint64(e)&(entryCompressed-1)>>x) + 1
	return off, sectors*512 - off&511
}

// Check returns an error for reserved bits, for an offset that is not cluster
// aligned, and for a compressed cluster that is marked COPIED or lies past
// [MaxHostOffset]. Whether it lies inside the file is the caller's to check.
func (e L2Entry) Check(h *Header) error {
	if e.Compressed() {
		off, n := e.CompressedRange(h.ClusterBits)
		if e.Copied() {
			return corrupt("compressed cluster at 0x%x is marked COPIED", off)
		}
		if off+n > MaxHostOffset {
			return corrupt("compressed cluster at 0x%x lies past 2^56", off)
		}
		return nil
	}
	if r := uint64(e) & l2ReservedBits(h); r != 0 {
		return corrupt("L2 entry 0x%016x has reserved bits 0x%x set", uint64(e), r)
	}
	if e.Offset()&(h.ClusterSize()-1) != 0 {
		return corrupt("cluster offset 0x%x is not a multiple of the cluster size %d", e.Offset(), h.ClusterSize())
	}
	return nil
}

// l2ReservedBits are the bits that must be zero in an entry that is not compressed.
func l2ReservedBits(h *Header) uint64 {
	if h.Version == 2 || h.Incompatible&IncompatExtendedL2 != 0 {
		return l2Reserved | entryZero
	}
	return l2Reserved
}

// RefcountMax is the largest refcount of 1<<order bits.
func RefcountMax(order uint32) uint64 { return ^uint64(0) >> (64 - 1<<order) }

// RefcountGet returns refcount i of a refcount block whose refcounts are 1<<order bits wide.
func RefcountGet(block []byte, order uint32, i int64) uint64 {
	switch order {
	case 3:
		return uint64(block[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(block[i*2:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(block[i*4:]))
	case 6:
		return binary.BigEndian.Uint64(block[i*8:])
	}
	at, shift := subByte(order, i)
	return uint64(block[at]) >> shift & RefcountMax(order)
}

// RefcountSet stores refcount i of a refcount block whose refcounts are 1<<order
// bits wide. v is at most [RefcountMax].
func RefcountSet(block []byte, order uint32, i int64, v uint64) {
	switch order {
	case 3:
		block[i] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(block[i*2:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(block[i*4:], uint32(v))
	case 6:
		binary.BigEndian.PutUint64(block[i*8:], v)
	default:
		at, shift := subByte(order, i)
		mask := byte(RefcountMax(order)) << shift
		block[at] = block[at]&^mask | byte(v)<<shift&mask
	}
}

// subByte places refcount i of fewer than 8 bits: the byte, and the bit in it counted from the lowest.
func subByte(order uint32, i int64) (at int64, shift uint) {
	bit := i << order
	return bit / 8, uint(bit % 8)
}
