package qcow2

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdserve/nbdserve/block"
)

// variants are options of images that qemu-img makes.
func variants() []string {
	all := []string{"compat=0.10", "compat=1.1"}
	for bits := MinClusterBits; bits <= MaxClusterBits; bits++ {
		all = append(all, fmt.Sprintf("compat=0.10,cluster_size=%d", 1<<bits), fmt.Sprintf("compat=1.1,cluster_size=%d", 1<<bits))
	}
	for order := 0; order <= MaxRefcountOrder; order++ {
		all = append(all, fmt.Sprintf("refcount_bits=%d", 1<<order), fmt.Sprintf("refcount_bits=%d,cluster_size=512", 1<<order))
	}
	return append(all, "compression_type=zstd", "lazy_refcounts=on", "extended_l2=on", "preallocation=metadata")
}

func TestImagesOfQemuImgAreParsedAsItDescribesThem(t *testing.T) {
	for _, opts := range variants() {
		path := imagePath(t, "a.qcow2")
		mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", opts, path, "64M")
		h := parseFile(t, path)
		info := qemuInfo(t, path)
		if h.Size != info.VirtualSize || h.ClusterSize() != info.ClusterSize {
			t.Errorf("%s: size %d, cluster size %d; qemu-img says %d, %d", opts, h.Size, h.ClusterSize(), info.VirtualSize, info.ClusterSize)
		}
		ours, err := Inspect(t.Context(), openTarget(t, path), h)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(info.FormatSpecific.Data, viaJSON(t, ours)); d != "" {
			t.Errorf("%s: format-specific data, -qemu-img +ours:\n%s", opts, d)
		}
	}
}

// qemuImgInfo is a part of qemu-img info's output.
type qemuImgInfo struct {
	VirtualSize    int64          `json:"virtual-size"`
	ClusterSize    int64          `json:"cluster-size"`
	Snapshots      []SnapshotInfo `json:"snapshots"`
	FormatSpecific struct {
		Data map[string]any `json:"data"`
	} `json:"format-specific"`
}

func qemuInfo(t testing.TB, path string) (info qemuImgInfo) {
	t.Helper()
	if err := json.Unmarshal([]byte(mustRun(t, "qemu-img", "info", "--output=json", path)), &info); err != nil {
		t.Fatal(err)
	}
	return info
}

// viaJSON is v as its JSON reads.
func viaJSON(t testing.TB, v any) (m map[string]any) {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestBackingFileAndFormatAreRead(t *testing.T) {
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base.raw"), filepath.Join(dir, "top.qcow2")
	mustRun(t, "qemu-img", "create", "-q", "-f", "raw", base, "1M")
	for _, compat := range []string{"0.10", "1.1"} {
		mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat="+compat, "-b", "base.raw", "-F", "raw", top)
		if h := parseFile(t, top); h.BackingFile != "base.raw" || h.BackingFormat != "raw" {
			t.Errorf("compat %s: backing file %q, format %q", compat, h.BackingFile, h.BackingFormat)
		}
	}
}

func TestHeaderSurvivesMarshalling(t *testing.T) {
	m := newImage(t, CreateOptions{})
	h := mustParse(t, m)
	h.BackingFile, h.BackingFormat = "base.img", "raw"
	h.Unknown = append(h.Unknown, 1, 2, 3, 4, 5, 6, 7, 8)
	h.HeaderLength = 120
	h.Compatible, h.Autoclear = 0xf0, 0xf00
	h.Extensions = []Extension{{0x12345678, []byte("unknown")}, {0x12345679, []byte{}}, {ExtDataFile, []byte("12345678")}}
	h.FeatureNames = standardFeatureNames
	b, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	copy(m.data, b)
	if d := cmp.Diff(h, mustParse(t, m)); d != "" {
		t.Errorf("-marshalled +parsed:\n%s", d)
	}
}

func TestHeaderOfQemuImgIsUnchangedByMarshalling(t *testing.T) {
	for _, opts := range variants() {
		path := imagePath(t, "a.qcow2")
		mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", opts, path, "64M")
		b, err := parseFile(t, path).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, raw[:len(b)]) {
			t.Errorf("%s: header differs:\n% x\n% x", opts, raw[:len(b)], b)
		}
	}
}

