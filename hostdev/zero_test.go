package hostdev

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

// allocated is how many bytes of storage a file has.
func allocated(t testing.TB, fd int) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestZeroedWithoutMayUnmapIsProvisioned(t *testing.T) {
	const size = 20 << 20 // more than a zeroPiece
	for name, dir := range map[string]string{"ext4": mounted(t, "ext4"), "xfs": mounted(t, "xfs"), "tmpfs": tmpfs(t)} {
		path := filepath.Join(dir, "disk")
		newFile(t, path, filled(1, 1<<20), size)
		n, _ := opened(t, config(path))
		for _, flags := range []block.ReqFlags{0, block.NoFallback} {
			if err := n.WriteZeroes(ctx, 100, size-200, flags); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if got := allocated(t, n.fd); got < size-8192 {
				t.Errorf("%s: %d of %d bytes are provisioned", name, got, size)
			}
			if err := n.WriteZeroes(ctx, 0, size, flags|block.MayUnmap); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if got := allocated(t, n.fd); got > 64<<10 {
				t.Errorf("%s: %d bytes are allocated after MayUnmap", name, got)
			}
		}
	}
}

func TestZeroPastTheEndGrowsTheFile(t *testing.T) {
	for name, dir := range map[string]string{"disk": t.TempDir(), "tmpfs": tmpfs(t)} {
		for _, cache := range []block.CacheMode{buffered, direct} {
			for _, flags := range []block.ReqFlags{0, block.MayUnmap} {
				path := filepath.Join(dir, "disk")
				newFile(t, path, filled(1, 8192), 8192)
				cfg := config(path)
				cfg.Cache = cache
				n, _ := opened(t, cfg)
				for _, r := range [][2]int64{{4096, 8192}, {20480, 4096}} {
					if err := n.WriteZeroes(ctx, r[0], r[1], flags); err != nil {
						t.Fatal(err)
					}
				}
				want := append(filled(1, 4096), make([]byte, 20480)...)
				if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) || n.Size() != 24576 {
					t.Errorf("%s %+v flags %#x: size %d, file has %d bytes or other data (%v)", name, cache, flags, n.Size(), len(got), err)
				}
			}
		}
	}
}

func TestFileSystemWithoutZeroingIsRememberedAndUnchanged(t *testing.T) {
	path := filepath.Join(mounted(t, "ext2"), "disk")
	data := filled(1, 1<<20)
	newFile(t, path, data, 1<<20)
	n, r := opened(t, config(path))
	for range 2 {
		if err := n.WriteZeroes(ctx, 0, 8192, block.NoFallback); err != block.ErrNotSupported {
			t.Fatalf("zero: %v, want ErrNotSupported", err)
		}
	}
	if !n.lacks.zeroRange.Load() || !n.lacks.allocate.Load() {
		t.Error("what is lacking was not remembered")
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
		t.Errorf("a refused zero changed the file (%v)", err)
	}
	do(t, r, func(ctx context.Context) error { return r.WriteZeroes(ctx, 0, 8192, 0) })
	clear(data[:8192])
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the fallback did not zero (%v)", err)
	}
}

func TestDeviceZeroAndDiscard(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		file := filepath.Join(t.TempDir(), "disk")
		newFile(t, file, filled(1, 1<<20), 1<<20)
		dev := loopDevice(t, file, sector)
		n, _ := opened(t, config(dev))
		want := filled(1, 1<<20)
		if got := n.Limits().LogicalBlockSize; got != int64(sector) {
			t.Fatalf("logical block size is %d, want %d", got, sector)
		}
		check := func(what string) {
			t.Helper()
			got := make([]byte, 1<<20)
			if err := n.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("sector %d: after %s the device holds something else (%v)", sector, what, err)
			}
		}
		for i, flags := range []block.ReqFlags{0, block.MayUnmap, block.MayUnmap | block.NoFallback, block.NoFallback} {
			off, length := int64(i)<<16+100, int64(40_000)
			err := n.WriteZeroes(ctx, off, length, flags)
			if err != nil && !(errors.Is(err, block.ErrNotSupported) && flags&block.NoFallback != 0) {
				t.Fatalf("zero with flags %#x: %v", flags, err)
			}
			if err == nil {
				clear(want[off : off+length])
			}
			check("zeroing")
		}
		if err := n.Discard(ctx, 512<<10+100, 100_000); err != nil && !errors.Is(err, block.ErrNotSupported) {
			t.Fatal(err)
		}
		first, last := roundUp(512<<10+100, int64(sector)), roundDown(512<<10+100_100, int64(sector))
		if err := n.ReadAt(ctx, want[first:last], first); err != nil { // whatever it is now
			t.Fatal(err)
		}
		check("discarding")
	}
}

