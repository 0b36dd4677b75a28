package qcow2

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// damaged is an image of 1 MiB, half of it written, with an entry of its tables changed.
func damaged(t *testing.T, version uint32, change func(m *memTarget, h *Header)) *blocktest.Store {
	t.Helper()
	s := emptyStore(t, CreateOptions{ClusterSize: 4096, Version: version})
	d := openDisk(t, testGraph(t), storeNode(s, nil))
	d.write(pattern(1, 512<<10), 0)
	d.close()
	m := &memTarget{data: s.Bytes()}
	change(m, mustParse(t, m))
	return blocktest.StoreOf(m.data)
}

func firstL2(m *memTarget, h *Header) int64 { return L1Entry(word(m, h.L1Offset)).Offset() }

func TestInvalidEntriesDisableAWritableImage(t *testing.T) {
	ctx := context.Background()
	entries := map[string]func(m *memTarget, h *Header){
		"L2 reserved bit": func(m *memTarget, h *Header) { setWord(m, firstL2(m, h), word(m, firstL2(m, h))|2) },
		"L2 misaligned":   func(m *memTarget, h *Header) { setWord(m, firstL2(m, h), word(m, firstL2(m, h))|512) },
		"L2 entry over the header": func(m *memTarget, h *Header) {
			m.data[firstL2(m, h)+7] = 0
			setWord(m, firstL2(m, h), 1<<63|uint64(h.L1Offset))
		},
		"L2 entry over the refcounts": func(m *memTarget, h *Header) { setWord(m, firstL2(m, h), 1<<63|uint64(h.RefcountTableOffset)) },
		"L2 entry over its own table": func(m *memTarget, h *Header) { setWord(m, firstL2(m, h), 1<<63|uint64(firstL2(m, h))) },
		"L2 entry past the end":       func(m *memTarget, h *Header) { setWord(m, firstL2(m, h), 1<<63|1<<40) },
		"L1 reserved bit":             func(m *memTarget, h *Header) { setWord(m, h.L1Offset, word(m, h.L1Offset)|1) },
		"L1 misaligned":               func(m *memTarget, h *Header) { setWord(m, h.L1Offset, word(m, h.L1Offset)|512) },
		"L1 past the end":             func(m *memTarget, h *Header) { setWord(m, h.L1Offset, 1<<63|1<<40) },
		"L1 over the header's tables": func(m *memTarget, h *Header) { setWord(m, h.L1Offset, 1<<63|uint64(h.RefcountTableOffset)) },
	}
	for name, change := range entries {
		for _, version := range []uint32{2, 3} {
			t.Run(fmt.Sprintf("%s, version %d", name, version), func(t *testing.T) {
				s := damaged(t, version, change)
				before := s.Clone()
				d := openDisk(t, testGraph(t), storeNode(s, nil))
				err := d.do(func(ctx context.Context) error { return d.root.WriteAt(ctx, []byte("data"), 100, 0) })
				if !errors.Is(err, block.ErrCorrupt) || !errors.Is(err, syscall.EIO) {
					t.Fatalf("write: %v", err)
				}
				for what, f := range map[string]func(context.Context) error{
					"read":    func(ctx context.Context) error { return d.root.ReadAt(ctx, make([]byte, 1), 500<<10) },
					"write":   func(ctx context.Context) error { return d.root.WriteAt(ctx, make([]byte, 1), 500<<10, 0) },
					"discard": func(ctx context.Context) error { return d.root.Discard(ctx, 0, 1<<20) },
					"zero":    func(ctx context.Context) error { return d.root.WriteZeroes(ctx, 0, 4096, block.MayUnmap) },
					"flush":   d.root.Flush,
				} {
					if err := d.do(f); !errors.Is(err, block.ErrCorrupt) {
						t.Errorf("%s after fatal corruption: %v", what, err)
					}
				}
				// Detach and Release flush, which fails too.
				if err := errors.Join(d.root.Detach(ctx), d.graph.Release(ctx, d.node)); !errors.Is(err, block.ErrCorrupt) {
					t.Errorf("close: %v", err)
				}
				d.node = nil
				m := &memTarget{data: s.Bytes()}
				h := mustParse(t, m)
				if h.Corrupt() != (version == 3) {
					t.Errorf("the corrupt bit is %t", h.Corrupt())
				}
				if version == 3 {
					m.data[incompatibleOffset+7] &^= byte(IncompatCorrupt)
				}
				if i := firstDifference(m.data, before.Bytes()); i >= 0 {
					t.Errorf("byte %#x of the image was changed", i)
				}
			})
		}
	}
}