func TestEveryPrefixOfSectorsIsAHeader(t *testing.T) {
	m := newImage(t, CreateOptions{})
	h := mustParse(t, m)
	h.Extensions = []Extension{{0x12345678, make([]byte, 700)}, {0x12345679, make([]byte, 1200)}}
	b, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for n := 512; n < len(b)+512; n += 512 {
		clear(m.data[:h.ClusterSize()])
		copy(m.data, b[:min(n, len(b))])
		got := mustParse(t, m)
		if got.L1Offset != h.L1Offset || got.RefcountTableOffset != h.RefcountTableOffset || got.Size != h.Size {
			t.Errorf("first %d bytes: tables moved", n)
		}
	}
}

func TestNewHeaderFitsInOneSector(t *testing.T) {
	for _, o := range []CreateOptions{{}, {Version: 2}, {BackingFile: strings.Repeat("x", 300), BackingFormat: "qcow2"}} {
		if b, err := mustParse(t, newImage(t, o)).Marshal(); err != nil || len(b) > 512 {
			t.Errorf("%+v: %d bytes, %v", o, len(b), err)
		}
	}
}

// A field is a header field of a number of bytes.
type field struct {
	name string
	off  int
	size int
}

var headerFields = []field{
	{"magic", 0, 4}, {"version", 4, 4}, {"backing_file_offset", 8, 8}, {"backing_file_size", 16, 4},
	{"cluster_bits", 20, 4}, {"size", 24, 8}, {"crypt_method", 32, 4}, {"l1_size", 36, 4}, {"l1_table_offset", 40, 8},
	{"refcount_table_offset", 48, 8}, {"refcount_table_clusters", 56, 4}, {"nb_snapshots", 60, 4}, {"snapshots_offset", 64, 8},
	{"incompatible_features", 72, 8}, {"compatible_features", 80, 8}, {"autoclear_features", 88, 8},
	{"refcount_order", 96, 4}, {"header_length", 100, 4}, {"compression_type", 104, 1},
}

func (f field) put(b []byte, v uint64) {
	var word [8]byte
	binary.BigEndian.PutUint64(word[:], v)
	copy(b[f.off:f.off+f.size], word[8-f.size:])
}

func (f field) get(b []byte) uint64 {
	var word [8]byte
	copy(word[8-f.size:], b[f.off:f.off+f.size])
	return binary.BigEndian.Uint64(word[:])
}

// setField changes a field of an image by its name.
func setField(t testing.TB, m *memTarget, name string, v uint64) {
	t.Helper()
	for _, f := range headerFields {
		if f.name == name {
			f.put(m.data, v)
			return
		}
	}
	t.Fatalf("no header field %s", name)
}

