package raw_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"github.com/nbdserve/nbdserve/formats/raw"
	"github.com/nbdserve/nbdserve/hostdev"
)

var ctx = context.Background()

// TestMain has fewer random runs than usual, unless there is time or the command line says otherwise.
func TestMain(m *testing.M) {
	if os.Getenv("NBDSERVE_LONG") == "" {
		if err := flag.Set("rapid.checks", "25"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// probe knows one other format.
func probe(head []byte) string {
	if bytes.HasPrefix(head, []byte("QFI\xfb")) {
		return "qcow2"
	}
	return "raw"
}

func newGraph(t blocktest.TB) *block.Graph {
	return blocktest.NewGraph(t, raw.Driver(probe), hostdev.FileDriver(), hostdev.DeviceDriver())
}

func config(o raw.Options, file *block.Config) *block.Config {
	return &block.Config{Driver: "raw", Unmap: true, Options: &o, Children: map[string]*block.Config{"file": file}}
}

// memory is a disk in memory that holds a pattern with holes.
func memory(size int64, limits block.Limits) (*block.Config, *blocktest.Store) {
	s := blocktest.NewStore(size)
	s.Write(bytes.Repeat([]byte{1, 2, 3}, int(size)/7), 1000)
	return &block.Config{Driver: "memory", Options: &blocktest.MemoryOptions{Store: s, Limits: limits}}, s
}

// window is what of contents belongs to the image.
func window(contents []byte, o raw.Options) []byte {
	contents = contents[o.Offset:]
	if o.Size > 0 {
		contents = contents[:o.Size]
	}
	return contents
}

func align(a int64) block.Limits {
	l := blocktest.AllFlags
	l.RequestAlignment = a
	return l
}

func TestConforms(t *testing.T) {
	for _, c := range []struct {
		name   string
		o      raw.Options
		limits block.Limits
		probed bool
	}{
		{"Whole", raw.Options{}, align(1), false},
		{"WholeAligned", raw.Options{}, align(4096), false},
		{"Probed", raw.Options{}, align(1), true},
		{"Offset", raw.Options{Offset: 1 << 12}, align(1), false},
		{"OffsetOdd", raw.Options{Offset: 12345}, align(1), false},
		{"OffsetOfHalfBlocks", raw.Options{Offset: 2048, Size: 90_000}, align(4096), false},
		{"OffsetOddProbed", raw.Options{Offset: 12345}, align(4096), true},
		{"Size", raw.Options{Size: 70_001}, align(1), false},
		{"OffsetAndSize", raw.Options{Offset: 777, Size: 70_001}, align(512), false},
		{"OffsetAndSizeProbed", raw.Options{Offset: 777, Size: 70_001}, align(1), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			blocktest.Conformance(t, blocktest.Factory{
				New: func(t blocktest.TB) blocktest.Subject {
					file, s := memory(100_001, c.limits)
					before := bytes.Clone(s.Bytes())
					cfg := config(c.o, file)
					cfg.Probed = c.probed
					return blocktest.Subject{
						Graph: newGraph(t), Config: cfg, Contents: bytes.Clone(window(before, c.o)),
						Verify: func(t blocktest.TB, contents []byte) {
							after := s.Bytes()
							copy(window(before, c.o), contents)
							if !bytes.Equal(after, before) {
								t.Errorf("bytes outside the window were changed, or some inside not")
							}
						},
					}
				},
				// What is no whole block needs writing, and the memory node says no to that.
				FastZero: c.limits.RequestAlignment == 1,
				Locates:  true,
				Holes:    true,
			})
		})
	}
}

func TestConformsOnFile(t *testing.T) {
	for _, c := range []struct {
		name   string
		o      raw.Options
		direct bool
	}{
		{"Whole", raw.Options{}, false},
		{"WholeDirect", raw.Options{}, true},
		{"Window", raw.Options{Offset: 5000, Size: 80_001}, false},
		{"WindowDirect", raw.Options{Offset: 5000, Size: 80_001}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, err := os.MkdirTemp("/dev/shm", "raw")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			var serial atomic.Int64
			blocktest.Conformance(t, blocktest.Factory{
				New: func(t blocktest.TB) blocktest.Subject {
					path := filepath.Join(dir, fmt.Sprint(serial.Add(1)))
					contents := append(bytes.Repeat([]byte{7}, 50_000), make([]byte, 50_001)...)
					writeFile(t, path, contents)
					t.Cleanup(func() { os.Remove(path) })
					cfg := config(c.o, fileConfig(path))
					cfg.Cache.Direct = c.direct
					return blocktest.Subject{Graph: newGraph(t), Config: cfg, Contents: window(contents, c.o)}
				},
				FastZero: !c.direct,
				Locates:  !c.direct,
				Holes:    true,
			})
		})
	}
}

func TestWholeFileConformsResizable(t *testing.T) {
	for _, o := range []raw.Options{{}, {Offset: 12345}} {
		t.Run(fmt.Sprint(o.Offset), func(t *testing.T) {
			blocktest.Conformance(t, blocktest.Factory{
				New: func(t blocktest.TB) blocktest.Subject {
					file, s := memory(100_001, align(1))
					return blocktest.Subject{Graph: newGraph(t), Config: config(o, file), Contents: bytes.Clone(window(s.Bytes(), o))}
				},
				FastZero: true, Locates: true, Resizes: true, Holes: true,
			})
		})
	}
}

func writeFile(t blocktest.TB, path string, contents []byte) {
	t.Helper()
	if err := os.WriteFile(path, contents, 0o600); err != nil {
		t.Fatalf("%v", err)
	}
}

func fileConfig(path string) *block.Config {
	return &block.Config{Driver: "file", Options: &hostdev.Options{Filename: path}}
}

// opened opens a node with a root that may do everything.
func opened(t *testing.T, cfg *block.Config) *block.Root {
	t.Helper()
	g := newGraph(t)
	n, err := g.Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermAll, Shared: block.PermAll})
	if err != nil {
		t.Fatal(errors.Join(err, g.Release(ctx, n)))
	}
	t.Cleanup(func() {
		if err := errors.Join(r.Detach(ctx), g.Release(ctx, n)); err != nil {
			t.Error(err)
		}
	})
	return r
}

