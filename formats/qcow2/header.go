package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"strings"

	"github.com/nbdserve/nbdserve/block"
)

// Magic is the first four bytes of every qcow2 image, as a big-endian number: "QFI\xfb".
const Magic = 0x514649fb

// Limits of the format and, where it sets none, of every implementation.
const (
	MinClusterBits = 9  // 512 bytes
	MaxClusterBits = 21 // 2 MiB

	MaxL1Bytes            = 32 << 20
	MaxRefcountTableBytes = 8 << 20
	MaxSnapshots          = 65536
	MaxSnapshotTableBytes = 64 << 20
	MaxSnapshotExtra      = 1024
	MaxBackingFileName    = 1023
	MaxRefcountOrder      = 6 // 64 bits

	// MaxHostOffset is the end of what L1 and L2 entries can address.
	MaxHostOffset = 1 << 56
)

// Where fields lie that are changed in place.
const (
	headerOffRefcountTable = 48 // offset and clusters, 12 bytes
	headerOffIncompatible  = 72
)

// Lengths of the header.
const (
	headerLenV2    = 72
	headerLenV3Min = 104
	headerLenV3    = 112 // with the compression type and its padding: what is written
)

// Incompatible features: an image with one that is not known must not be opened.
const (
	IncompatDirty       uint64 = 1 << iota // refcounts may be wrong
	IncompatCorrupt                        // metadata may be wrong: not to be written
	IncompatDataFile                       // data lies in an external file
	IncompatCompression                    // compressed clusters are not zlib
	IncompatExtendedL2                     // 128-bit L2 entries with subclusters

	knownIncompat = IncompatDirty | IncompatCorrupt | IncompatDataFile | IncompatCompression | IncompatExtendedL2
)

// CompatLazyRefcounts is the compatible feature: refcounts may be written late, under the dirty bit.
const CompatLazyRefcounts uint64 = 1

// Autoclear features: a writer clears those that it does not keep up to date.
const (
	AutoclearBitmaps     uint64 = 1 << iota // the bitmaps extension is consistent
	AutoclearDataFileRaw                    // the external data file is a raw image
)

// Methods of encryption.
const (
	CryptNone = 0
	CryptAES  = 1
	CryptLUKS = 2
)

// Compression types.
const (
	CompressionZlib = 0
	CompressionZstd = 1
)

// A Reader is what image metadata is read from: a [block.Edge] or [block.Root].
type Reader interface {
	// ReadAt fills p from byte off on; reading past Size is an error.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// Size is the length of the file in bytes.
	Size() int64
}

// A Header is the header of an image with its extensions and the backing file's
// name: the first cluster. Offsets and sizes are bytes unless said otherwise. It
// is plain data, not safe for parallel changes.
type Header struct {
	Version               uint32 // 2 or 3
	ClusterBits           uint32
	Size                  int64 // of the virtual disk
	CryptMethod           uint32
	L1Size                uint32 // entries
	L1Offset              int64
	RefcountTableOffset   int64
	RefcountTableClusters uint32 // clusters
	NbSnapshots           uint32
	SnapshotsOffset       int64

	// Version 3; in version 2 zero, RefcountOrder 4, and HeaderLength 72.
	Incompatible    uint64
	Compatible      uint64
	Autoclear       uint64
	RefcountOrder   uint32 // refcounts are 1<<RefcountOrder bits wide
	HeaderLength    uint32
	CompressionType uint8
	// Unknown holds the header's bytes from 105 to HeaderLength. They are kept when the header is rewritten.
	Unknown []byte

	BackingFile   string // "": none
	BackingFormat string // "": not stated
	FeatureNames  []FeatureName
	// Extensions are all other extensions in their order, those not known included.
	Extensions []Extension
}

// formatError is an error of an image's contents or of what we can do with it.
type formatError struct {
	text string
	kind error // block.ErrCorrupt, block.ErrInvalid, block.ErrNotSupported
}

func (e *formatError) Error() string { return e.text }
func (e *formatError) Unwrap() error { return e.kind }

func invalid(format string, args ...any) error {
	return &formatError{fmt.Sprintf(format, args...), block.ErrInvalid}
}

func corrupt(format string, args ...any) error {
	return &formatError{fmt.Sprintf(format, args...), block.ErrCorrupt}
}

