package block_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// logged opens a disk of size bytes that records what reaches the driver, with a
// root that may write.
func logged(t *testing.T, size int64, change func(*block.Config, *block.Limits)) (*block.Root, *blocktest.Log) {
	t.Helper()
	l := blocktest.NewLog(blocktest.StoreOf(bytes.Repeat([]byte{0x77}, int(size))))
	c := blocktest.CrashConfig(l)
	change(c, &c.Options.(*blocktest.CrashOptions).Limits)
	n := opened(t, newGraph(t), c)
	return attached(t, n, "test", rd|wr, rd), l
}

func asIs(*block.Config, *block.Limits) {}

// reached lists what reached the driver since the last call.
func reached(l *blocktest.Log, from *int) []string {
	var list []string
	all := l.Entries()
	for _, e := range all[*from:] {
		fua := ""
		if e.FUA {
			fua = " fua"
		}
		if e.Op == blocktest.OpFlush {
			list = append(list, "flush")
			continue
		}
		list = append(list, fmt.Sprintf("%s%s %d+%d", e.Op, fua, e.Off, e.Len))
	}
	*from = len(all)
	return list
}

func must(t blocktest.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%v", err)
	}
}

func wantReached(t *testing.T, l *blocktest.Log, from *int, want ...string) {
	t.Helper()
	if got := reached(l, from); !slices.Equal(got, want) {
		t.Errorf("the driver got %q, want %q", got, want)
	}
}

func TestFUAIsPassedOnOrEmulatedByAFlush(t *testing.T) {
	r, l := logged(t, 4096, asIs)
	from := 0
	must(t, r.WriteAt(ctx, []byte{1}, 0, block.FUA))
	must(t, r.WriteZeroes(ctx, 0, 512, block.FUA))
	wantReached(t, l, &from, "write fua 0+1", "zero fua 0+512")

	r, l = logged(t, 4096, func(_ *block.Config, lim *block.Limits) { lim.WriteFlags, lim.ZeroFlags = 0, 0 })
	from = 0
	must(t, r.WriteAt(ctx, []byte{1}, 0, block.FUA))
	must(t, r.WriteZeroes(ctx, 0, 512, block.FUA))
	must(t, r.WriteAt(ctx, []byte{1}, 0, 0))
	wantReached(t, l, &from, "write 0+1", "flush", "zero 0+512", "flush", "write 0+1")
}

func TestEmulatedFUAOfASplitWriteFlushesAfterTheLastPart(t *testing.T) {
	r, l := logged(t, 4096, func(_ *block.Config, lim *block.Limits) { lim.WriteFlags, lim.MaxTransfer = 0, 1024 })
	from := 0
	must(t, r.WriteAt(ctx, make([]byte, 2500), 0, block.FUA))
	wantReached(t, l, &from, "write 0+1024", "write 1024+1024", "write 2048+452", "flush")
}

func TestWriteThroughRootMakesEachWriteDurable(t *testing.T) {
	l := blocktest.NewLog(blocktest.NewStore(4096))
	n := opened(t, newGraph(t), blocktest.CrashConfig(l))
	r, err := n.Graph().AttachRoot(ctx, block.RootConfig{User: "x", Node: n, Perm: rd | wr, Shared: rd, WriteThrough: true})
	must(t, err)
	defer detach(t, r)
	from := 0
	must(t, r.WriteAt(ctx, []byte{1}, 0, 0))
	must(t, r.WriteZeroes(ctx, 0, 512, 0))
	wantReached(t, l, &from, "write fua 0+1", "zero fua 0+512")
}