func TestWindowMustLieInTheFile(t *testing.T) {
	for _, c := range []struct {
		o    raw.Options
		text string
	}{
		{raw.Options{Offset: 100_001}, "Offset (100001) cannot be greater than size of the containing file (100000)"},
		{raw.Options{Offset: 1<<63 - 1}, "Offset (9223372036854775807) cannot be greater than size of the containing file (100000)"},
		{raw.Options{Size: 100_001}, "The sum of offset (0) and size (100001) has to be smaller or equal to the actual size of the containing file (100000)"},
		{raw.Options{Offset: 1, Size: 100_000}, "The sum of offset (1) and size (100000) has to be smaller or equal"},
		{raw.Options{Offset: 50_000, Size: 1<<63 - 1}, "The sum of offset (50000) and size (9223372036854775807)"},
		{raw.Options{Offset: -1}, "cannot be negative"},
		{raw.Options{Size: -1}, "cannot be negative"},
	} {
		file, _ := memory(100_000, align(1))
		g := newGraph(t)
		n, err := g.Open(ctx, config(c.o, file))
		if err == nil {
			err = errors.Join(errors.New("it was opened"), g.Release(ctx, n))
		}
		if !strings.Contains(err.Error(), c.text) {
			t.Errorf("%+v: %v, want %s", c.o, err, c.text)
		}
	}
	file, _ := memory(100_000, align(1))
	if r := opened(t, config(raw.Options{Offset: 100_000}, file)); r.Size() != 0 {
		t.Errorf("a window of nothing has %d bytes", r.Size())
	}
}

func TestRoleOfTheFileTellsWhetherItIsTheWholeDisk(t *testing.T) {
	for o, want := range map[raw.Options]block.Role{
		{}:          block.RoleFiltered | block.RolePrimary,
		{Offset: 1}: block.RoleData | block.RolePrimary,
		{Size: 512}: block.RoleData | block.RolePrimary,
	} {
		file, _ := memory(100_000, align(1))
		if got := opened(t, config(o, file)).Node().Child("file").Role(); got != want {
			t.Errorf("%+v: role is %s, want %s", o, got, want)
		}
	}
}

