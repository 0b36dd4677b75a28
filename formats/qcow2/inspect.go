package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
)

// Info is what is special to qcow2 about an image, in the names of qemu-img info's
// format-specific data. Fields that version 2 does not have are nil there.
type Info struct {
	Compat          string       `json:"compat"` // "0.10" or "1.1"
	DataFile        string       `json:"data-file,omitempty"`
	DataFileRaw     bool         `json:"data-file-raw,omitempty"`
	ExtendedL2      *bool        `json:"extended-l2,omitempty"`
	LazyRefcounts   *bool        `json:"lazy-refcounts,omitempty"`
	Corrupt         *bool        `json:"corrupt,omitempty"`
	RefcountBits    int          `json:"refcount-bits"`
	Encrypt         *EncryptInfo `json:"encrypt,omitempty"`
	Bitmaps         []BitmapInfo `json:"bitmaps,omitempty"`
	CompressionType string       `json:"compression-type"`
}

// EncryptInfo names the method of encryption: "aes" or "luks".
type EncryptInfo struct {
	Format string `json:"format"`
}

// BitmapInfo describes a persistent bitmap.
type BitmapInfo struct {
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"` // bytes
	Flags       []string `json:"flags"`       // "in-use", "auto"
}

// A Snapshot is an internal snapshot. Its contents are what its L1 table leads to.
type Snapshot struct {
	ID, Name    string
	L1Offset    uint64
	L1Size      uint32 // entries
	DateSec     uint32 // since the Epoch
	DateNsec    uint32
	VMClockNsec uint64
	VMStateSize uint64 // bytes; 0: none
	DiskSize    int64  // bytes; the image's size where the entry does not tell
	ICount      int64  // instruction count; -1: none
	// Extra is the entry's extra data beyond the fields above.
	Extra []byte
}

// SnapshotInfo is a snapshot in the names of qemu-img info.
type SnapshotInfo struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	VMStateSize uint64 `json:"vm-state-size"`
	DateSec     uint32 `json:"date-sec"`
	DateNsec    uint32 `json:"date-nsec"`
	VMClockSec  uint64 `json:"vm-clock-sec"`
	VMClockNsec uint64 `json:"vm-clock-nsec"`
	ICount      *int64 `json:"icount,omitempty"`
}

// Info describes s for people and tools.
func (s *Snapshot) Info() SnapshotInfo {
	i := SnapshotInfo{
		ID: s.ID, Name: s.Name, VMStateSize: s.VMStateSize,
		DateSec: s.DateSec, DateNsec: s.DateNsec,
		VMClockSec: s.VMClockNsec / 1e9, VMClockNsec: s.VMClockNsec % 1e9,
	}
	if s.ICount >= 0 {
		i.ICount = &s.ICount
	}
	return i
}

// Validate checks that the snapshot's L1 table is aligned, bounded, covers the
// snapshot's disk, and lies inside a file of fileSize bytes.
func (s *Snapshot) Validate(h *Header, fileSize int64) error {
	if s.L1Offset > math.MaxInt64 {
		return corrupt("snapshot %q (%s): L1 table offset invalid: 0x%x", s.ID, s.Name, s.L1Offset)
	}
	if s.L1Size != 0 {
		if err := h.validateTable("L1 table", "l1_size", int64(s.L1Offset), int64(s.L1Size)*8, MaxL1Bytes, fileSize); err != nil {
			return corrupt("snapshot %q (%s): %v", s.ID, s.Name, err)
		}
	}
	if need := h.L1Needed(s.DiskSize); s.DiskSize < 0 || int64(s.L1Size) < need {
		return corrupt("snapshot %q (%s): L1 table is too small: l1_size is %d, a disk of %d bytes needs %d", s.ID, s.Name, s.L1Size, s.DiskSize, need)
	}
	return nil
}

// Inspect describes an image. It reads the directory of bitmaps; what of it is
// broken is an error that comes with the rest of the description.
func Inspect(ctx context.Context, r Reader, h *Header) (*Info, error) {
	i := &Info{Compat: "0.10", RefcountBits: 1 << h.RefcountOrder, CompressionType: "zlib"}
	if h.CompressionType == CompressionZstd {
		i.CompressionType = "zstd"
	}
	switch h.CryptMethod {
	case CryptAES:
		i.Encrypt = &EncryptInfo{"aes"}
	case CryptLUKS:
		i.Encrypt = &EncryptInfo{"luks"}
	}
	if h.Version < 3 {
		return i, nil
	}
	i.Compat = "1.1"
	i.ExtendedL2 = new(h.Incompatible&IncompatExtendedL2 != 0)
	i.LazyRefcounts = new(h.Compatible&CompatLazyRefcounts != 0)
	i.Corrupt = new(h.Corrupt())
	if h.Incompatible&IncompatDataFile != 0 {
		i.DataFile = h.DataFile()
		i.DataFileRaw = h.Autoclear&AutoclearDataFileRaw != 0
	}
	bitmaps, err := readBitmapDirectory(ctx, r, h)
	for _, b := range bitmaps {
		i.Bitmaps = append(i.Bitmaps, b.info())
	}
	return i, err
}