func TestZeroFallsBackToWriting(t *testing.T) {
	s := blocktest.StoreOf(bytes.Repeat([]byte{9}, 200_000))
	c := blocktest.MemoryConfig(s)
	c.Options.(*blocktest.MemoryOptions).NoZero = true
	n := opened(t, newGraph(t), c)
	r := attached(t, n, "x", rd|wr, rd)
	if err := r.WriteZeroes(ctx, 0, 512, block.NoFallback); !errors.Is(err, block.ErrNotSupported) {
		t.Errorf("no fallback: %v", err)
	}
	if !bytes.Equal(s.Bytes(), bytes.Repeat([]byte{9}, 200_000)) {
		t.Errorf("a refused zero request changed the disk")
	}
	must(t, r.WriteZeroes(ctx, 100, 150_000, block.MayUnmap))
	want := bytes.Repeat([]byte{9}, 200_000)
	clear(want[100:150_100])
	if !bytes.Equal(s.Bytes(), want) {
		t.Errorf("the range is not zero, or more is")
	}
}

// A driver may refuse NoFallback for one part of a split request when an earlier
// part is done; refusing the whole is too late then.
func TestZeroRefusedHalfwayIsFinished(t *testing.T) {
	s := blocktest.StoreOf(bytes.Repeat([]byte{9}, 8192))
	c := blocktest.MemoryConfig(s)
	c.Options.(*blocktest.MemoryOptions).Limits.MaxZero = 1024
	faults := new(blocktest.Faults)
	faults.Add(blocktest.Fault{Op: blocktest.OpZero, Skip: 2, Err: block.ErrNotSupported})
	n := opened(t, newGraph(t), blocktest.FaultConfig(faults, c))
	r := attached(t, n, "x", rd|wr, rd)
	err := r.WriteZeroes(ctx, 0, 8192, block.NoFallback)
	zero := block.IsZero(s.Bytes())
	same := bytes.Equal(s.Bytes(), bytes.Repeat([]byte{9}, 8192))
	if err == nil && !zero || errors.Is(err, block.ErrNotSupported) && !same {
		t.Errorf("error %v; all zero %t, unchanged %t", err, zero, same)
	}
}

func TestUnmapIsUpToTheNode(t *testing.T) {
	r, l := logged(t, 4096, func(c *block.Config, _ *block.Limits) { c.Unmap = false })
	from := 0
	must(t, r.WriteZeroes(ctx, 0, 512, block.MayUnmap))
	must(t, r.Discard(ctx, 0, 512))
	wantReached(t, l, &from, "zero 0+512")

	r, l = logged(t, 4096, asIs)
	from = 0
	must(t, r.WriteZeroes(ctx, 0, 512, block.MayUnmap))
	must(t, r.WriteZeroes(ctx, 0, 512, 0))
	must(t, r.Discard(ctx, 0, 1024))
	wantReached(t, l, &from, "discard 0+512", "zero 0+512", "discard 0+1024")
}

func TestDiscardThatTheDriverCannotDoIsNoError(t *testing.T) {
	for _, change := range []func(*blocktest.MemoryOptions){
		func(o *blocktest.MemoryOptions) { o.NoDiscard = true },
		func(o *blocktest.MemoryOptions) { o.Bare = true },
	} {
		s := blocktest.StoreOf(bytes.Repeat([]byte{9}, 4096))
		c := blocktest.MemoryConfig(s)
		change(c.Options.(*blocktest.MemoryOptions))
		r := attached(t, opened(t, newGraph(t), c), "x", rd|wr, rd)
		must(t, r.Discard(ctx, 0, 4096))
		if !bytes.Equal(s.Bytes(), bytes.Repeat([]byte{9}, 4096)) {
			t.Errorf("the disk changed")
		}
	}
}