func TestGuessedImageKeepsItsFormat(t *testing.T) {
	file, s := memory(100_001, align(1))
	cfg := config(raw.Options{}, file)
	cfg.Probed = true
	r := opened(t, cfg)
	if a := r.Limits().RequestAlignment; a != 512 {
		t.Errorf("request alignment is %d, want 512", a)
	}
	write := func(p []byte, off int64) error {
		return r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, p, off, 0) })
	}
	magic := append([]byte("QFI\xfb"), make([]byte, 2000)...)
	before := bytes.Clone(s.Bytes())
	for _, p := range [][]byte{magic, magic[:512], magic[:4]} {
		err := write(p, 0)
		if block.Errno(err) != syscall.EPERM || !strings.Contains(err.Error(), "qcow2") {
			t.Errorf("write of %d bytes: %v, want EPERM and the format", len(p), err)
		}
	}
	if !bytes.Equal(s.Bytes(), before) {
		t.Error("a refused write changed the image")
	}
	// Byte by byte it is refused with the last one.
	for i := range 3 {
		if err := write(magic[i:i+1], int64(i)); err != nil {
			t.Errorf("byte %d: %v", i, err)
		}
	}
	if err := write(magic[3:4], 3); block.Errno(err) != syscall.EPERM {
		t.Errorf("last byte of the magic: %v, want EPERM", err)
	}
	if err := write(magic, 512); err != nil {
		t.Errorf("magic in the second sector: %v", err)
	}
	err := r.Do(ctx, func(ctx context.Context) error {
		return errors.Join(r.WriteZeroes(ctx, 0, 1024, 0), r.Discard(ctx, 0, 512), r.WriteAt(ctx, make([]byte, 4096), 0, 0))
	})
	if err != nil {
		t.Error(err)
	}
}

func TestNamedFormatAllowsAnything(t *testing.T) {
	file, s := memory(100_000, align(1))
	r := opened(t, config(raw.Options{}, file))
	err := r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, []byte("QFI\xfb"), 0, 0) })
	if err != nil || !bytes.HasPrefix(s.Bytes(), []byte("QFI\xfb")) {
		t.Errorf("write: %v", err)
	}
}

func TestSizeFollowsTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	writeFile(t, path, make([]byte, 10_000))
	r := opened(t, config(raw.Options{Offset: 1000}, fileConfig(path)))
	file := r.Node().Child("file").Node().Instance().(block.Refresher)
	for _, size := range []int64{20_000, 500, 1001} {
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		if err := file.Refresh(ctx); err != nil {
			t.Fatal(err)
		}
		if got, want := r.Size(), max(0, size-1000); got != want {
			t.Errorf("file of %d bytes: size is %d, want %d", size, got, want)
		}
	}
	if err := r.Do(ctx, func(ctx context.Context) error { return r.Truncate(ctx, 3000) }); err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 4000 || r.Size() != 3000 {
		t.Errorf("file has %d bytes, image %d (%v)", st.Size(), r.Size(), err)
	}
}

func TestFixedWindowNeitherGrowsNorShrinks(t *testing.T) {
	file, _ := memory(100_000, align(1))
	r := opened(t, config(raw.Options{Size: 50_000}, file))
	err := r.Do(ctx, func(ctx context.Context) error { return r.Truncate(ctx, 1000) })
	if !errors.Is(err, block.ErrNotSupported) || !strings.Contains(err.Error(), "Cannot resize fixed-size raw disks") {
		t.Errorf("truncate: %v", err)
	}
	for name, f := range map[string]func(ctx context.Context) error{
		"write": func(ctx context.Context) error { return r.WriteAt(ctx, make([]byte, 512), 49_999, 0) },
		"zero":  func(ctx context.Context) error { return r.WriteZeroes(ctx, 49_999, 512, 0) },
	} {
		if err := r.Do(ctx, f); !errors.Is(err, block.ErrNoSpace) {
			t.Errorf("%s past the end: %v, want ErrNoSpace", name, err)
		}
	}
}

func TestLocatedDataIsAtTheOffsetOfTheWindow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	contents := make([]byte, 20_000)
	for i := range contents {
		contents[i] = byte(i / 3)
	}
	writeFile(t, path, contents)
	r := opened(t, config(raw.Options{Offset: 1000}, fileConfig(path)))
	l := r.Locate(0, 2000, 5000)
	if l.Kind != block.LocateData || !l.Stable || l.Offset != 3000 || l.Length != 5000 {
		t.Fatalf("location is %+v", l)
	}
	p := make([]byte, 5000)
	if n := l.File.ReadNowait(p, l.Offset); n != 5000 || !bytes.Equal(p, contents[3000:8000]) {
		t.Errorf("%d bytes were read, or others", n)
	}
}