func unsupported(format string, args ...any) error {
	return &formatError{fmt.Sprintf(format, args...), block.ErrNotSupported}
}

// Probe scores the first bytes of an image: 100 for qcow2 of version 2 or 3, else 0.
func Probe(head []byte) int {
	if len(head) < 8 || binary.BigEndian.Uint32(head) != Magic {
		return 0
	}
	if v := binary.BigEndian.Uint32(head[4:]); v != 2 && v != 3 {
		return 0
	}
	return 100
}

// ParseHeader reads and validates the header of an image in a file of fileSize
// bytes. It reads at most one cluster and holds no more memory than that. Errors
// name the field and its value, not the file; they wrap [block.ErrInvalid] or
// [block.ErrNotSupported], or are what r returned.
func ParseHeader(ctx context.Context, r Reader, fileSize int64) (*Header, error) {
	if fileSize < headerLenV2 {
		return nil, invalid("qcow2 header too short: the file has %d bytes, a header %d", fileSize, headerLenV2)
	}
	buf := make([]byte, min(fileSize, headerLenV3))
	if err := r.ReadAt(ctx, buf, 0); err != nil {
		return nil, fmt.Errorf("read qcow2 header: %w", err)
	}
	h, err := parseFixed(buf)
	if err != nil {
		return nil, err
	}
	cluster := make([]byte, h.ClusterSize())
	if err := r.ReadAt(ctx, cluster[:min(fileSize, h.ClusterSize())], 0); err != nil {
		return nil, fmt.Errorf("read qcow2 header: %w", err)
	}
	if err := h.parseVariable(cluster); err != nil {
		return nil, err
	}
	if err := h.Validate(fileSize); err != nil {
		return nil, err
	}
	return h, nil
}

// parseFixed reads the fields of fixed place from the first bytes of an image,
// which are shorter than headerLenV3 if the file is. It checks as much as is
// needed to read the rest.
func parseFixed(b []byte) (*Header, error) {
	be := binary.BigEndian
	if be.Uint32(b) != Magic {
		return nil, invalid("not a qcow2 image: magic is 0x%08x, not 0x%08x", be.Uint32(b), uint32(Magic))
	}
	h := &Header{Version: be.Uint32(b[4:])}
	if h.Version != 2 && h.Version != 3 {
		return nil, unsupported("Unsupported qcow2 version %d", h.Version)
	}
	h.ClusterBits = be.Uint32(b[20:])
	if h.ClusterBits < MinClusterBits || h.ClusterBits > MaxClusterBits {
		return nil, invalid("Unsupported cluster size: 2^%d; cluster_bits must be %d to %d", h.ClusterBits, MinClusterBits, MaxClusterBits)
	}
	h.CryptMethod = be.Uint32(b[32:])
	h.L1Size = be.Uint32(b[36:])
	h.RefcountTableClusters = be.Uint32(b[56:])
	h.NbSnapshots = be.Uint32(b[60:])
	for _, f := range []struct {
		name string
		at   int
		dst  *int64
	}{
		{"Image is too big: size", 24, &h.Size},
		{"Active L1 table offset invalid: l1_table_offset", 40, &h.L1Offset},
		{"Reference count table offset invalid: refcount_table_offset", 48, &h.RefcountTableOffset},
		{"Snapshot table offset invalid: snapshots_offset", 64, &h.SnapshotsOffset},
	} {
		v := be.Uint64(b[f.at:])
		if v > math.MaxInt64 {
			return nil, invalid("%s is 0x%x", f.name, v)
		}
		*f.dst = int64(v)
	}
	h.RefcountOrder, h.HeaderLength = 4, headerLenV2
	if h.Version == 2 {
		return h, nil
	}
	if len(b) < headerLenV3Min {
		return nil, invalid("qcow2 header too short: the file has %d bytes, a header of version 3 %d", len(b), headerLenV3Min)
	}
	h.Incompatible = be.Uint64(b[72:])
	h.Compatible = be.Uint64(b[80:])
	h.Autoclear = be.Uint64(b[88:])
	h.RefcountOrder = be.Uint32(b[96:])
	h.HeaderLength = be.Uint32(b[100:])
	switch {
	case h.HeaderLength < headerLenV3Min:
		return nil, invalid("qcow2 header too short: header_length is %d, at least %d in version 3", h.HeaderLength, headerLenV3Min)
	case int64(h.HeaderLength) > h.ClusterSize():
		return nil, invalid("qcow2 header exceeds cluster size: header_length is %d, a cluster %d", h.HeaderLength, h.ClusterSize())
	case h.HeaderLength%8 != 0:
		return nil, invalid("header_length is %d, not a multiple of 8", h.HeaderLength)
	}
	return h, nil
}

