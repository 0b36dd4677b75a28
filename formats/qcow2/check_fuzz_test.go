package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdserve/nbdserve/block"
)

// maxFuzzed bounds the images that are fuzzed, in bytes.
const maxFuzzed = 1 << 20

func FuzzHeader(f *testing.F) {
	for _, o := range []CreateOptions{
		{ClusterSize: 512}, {ClusterSize: 512, Version: 2}, {ClusterSize: 4096, RefcountBits: 1},
		{ClusterSize: 1024, BackingFile: "base.qcow2", BackingFormat: "qcow2", Compression: CompressionZstd},
	} {
		f.Add(newImage(f, o).data)
	}
	m := newImage(f, CreateOptions{ClusterSize: 4096})
	h := mustParse(f, m)
	h.FeatureNames = standardFeatureNames
	h.Autoclear = AutoclearBitmaps
	h.Extensions = []Extension{{ExtBitmaps, make([]byte, 24)}, {ExtCrypto, make([]byte, 16)}, {ExtDataFile, []byte("data")}, {1, []byte("x")}}
	b, err := h.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append(b, m.data[len(b):]...))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > maxFuzzed {
			return
		}
		m := &memTarget{data: data}
		h, err := parse(m)
		if err != nil {
			if !errors.Is(err, block.ErrInvalid) && !errors.Is(err, block.ErrNotSupported) {
				t.Errorf("%v wraps neither ErrInvalid nor ErrNotSupported", err)
			}
			return
		}
		if h.RefcountTableOffset+h.RefcountTableEntries()*8 > m.Size()+h.ClusterSize() || int64(h.L1Size)*8 > m.Size() || h.L1Needed(h.Size) > int64(h.L1Size) {
			t.Errorf("tables out of bounds: %+v", h)
		}
		b, err := h.Marshal()
		if err != nil {
			return // made longer by padding, and too long now
		}
		again := &memTarget{data: append(b, make([]byte, max(m.Size()-int64(len(b)), 0))...)}
		h2, err := parse(again)
		if err != nil {
			t.Fatalf("marshalled header: %v", err)
		}
		// What a shorter header left out is zero.
		h.HeaderLength, h.Unknown, h2.Unknown = h2.HeaderLength, bytes.TrimRight(h.Unknown, "\x00"), bytes.TrimRight(h2.Unknown, "\x00")
		if d := cmp.Diff(h, h2, cmp.Transformer("empty", func(b []byte) string { return string(b) })); d != "" {
			t.Errorf("-parsed +marshalled and parsed:\n%s", d)
		}
	})
}

// tinyImage is an image of 512-byte clusters with data, zeroes, a compressed
// cluster, and a snapshot. It is made without tools, so that fuzzing needs none.
func tinyImage(t testing.TB, version uint32, order int) *memTarget {
	m := newImage(t, CreateOptions{Size: 64 << 10, ClusterSize: 512, Version: version, RefcountBits: 1 << order})
	h := mustParse(t, m)
	next := m.Size()
	m.data = append(m.data, make([]byte, 16*512)...)
	setWord(m, h.L1Offset, entryCopied|uint64(next))
	setWord(m, next, entryCopied|uint64(next+512))
	setWord(m, next+8, entryCopied|uint64(next+1024)|entryZero)
	setWord(m, next+16, entryCompressed|uint64(next+1600))
	setWord(m, next+24, entryZero)
	// A snapshot whose L1 table shares the L2 table.
	at, l1 := next+5*512, next+6*512
	setWord(m, at, uint64(l1))
	binary.BigEndian.PutUint32(m.data[at+8:], 2)
	copy(m.data[at+12:], []byte{0, 1, 0, 4})
	binary.BigEndian.PutUint32(m.data[at+36:], 24)
	setWord(m, at+48, 64<<10)
	copy(m.data[at+64:], "1name")
	setWord(m, l1, uint64(next))
	setField(t, m, "nb_snapshots", 1)
	setField(t, m, "snapshots_offset", uint64(at))
	setDirty(t, m)
	return m
}

func FuzzCheck(f *testing.F) {
	for order := range MaxRefcountOrder + 1 {
		f.Add(tinyImage(f, 3, order).data)
	}
	f.Add(tinyImage(f, 2, 4).data)
	bitmaps := tinyImage(f, 3, 4)
	h := mustParse(f, bitmaps)
	dir := bitmaps.Size()
	entry := make([]byte, 512)
	binary.BigEndian.PutUint64(entry, uint64(dir+512))
	entry[11], entry[16], entry[17], entry[19] = 1, 1, 16, 4
	copy(entry[24:], "name")
	ext := make([]byte, 24)
	ext[3], ext[15] = 1, 32
	binary.BigEndian.PutUint64(ext[16:], uint64(dir))
	h.Extensions, h.FeatureNames, h.Autoclear = []Extension{{ExtBitmaps, ext}}, nil, AutoclearBitmaps
	head, err := h.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	bitmaps.data = append(bitmaps.data, append(entry, make([]byte, 1024)...)...)
	setWord(bitmaps, dir+512, uint64(dir+1024))
	clear(bitmaps.data[:512])
	copy(bitmaps.data, head)
	f.Add(bitmaps.data)

	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > maxFuzzed {
			return
		}
		m := &memTarget{data: bytes.Clone(data)}
		h, err := parse(m)
		if err != nil {
			return
		}
		res, err := Check(context.Background(), m, h, func(string) {})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(m.data, data) {
			t.Fatal("the check changed the image")
		}
		snapshots, _ := ReadSnapshots(context.Background(), m, h)
		for i := range snapshots {
			_ = snapshots[i].Validate(h, m.Size())
		}
		if _, err := Inspect(context.Background(), m, h); err != nil && res.Corruptions == 0 {
			t.Errorf("no corruptions, but %v", err)
		}
		if _, err := RepairRefcounts(context.Background(), m, h); err != nil {
			if !bytes.Equal(m.data, data) {
				t.Error("a repair that was refused changed the image")
			}
			return
		}
		h, err = parse(m)
		if err != nil {
			t.Fatalf("after the repair: %v", err)
		}
		if res, err = Check(context.Background(), m, h, nil); err != nil || res.Corruptions+res.Leaks+res.CheckErrors != 0 || h.Dirty() {
			t.Errorf("after the repair: %+v, %v", *res, err)
		}
	})
}

func TestTinyImageIsRepaired(t *testing.T) {
	for order := 1; order <= MaxRefcountOrder; order++ {
		m := tinyImage(t, 3, order)
		repaired(t, "tiny", m)
		mustRun(t, "qemu-img", "check", "-q", "-f", "qcow2", saveTarget(t, m))
	}
}