func TestZeroesAreDetected(t *testing.T) {
	for mode, want := range map[block.DetectZeroes][]string{
		block.DetectZeroesOff:   {"write 0+512", "write fua 512+512", "write 0+4096"},
		block.DetectZeroesOn:    {"zero 0+512", "zero fua 512+512", "write 0+4096"},
		block.DetectZeroesUnmap: {"discard 0+512", "discard fua 512+512", "write 0+4096"},
	} {
		r, l := logged(t, 4096, func(c *block.Config, _ *block.Limits) { c.DetectZeroes = mode })
		from := 0
		must(t, r.WriteAt(ctx, make([]byte, 512), 0, 0))
		must(t, r.WriteAt(ctx, make([]byte, 512), 512, block.FUA))
		p := make([]byte, 4096)
		p[4095] = 1
		must(t, r.WriteAt(ctx, p, 0, 0))
		wantReached(t, l, &from, want...)
	}
}

func TestDetectedZeroesNeedNoMorePermissionThanTheWrite(t *testing.T) {
	c := blocktest.MemoryConfig(blocktest.NewStore(4096))
	c.DetectZeroes = block.DetectZeroesOn
	r := attached(t, opened(t, newGraph(t), c), "copier", rd|wu, all)
	must(t, r.WriteAt(ctx, make([]byte, 512), 0, block.WriteUnchanged))
}

func TestLargeRequestsAreSplit(t *testing.T) {
	r, l := logged(t, 10_000, func(_ *block.Config, lim *block.Limits) {
		lim.MaxTransfer, lim.MaxZero, lim.MaxDiscard = 4096, 2048, 8192
	})
	from := 0
	must(t, r.WriteAt(ctx, make([]byte, 9000), 100, block.FUA))
	wantReached(t, l, &from, "write fua 100+4096", "write fua 4196+4096", "write fua 8292+808")
	must(t, r.WriteZeroes(ctx, 100, 5000, 0))
	wantReached(t, l, &from, "zero 100+2048", "zero 2148+2048", "zero 4196+904")
	must(t, r.Discard(ctx, 0, 10_000))
	wantReached(t, l, &from, "discard 0+8192", "discard 8192+1808")
	must(t, r.ReadAt(ctx, make([]byte, 10_000), 0)) // the driver checks the parts
}

func TestUnalignedWritesRewriteOnlyTheirFirstAndLastBlock(t *testing.T) {
	r, l := logged(t, 1<<16, func(_ *block.Config, lim *block.Limits) { lim.RequestAlignment = 4096 })
	from := 0
	must(t, r.WriteAt(ctx, make([]byte, 10), 5000, 0))
	wantReached(t, l, &from, "write 4096+4096")
	must(t, r.WriteAt(ctx, make([]byte, 20_000), 5000, 0))
	wantReached(t, l, &from, "write 4096+4096", "write 8192+16384", "write 24576+4096")
	must(t, r.WriteAt(ctx, make([]byte, 8192), 8192, 0))
	wantReached(t, l, &from, "write 8192+8192")
	must(t, r.WriteZeroes(ctx, 5000, 20_000, 0))
	wantReached(t, l, &from, "zero 8192+16384", "write 4096+4096", "write 24576+4096")
	must(t, r.Discard(ctx, 5000, 20_000))
	wantReached(t, l, &from, "discard 8192+16384")
	must(t, r.Discard(ctx, 5000, 20))
	wantReached(t, l, &from)
}

// Neighbours in one block write at the same time, through a driver that takes
// whole blocks only: no write may undo another.
func TestParallelUnalignedWritersLoseNothing(t *testing.T) {
	for _, align := range []int64{512, 4096} {
		s := blocktest.NewStore(16 * align)
		c := blocktest.MemoryConfig(s)
		c.Options.(*blocktest.MemoryOptions).Limits.RequestAlignment = align
		r := attached(t, opened(t, newGraph(t), c), "x", rd|wr, rd)
		const workers = 8
		model := make([]byte, 16*align)
		errs := make(chan error, workers)
		for w := range int64(workers) {
			go func() {
				rng := rand.New(rand.NewPCG(uint64(align), uint64(w)))
				stripe := align / 4
				var err error
				for range 300 {
					at := (rng.Int64N(int64(len(model))/stripe/workers)*workers + w) * stripe
					off := at + rng.Int64N(stripe)
					n := rng.Int64N(at+stripe-off) + 1
					p := model[off : off+n]
					for i := range p {
						p[i] = byte(rng.Uint32())
					}
					if rng.IntN(5) == 0 {
						clear(p)
						err = errors.Join(err, r.WriteZeroes(ctx, off, n, block.MayUnmap))
					} else {
						err = errors.Join(err, r.WriteAt(ctx, p, off, 0))
					}
				}
				errs <- err
			}()
		}
		for range workers {
			must(t, <-errs)
		}
		if !bytes.Equal(s.Bytes(), model) {
			t.Errorf("alignment %d: a write was lost", align)
		}
	}
}

