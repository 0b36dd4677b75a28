package qcow2

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/nbdserve/nbdserve/block"
)

func TestCreatedImagesAreSoundToQemuImg(t *testing.T) {
	for bits := MinClusterBits; bits <= MaxClusterBits; bits++ {
		for order := 0; order <= MaxRefcountOrder; order++ {
			opts := CreateOptions{Size: 100<<20 + 1, ClusterSize: 1 << bits, RefcountBits: 1 << order}
			path := imagePath(t, "a.qcow2")
			if err := Create(t.Context(), openTarget(t, path), opts); err != nil {
				t.Fatalf("%+v: %v", opts, err)
			}
			mustRun(t, "qemu-img", "check", "-q", path)
			info := qemuInfo(t, path)
			if info.VirtualSize != 100<<20+512 || info.ClusterSize != 1<<bits || info.FormatSpecific.Data["refcount-bits"] != float64(int(1)<<order) {
				t.Errorf("%+v: qemu-img says %+v", opts, info)
			}
		}
	}
}

func TestCreatedImagesCanBeWrittenByQemu(t *testing.T) {
	for _, opts := range []CreateOptions{
		{}, {Version: 2}, {ClusterSize: 512}, {ClusterSize: 512, RefcountBits: 64}, {ClusterSize: 2 << 20}, {RefcountBits: 1}, {Compression: CompressionZstd},
	} {
		opts.Size = 4 << 20
		path := imagePath(t, "a.qcow2")
		if err := Create(t.Context(), openTarget(t, path), opts); err != nil {
			t.Fatal(err)
		}
		mustRun(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4M", "-c", "read -P 1 0 4M", path)
		mustRun(t, "qemu-img", "check", "-q", path)
	}
}

func TestCreatedImageOfTheLargestSizeIsSound(t *testing.T) {
	for _, c := range []struct{ cluster, size int64 }{{512, 128 << 30}, {4096, 8 << 40}, {65536, 2 << 50}, {2 << 20, 1 << 60}} {
		path := imagePath(t, "a.qcow2")
		if err := Create(t.Context(), openTarget(t, path), CreateOptions{Size: c.size, ClusterSize: c.cluster}); err != nil {
			t.Fatal(err)
		}
		mustRun(t, "qemu-img", "check", "-q", path)
		if got := qemuInfo(t, path).VirtualSize; got != c.size {
			t.Errorf("size %d, want %d", got, c.size)
		}
	}
}

func TestCreatedImageNamesItsBackingFile(t *testing.T) {
	for _, version := range []uint32{2, 3} {
		path := imagePath(t, "a.qcow2")
		opts := CreateOptions{Size: 1 << 20, Version: version, BackingFile: "base.raw", BackingFormat: "raw"}
		if err := Create(t.Context(), openTarget(t, path), opts); err != nil {
			t.Fatal(err)
		}
		out := mustRun(t, "qemu-img", "info", path)
		if !strings.Contains(out, "backing file: base.raw") || !strings.Contains(out, "backing file format: raw") {
			t.Errorf("version %d: qemu-img says\n%s", version, out)
		}
	}
}

func TestCreateRefusesOptionsThatDoNotFit(t *testing.T) {
	for _, c := range []struct {
		opts CreateOptions
		want string
	}{
		{CreateOptions{Size: -1}, "image size -1"},
		{CreateOptions{Size: 1<<63 - 1}, "is out of range"},
		{CreateOptions{Size: 1 << 62}, "The image size is too large"},
		{CreateOptions{Size: 2<<50 + 1}, "The image size is too large (try using a larger cluster size)"},
		{CreateOptions{Version: 1}, "qcow2 version is 1"},
		{CreateOptions{Version: 4}, "qcow2 version is 4"},
		{CreateOptions{ClusterSize: 256}, "Cluster size must be a power of two between 512 and 2048k, not 256"},
		{CreateOptions{ClusterSize: 4 << 20}, "Cluster size must be a power of two"},
		{CreateOptions{ClusterSize: 1000}, "Cluster size must be a power of two"},
		{CreateOptions{ClusterSize: -512}, "Cluster size must be a power of two"},
		{CreateOptions{RefcountBits: 3}, "Refcount width must be a power of two"},
		{CreateOptions{RefcountBits: 128}, "Refcount width must be a power of two"},
		{CreateOptions{RefcountBits: -1}, "Refcount width must be a power of two"},
		{CreateOptions{RefcountBits: 8, Version: 2}, "Different refcount widths than 16 bits"},
		{CreateOptions{Compression: CompressionZstd, Version: 2}, "Non-zlib compression type"},
		{CreateOptions{Compression: 2}, "unknown compression type 2"},
		{CreateOptions{BackingFile: "a"}, `backing file "a" needs its format stated`},
		{CreateOptions{BackingFormat: "raw"}, `backing format "raw" without a backing file`},
		{CreateOptions{BackingFile: strings.Repeat("a", 1024), BackingFormat: "raw"}, "Backing file name too long: 1024 bytes"},
		{CreateOptions{BackingFile: strings.Repeat("a", 500), BackingFormat: "raw", ClusterSize: 512}, "qcow2 header exceeds cluster size"},
	} {
		m := &memTarget{data: []byte("untouched")}
		err := Create(t.Context(), m, c.opts)
		if err == nil || !strings.Contains(err.Error(), c.want) || !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%+v: %v, want %q", c.opts, err, c.want)
		}
		if string(m.data) != "untouched" {
			t.Errorf("%+v: the file was changed", c.opts)
		}
	}
}