func TestDiscardFreesStorage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	newFile(t, path, filled(1, 4<<20), 4<<20)
	n, r := opened(t, config(path))
	do(t, r, func(ctx context.Context) error { return r.Discard(ctx, 0, 4<<20) })
	if got := allocated(t, n.fd); got > 64<<10 {
		t.Errorf("%d bytes are allocated after a discard of everything", got)
	}
	if n.Size() != 4<<20 {
		t.Errorf("size is %d", n.Size())
	}
}

func TestStatusOfDataComesFromMemoryUntilDiscarded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	newFile(t, path, filled(1, 1<<20), 4<<20)
	n, _ := opened(t, config(path))
	status := func(off, length int64) block.Extent {
		t.Helper()
		x, err := n.BlockStatus(ctx, off, length, true)
		if err != nil {
			t.Fatal(err)
		}
		if x.File != n.self || x.Offset != off || x.Flags&block.StatusOffset == 0 {
			t.Errorf("extent at %d is stored at %d of %v", off, x.Offset, x.File)
		}
		return x
	}
	for off := int64(0); off < 1<<20; off += 1 << 16 {
		if x := status(off, 1<<16); x.Flags&block.StatusData == 0 || x.Length != 1<<16 {
			t.Errorf("status at %d is %+v, want data", off, x)
		}
	}
	if hits := n.status.hits.Load(); hits != 15 {
		t.Errorf("%d of 16 answers came from memory, want 15", hits)
	}
	if x := status(1<<20, 3<<20); x.Flags&block.StatusZero == 0 || x.Length != 3<<20 {
		t.Errorf("status of the hole is %+v", x)
	}
	if err := n.Discard(ctx, 1<<16, 1<<16); err != nil {
		t.Fatal(err)
	}
	if x := status(1<<16, 1<<20); x.Flags&block.StatusZero == 0 || x.Length != 1<<16 {
		t.Errorf("status of what was discarded is %+v", x)
	}
	// A hole that somebody else fills is seen at once.
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{1}, 2<<20); err != nil {
		t.Fatal(err)
	}
	if x := status(2<<20, 1); x.Flags&block.StatusData == 0 {
		t.Errorf("status of a filled hole is %+v", x)
	}
}

// An extent that was found before a hole was made must not be kept after it.
func TestStatusCacheDropsWhatIsFoundMeanwhile(t *testing.T) {
	var c statusCache
	gen := c.gen.Load()
	c.invalidate()
	c.store(gen, 0, 100)
	if _, ok := c.lookup(50); ok {
		t.Error("a stale extent was kept")
	}
	c.store(c.gen.Load(), 0, 100)
	if end, ok := c.lookup(50); !ok || end != 100 {
		t.Error("a fresh extent was not kept")
	}
	if _, ok := c.lookup(100); ok {
		t.Error("an extent answers past its end")
	}
	c.invalidate()
	if _, ok := c.lookup(50); ok {
		t.Error("an extent survived")
	}
}

// Item 119: what was zeroed without MayUnmap is provisioned and told so, where the
// file system can tell; what was never written or was unmapped is a hole.
func TestStatusTellsProvisionedZeroesFromHoles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	newFile(t, path, filled(1, 1<<20), 4<<20)
	n, r := opened(t, config(path))
	do(t, r, func(ctx context.Context) error { return r.WriteZeroes(ctx, 2<<20, 256<<10, 0) })
	do(t, r, func(ctx context.Context) error { return r.WriteZeroes(ctx, 512<<10, 256<<10, block.MayUnmap) })
	const data, zero = block.StatusData, block.StatusZero
	for _, want := range []struct {
		off, length int64
		flags       block.StatusFlags
	}{
		{0, 512 << 10, data},
		{512 << 10, 256 << 10, zero},
		{768 << 10, 256 << 10, data},
		{1 << 20, 1 << 20, zero},
		{2 << 20, 256 << 10, data | zero},
		{2<<20 + 64<<10, 192 << 10, data | zero},
		{2<<20 + 256<<10, 2<<20 - 256<<10, zero},
	} {
		x, err := n.BlockStatus(ctx, want.off, 4<<20-want.off, true)
		if err != nil {
			t.Fatal(err)
		}
		if x.Flags&(data|zero) != want.flags || x.Length != want.length {
			t.Errorf("status at %d is %+v, want flags %d for %d bytes", want.off, x, want.flags, want.length)
		}
	}
}