// parseVariable reads what has no fixed place from the first cluster.
func (h *Header) parseVariable(cluster []byte) error {
	be := binary.BigEndian
	if h.HeaderLength > headerLenV3Min {
		h.CompressionType = cluster[headerLenV3Min]
		h.Unknown = append([]byte(nil), cluster[headerLenV3Min+1:h.HeaderLength]...)
	}
	nameOff, nameLen := be.Uint64(cluster[8:]), uint64(be.Uint32(cluster[16:]))
	end := uint64(len(cluster))
	if nameOff != 0 {
		if nameOff < uint64(h.HeaderLength) || nameOff > end {
			return invalid("Invalid backing file offset: backing_file_offset is 0x%x, outside of 0x%x to 0x%x", nameOff, h.HeaderLength, end)
		}
		if nameLen > MaxBackingFileName || nameLen > end-nameOff {
			return invalid("Backing file name too long: backing_file_size is %d at offset 0x%x, at most %d and inside the first cluster of %d bytes", nameLen, nameOff, MaxBackingFileName, end)
		}
		h.BackingFile = string(cluster[nameOff : nameOff+nameLen])
		if i := strings.IndexByte(h.BackingFile, 0); i >= 0 {
			return invalid("backing file name has a NUL byte at offset 0x%x", nameOff+uint64(i))
		}
		end = nameOff
	}
	return h.parseExtensions(cluster[h.HeaderLength:end])
}

// ClusterSize is the size of a cluster in bytes, 512 to 2 MiB.
func (h *Header) ClusterSize() int64 { return 1 << h.ClusterBits }

// L2EntrySize is the size of an L2 entry in bytes, 8, or 16 with extended entries.
func (h *Header) L2EntrySize() int64 {
	if h.Incompatible&IncompatExtendedL2 != 0 {
		return 16
	}
	return 8
}

// L2Entries is the number of entries in an L2 table.
func (h *Header) L2Entries() int64 { return h.ClusterSize() / h.L2EntrySize() }

// RefcountBlockEntries is the number of refcounts in a refcount block.
func (h *Header) RefcountBlockEntries() int64 { return h.ClusterSize() * 8 >> h.RefcountOrder }

// RefcountTableEntries is the number of entries in the refcount table.
func (h *Header) RefcountTableEntries() int64 {
	return int64(h.RefcountTableClusters) * h.ClusterSize() / 8
}

// L1Needed is the number of L1 entries for a disk of size bytes.
func (h *Header) L1Needed(size int64) int64 {
	shift := int(h.ClusterBits) + bits.Len64(uint64(h.L2Entries())) - 1
	n := size >> shift
	if size&(1<<shift-1) != 0 {
		n++
	}
	return n
}

// Clusters is the number of clusters that n bytes occupy, the last one in part.
func (h *Header) Clusters(n int64) int64 {
	return n>>h.ClusterBits + (n&(h.ClusterSize()-1)+h.ClusterSize()-1)>>h.ClusterBits
}

// Dirty tells whether the refcounts may be wrong.
func (h *Header) Dirty() bool { return h.Incompatible&IncompatDirty != 0 }

// Corrupt tells whether the image is marked as corrupt.
func (h *Header) Corrupt() bool { return h.Incompatible&IncompatCorrupt != 0 }

// Validate checks every field against the format's limits and the size of the
// file in bytes. What it accepts can be used without overflow: tables lie inside
// the file and are bounded in memory. It does not refuse known features that this
// package cannot use; [Header.Unsupported] does.
func (h *Header) Validate(fileSize int64) error {
	if h.Version != 2 && h.Version != 3 {
		return unsupported("Unsupported qcow2 version %d", h.Version)
	}
	if h.ClusterBits < MinClusterBits || h.ClusterBits > MaxClusterBits {
		return invalid("Unsupported cluster size: 2^%d; cluster_bits must be %d to %d", h.ClusterBits, MinClusterBits, MaxClusterBits)
	}
	if err := h.validateFeatures(); err != nil {
		return err
	}
	if h.RefcountOrder > MaxRefcountOrder {
		return invalid("Reference count entry width too large; may not exceed 64 bits: refcount_order is %d, at most %d", h.RefcountOrder, MaxRefcountOrder)
	}
	if h.CryptMethod > CryptLUKS {
		return unsupported("Unsupported encryption method: crypt_method is %d", h.CryptMethod)
	}
	if err := h.validateTables(fileSize); err != nil {
		return err
	}
	return h.validateExtensions()
}

