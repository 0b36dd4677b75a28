package hostdev

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

func TestReadNowaitReadsWhatIsInMemory(t *testing.T) {
	for name, dir := range map[string]string{"ext4 or the like": t.TempDir(), "tmpfs": tmpfs(t)} {
		path := filepath.Join(dir, "disk")
		data := make([]byte, 1<<20)
		for i := range data {
			data[i] = byte(i / 7)
		}
		newFile(t, path, data, int64(len(data)))
		n, r := opened(t, config(path))
		p := make([]byte, 300<<10)
		for _, size := range []int{1, 4096, 64 << 10, 300 << 10} {
			l := r.Locate(0, 5000, int64(size))
			if l.Kind != block.LocateData || !l.Stable || l.Length != int64(size) || l.Offset != 5000 {
				t.Fatalf("%s: location is %+v", name, l)
			}
			if k := l.File.ReadNowait(p[:size], l.Offset); k != size || !bytes.Equal(p[:k], data[5000:5000+k]) {
				t.Errorf("%s: %d of %d bytes read without waiting", name, k, size)
			}
		}
		if k := n.ReadNowait(p, 1<<20-100); k != 100 {
			t.Errorf("%s: %d bytes read at the end, want 100", name, k)
		}
		if fd := n.Fd(); fd < 0 {
			t.Errorf("%s: no descriptor for sendfile", name)
		}
	}
}

// cold drops a file from the page cache.
func cold(t testing.TB, n *node) {
	t.Helper()
	if err := errors.Join(unix.Fdatasync(n.fd), unix.Fadvise(n.fd, 0, 0, unix.FADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
}

func TestPrefetchMakesColdDataReadableWithoutWaiting(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	newFile(t, path, filled(7, 3<<20+100), 3<<20+100)
	n, r := opened(t, config(path))
	cold(t, n)
	p := make([]byte, 4096)
	missing := func() (pages int) {
		for off := int64(0); off+4096 <= n.Size(); off += 4096 {
			if n.ReadNowait(p, off) < 4096 {
				pages++
			}
		}
		return pages
	}
	// Each look may start readahead, so one page is looked at.
	if n.ReadNowait(p, 1<<20) == 4096 {
		t.Fatal("the file is still in memory")
	}
	do(t, r, func(ctx context.Context) error { return r.Prefetch(ctx, 100, n.Size()-100) })
	if k := missing(); k != 0 {
		t.Errorf("%d pages cannot be read without waiting after a prefetch", k)
	}
}

func TestDirectNodesAreAskedAndBypassTheCache(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	newFile(t, path, filled(7, 1<<20), 1<<20)
	cfg := config(path)
	cfg.Cache.Direct = true
	n, r := opened(t, cfg)
	cold(t, n)
	if l := r.Locate(0, 0, 4096); l.Kind != block.LocateAsk {
		t.Errorf("location is %+v, want ask", l)
	}
	if n.Fd() != -1 {
		t.Error("there is a descriptor for sendfile")
	}
	do(t, r, func(ctx context.Context) error { return r.ReadAt(ctx, make([]byte, 1<<20), 0) })
	if k, errno := readv2(n.tail, make([]byte, 4096), 1<<19, unix.RWF_NOWAIT); k > 0 && errno == 0 {
		t.Error("reading brought the data into the page cache")
	}
}

func TestDirectIOFromMisalignedMemory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	newFile(t, path, nil, 2<<20)
	cfg := config(path)
	cfg.Cache.Direct = true
	n, _ := opened(t, cfg)
	for _, size := range []int{4096, 1 << 20} {
		for _, skip := range []int{0, 1, 512} {
			b := block.GetBuffer(size + 512)
			p := b[skip : skip+size]
			for i := range p {
				p[i] = byte(i*7 + skip)
			}
			want := bytes.Clone(p)
			if err := n.WriteAt(ctx, p, 4096, block.FUA); err != nil {
				t.Fatal(err)
			}
			clear(p)
			if err := n.ReadAt(ctx, p, 4096); err != nil || !bytes.Equal(p, want) {
				t.Errorf("%d bytes of memory at %d past a page do not read as written, or: %v", size, skip, err)
			}
			block.PutBuffer(b)
		}
	}
}

// Requests reach a direct node in whole blocks; what its last block has past the end is dropped.
func TestLastBlockOfDirectFile(t *testing.T) {
	for _, dir := range []string{t.TempDir(), tmpfs(t)} {
		path := filepath.Join(dir, "disk")
		newFile(t, path, filled(3, 5000), 5000)
		cfg := config(path)
		cfg.Cache.Direct = true
		n, _ := opened(t, cfg)
		a := n.Limits().RequestAlignment
		size := roundUp(5000, a)
		if a < 512 {
			t.Fatalf("request alignment is %d", a)
		}
		for i := range 20 {
			p := block.GetBuffer(int(size))
			for k := range p {
				p[k] = byte(i)
			}
			if err := n.WriteAt(ctx, p, 0, block.FUA); err != nil {
				t.Fatal(err)
			}
			if err := n.ReadAt(ctx, p, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p, append(filled(byte(i), 5000), make([]byte, size-5000)...)) {
				t.Fatal("the last block does not read as written and padded with zeroes")
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, filled(byte(i), 5000)) {
				t.Fatalf("the file has %d bytes or other data (%v)", len(got), err)
			}
			block.PutBuffer(p)
		}
		if err := n.WriteZeroes(ctx, 0, size, 0); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, make([]byte, 5000)) || n.Size() != 5000 {
			t.Fatalf("the file has %d bytes or other data (%v)", len(got), err)
		}
	}
}

