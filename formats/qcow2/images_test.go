package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"pgregory.net/rapid"
)

func TestImagesOfQemuImgReadAsItReadsThem(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "source")
	const size = 3 << 20
	contents := make([]byte, size)
	copy(contents[100000:], pattern(1, 900000))
	copy(contents[1<<20:], strings.Repeat("compress me ", 100000))
	writeFile(t, source, contents)
	for _, opts := range []string{
		"compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=4096,refcount_bits=1", "cluster_size=2M,refcount_bits=64",
		"compat=0.10,compressed", "compat=1.1,compressed", "cluster_size=512,compressed", "cluster_size=2M,compressed",
		"compression_type=zstd,compressed", "compression_type=zstd,compressed,cluster_size=4096", "compression_type=zstd,compressed,cluster_size=2M",
		"preallocation=metadata", "preallocation=full",
	} {
		t.Run(opts, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image")
			args := []string{"convert", "-O", "qcow2"}
			if rest, ok := strings.CutSuffix(opts, ",compressed"); ok || strings.Contains(opts, ",compressed,") {
				args = append(args, "-c", "-o", strings.Replace(rest, ",compressed,", ",", 1))
			} else {
				args = append(args, "-o", opts)
			}
			mustRun(t, "qemu-img", append(args, source, path)...)
			data := bytes.Clone(contents)
			d := openDisk(t, testGraph(t), imageNode(path))
			d.compare(data)
			// Written over, it still reads and checks.
			d.write(data[100000:300001], 1<<20+5)
			copy(data[1<<20+5:], data[100000:300001])
			d.write([]byte("x"), size-1)
			data[size-1] = 'x'
			d.compare(data)
			d.close()
			checkFile(t, path)
			raw := filepath.Join(t.TempDir(), "raw")
			writeFile(t, raw, data)
			mustRun(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, raw)
		})
	}
}

// A chain is an image file with a backing image, and the bytes that it should hold.
type chain struct {
	t         *rapid.T
	dir       string
	path      string
	cfg       *block.Config
	disk      *disk
	model     []byte
	snapshots map[string][]byte

	maxSnapshots int
}

// TestRandomRequestsThroughABackingChain does what a guest and its host do, and
// lets qemu-img judge the image each time it is closed.
func TestRandomRequestsThroughABackingChain(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(t.TempDir(), "chain")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		c := newChain(t, rt, dir)
		c.disk = openDisk(rt, testGraph(rt), c.cfg)
		rt.Repeat(map[string]func(*rapid.T){
			"write":   c.write,
			"zero":    c.zero,
			"discard": c.discard,
			"read":    c.read,
			"flush":   func(*rapid.T) { c.disk.flush() },
			"reopen": func(*rapid.T) {
				c.disk.close()
				c.judge(t)
				c.disk.open()
			},
			"snapshot": func(*rapid.T) { c.snapshot(t) },
		})
		c.disk.compare(c.model)
		c.disk.close()
		c.judge(t)
		rawPath := filepath.Join(dir, "raw")
		writeFile(t, rawPath, c.model)
		mustRun(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", c.path, rawPath)
	})
}