func TestBadFieldIsAnErrorThatNamesIt(t *testing.T) {
	const cluster = 65536
	type set map[string]uint64
	for _, c := range []struct {
		set  set
		want string // "": no error
	}{
		{set{"magic": 0}, "not a qcow2 image: magic is 0x00000000"},
		{set{"version": 1}, "Unsupported qcow2 version 1"},
		{set{"version": 4}, "Unsupported qcow2 version 4"},
		{set{"version": math.MaxUint32}, "Unsupported qcow2 version 4294967295"},
		{set{"cluster_bits": 0}, "Unsupported cluster size: 2^0"},
		{set{"cluster_bits": 8}, "Unsupported cluster size: 2^8"},
		{set{"cluster_bits": 22}, "Unsupported cluster size: 2^22"},
		{set{"cluster_bits": math.MaxUint32}, "Unsupported cluster size: 2^4294967295"},
		{set{"backing_file_offset": 1, "backing_file_size": 1}, "Invalid backing file offset: backing_file_offset is 0x1"},
		{set{"backing_file_offset": 111, "backing_file_size": 1}, "Invalid backing file offset"},
		{set{"backing_file_offset": cluster + 1}, "Invalid backing file offset: backing_file_offset is 0x10001"},
		{set{"backing_file_offset": math.MaxUint64}, "Invalid backing file offset: backing_file_offset is 0xffffffffffffffff"},
		{set{"backing_file_offset": 4096, "backing_file_size": 1024}, "Backing file name too long: backing_file_size is 1024"},
		{set{"backing_file_offset": 4096, "backing_file_size": math.MaxUint32}, "Backing file name too long: backing_file_size is 4294967295"},
		{set{"backing_file_offset": cluster - 1, "backing_file_size": 2}, "Backing file name too long: backing_file_size is 2"},
		{set{"backing_file_offset": cluster}, ""},
		{set{"backing_file_offset": 4096, "backing_file_size": 4}, "backing file name has a NUL byte at offset 0x1000"},
		{set{"size": 0}, ""},
		{set{"size": math.MaxUint64}, "Image is too big: size is 0xffffffffffffffff"},
		{set{"size": math.MaxInt64 + 1}, "Image is too big: size is 0x8000000000000000"},
		{set{"size": math.MaxInt64}, "Image is too big: size is 9223372036854775807"},
		{set{"size": 1<<51 + 1}, "Image is too big: size is 2251799813685249, which needs 4194305 L1 entries"},
		{set{"size": 1 << 51}, "L1 table is too small: l1_size is 1, a disk of 2251799813685248 bytes needs 4194304"},
		{set{"size": 512<<20 + 1}, "L1 table is too small: l1_size is 1, a disk of 536870913 bytes needs 2"},
		{set{"size": 512 << 20}, ""},
		{set{"crypt_method": 3}, "Unsupported encryption method: crypt_method is 3"},
		{set{"crypt_method": 2}, ""}, // Unsupported refuses it
		{set{"l1_size": 0}, "L1 table is too small: l1_size is 0"},
		{set{"l1_size": 0, "size": 0}, ""},
		{set{"l1_size": math.MaxUint32}, "Active L1 table too large: l1_size makes 34359738360 bytes, at most 33554432"},
		{set{"l1_size": 4<<20 + 1}, "Active L1 table too large: l1_size makes 33554440 bytes"},
		{set{"l1_size": 4 << 20}, "Active L1 table is past the end of the file: offset 0x30000 and 33554432 bytes"},
		{set{"l1_size": 8193}, "Active L1 table is past the end of the file"},
		{set{"l1_size": 8192}, ""},
		{set{"l1_table_offset": 0}, "Active L1 table offset invalid: 0x0"},
		{set{"l1_table_offset": 0x30001}, "Active L1 table offset invalid: 0x30001 is not a multiple of the cluster size 65536"},
		{set{"l1_table_offset": 0x40000}, "Active L1 table is past the end of the file: offset 0x40000"},
		{set{"l1_table_offset": math.MaxInt64 - cluster + 1}, "Active L1 table is past the end of the file"},
		{set{"l1_table_offset": math.MaxUint64}, "Active L1 table offset invalid: l1_table_offset is 0xffffffffffffffff"},
		{set{"refcount_table_offset": 0}, "Reference count table offset invalid: 0x0"},
		{set{"refcount_table_offset": 0x10200}, "Reference count table offset invalid: 0x10200 is not a multiple"},
		{set{"refcount_table_offset": 0x40000}, "Reference count table is past the end of the file: offset 0x40000"},
		{set{"refcount_table_offset": math.MaxUint64}, "Reference count table offset invalid: refcount_table_offset is 0xffffffffffffffff"},
		{set{"refcount_table_clusters": 0}, "Image does not contain a reference count table"},
		{set{"refcount_table_clusters": 4}, "Reference count table is past the end of the file: offset 0x10000 and 262144 bytes by refcount_table_clusters"},
		{set{"refcount_table_clusters": 129}, "Reference count table too large: refcount_table_clusters makes 8454144 bytes, at most 8388608"},
		{set{"refcount_table_clusters": math.MaxUint32}, "Reference count table too large"},
		{set{"nb_snapshots": 1}, "Snapshot table offset invalid: 0x0"},
		{set{"nb_snapshots": 1, "snapshots_offset": 0x30000}, ""},
		{set{"nb_snapshots": 1, "snapshots_offset": 0x30008}, "Snapshot table offset invalid: 0x30008 is not a multiple"},
		{set{"nb_snapshots": 1, "snapshots_offset": 0x40000}, "Snapshot table is past the end of the file: offset 0x40000"},
		{set{"nb_snapshots": 65537, "snapshots_offset": 0x30000}, "Snapshot table too large: nb_snapshots is 65537, at most 65536"},
		{set{"nb_snapshots": 65536, "snapshots_offset": 0x30000}, "Snapshot table is past the end of the file"},
		{set{"nb_snapshots": math.MaxUint32, "snapshots_offset": 0x30000}, "Snapshot table too large"},
		{set{"snapshots_offset": math.MaxUint64}, "Snapshot table offset invalid: snapshots_offset is 0xffffffffffffffff"},
		{set{"incompatible_features": 1 << 5}, "Unsupported qcow2 feature(s): Unknown incompatible feature: 20"},
		{set{"incompatible_features": 1 << 63}, "Unsupported qcow2 feature(s): Unknown incompatible feature: 8000000000000000"},
		{set{"incompatible_features": IncompatCompression}, "Compression type incompatible feature bit must not be set"},
		{set{"incompatible_features": IncompatCompression, "compression_type": 1}, ""},
		{set{"incompatible_features": IncompatCompression, "compression_type": 2}, "unknown compression type: 2"},
		{set{"compression_type": 1}, "Compression type incompatible feature bit must be set"},
		{set{"compression_type": 255}, "unknown compression type: 255"},
		{set{"compatible_features": math.MaxUint64}, ""},
		{set{"autoclear_features": math.MaxUint64}, ""},
		{set{"refcount_order": 6}, ""},
		{set{"refcount_order": 7}, "refcount_order is 7, at most 6"},
		{set{"refcount_order": math.MaxUint32}, "refcount_order is 4294967295"},
		{set{"header_length": 0}, "qcow2 header too short: header_length is 0"},
		{set{"header_length": 103}, "qcow2 header too short: header_length is 103"},
		{set{"header_length": 104}, ""},
		{set{"header_length": 105}, "header_length is 105, not a multiple of 8"},
		{set{"header_length": cluster}, ""},
		{set{"header_length": cluster + 8}, "qcow2 header exceeds cluster size: header_length is 65544"},
		{set{"header_length": math.MaxUint32}, "qcow2 header exceeds cluster size"},
	} {
		m := newImage(t, CreateOptions{})
		clear(m.data[headerLenV3:512]) // no extensions
		for name, v := range c.set {
			setField(t, m, name, v)
		}
		_, err := parse(m)
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%v: %v", c.set, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%v: error %v, want %q", c.set, err, c.want)
		case err != nil && !errors.Is(err, block.ErrInvalid) && !errors.Is(err, block.ErrNotSupported):
			t.Errorf("%v: error %v wraps neither ErrInvalid nor ErrNotSupported", c.set, err)
		}
	}
}

