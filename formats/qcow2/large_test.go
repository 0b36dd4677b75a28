package qcow2

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block"
)

func TestRefcountTableGrowsWithTheFile(t *testing.T) {
	for _, bits := range []int{64, 16, 1} {
		s := emptyStore(t, CreateOptions{Size: 40 << 20, ClusterSize: 512, RefcountBits: bits})
		m := &memTarget{data: s.Bytes()}
		before := mustParse(t, m).RefcountTableClusters
		d := openDisk(t, testGraph(t), storeNode(s, nil))
		data := pattern(1, 20<<20)
		for off := 0; off < len(data); off += 1 << 20 {
			d.write(data[off:off+1<<20], int64(off)+3)
		}
		if got := d.read(3, int64(len(data))); firstDifference(got, data) >= 0 {
			t.Errorf("%d bits: the disk does not hold what was written", bits)
		}
		d.close()
		checkStore(t, s, false)
		after := mustParse(t, &memTarget{data: s.Bytes()}).RefcountTableClusters
		if bits == 64 && after <= before {
			t.Errorf("the refcount table has %d clusters still", after)
		}
	}
}

// hugeFile is an image file of 1 TiB with nothing in it.
func hugeFile(t testing.TB, opts CreateOptions) string {
	t.Helper()
	opts.Size = 1 << 40
	path := filepath.Join(t.TempDir(), "huge")
	writeFile(t, path, newImage(t, opts).data)
	return path
}

func TestStatusOfAnEmptyTerabyteIsOneExtentAtOnce(t *testing.T) {
	d := openDisk(t, testGraph(t), imageNode(hugeFile(t, CreateOptions{})))
	d.must(func(ctx context.Context) error {
		x, err := d.root.BlockStatus(ctx, 0, 1<<40, true)
		if x.Length != 1<<40 || x.Flags&block.StatusZero == 0 {
			t.Errorf("%+v", x)
		}
		return err
	})
}

// TestTrimOfATerabyteLetsOthersThrough writes while a large range is given up.
func TestTrimOfATerabyteLetsOthersThrough(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	writeFile(t, base, newImage(t, CreateOptions{Size: 1 << 40}).data)
	top := filepath.Join(dir, "top")
	writeFile(t, top, newImage(t, CreateOptions{Size: 1 << 40, BackingFile: base, BackingFormat: "qcow2"}).data)
	cfg := imageNode(top)
	cfg.Cache.NoFlush = true
	d := openDisk(t, testGraph(t), cfg)
	start := time.Now()
	done := make(chan error)
	go func() {
		done <- d.do(func(ctx context.Context) error {
			return d.root.WriteZeroes(ctx, 0, 1<<40, block.MayUnmap|block.NoFallback)
		})
	}()
	var worst time.Duration
	writes := 0
	for running := true; running; writes++ {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		default:
		}
		begin := time.Now()
		d.write([]byte("x"), 1<<40-1-int64(writes)*65536)
		worst = max(worst, time.Since(begin))
	}
	t.Logf("zeroing 1 TiB took %v; the slowest of %d writes meanwhile %v", time.Since(start), writes, worst)
	if writes < 10 {
		t.Errorf("only %d writes got through", writes)
	}
	d.close()
	checkFile(t, top)
	// 128 MiB of L2 tables, and the clusters that were written.
	if fi, err := os.Stat(top); err != nil || fi.Size() > 140<<20+int64(writes)*65536 {
		t.Errorf("the file has %d bytes (%v)", fi.Size(), err)
	}
}

func TestMissedSlicesAreReadOnceAndTheCacheIsBounded(t *testing.T) {
	s := emptyStore(t, CreateOptions{Size: 64 << 20, ClusterSize: 4096})
	cfg := storeNode(s, nil)
	cfg.Options = &Options{L2CacheSize: 64 << 10}
	d := openDisk(t, testGraph(t), cfg)
	for off := int64(0); off < 64<<20; off += 1 << 20 {
		d.write([]byte(fmt.Sprint("here is ", off)), off)
	}
	d.flush()
	if n := d.image().l2.size(); n != 64<<10 {
		t.Errorf("the cache has %d bytes", n)
	}
	misses := d.image().misses.Load()
	for range 3 {
		for off := int64(0); off < 64<<20; off += 1 << 20 {
			want := fmt.Sprint("here is ", off)
			if got := d.read(off, int64(len(want))); string(got) != want {
				t.Fatalf("at %d: %q", off, got)
			}
		}
	}
	if d.image().misses.Load() == misses {
		t.Error("more slices than the cache holds were read without a miss")
	}
	d.close()
	checkStore(t, s, false)
}

func TestLocateDoesNotAllocate(t *testing.T) {
	s := emptyStore(t, CreateOptions{Size: 64 << 20})
	d := openDisk(t, testGraph(t), storeNode(s, nil))
	d.write(pattern(1, 1<<20), 0)
	if n := testing.AllocsPerRun(1000, func() { d.image().lookup(300000, 4096) }); n != 0 {
		t.Errorf("%v allocations a lookup", n)
	}
	for _, off := range []int64{0, 2 << 20, 32 << 20} {
		if n := testing.AllocsPerRun(1000, func() { d.root.Locate(1, off, 4096) }); n != 0 {
			t.Errorf("%v allocations to locate %d", n, off)
		}
	}
}

// benchDisk is an image file with 256 MiB of data in the page cache.
func benchDisk(b *testing.B) *disk {
	path := filepath.Join(b.TempDir(), "image")
	writeFile(b, path, newImage(b, CreateOptions{Size: 1 << 40}).data)
	d := openDisk(b, testGraph(b), imageNode(path))
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(i) | 1
	}
	for off := int64(0); off < 256<<20; off += 1 << 20 {
		d.write(data, off)
	}
	d.flush()
	return d
}

func BenchmarkLocateHot(b *testing.B) {
	d := benchDisk(b)
	im := d.image()
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		off := int64(i) * 40503 * 4096 & (256<<20 - 1)
		if l := im.Locate(1, off, 4096); l.Kind != block.LocateData {
			b.Fatalf("%+v", l)
		}
	}
}

func BenchmarkLookupHot(b *testing.B) {
	d := benchDisk(b)
	im := d.image()
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		off := int64(i) * 40503 * 4096 & (256<<20 - 1)
		if _, hit := im.lookup(off, 4096); !hit {
			b.Fatal("missed")
		}
	}
}

func BenchmarkReadHot(b *testing.B) {
	d := benchDisk(b)
	p := make([]byte, 4096)
	ctx := block.WithShard(context.Background(), 1)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		if err := d.root.ReadAt(ctx, p, int64(i)*40503*4096&(256<<20-1)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWriteInPlace(b *testing.B) {
	d := benchDisk(b)
	p := make([]byte, 4096)
	ctx := block.WithShard(context.Background(), 1)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		if err := d.root.WriteAt(ctx, p, int64(i)*40503*4096&(256<<20-1), 0); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWriteAllocating(b *testing.B) {
	d := benchDisk(b)
	p := make([]byte, 4096)
	ctx := block.WithShard(context.Background(), 1)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		if err := d.root.WriteAt(ctx, p, 512<<20+int64(i)*65536, 0); err != nil {
			b.Fatal(err)
		}
	}
}