// ReadSnapshots reads the snapshot table, at most [MaxSnapshotTableBytes] of it.
// The L1 tables are not looked at; see [Snapshot.Validate]. Errors wrap
// [block.ErrCorrupt] or are what r returned.
func ReadSnapshots(ctx context.Context, r Reader, h *Header) ([]Snapshot, error) {
	snapshots, _, err := readSnapshots(ctx, r, h)
	return snapshots, err
}

// readSnapshots also returns the length of the snapshot table in bytes.
func readSnapshots(ctx context.Context, r Reader, h *Header) ([]Snapshot, int64, error) {
	if h.NbSnapshots == 0 {
		return nil, 0, nil
	}
	t := tableReader{ctx: ctx, r: r, start: h.SnapshotsOffset, limit: MaxSnapshotTableBytes}
	var all []Snapshot
	for i := range h.NbSnapshots {
		s, err := t.snapshot(h)
		if err != nil {
			return all, t.pos, fmt.Errorf("snapshot table entry %d of %d: %w", i, h.NbSnapshots, err)
		}
		all = append(all, s)
	}
	return all, t.pos, nil
}

func (t *tableReader) snapshot(h *Header) (Snapshot, error) {
	be := binary.BigEndian
	b, err := t.next(snapshotEntryLen)
	if err != nil {
		return Snapshot{}, err
	}
	s := Snapshot{
		L1Offset:    be.Uint64(b),
		L1Size:      be.Uint32(b[8:]),
		DateSec:     be.Uint32(b[16:]),
		DateNsec:    be.Uint32(b[20:]),
		VMClockNsec: be.Uint64(b[24:]),
		VMStateSize: uint64(be.Uint32(b[32:])),
		DiskSize:    h.Size,
		ICount:      -1,
	}
	idLen, nameLen, extraLen := int64(be.Uint16(b[12:])), int64(be.Uint16(b[14:])), int64(be.Uint32(b[36:]))
	if extraLen > MaxSnapshotExtra {
		return s, corrupt("extra data of %d bytes, at most %d", extraLen, MaxSnapshotExtra)
	}
	if b, err = t.next(extraLen + idLen + nameLen); err != nil {
		return s, err
	}
	extra := b[:extraLen]
	if len(extra) >= 8 {
		s.VMStateSize = be.Uint64(extra)
	}
	if len(extra) >= 16 {
		size := be.Uint64(extra[8:])
		if size > math.MaxInt64 {
			return s, corrupt("disk size 0x%x is too big", size)
		}
		s.DiskSize = int64(size)
	}
	if len(extra) >= 24 {
		s.ICount = int64(be.Uint64(extra[16:]))
		s.Extra = append([]byte(nil), extra[24:]...)
	}
	s.ID = string(b[extraLen : extraLen+idLen])
	s.Name = string(b[extraLen+idLen:])
	t.align8()
	return s, nil
}

// A bitmapEntry is an entry of the bitmap directory.
type bitmapEntry struct {
	name            string
	tableOffset     uint64
	tableSize       uint32 // entries
	flags           uint32
	granularityBits uint8
}

func (b bitmapEntry) info() BitmapInfo {
	i := BitmapInfo{Name: b.name, Flags: []string{}}
	if b.granularityBits < 63 {
		i.Granularity = 1 << b.granularityBits
	}
	if b.flags&1 != 0 {
		i.Flags = append(i.Flags, "in-use")
	}
	if b.flags&2 != 0 {
		i.Flags = append(i.Flags, "auto")
	}
	return i
}

const (
	bitmapEntryLen      = 24
	maxBitmaps          = 65535
	maxBitmapDirectory  = 1024 * maxBitmaps
	maxBitmapName       = 1023
	maxBitmapBytes      = 512 << 20 // of one bitmap's data
	bitmapTableReserved = 0xff000000000001fe
)