func TestAnyFieldAtItsEdgesLeavesTablesInsideTheFile(t *testing.T) {
	for _, opts := range []CreateOptions{{}, {Version: 2}, {ClusterSize: 512}, {ClusterSize: 4096, RefcountBits: 1}} {
		image := newImage(t, opts)
		for _, f := range headerFields {
			top := uint64(math.MaxUint64) >> (64 - 8*f.size)
			now := f.get(image.data)
			for _, v := range []uint64{0, 1, now - 1, now + 1, top / 2, top/2 + 1, top - 1, top} {
				m := &memTarget{data: bytes.Clone(image.data)}
				f.put(m.data, v&top)
				h, err := parse(m)
				if err != nil {
					continue
				}
				if end := h.L1Offset + int64(h.L1Size)*8; h.L1Size > 0 && end > m.Size() {
					t.Errorf("%s = 0x%x: L1 table ends at 0x%x", f.name, v, end)
				}
				if end := h.RefcountTableOffset + h.RefcountTableEntries()*8; end > m.Size() {
					t.Errorf("%s = 0x%x: refcount table ends at 0x%x", f.name, v, end)
				}
				if _, err := Check(t.Context(), m, h, nil); err != nil {
					t.Errorf("%s = 0x%x: check: %v", f.name, v, err)
				}
			}
		}
	}
}

