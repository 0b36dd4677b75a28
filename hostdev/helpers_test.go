package hostdev

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
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

// command runs a program and returns its output.
func command(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, &stderr)
	}
	return strings.TrimSpace(string(out))
}

// tmpfs returns a directory in memory that is removed at the end of the test.
func tmpfs(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "hostdev")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// mounted makes a file system of some kind in a file and mounts it. It needs root.
func mounted(t testing.TB, kind string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), kind+".img")
	newFile(t, image, nil, 400<<20)
	args := map[string][]string{"xfs": {"-q"}, "btrfs": {"-q"}, "ext4": {"-q"}, "ext2": {"-q"}}[kind]
	command(t, "mkfs."+kind, append(args, image)...)
	dir := t.TempDir()
	command(t, "mount", "-o", "loop", image, dir)
	t.Cleanup(func() { command(t, "umount", "--lazy", dir) })
	return dir
}

// newFile makes a file that begins with data and has size bytes.
func newFile(t blocktest.TB, path string, data []byte, size int64) {
	t.Helper()
	err := os.WriteFile(path, data, 0o600)
	if err == nil {
		err = os.Truncate(path, size)
	}
	if err != nil {
		t.Fatalf("%v", err)
	}
}

// loopDevice makes a device of a file. It needs root.
func loopDevice(t testing.TB, file string, sector int) string {
	t.Helper()
	dev := command(t, "losetup", "--find", "--show", "--sector-size", fmt.Sprint(sector), file)
	t.Cleanup(func() { command(t, "losetup", "-d", dev) })
	return dev
}

func newGraph(t blocktest.TB) *block.Graph {
	return blocktest.NewGraph(t, FileDriver(), DeviceDriver())
}

func config(path string) *block.Config {
	driver := "file"
	if isDevice(path) > 0 {
		driver = "host_device"
	}
	return &block.Config{Driver: driver, Unmap: true, Options: &Options{Filename: path}}
}

// opened opens a node with a root that may do everything and shares all.
func opened(t testing.TB, cfg *block.Config) (*node, *block.Root) {
	t.Helper()
	g := newGraph(t)
	n, err := g.Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	perm := block.PermConsistentRead
	if !cfg.ReadOnly {
		perm |= block.PermWrite | block.PermResize
	}
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: perm, Shared: block.PermAll})
	if err != nil {
		t.Fatal(errors.Join(err, g.Release(ctx, n)))
	}
	t.Cleanup(func() {
		err := errors.Join(r.Detach(ctx), g.Release(ctx, n))
		var flush *FlushError
		if err != nil && !errors.As(err, &flush) {
			t.Error(err)
		}
	})
	return n.Instance().(*node), r
}

// do runs one request.
func do(t testing.TB, r *block.Root, f func(ctx context.Context) error) {
	t.Helper()
	if err := r.Do(ctx, f); err != nil {
		t.Fatal(err)
	}
}

func filled(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

var serial atomic.Int64

// disks makes subjects for the conformance suite: files of size bytes in dir, half of them a hole.
func disks(dir string, size int64, cache block.CacheMode) func(t blocktest.TB) blocktest.Subject {
	return func(t blocktest.TB) blocktest.Subject {
		path := filepath.Join(dir, fmt.Sprint("disk", serial.Add(1)))
		data := filled(0x5c, int(size/2))
		newFile(t, path, data, size)
		t.Cleanup(func() { os.Remove(path) })
		cfg := config(path)
		cfg.Cache = cache
		contents := append(data, make([]byte, size-int64(len(data)))...)
		return blocktest.Subject{Graph: newGraph(t), Config: cfg, Contents: contents, Verify: func(t blocktest.TB, want []byte) {
			got, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("the file holds something else than the node, or: %v", err)
			}
		}}
	}
}

// devices makes subjects of one device, which is written anew for each.
func devices(dev string, size int64, cache block.CacheMode) func(t blocktest.TB) blocktest.Subject {
	return func(t blocktest.TB) blocktest.Subject {
		contents := append(filled(0x5c, int(size/2)), make([]byte, size-size/2)...)
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err == nil {
			_, err = f.WriteAt(contents, 0)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			t.Fatalf("%v", err)
		}
		cfg := config(dev)
		cfg.Cache = cache
		return blocktest.Subject{Graph: newGraph(t), Config: cfg, Contents: contents}
	}
}