func TestInvalidEntriesOfAReadOnlyImageFailOnlyTheirReads(t *testing.T) {
	s := damaged(t, 3, func(m *memTarget, h *Header) { setWord(m, firstL2(m, h), word(m, firstL2(m, h))|2) })
	before := s.Bytes()
	cfg := storeNode(s, nil)
	cfg.ReadOnly = true
	d := openDisk(t, testGraph(t), cfg)
	if err := d.do(func(ctx context.Context) error { return d.root.ReadAt(ctx, make([]byte, 1), 0) }); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("read: %v", err)
	}
	if got := d.read(4096, 4096); firstDifference(got, pattern(1, 8192)[4096:]) >= 0 {
		t.Error("the next cluster does not read as it was written")
	}
	d.close()
	if firstDifference(s.Bytes(), before) >= 0 {
		t.Error("a read-only node changed the image")
	}
}

func TestRefcountsThatAreTooLowAreNoticedBeforeMetadataIsOverwritten(t *testing.T) {
	s := damaged(t, 3, func(m *memTarget, h *Header) { setRefcount(m, h, firstL2(m, h)>>h.ClusterBits, 0) })
	d := openDisk(t, testGraph(t), storeNode(s, nil))
	err := d.do(func(ctx context.Context) error { return d.root.WriteAt(ctx, []byte("new"), 600<<10, 0) })
	if !errors.Is(err, block.ErrCorrupt) {
		t.Fatalf("write: %v", err)
	}
	err = errors.Join(d.root.Detach(context.Background()), d.graph.Release(context.Background(), d.node))
	if !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("close: %v", err)
	}
	d.node = nil
}

func TestCorruptAndDirtyImages(t *testing.T) {
	s := damaged(t, 3, func(m *memTarget, h *Header) { m.data[incompatibleOffset+7] |= byte(IncompatCorrupt) })
	g := testGraph(t)
	if _, err := g.Open(context.Background(), storeNode(s, nil)); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("a corrupt image is opened for writing: %v", err)
	}
	cfg := storeNode(s, nil)
	cfg.ReadOnly = true
	d := openDisk(t, g, cfg)
	if firstDifference(d.read(0, 4096), pattern(1, 4096)) >= 0 {
		t.Error("a corrupt image does not read as it was written")
	}

	s = damaged(t, 3, func(m *memTarget, h *Header) {
		m.data[incompatibleOffset+7] |= byte(IncompatDirty)
		m.data[autoclearOffset] = 0x80 // a feature of the future
		setRefcount(m, h, firstL2(m, h)>>h.ClusterBits, 0)
		setRefcount(m, h, int64(len(m.data))>>h.ClusterBits-1, 0)
	})
	d = openDisk(t, testGraph(t), storeNode(s, nil))
	d.write(pattern(2, 400<<10), 600<<10)
	want := append(pattern(1, 512<<10), make([]byte, 512<<10)...)
	copy(want[600<<10:], pattern(2, 400<<10))
	d.compare(want)
	d.close()
	checkStore(t, s, false)
	if h := mustParse(t, &memTarget{data: s.Bytes()}); h.Dirty() || h.Autoclear != 0 {
		t.Errorf("dirty is %t, autoclear features are %#x", h.Dirty(), h.Autoclear)
	}
}