// readBitmapDirectory lists the persistent bitmaps of an image whose bitmaps are
// consistent. With an error come those before it.
func readBitmapDirectory(ctx context.Context, r Reader, h *Header) ([]bitmapEntry, error) {
	ext := h.Bitmaps()
	if ext == nil {
		return nil, nil
	}
	size := r.Size()
	switch {
	case ext.Bitmaps > maxBitmaps:
		return nil, corrupt("bitmaps extension: nb_bitmaps is %d, at most %d", ext.Bitmaps, maxBitmaps)
	case ext.DirectorySize > maxBitmapDirectory:
		return nil, corrupt("bitmaps extension: bitmap_directory_size is %d, at most %d", ext.DirectorySize, maxBitmapDirectory)
	case ext.DirectoryOffset > uint64(size) || ext.DirectorySize > uint64(size)-ext.DirectoryOffset:
		return nil, corrupt("bitmaps extension: the directory of %d bytes at 0x%x is past the end of the file of %d bytes", ext.DirectorySize, ext.DirectoryOffset, size)
	case ext.DirectoryOffset&uint64(h.ClusterSize()-1) != 0:
		return nil, corrupt("bitmaps extension: bitmap_directory_offset 0x%x is not a multiple of the cluster size %d", ext.DirectoryOffset, h.ClusterSize())
	}
	be := binary.BigEndian
	t := tableReader{ctx: ctx, r: r, start: int64(ext.DirectoryOffset), limit: int64(ext.DirectorySize)}
	var all []bitmapEntry
	for i := range ext.Bitmaps {
		b, err := t.next(bitmapEntryLen)
		if err != nil {
			return all, fmt.Errorf("bitmap directory entry %d of %d: %w", i, ext.Bitmaps, err)
		}
		e := bitmapEntry{tableOffset: be.Uint64(b), tableSize: be.Uint32(b[8:]), flags: be.Uint32(b[12:]), granularityBits: b[17]}
		nameLen, extraLen := int64(be.Uint16(b[18:])), int64(be.Uint32(b[20:]))
		if nameLen == 0 || nameLen > maxBitmapName {
			return all, corrupt("bitmap directory entry %d: name_size is %d, must be 1 to %d", i, nameLen, maxBitmapName)
		}
		if most := maxBitmapBytes >> h.ClusterBits; int64(e.tableSize) > int64(most) {
			return all, corrupt("bitmap directory entry %d: bitmap_table_size is %d, at most %d", i, e.tableSize, most)
		}
		if err := t.skip(extraLen); err != nil {
			return all, fmt.Errorf("bitmap directory entry %d: extra data: %w", i, err)
		}
		if b, err = t.next(nameLen); err != nil {
			return all, fmt.Errorf("bitmap directory entry %d: name: %w", i, err)
		}
		e.name = string(b)
		t.align8()
		all = append(all, e)
	}
	return all, nil
}

// A tableReader reads a table of entries of unequal lengths, buffered and bounded.
type tableReader struct {
	ctx   context.Context
	r     Reader
	start int64 // bytes; offset of the table in the file
	limit int64 // bytes; the table's length, or a bound of it
	pos   int64 // bytes read of the table

	buf    []byte
	bufPos int64 // of buf in the table
}

const tableReaderBuf = 64 << 10

// next returns the next n bytes, at most 1 MiB, valid until the next call.
func (t *tableReader) next(n int64) ([]byte, error) {
	if n > t.limit-t.pos {
		return nil, corrupt("%d bytes at 0x%x lie past the end of the table of at most %d bytes", n, t.start+t.pos, t.limit)
	}
	if end := t.r.Size(); t.start+t.pos > end || n > end-t.start-t.pos {
		return nil, corrupt("%d bytes at 0x%x lie past the end of the file of %d bytes", n, t.start+t.pos, end)
	}
	if t.pos < t.bufPos || t.pos+n > t.bufPos+int64(len(t.buf)) {
		want := max(n, min(tableReaderBuf, t.limit-t.pos, t.r.Size()-t.start-t.pos))
		t.buf, t.bufPos = make([]byte, want), t.pos
		if err := t.r.ReadAt(t.ctx, t.buf, t.start+t.pos); err != nil {
			return nil, fmt.Errorf("read %d bytes at 0x%x: %w", want, t.start+t.pos, err)
		}
	}
	at := t.pos - t.bufPos
	t.pos += n
	return t.buf[at : at+n], nil
}

// skip passes over n bytes.
func (t *tableReader) skip(n int64) error {
	if n > t.limit-t.pos {
		return corrupt("%d bytes at 0x%x lie past the end of the table of at most %d bytes", n, t.start+t.pos, t.limit)
	}
	t.pos += n
	return nil
}

// align8 passes over padding. The padding of the last entry may be missing.
func (t *tableReader) align8() { t.pos = min((t.pos+7)&^7, t.limit) }