func TestParallelGrowthEndsAtTheFurthestByte(t *testing.T) {
	path := filepath.Join(tmpfs(t), "disk")
	newFile(t, path, nil, 0)
	n, r := opened(t, config(path))
	var wg sync.WaitGroup
	ends := make([]int64, 8)
	for w := range ends {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(w)))
			for range 200 {
				off, k := rng.Int64N(1<<20), rng.IntN(5000)+1
				var f func(ctx context.Context) error
				switch rng.IntN(3) {
				case 0:
					f = func(ctx context.Context) error { return r.WriteZeroes(ctx, off, int64(k), block.MayUnmap) }
				case 1:
					f = func(ctx context.Context) error { return r.WriteZeroes(ctx, off, int64(k), 0) }
				default:
					f = func(ctx context.Context) error { return r.WriteAt(ctx, filled(byte(w), k), off, 0) }
				}
				if err := r.Do(ctx, f); err != nil {
					t.Error(err)
				}
				ends[w] = max(ends[w], off+int64(k))
				if size := n.Size(); size < ends[w] {
					t.Errorf("size is %d after a write to %d", size, ends[w])
				}
			}
		})
	}
	wg.Wait()
	var want int64
	for _, end := range ends {
		want = max(want, end)
	}
	st, err := os.Stat(path)
	if err != nil || n.Size() != want || st.Size() != want {
		t.Errorf("node has %d bytes, file has %d, want %d (%v)", n.Size(), st.Size(), want, err)
	}
}

func TestFileTruncatedByOthersFailsReads(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	newFile(t, path, filled(1, 8192), 8192)
	for _, cache := range []block.CacheMode{buffered, direct} {
		newFile(t, path, filled(1, 8192), 8192)
		cfg := config(path)
		cfg.Cache = cache
		n, r := opened(t, cfg)
		if err := os.Truncate(path, 5000); err != nil {
			t.Fatal(err)
		}
		err := r.Do(ctx, func(ctx context.Context) error { return r.ReadAt(ctx, make([]byte, 8192), 0) })
		if block.Errno(err) != syscall.EIO || !strings.Contains(err.Error(), "ends at byte 5000") {
			t.Errorf("read: %v, want EIO and where the file ends", err)
		}
		x, err := n.BlockStatus(ctx, 8191, 1, true)
		if err != nil || x.Flags&block.StatusZero != 0 {
			t.Errorf("status of what is gone is %#x (%v), want no zeroes", x.Flags, err)
		}
		if err := n.Refresh(ctx); err != nil || n.Size() != 5000 {
			t.Errorf("refresh: %d, %v", n.Size(), err)
		}
		if err := os.Truncate(path, 9000); err != nil {
			t.Fatal(err)
		}
		if err := n.Refresh(ctx); err != nil || n.Size() != 9000 {
			t.Errorf("refresh of a grown file: %d, %v", n.Size(), err)
		}
	}
}