func (h *Header) validateFeatures() error {
	if unknown := h.Incompatible &^ knownIncompat; unknown != 0 {
		return unsupported("Unsupported qcow2 feature(s): %s", h.featureNames(unknown))
	}
	if h.Version == 2 && (h.Incompatible|h.Compatible|h.Autoclear != 0 || h.RefcountOrder != 4) {
		return invalid("version 2 has no feature bits and only 16-bit refcounts")
	}
	if h.Incompatible&IncompatExtendedL2 != 0 && h.ClusterBits < 14 {
		return invalid("extended L2 entries need clusters of 16 KiB or more, cluster_bits is %d", h.ClusterBits)
	}
	marked := h.Incompatible&IncompatCompression != 0
	switch {
	case h.CompressionType > CompressionZstd:
		return unsupported("qcow2: unknown compression type: %d", h.CompressionType)
	case marked && h.CompressionType == CompressionZlib:
		return invalid("qcow2: Compression type incompatible feature bit must not be set: compression_type is 0")
	case !marked && h.CompressionType != CompressionZlib:
		return invalid("qcow2: Compression type incompatible feature bit must be set: compression_type is %d", h.CompressionType)
	}
	return nil
}

func (h *Header) validateTables(fileSize int64) error {
	if h.RefcountTableClusters == 0 {
		return invalid("Image does not contain a reference count table: refcount_table_clusters is 0")
	}
	padded := fileSize
	if rest := fileSize & (h.ClusterSize() - 1); rest != 0 && fileSize <= math.MaxInt64-h.ClusterSize() {
		padded += h.ClusterSize() - rest
	}
	refBytes := int64(h.RefcountTableClusters) << h.ClusterBits
	if err := h.validateTable("Reference count table", "refcount_table_clusters", h.RefcountTableOffset, refBytes, MaxRefcountTableBytes, padded); err != nil {
		return err
	}
	if h.Size < 0 {
		return invalid("Image is too big: size is %d", uint64(h.Size))
	}
	needed := h.L1Needed(h.Size)
	if needed > MaxL1Bytes/8 {
		return invalid("Image is too big: size is %d, which needs %d L1 entries of at most %d with clusters of %d bytes", h.Size, needed, MaxL1Bytes/8, h.ClusterSize())
	}
	if h.L1Size != 0 {
		if err := h.validateTable("Active L1 table", "l1_size", h.L1Offset, int64(h.L1Size)*8, MaxL1Bytes, fileSize); err != nil {
			return err
		}
	}
	if int64(h.L1Size) < needed {
		return invalid("L1 table is too small: l1_size is %d, a disk of %d bytes needs %d", h.L1Size, h.Size, needed)
	}
	if h.NbSnapshots == 0 {
		return nil
	}
	if h.NbSnapshots > MaxSnapshots {
		return invalid("Snapshot table too large: nb_snapshots is %d, at most %d", h.NbSnapshots, MaxSnapshots)
	}
	return h.validateTable("Snapshot table", "nb_snapshots", h.SnapshotsOffset, int64(h.NbSnapshots)*snapshotEntryLen, MaxSnapshotTableBytes, fileSize)
}

// validateTable checks that a table of n bytes at off is aligned, bounded and
// inside a file of end bytes. Offset 0 is the header's.
func (h *Header) validateTable(table, sizeField string, off, n, limit, end int64) error {
	switch {
	case n > limit:
		return invalid("%s too large: %s makes %d bytes, at most %d", table, sizeField, n, limit)
	case off <= 0:
		return invalid("%s offset invalid: 0x%x is where the header lies", table, uint64(off))
	case off&(h.ClusterSize()-1) != 0:
		return invalid("%s offset invalid: 0x%x is not a multiple of the cluster size %d", table, off, h.ClusterSize())
	case off > end || n > end-off:
		return invalid("%s is past the end of the file: offset 0x%x and %d bytes by %s, the file has %d bytes", table, off, n, sizeField, end)
	}
	return nil
}