func TestExtensionsAreBounded(t *testing.T) {
	for _, c := range []struct {
		name string
		ext  []byte
		want string
	}{
		{"longer than the cluster", []byte{0xe2, 0x79, 0x2a, 0xca, 0, 1, 0, 0}, "Header extension too large: extension 0xe2792aca has a length of 65536"},
		{"longest", []byte{1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff}, "Header extension too large: extension 0x01020304 has a length of 4294967295"},
		{"bitmaps of a wrong length", []byte{0x23, 0x85, 0x28, 0x75, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}, "bitmaps_ext: Invalid extension length: 1"},
		{"crypto header of a wrong length", []byte{0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 0}, "CRYPTO header extension size 0"},
	} {
		m := newImage(t, CreateOptions{})
		setField(t, m, "autoclear_features", AutoclearBitmaps)
		clear(m.data[headerLenV3:512])
		copy(m.data[headerLenV3:], c.ext)
		if _, err := parse(m); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

func TestExtensionsMayFillTheClusterWithoutAnEndMark(t *testing.T) {
	m := newImage(t, CreateOptions{ClusterSize: 512})
	clear(m.data[headerLenV3:512])
	binary.BigEndian.PutUint32(m.data[112:], 0x12345678)
	binary.BigEndian.PutUint32(m.data[116:], 512-120)
	h := mustParse(t, m)
	if len(h.Extensions) != 1 || len(h.Extensions[0].Data) != 512-120 {
		t.Errorf("extensions: %v", h.Extensions)
	}
}

func TestUnknownFeatureIsNamedByTheImage(t *testing.T) {
	m := newImage(t, CreateOptions{})
	h := mustParse(t, m)
	h.Incompatible = 1<<9 | 1<<10
	h.FeatureNames = []FeatureName{{FeatureCompatible, 9, "wrong"}, {FeatureIncompatible, 9, "time travel"}, {FeatureIncompatible, 200, "no bit"}}
	b, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	copy(m.data, append(b, make([]byte, 512)...))
	if _, err := parse(m); err == nil || !strings.Contains(err.Error(), "Unsupported qcow2 feature(s): time travel, Unknown incompatible feature: 400") {
		t.Error(err)
	}
}

func TestTruncatedFileIsAnErrorUnlessItHoldsItsTables(t *testing.T) {
	for _, opts := range []CreateOptions{{ClusterSize: 512}, {ClusterSize: 512, Version: 2}, {ClusterSize: 4096, RefcountBits: 64}} {
		image := newImage(t, opts)
		h := mustParse(t, image)
		needed := h.L1Offset + int64(h.L1Size)*8
		for n := range image.Size() {
			if _, err := parse(&memTarget{data: image.data[:n:n]}); (err == nil) != (n >= needed) {
				t.Errorf("first %d bytes, tables end at %d: error %v", n, needed, err)
			}
		}
	}
}

func TestUnsupportedFeaturesAreRefusedByName(t *testing.T) {
	for _, c := range []struct {
		change   func(h *Header)
		readable bool
		want     string
	}{
		{func(h *Header) { h.Incompatible |= IncompatExtendedL2 }, false, "extended L2 entries"},
		{func(h *Header) { h.Incompatible |= IncompatDataFile }, false, "external data file"},
		{func(h *Header) { h.CryptMethod = CryptAES }, false, "encrypted with AES"},
		{func(h *Header) { h.CryptMethod = CryptLUKS }, false, "encrypted with LUKS"},
		{func(h *Header) { h.Incompatible |= IncompatCorrupt }, true, "Image is corrupt; cannot be opened read/write"},
		{func(h *Header) { h.Autoclear |= AutoclearBitmaps }, true, "persistent bitmaps"},
		{func(h *Header) { h.Extensions = []Extension{{ExtBitmaps, make([]byte, 24)}} }, true, "persistent bitmaps"},
	} {
		h := mustParse(t, newImage(t, CreateOptions{}))
		if err := h.Unsupported(true); err != nil {
			t.Fatal(err)
		}
		c.change(h)
		if err := h.Unsupported(true); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("writable: %v, want %q", err, c.want)
		}
		if err := h.Unsupported(false); (err == nil) != c.readable {
			t.Errorf("%s, read-only: %v", c.want, err)
		}
	}
}

func TestDirtyBitIsNoReasonToRefuse(t *testing.T) {
	h := mustParse(t, newImage(t, CreateOptions{}))
	h.Incompatible |= IncompatDirty
	if err := h.Unsupported(true); err != nil || !h.Dirty() {
		t.Error(err)
	}
}

func TestProbe(t *testing.T) {
	for _, c := range []struct {
		head string
		want int
	}{{"", 0}, {"QFI\xfb\x00\x00\x00", 0}, {"QFI\xfb\x00\x00\x00\x02", 100}, {"QFI\xfb\x00\x00\x00\x03", 100}, {"QFI\xfb\x00\x00\x00\x01", 0}, {"KDMV\x00\x00\x00\x03", 0}} {
		if got := Probe([]byte(c.head)); got != c.want {
			t.Errorf("%q: %d, want %d", c.head, got, c.want)
		}
	}
}

func TestHeaderWithManyUnknownFieldsIsMarshalled(t *testing.T) {
	m := newImage(t, CreateOptions{ClusterSize: 4096})
	h := mustParse(t, m)
	h.Unknown = bytes.Repeat([]byte{7}, 1000)
	b, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	again := mustParse(t, &memTarget{data: append(b, m.data[len(b):]...)})
	if got := again.Unknown[:len(h.Unknown)]; !bytes.Equal(got, h.Unknown) {
		t.Errorf("unknown fields were not kept: %x", got)
	}
}