func TestBadCompressedDataIsAnErrorOfItsClusterOnly(t *testing.T) {
	for _, kind := range []string{"zlib", "zstd"} {
		dir := t.TempDir()
		data := []byte(strings.Repeat("words and words ", 65536/16*4))
		writeFile(t, filepath.Join(dir, "raw"), data)
		path := filepath.Join(dir, "image")
		mustRun(t, "qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type="+kind, filepath.Join(dir, "raw"), path)
		m := loadTarget(t, path)
		h := mustParse(t, m)
		off, n := L2Entry(word(m, firstL2(m, h)+8)).CompressedRange(h.ClusterBits)
		for i := off; i < min(off+n-512, int64(len(m.data))); i++ {
			m.data[i] = 0xff
		}
		if n < 512 {
			m.data[off] = 0xff
		}
		d := openDisk(t, testGraph(t), storeNode(blocktest.StoreOf(m.data), nil))
		for range 2 { // an error is not cached as contents
			if err := d.do(func(ctx context.Context) error { return d.root.ReadAt(ctx, make([]byte, 10), 65536+5) }); !errors.Is(err, block.ErrCorrupt) {
				t.Errorf("%s: read of a bad cluster: %v", kind, err)
			}
		}
		if firstDifference(d.read(0, 65536), data[:65536]) >= 0 {
			t.Errorf("%s: a good cluster does not read", kind)
		}
		d.close()
	}
}

func TestBackingFilesThatAreRefused(t *testing.T) {
	dir := t.TempDir()
	image := func(name, backing, format string) string {
		path := filepath.Join(dir, name)
		m := newImage(t, CreateOptions{BackingFile: backing, BackingFormat: format})
		writeFile(t, path, m.data)
		return path
	}
	noFormat := newImage(t, CreateOptions{BackingFile: "base", BackingFormat: "raw"})
	h := mustParse(t, noFormat)
	h.BackingFormat = ""
	raw, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	clear(noFormat.data[:1024])
	copy(noFormat.data, raw)
	writeFile(t, filepath.Join(dir, "noformat"), noFormat.data)
	image("loop1", "loop2", "qcow2")
	image("loop2", "loop1", "qcow2")
	if err := os.Symlink("self", filepath.Join(dir, "other")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		filepath.Join(dir, "noformat"):                 "qemu-img rebase",
		image("json", `json:{"driver":"null"}`, "raw"): "json:",
		image("nbd", "nbd://localhost/x", "raw"):       "Could not open backing file: Unknown protocol 'nbd'",
		filepath.Join(dir, "loop1"):                    "loop",
		image("self", "self", "qcow2"):                 "loop",
		image("link", "other", "qcow2"):                "loop",
		image("missing", "is not there", "qcow2"):      "is not there",
		image("vmdk", "base", "vmdk"):                  "vmdk",
		image("protocol", "base", "file"):              "file",
		image("empty", "file:", "raw"):                 "no file name",
	} {
		_, err := testGraph(t).Open(context.Background(), imageNode(name))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error that says %q", filepath.Base(name), err, want)
		}
	}
	cfg := imageNode(image("refused", "base", "raw"))
	cfg.Options = &Options{RefuseBacking: true}
	if _, err := testGraph(t).Open(context.Background(), cfg); !errors.Is(err, block.ErrPermission) {
		t.Errorf("refused backing file: %v", err)
	}
}

func TestBackingChainIsBounded(t *testing.T) {
	dir := t.TempDir()
	for i := range maxChain + 1 {
		opts := CreateOptions{ClusterSize: 512, Size: 4096}
		if i > 0 {
			opts.BackingFile, opts.BackingFormat = fmt.Sprint(i-1), "qcow2"
		}
		writeFile(t, filepath.Join(dir, fmt.Sprint(i)), newImage(t, opts).data)
	}
	open := func(i int) error {
		g := testGraph(t)
		cfg := imageNode(filepath.Join(dir, fmt.Sprint(i)))
		cfg.Options = &Options{L2CacheSize: 1}
		n, err := g.Open(context.Background(), cfg)
		if err != nil {
			return err
		}
		return g.Release(context.Background(), n)
	}
	if err := open(maxChain - 1); err != nil {
		t.Errorf("a chain of %d images: %v", maxChain, err)
	}
	if err := open(maxChain); err == nil {
		t.Errorf("a chain of %d images is opened", maxChain+1)
	}
}