func TestDeviceRefusesToGrow(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	newFile(t, file, nil, 1<<20)
	dev := loopDevice(t, file, 512)
	n, _ := opened(t, config(dev))
	if err := n.WriteAt(ctx, filled(1, 1024), 1<<20-512, 0); !errors.Is(err, block.ErrNoSpace) {
		t.Errorf("write past the end: %v, want ErrNoSpace", err)
	}
	if err := n.WriteZeroes(ctx, 1<<20-512, 1024, 0); !errors.Is(err, block.ErrNoSpace) {
		t.Errorf("zero past the end: %v, want ErrNoSpace", err)
	}
	if err := n.Truncate(ctx, 1<<19); !errors.Is(err, block.ErrNotSupported) {
		t.Errorf("truncate: %v, want ErrNotSupported", err)
	}
	if err := n.Truncate(ctx, 1<<20); err != nil {
		t.Errorf("truncate to the size there is: %v", err)
	}
	// The device grows by itself.
	if err := os.Truncate(file, 2<<20); err != nil {
		t.Fatal(err)
	}
	command(t, "losetup", "--set-capacity", dev)
	if err := n.Refresh(ctx); err != nil || n.Size() != 2<<20 {
		t.Errorf("refresh of a grown device: %d, %v", n.Size(), err)
	}
}

func TestKernelWithoutDsyncFallsBackToFlush(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	newFile(t, path, nil, 1<<20)
	n, r := opened(t, config(path))
	fua := func(ctx context.Context) error { return r.WriteAt(ctx, filled(1, 4096), 0, block.FUA) }
	do(t, r, fua)
	if n.noDsync.Load() || n.flush.rounds.Load() != 0 {
		t.Errorf("a write with FUA needed %d flushes", n.flush.rounds.Load())
	}
	n.noDsync.Store(true)
	do(t, r, fua)
	if n.flush.rounds.Load() != 1 {
		t.Errorf("a write with FUA was followed by %d flushes, want 1", n.flush.rounds.Load())
	}
}

func TestRequestsDoNotAllocate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	newFile(t, path, filled(1, 1<<20), 1<<20)
	n, _ := opened(t, config(path))
	p := make([]byte, 4096)
	for name, f := range map[string]func(){
		"ReadNowait": func() { n.ReadNowait(p, 4096) },
		"Locate":     func() { n.Locate(0, 0, 4096) },
		"ReadAt":     func() { _ = n.ReadAt(ctx, p, 4096) },
		"WriteAt":    func() { _ = n.WriteAt(ctx, p, 4096, 0) },
		"FUA":        func() { _ = n.WriteAt(ctx, p, 4096, block.FUA) },
		"Flush":      func() { _ = n.Flush(ctx) },
		"Discard":    func() { _ = n.Discard(ctx, 0, 4096) },
		"Zeroes":     func() { _ = n.WriteZeroes(ctx, 0, 4096, block.MayUnmap) },
		"Status":     func() { _, _ = n.BlockStatus(ctx, 8192, 4096, true) },
	} {
		if k := testing.AllocsPerRun(20, f); k != 0 {
			t.Errorf("%s allocates %v times", name, k)
		}
	}
}

func BenchmarkRead4K(b *testing.B) {
	for name, dir := range map[string]string{"disk": b.TempDir(), "tmpfs": tmpfs(b)} {
		path := filepath.Join(dir, "disk")
		newFile(b, path, filled(1, 16<<20), 16<<20)
		n, _ := opened(b, config(path))
		p := make([]byte, 4096)
		off := func(i int) int64 { return int64(i) * 40960 & (16<<20 - 1) &^ 4095 }
		b.Run(name+"/ReadNowait", func(b *testing.B) {
			for i := range b.N {
				if n.ReadNowait(p, off(i)) != 4096 {
					b.Fatal("not in memory")
				}
			}
		})
		b.Run(name+"/pread", func(b *testing.B) {
			for i := range b.N {
				if k, err := pread(n.fd, p, off(i)); k != 4096 {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/ReadAt", func(b *testing.B) {
			for i := range b.N {
				if err := n.ReadAt(ctx, p, off(i)); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/WriteAt", func(b *testing.B) {
			for i := range b.N {
				if err := n.WriteAt(ctx, p, off(i), 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkReadNowait64K(b *testing.B) {
	path := filepath.Join(tmpfs(b), "disk")
	newFile(b, path, filled(1, 16<<20), 16<<20)
	n, _ := opened(b, config(path))
	p := make([]byte, 64<<10)
	b.SetBytes(64 << 10)
	for i := range b.N {
		if n.ReadNowait(p, int64(i)<<16&(16<<20-1)) != len(p) {
			b.Fatal("not in memory")
		}
	}
}
