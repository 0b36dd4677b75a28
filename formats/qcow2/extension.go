package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"
	"strings"
)

// Types of header extensions.
const (
	ExtEnd           uint32 = 0x00000000
	ExtBackingFormat uint32 = 0xe2792aca
	ExtFeatureNames  uint32 = 0x6803f857
	ExtBitmaps       uint32 = 0x23852875
	ExtCrypto        uint32 = 0x0537be77
	ExtDataFile      uint32 = 0x44415441
)

// An Extension is a header extension as it is stored, without its padding.
type Extension struct {
	Type uint32
	Data []byte
}

// FeatureType picks the feature field that a [FeatureName] is about.
type FeatureType uint8

const (
	FeatureIncompatible FeatureType = iota
	FeatureCompatible
	FeatureAutoclear
)

// A FeatureName names a feature bit, for programs that do not know it.
type FeatureName struct {
	Type FeatureType
	Bit  uint8  // 0 to 63
	Name string // at most 46 bytes
}

const (
	featureNameLen = 48
	bitmapsExtLen  = 24
	cryptoExtLen   = 16
)

// BitmapsExtension says where the directory of persistent bitmaps lies.
type BitmapsExtension struct {
	Bitmaps         uint32
	DirectorySize   uint64 // bytes
	DirectoryOffset uint64
}

// CryptoExtension says where the LUKS header lies.
type CryptoExtension struct {
	Offset, Length uint64 // bytes
}

// parseExtensions reads the extension area. Its end counts as an end mark.
func (h *Header) parseExtensions(area []byte) error {
	be := binary.BigEndian
	for len(area) >= 8 {
		typ, n := be.Uint32(area), uint64(be.Uint32(area[4:]))
		if typ == ExtEnd {
			return nil
		}
		area = area[8:]
		if n > uint64(len(area)) {
			return invalid("Header extension too large: extension 0x%08x has a length of %d, %d bytes are left for it", typ, n, len(area))
		}
		data := area[:n]
		switch typ {
		case ExtBackingFormat:
			h.BackingFormat = string(data)
		case ExtFeatureNames:
			h.FeatureNames = parseFeatureNames(data)
		default:
			h.Extensions = append(h.Extensions, Extension{typ, bytes.Clone(data)})
		}
		area = area[min((n+7)&^7, uint64(len(area))):]
	}
	return nil
}

func parseFeatureNames(data []byte) []FeatureName {
	var names []FeatureName
	for ; len(data) >= featureNameLen; data = data[featureNameLen:] {
		name, _, _ := bytes.Cut(data[2:featureNameLen], []byte{0})
		names = append(names, FeatureName{FeatureType(data[0]), data[1], string(name)})
	}
	return names
}

// appendExtensions encodes the extension area and its end mark.
func (h *Header) appendExtensions(b []byte) []byte {
	if h.BackingFormat != "" {
		b = appendExtension(b, ExtBackingFormat, []byte(h.BackingFormat))
	}
	for _, e := range h.Extensions {
		b = appendExtension(b, e.Type, e.Data)
	}
	if len(h.FeatureNames) > 0 {
		table := make([]byte, featureNameLen*len(h.FeatureNames))
		for i, f := range h.FeatureNames {
			entry := table[i*featureNameLen:][:featureNameLen]
			entry[0], entry[1] = byte(f.Type), f.Bit
			copy(entry[2:], f.Name)
		}
		b = appendExtension(b, ExtFeatureNames, table)
	}
	return append(b, 0, 0, 0, 0, 0, 0, 0, 0)
}

func appendExtension(b []byte, typ uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, typ)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	b = append(b, data...)
	return append(b, make([]byte, -len(data)&7)...)
}

// Extension returns the data of the first extension of a type, and whether there is one.
func (h *Header) Extension(typ uint32) ([]byte, bool) {
	for _, e := range h.Extensions {
		if e.Type == typ {
			return e.Data, true
		}
	}
	return nil, false
}

// HasBitmaps tells whether the image holds persistent bitmaps, consistent or not.
func (h *Header) HasBitmaps() bool {
	_, ok := h.Extension(ExtBitmaps)
	return ok || h.Autoclear&AutoclearBitmaps != 0
}

// Bitmaps decodes the bitmaps extension; nil if there is none or it is not
// consistent (its autoclear bit is unset).
func (h *Header) Bitmaps() *BitmapsExtension {
	d, _ := h.Extension(ExtBitmaps)
	if len(d) != bitmapsExtLen || h.Autoclear&AutoclearBitmaps == 0 {
		return nil
	}
	be := binary.BigEndian
	return &BitmapsExtension{be.Uint32(d), be.Uint64(d[8:]), be.Uint64(d[16:])}
}

// Crypto decodes the extension that points to the LUKS header; nil if there is none.
func (h *Header) Crypto() *CryptoExtension {
	d, _ := h.Extension(ExtCrypto)
	if len(d) != cryptoExtLen {
		return nil
	}
	return &CryptoExtension{binary.BigEndian.Uint64(d), binary.BigEndian.Uint64(d[8:])}
}

// DataFile is the name of the external data file, "" if none is stated.
func (h *Header) DataFile() string {
	d, _ := h.Extension(ExtDataFile)
	return string(d)
}

// validateExtensions checks the lengths of the extensions that are decoded.
func (h *Header) validateExtensions() error {
	if d, ok := h.Extension(ExtBitmaps); ok && len(d) != bitmapsExtLen && h.Autoclear&AutoclearBitmaps != 0 {
		return invalid("bitmaps_ext: Invalid extension length: %d, not %d", len(d), bitmapsExtLen)
	}
	if d, ok := h.Extension(ExtCrypto); ok && len(d) != cryptoExtLen {
		return invalid("CRYPTO header extension size %d, but expected size %d", len(d), cryptoExtLen)
	}
	return nil
}

// featureNames names incompatible features by the image's own table.
func (h *Header) featureNames(unknown uint64) string {
	var names []string
	for _, f := range h.FeatureNames {
		if f.Type == FeatureIncompatible && f.Bit < 64 && unknown&(1<<f.Bit) != 0 {
			names = append(names, f.Name)
			unknown &^= 1 << f.Bit
		}
	}
	if unknown != 0 {
		names = append(names, fmt.Sprintf("Unknown incompatible feature: %x (incompatible_features bit %d)", unknown, bits.TrailingZeros64(unknown)))
	}
	return strings.Join(names, ", ")
}

// standardFeatureNames are the features of the format as of QEMU 10.
var standardFeatureNames = []FeatureName{
	{FeatureIncompatible, 0, "dirty bit"},
	{FeatureIncompatible, 1, "corrupt bit"},
	{FeatureIncompatible, 2, "external data file"},
	{FeatureIncompatible, 3, "compression type"},
	{FeatureIncompatible, 4, "extended L2 entries"},
	{FeatureCompatible, 0, "lazy refcounts"},
	{FeatureAutoclear, 0, "bitmaps"},
	{FeatureAutoclear, 1, "raw external data"},
}