// Metadata that overlaps is refused before anything is written: a refcount block
// that is full and in every place of the table, for example, would keep the search
// for a free cluster busy for hours.
func TestOverlappingMetadataIsRefusedForWriting(t *testing.T) {
	for name, change := range map[string]func(m *memTarget, h *Header){
		"refcount block in two places": func(m *memTarget, h *Header) {
			setWord(m, h.RefcountTableOffset+8, word(m, h.RefcountTableOffset))
		},
		"refcount block over the L1 table": func(m *memTarget, h *Header) {
			setWord(m, h.RefcountTableOffset+8, uint64(h.L1Offset))
		},
		"L1 table over the refcount table": func(m *memTarget, h *Header) {
			setWord(m, 40, uint64(h.RefcountTableOffset))
		},
	} {
		s := damaged(t, 3, change)
		before := s.Clone()
		g := testGraph(t)
		_, err := g.Open(context.Background(), storeNode(s, nil))
		if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "overlaps") {
			t.Errorf("%s: open: %v", name, err)
		}
		if firstDifference(s.Bytes(), before.Bytes()) >= 0 {
			t.Errorf("%s: the image was changed", name)
		}
		cfg := storeNode(s, nil)
		cfg.ReadOnly = true
		openDisk(t, g, cfg)
	}
}

// Discarding a guest cluster that is mapped to metadata keeps the metadata.
func TestDiscardNeverGivesMetadataBack(t *testing.T) {
	for name, place := range map[string]func(m *memTarget, h *Header) int64{
		"L1 table":       func(_ *memTarget, h *Header) int64 { return h.L1Offset },
		"refcount table": func(_ *memTarget, h *Header) int64 { return h.RefcountTableOffset },
		"L2 table":       firstL2,
	} {
		var off int64
		s := damaged(t, 3, func(m *memTarget, h *Header) {
			off = place(m, h)
			setWord(m, firstL2(m, h), 1<<63|uint64(off))
		})
		before := s.Bytes()
		d := openDisk(t, testGraph(t), storeNode(s, nil))
		d.must(func(ctx context.Context) error { return d.root.Discard(ctx, 0, 4096) })
		ctx := context.Background()
		if err := errors.Join(d.root.Detach(ctx), d.graph.Release(ctx, d.node)); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("%s: close: %v", name, err)
		}
		d.node = nil
		m := &memTarget{data: s.Bytes()}
		keeps := off
		if name == "L2 table" {
			keeps += 8 // the entry that was discarded
		}
		if firstDifference(m.data[keeps:off+4096], before[keeps:off+4096]) >= 0 {
			t.Errorf("%s: it was given back to the file", name)
		}
	}
}

// Zeroing an entry that is not valid is an error, not a success that leaves it as it is.
func TestZeroingAnInvalidEntryIsAnError(t *testing.T) {
	s := damaged(t, 3, func(m *memTarget, h *Header) { setWord(m, firstL2(m, h), word(m, firstL2(m, h))|2) })
	d := openDisk(t, testGraph(t), storeNode(s, nil))
	err := d.do(func(ctx context.Context) error { return d.root.WriteZeroes(ctx, 0, 8192, block.MayUnmap) })
	if !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("write zeroes: %v", err)
	}
	ctx := context.Background()
	if err := errors.Join(d.root.Detach(ctx), d.graph.Release(ctx, d.node)); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("close: %v", err)
	}
	d.node = nil
}