// A device is a target of a fixed size.
type device struct{ *memTarget }

func (device) Truncate(context.Context, int64) error { return block.ErrNotSupported }

func TestCreateOverwritesADevice(t *testing.T) {
	d := device{&memTarget{data: []byte(strings.Repeat("x", 3<<20))}}
	if err := Create(t.Context(), d, CreateOptions{Size: 64 << 20, ClusterSize: 4096}); err != nil {
		t.Fatal(err)
	}
	if d.Size() != 3<<20 {
		t.Errorf("size %d", d.Size())
	}
	mustRun(t, "qemu-img", "check", "-q", saveTarget(t, d.memTarget))
	small := device{&memTarget{data: make([]byte, 4096)}}
	if err := Create(t.Context(), small, CreateOptions{Size: 64 << 20}); !errors.Is(err, block.ErrNoSpace) {
		t.Errorf("device too small: %v", err)
	}
}

func TestCreateCutShortLeavesNoImage(t *testing.T) {
	for _, fixed := range []bool{false, true} {
		var flushed, now []byte
		m := newImage(t, CreateOptions{Size: 8 << 20, ClusterSize: 512})
		m.data = append(m.data, make([]byte, 1<<20)...)
		writes := 0
		m.log = func(op string, off int64, p []byte) {
			now = append(now[:0], m.data...)
			if op == "flush" {
				flushed = append(flushed[:0], now...)
				return
			}
			if writes++; writes > 1 && off != 0 {
				if _, err := parse(&memTarget{data: now}); err == nil {
					t.Errorf("fixed %v: an image before write %d at %d", fixed, writes, off)
				}
			}
			if off == 0 && writes > 1 && string(flushed) != string(now) {
				t.Errorf("fixed %v: the header is written before all else is durable", fixed)
			}
		}
		var target Target = m
		if fixed {
			target = device{m}
		}
		if err := Create(t.Context(), target, CreateOptions{Size: 8 << 20, ClusterSize: 512}); err != nil {
			t.Fatal(err)
		}
		if _, err := parse(m); err != nil || writes == 0 {
			t.Error(err)
		}
	}
}

func TestCreateWithoutSpaceFails(t *testing.T) {
	for _, op := range []string{"write", "flush", "truncate"} {
		err := Create(t.Context(), failingTarget{newImage(t, CreateOptions{}), op}, CreateOptions{Size: 1 << 20})
		if !errors.Is(err, errFailed) {
			t.Errorf("%s fails: %v", op, err)
		}
	}
}

var errFailed = fmt.Errorf("failed on purpose: %w", block.ErrNoSpace)

// A failingTarget fails one of its operations.
type failingTarget struct {
	*memTarget
	op string
}

func (f failingTarget) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	if f.op == "write" {
		return errFailed
	}
	return f.memTarget.WriteAt(ctx, p, off, flags)
}

func (f failingTarget) Flush(ctx context.Context) error {
	if f.op == "flush" {
		return errFailed
	}
	return f.memTarget.Flush(ctx)
}

func (f failingTarget) Truncate(ctx context.Context, size int64) error {
	if f.op == "truncate" {
		return errFailed
	}
	return f.memTarget.Truncate(ctx, size)
}