func TestTailOfARootIsPaddedWithZeroes(t *testing.T) {
	s := blocktest.StoreOf(bytes.Repeat([]byte{7}, 5000))
	c := blocktest.MemoryConfig(s)
	c.Options.(*blocktest.MemoryOptions).Limits.RequestAlignment = 512
	n := opened(t, newGraph(t), c)
	r := attached(t, n, "x", rd|wr, rd)
	if n.Size() != 5000 || r.Size() != 5120 {
		t.Fatalf("sizes %d and %d", n.Size(), r.Size())
	}
	p := bytes.Repeat([]byte{1}, 620)
	must(t, r.ReadAt(ctx, p, 4500))
	if !bytes.Equal(p[:500], bytes.Repeat([]byte{7}, 500)) || !block.IsZero(p[500:]) {
		t.Errorf("the tail reads wrong")
	}
	err := r.WriteAt(ctx, bytes.Repeat([]byte{8}, 512), 4608, 0)
	if !errors.Is(err, syscall.EPERM) || s.Bytes()[4608] != 7 {
		t.Errorf("write into the padding: %v", err)
	}
	must(t, r.WriteAt(ctx, append(bytes.Repeat([]byte{8}, 392), make([]byte, 120)...), 4608, 0))
	if s.Size() != 5000 || s.Bytes()[4999] != 8 {
		t.Errorf("size %d after a write of zeroes into the padding", s.Size())
	}
	must(t, r.WriteZeroes(ctx, 4608, 512, 0))
	must(t, r.Discard(ctx, 0, 5120))
	if s.Size() != 5000 {
		t.Errorf("size %d", s.Size())
	}
	var end int64
	for off := int64(0); off < 5120; off = end {
		e, err := r.BlockStatus(ctx, off, 5120-off, true)
		must(t, err)
		if end = off + e.Length; end == 5120 && e.Flags&block.StatusEOF == 0 {
			t.Errorf("the last extent has flags %#x", e.Flags)
		}
	}
	if _, err := r.BlockStatus(ctx, 5120, 1, true); !errors.Is(err, block.ErrRange) {
		t.Errorf("status past the end: %v", err)
	}
	if l := r.Locate(0, 5000, 120); l.Kind == block.LocateData {
		t.Errorf("the padding was located in the file")
	}
}

// chain opens layers of "cow" nodes over each other, the last one without backing,
// and returns them with the contents that each one shows, and the layer that decides each byte.
func chain(t *testing.T, rng *rand.Rand, sizes []int64) (*block.Node, []byte, []int) {
	t.Helper()
	var cfg *block.Config
	var show []byte
	var depth []int
	for i := len(sizes) - 1; i >= 0; i-- {
		o := &cowOptions{size: sizes[i], data: map[int64][]byte{}}
		shown, deep := make([]byte, sizes[i]), make([]int, sizes[i])
		for at := int64(0); at < sizes[i]; at += cowBlock {
			end := min(at+cowBlock, sizes[i])
			switch rng.IntN(4) {
			case 0:
				d := make([]byte, cowBlock)
				for k := range d {
					d[k] = byte(rng.Uint32() | 1)
				}
				o.data[at/cowBlock] = d
				copy(shown[at:end], d)
			case 1:
				o.data[at/cowBlock] = nil
			default:
				for k := at; k < end; k++ {
					switch {
					case cfg == nil: // nothing below
					case k < int64(len(show)):
						shown[k], deep[k] = show[k], depth[k]+1
					default:
						deep[k] = 1
					}
				}
			}
		}
		show, depth = shown, deep
		cfg = cowConfig(fmt.Sprintf("layer%d", i), o, cfg)
		cfg.ReadOnly = true
	}
	return opened(t, newGraph(t), cfg), show, depth
}