// Unsupported refuses an image that this package cannot serve, or, with writable,
// cannot write, as an error that names the feature and wraps
// [block.ErrNotSupported] or [block.ErrCorrupt]. The dirty bit is no reason:
// [RepairRefcounts] clears it.
func (h *Header) Unsupported(writable bool) error {
	switch {
	case h.Incompatible&IncompatExtendedL2 != 0:
		return unsupported("qcow2: extended L2 entries (subclusters) are not supported; convert the image with extended_l2=off")
	case h.Incompatible&IncompatDataFile != 0:
		return unsupported("qcow2: external data files are not supported; convert the image without data_file")
	case h.CryptMethod == CryptAES:
		return unsupported("qcow2: encryption is not supported: the image is encrypted with AES")
	case h.CryptMethod != CryptNone:
		return unsupported("qcow2: encryption is not supported: the image is encrypted with LUKS")
	}
	if !writable {
		return nil
	}
	switch {
	case h.Corrupt():
		return corrupt("qcow2: Image is corrupt; cannot be opened read/write; serve it read-only, or repair a copy with 'qemu-img check -r all'")
	case h.HasBitmaps():
		return unsupported("qcow2: images with persistent bitmaps cannot be written; serve the image read-only, or remove them with 'qemu-img bitmap --remove'")
	}
	return nil
}

// Marshal encodes the header: all bytes from the start of the file to the end of
// the backing file's name. It fails if that is more than a cluster. The lengths of
// the extensions and the name's place are made up here; HeaderLength is raised to
// 112 in version 3.
//
// The fixed fields come first and then the small extensions, feature names last,
// so that a prefix of whole sectors is a header too, with at worst names missing.
func (h *Header) Marshal() ([]byte, error) {
	b := h.appendExtensions(h.marshalFixed())
	if h.BackingFile != "" {
		if len(h.BackingFile) > MaxBackingFileName {
			return nil, invalid("Backing file name too long: %d bytes, at most %d", len(h.BackingFile), MaxBackingFileName)
		}
		binary.BigEndian.PutUint64(b[8:], uint64(len(b)))
		binary.BigEndian.PutUint32(b[16:], uint32(len(h.BackingFile)))
		b = append(b, h.BackingFile...)
	}
	if int64(len(b)) > h.ClusterSize() {
		return nil, invalid("qcow2 header exceeds cluster size: %d bytes with extensions and backing file name, a cluster %d", len(b), h.ClusterSize())
	}
	return b, nil
}

// marshalFixed encodes the fields of fixed place, but for where the backing file's name is.
func (h *Header) marshalFixed() []byte {
	length := uint32(headerLenV2)
	if h.Version >= 3 {
		length = max(headerLenV3, headerLenV3Min+1+uint32(len(h.Unknown)))
		length = (length + 7) &^ 7
	}
	b := make([]byte, length, max(512, length))
	be := binary.BigEndian
	be.PutUint32(b, Magic)
	be.PutUint32(b[4:], h.Version)
	be.PutUint32(b[20:], h.ClusterBits)
	be.PutUint64(b[24:], uint64(h.Size))
	be.PutUint32(b[32:], h.CryptMethod)
	be.PutUint32(b[36:], h.L1Size)
	be.PutUint64(b[40:], uint64(h.L1Offset))
	be.PutUint64(b[48:], uint64(h.RefcountTableOffset))
	be.PutUint32(b[56:], h.RefcountTableClusters)
	be.PutUint32(b[60:], h.NbSnapshots)
	be.PutUint64(b[64:], uint64(h.SnapshotsOffset))
	if h.Version >= 3 {
		be.PutUint64(b[72:], h.Incompatible)
		be.PutUint64(b[80:], h.Compatible)
		be.PutUint64(b[88:], h.Autoclear)
		be.PutUint32(b[96:], h.RefcountOrder)
		be.PutUint32(b[100:], length)
		b[headerLenV3Min] = h.CompressionType
		copy(b[headerLenV3Min+1:], h.Unknown)
	}
	return b
}