func newChain(t *testing.T, rt *rapid.T, dir string) *chain {
	clusterBits := rapid.SampledFrom([]int{9, 9, 10, 12, 16}).Draw(rt, "cluster bits")
	order := rapid.IntRange(0, 6).Draw(rt, "refcount order")
	version := rapid.SampledFrom([]string{"1.1", "1.1", "0.10"}).Draw(rt, "compat")
	if version == "0.10" {
		order = 4
	}
	size := int64(rapid.IntRange(1, 600).Draw(rt, "sectors")) * 512
	c := &chain{t: rt, dir: dir, path: filepath.Join(dir, "top"), snapshots: map[string][]byte{}}
	c.model = make([]byte, size)
	args := []string{"create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("compat=%s,cluster_size=%d,refcount_bits=%d", version, 1<<clusterBits, 1<<order)}
	// A cluster may belong to the disk and to all snapshots.
	c.maxSnapshots = int(min(3, RefcountMax(uint32(order))-1))
	if backing := int64(rapid.IntRange(0, 700).Draw(rt, "backing sectors")) * 512; backing > 0 {
		base := pattern(5, backing)
		clear(base[backing/3 : backing/2])
		copy(c.model, base)
		writeFile(t, filepath.Join(dir, "base.raw"), base)
		format := rapid.SampledFrom([]string{"qcow2", "raw", "compressed"}).Draw(rt, "backing format")
		name := "base.raw"
		if format != "raw" {
			name = "base.qcow2"
			convert := []string{"convert", "-q", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096"}
			if format == "compressed" {
				convert = append(convert, "-c")
			}
			mustRun(t, "qemu-img", append(convert, filepath.Join(dir, "base.raw"), filepath.Join(dir, name))...)
			format = "qcow2"
		}
		args = append(args, "-b", name, "-F", format)
	}
	mustRun(t, "qemu-img", append(args, c.path, fmt.Sprint(size))...)
	c.cfg = imageNode(c.path)
	c.cfg.Options = &Options{L2CacheSize: 1, RefcountCacheSize: 1}
	c.cfg.Cache.NoFlush = true // no power is cut here
	return c
}

func (c *chain) rng(rt *rapid.T) (off, n int64) {
	off = rapid.Int64Range(0, int64(len(c.model))-1).Draw(rt, "offset")
	n = rapid.Int64Range(1, int64(len(c.model))-off).Draw(rt, "length")
	if rapid.Bool().Draw(rt, "short") {
		n = min(n, 3000)
	}
	return off, n
}

func (c *chain) write(rt *rapid.T) {
	off, n := c.rng(rt)
	p := pattern(rapid.Uint64().Draw(rt, "seed"), n)
	flags := block.ReqFlags(0)
	if rapid.Bool().Draw(rt, "fua") {
		flags = block.FUA
	}
	c.disk.must(func(ctx context.Context) error { return c.disk.root.WriteAt(ctx, p, off, flags) })
	copy(c.model[off:], p)
}

func (c *chain) zero(rt *rapid.T) {
	off, n := c.rng(rt)
	flags := rapid.SampledFrom([]block.ReqFlags{0, block.MayUnmap, block.FUA | block.MayUnmap}).Draw(rt, "flags")
	c.disk.must(func(ctx context.Context) error { return c.disk.root.WriteZeroes(ctx, off, n, flags) })
	clear(c.model[off : off+n])
}

// discard may leave bytes or zero them; the model learns which.
func (c *chain) discard(rt *rapid.T) {
	off, n := c.rng(rt)
	c.disk.must(func(ctx context.Context) error { return c.disk.root.Discard(ctx, off, n) })
	got := c.disk.read(off, n)
	for i, b := range got {
		if b != c.model[off+int64(i)] && b != 0 {
			rt.Fatalf("byte %d is %#x after a discard, was %#x", off+int64(i), b, c.model[off+int64(i)])
		}
	}
	copy(c.model[off:], got)
}

func (c *chain) read(rt *rapid.T) {
	off, n := c.rng(rt)
	if i := firstDifference(c.disk.read(off, n), c.model[off:off+n]); i >= 0 {
		rt.Fatalf("byte %#x differs", off+int64(i))
	}
}

func (c *chain) snapshot(t *testing.T) {
	if len(c.snapshots) >= c.maxSnapshots {
		return
	}
	c.disk.close()
	name := fmt.Sprintf("snap%d", len(c.snapshots))
	mustRun(t, "qemu-img", "snapshot", "-c", name, c.path)
	c.snapshots[name] = append([]byte(nil), c.model...)
	c.disk.open()
}

// judge lets qemu-img look at the closed image.
func (c *chain) judge(t *testing.T) {
	checkFile(t, c.path)
	for name, want := range c.snapshots {
		out := filepath.Join(c.dir, name)
		mustRun(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", name, c.path, out)
		got, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		if i := firstDifference(got, want); i >= 0 || len(got) != len(want) {
			c.t.Fatalf("snapshot %s has changed at byte %#x", name, i)
		}
	}
}