func TestStatusIsMergedAlongChainsOfDifferentLength(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, sizes := range [][]int64{
		{5000}, {5000, 5000}, {5000, 3000}, {5000, 2048, 9000}, {9000, 700, 8192, 100}, {3000, 10_000, 1}, {4096, 0, 4096},
	} {
		for range 20 {
			n, show, depth := chain(t, rng, sizes)
			r := attached(t, n, "x", rd, all)
			got := make([]byte, len(show))
			must(t, r.ReadAt(ctx, got, 0))
			if !bytes.Equal(got, show) {
				t.Fatalf("%v: the chain reads wrong", sizes)
			}
			size := int64(len(show))
			for off := int64(0); off < size; {
				want := min(rng.Int64N(4000)+1, size-off)
				e, err := r.BlockStatus(ctx, off, want, true)
				must(t, err)
				if e.Length < 1 || e.Length > want {
					t.Fatalf("%v: length %d of %d at %d", sizes, e.Length, want, off)
				}
				zero := block.IsZero(show[off : off+e.Length])
				if z := e.Flags&block.StatusZero != 0; z != zero || e.Flags&block.StatusAllocated == 0 || z == (e.Flags&block.StatusData != 0) {
					t.Fatalf("%v: flags %#x at %d+%d, zero %t", sizes, e.Flags, off, e.Length, zero)
				}
				for k := off; k < off+e.Length; k++ {
					if depth[k] != e.Depth {
						t.Fatalf("%v: depth %d at byte %d, want %d", sizes, e.Depth, k, depth[k])
					}
				}
				if eof := off+e.Length == size; eof != (e.Flags&block.StatusEOF != 0) {
					t.Fatalf("%v: flags %#x at %d+%d, end of the node: %t", sizes, e.Flags, off, e.Length, eof)
				}
				off += e.Length
			}
		}
	}
}

func TestLocatePassesThroughFilters(t *testing.T) {
	g := newGraph(t)
	s := blocktest.NewStore(1 << 16)
	s.Write([]byte("hello"), 8192)
	c := blocktest.MemoryConfig(s)
	n := opened(t, g, c)
	direct := attached(t, n, "x", rd, all)
	l := direct.Locate(0, 8192, 100)
	if l.Kind != block.LocateData || !l.Stable || l.Offset != 8192 || l.Length != 100 {
		t.Errorf("located %+v", l)
	}
	p := make([]byte, 5)
	if k := l.File.ReadNowait(p, l.Offset); string(p[:k]) != "hello" {
		t.Errorf("located bytes are %q", p[:k])
	}
	if l := direct.Locate(0, 0, 100); l.Kind != block.LocateZero {
		t.Errorf("a hole was located as %+v", l)
	}
	for _, bad := range [][2]int64{{-1, 10}, {1 << 16, 1}, {0, 0}, {0, -1}, {1 << 62, 1 << 62}} {
		if l := direct.Locate(0, bad[0], bad[1]); l.Kind != block.LocateAsk {
			t.Errorf("range %v was located", bad)
		}
	}
	slow := attached(t, opened(t, g, blocktest.SlowConfig(blocktest.NewGate(), blocktest.MemoryConfig(s))), "y", rd, all)
	if l := slow.Locate(0, 8192, 100); l.Kind != block.LocateAsk {
		t.Errorf("a slow node located %+v", l)
	}
	if allocs := testing.AllocsPerRun(100, func() { direct.Locate(0, 0, 100) }); allocs != 0 {
		t.Errorf("locate allocates %v times", allocs)
	}
}

func TestErrorsNameTheLowestNodeThatFailed(t *testing.T) {
	faults := new(blocktest.Faults)
	bottom := blocktest.FaultConfig(faults, disk("", 1<<16))
	bottom.NodeName = "bottom"
	g := newGraph(t)
	n := opened(t, g, node("top", new(events), filter, bottom))
	r := attached(t, n, "x", rd|wr, rd)
	faults.Add(blocktest.Fault{Op: blocktest.OpRead, Off: 4096, Len: 10, Err: syscall.EIO})
	faults.Add(blocktest.Fault{Op: blocktest.OpWrite, Err: syscall.ENOSPC, Times: 1})
	err := r.ReadAt(ctx, make([]byte, 512), 4000)
	wantError(t, err, syscall.EIO, "read of 512 bytes at offset 4000 on node 'bottom'")
	var at *block.NodeError
	if !errors.As(err, &at) || at.Node != "bottom" || at.Off != 4000 || at.Length != 512 {
		t.Errorf("error %+v", at)
	}
	must(t, r.ReadAt(ctx, make([]byte, 512), 0))
	if err := r.WriteAt(ctx, make([]byte, 512), 0, 0); block.Errno(err) != syscall.ENOSPC {
		t.Errorf("write: %v", err)
	}
	must(t, r.WriteAt(ctx, make([]byte, 512), 0, 0))
	if faults.Fired() != 2 {
		t.Errorf("%d faults fired", faults.Fired())
	}
}

func TestRequestsAreCounted(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("", 1<<16))
	r := attached(t, n, "x", rd|wr, rd)
	for shard := range block.Shard(20) {
		c := block.WithShard(ctx, shard)
		must(t, r.ReadAt(c, make([]byte, 100), 0))
		must(t, r.WriteAt(c, make([]byte, 10), 0, 0))
		must(t, r.WriteZeroes(c, 0, 512, 0))
		must(t, r.Discard(c, 0, 512))
		must(t, r.Flush(c))
		_, err := r.BlockStatus(c, 0, 512, false)
		must(t, err)
	}
	want := block.NodeStats{Reads: 20, ReadBytes: 2000, Writes: 20, WriteBytes: 200, Zeroes: 20, Discards: 20, Flushes: 20, Statuses: 20}
	if got := n.Stats(); got != want {
		t.Errorf("counted %+v, want %+v", got, want)
	}
}

func TestGrowingWritesAtAnAlignment(t *testing.T) {
	s := blocktest.NewStore(0)
	c := blocktest.MemoryConfig(s)
	c.Options.(*blocktest.MemoryOptions).Limits.RequestAlignment = 512
	n := opened(t, newGraph(t), c)
	r := attached(t, n, "grower", rd|wr|rs, all)
	must(t, r.WriteAt(ctx, []byte("abc"), 700, 0))
	if got := s.Bytes(); len(got) < 703 || string(got[700:703]) != "abc" || !block.IsZero(got[:700]) {
		t.Errorf("the disk has %d bytes", len(got))
	}
}

func TestBuffersOfThePoolAreAlignedAndWhole(t *testing.T) {
	for _, n := range []int{0, 1, 4095, 4096, 4097, 1 << 16, 1<<16 + 1, 1 << 20} {
		b := block.GetBuffer(n)
		if len(b) != n {
			t.Fatalf("%d bytes, want %d", len(b), n)
		}
		for i := range b {
			b[i] = 1
		}
		block.PutBuffer(b)
		if c := block.GetBuffer(n); cap(c) < n || cap(c)%block.PageSize != 0 {
			t.Fatalf("capacity %d for %d bytes", cap(c), n)
		} else {
			block.PutBuffer(c)
		}
	}
}
