package blocktest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"pgregory.net/rapid"
)

// A Factory makes nodes of the kind that [Conformance] tests, and says what they can do.
type Factory struct {
	// New makes a new disk and says how to open it. It is called often.
	New func(t TB) Subject
	// ReadOnly: the nodes are opened read-only; nothing is written.
	ReadOnly bool
	// Writable: the nodes cannot be opened read-only.
	Writable bool
	// FastZero: WriteZeroes with NoFallback succeeds on ranges aligned to ZeroAlignment.
	FastZero bool
	// DiscardZeroes: a discarded range that is aligned to DiscardAlignment reads as zero.
	DiscardZeroes bool
	// Locates: after everything was read once, Locate knows where data is that is not compressed.
	Locates bool
	// Resizes: the node can be truncated.
	Resizes bool
	// Holes: BlockStatus finds at least one zero extent in a new disk.
	Holes bool
}

// A Subject is a disk to test.
type Subject struct {
	Graph    *block.Graph  // of [NewGraph]
	Config   *block.Config // opens the node; opened again, it has what was written
	Contents []byte        // what it reads as at first; its length is the size in bytes, 64 KiB or more
	// Verify, if not nil, checks the disk after the node was closed.
	Verify func(t TB, contents []byte)
}

// Conformance runs the suite that every kind of node passes, as subtests of t.
func Conformance(t *testing.T, f Factory) {
	reading := []struct {
		name string
		test func(*testing.T, Factory)
	}{
		{"LimitsAreSane", testLimits},
		{"ReadsItsContents", testContents},
		{"RangesAreChecked", testRanges},
		{"StatusCoversEachByteOnce", testStatus},
		{"LocateAgreesWithRead", testLocate},
		{"ParallelReads", testParallelReads},
		{"PrefetchSucceeds", testPrefetch},
	}
	for _, c := range reading {
		t.Run(c.name, func(t *testing.T) { c.test(t, f) })
	}
	if f.ReadOnly {
		t.Run("WritesAreRefused", func(t *testing.T) { testReadOnly(t, f) })
		return
	}
	writing := []struct {
		name string
		test func(*testing.T, Factory)
	}{
		{"RandomRequestsAgainstModel", testModel},
		{"EveryAlignment", testAlignment},
		{"ParallelWriters", testParallelWriters},
		{"ParallelEverything", testParallelEverything},
		{"FUA", testFUA},
		{"ZeroFlags", testZeroFlags},
		{"NoFallbackChangesNothing", testNoFallback},
		{"DiscardStaysInside", testDiscard},
		{"FailedWritesChangeNothing", testFailedWrites},
		{"BuffersStayTheCallers", testBuffers},
		{"ContentsSurviveReopen", testReopen},
	}
	for _, c := range writing {
		t.Run(c.name, func(t *testing.T) { c.test(t, f) })
	}
	if !f.Writable {
		t.Run("ReadOnlyRefusesWrites", func(t *testing.T) { testReadOnly(t, f) })
	}
	if f.Resizes {
		t.Run("Resize", func(t *testing.T) { testResize(t, f) })
	}
}

// fixture is an open subject with a root on it.
type fixture struct {
	t       TB
	f       Factory
	subject Subject
	node    *block.Node
	root    *block.Root
	lane    *block.Lane
	model   []byte
	ctx     context.Context
}

func open(t TB, f Factory) *fixture {
	t.Helper()
	x := &fixture{t: t, f: f, subject: f.New(t), ctx: context.Background()}
	x.model = bytes.Clone(x.subject.Contents)
	x.attach(f.ReadOnly)
	return x
}

func (x *fixture) perm(readOnly bool) block.Perm {
	switch {
	case readOnly:
		return block.PermConsistentRead
	case x.f.Resizes:
		return block.PermConsistentRead | block.PermWrite | block.PermResize
	}
	return block.PermConsistentRead | block.PermWrite
}

func (x *fixture) attach(readOnly bool) {
	x.t.Helper()
	cfg := *x.subject.Config
	cfg.ReadOnly = readOnly
	n, err := x.subject.Graph.Open(x.ctx, &cfg)
	if err != nil {
		x.t.Fatalf("open: %v", err)
	}
	r, err := x.subject.Graph.AttachRoot(x.ctx, block.RootConfig{User: "conformance", Node: n, Perm: x.perm(readOnly), Shared: block.PermConsistentRead})
	if err != nil {
		x.t.Fatalf("attach: %v", errors.Join(err, x.subject.Graph.Release(x.ctx, n)))
	}
	x.node, x.root = n, r
	x.lane = r.NewLane(1, nil)
	if n.Size() != int64(len(x.model)) {
		x.t.Errorf("size is %d, want %d", n.Size(), len(x.model))
	}
}

func (x *fixture) detach() {
	x.t.Helper()
	x.lane.Close()
	if err := x.root.Detach(x.ctx); err != nil {
		x.t.Errorf("detach: %v", err)
	}
	if err := x.subject.Graph.Release(x.ctx, x.node); err != nil {
		x.t.Errorf("release: %v", err)
	}
	if nodes := x.subject.Graph.Nodes(); len(nodes) != 0 {
		x.t.Errorf("%d nodes are open after the last release, the first is '%s'", len(nodes), nodes[0].Name())
	}
}

// close ends the fixture, and reads everything once more from a node opened anew.
func (x *fixture) close() {
	x.t.Helper()
	x.compare()
	x.detach()
	x.attach(!x.f.Writable)
	x.compare()
	x.detach()
	if x.subject.Verify != nil {
		x.subject.Verify(x.t, x.model)
	}
}

// do runs a request between Begin and End.
func (x *fixture) do(f func(ctx context.Context) error) error {
	a, ok := x.lane.Begin()
	if !ok {
		return errors.New("the lane is drained")
	}
	defer x.lane.End(a)
	return f(x.lane.Context(x.ctx))
}

func (x *fixture) must(what string, err error) {
	x.t.Helper()
	if err != nil {
		x.t.Fatalf("%s: %v", what, err)
	}
}

func (x *fixture) read(off, n int64) []byte {
	x.t.Helper()
	p := bytes.Repeat([]byte{0xa5}, int(n))
	x.must("read", x.do(func(ctx context.Context) error { return x.root.ReadAt(ctx, p, off) }))
	return p
}

func (x *fixture) write(p []byte, off int64, flags block.ReqFlags) {
	x.t.Helper()
	x.must("write", x.do(func(ctx context.Context) error { return x.root.WriteAt(ctx, p, off, flags) }))
	copy(x.model[off:], p)
}

func (x *fixture) zero(off, n int64, flags block.ReqFlags) error {
	err := x.do(func(ctx context.Context) error { return x.root.WriteZeroes(ctx, off, n, flags) })
	if err == nil {
		clear(x.model[off : off+n])
	}
	return err
}

func (x *fixture) flush() {
	x.t.Helper()
	x.must("flush", x.do(x.root.Flush))
}

// discard drops a range. It may keep its bytes or become zero; the model takes over which.
func (x *fixture) discard(off, n int64) {
	x.t.Helper()
	x.must("discard", x.do(func(ctx context.Context) error { return x.root.Discard(ctx, off, n) }))
	got := x.read(off, n)
	defer copy(x.model[off:], got)
	if bytes.Equal(got, x.model[off:off+n]) && !x.f.DiscardZeroes {
		return
	}
	a := max(1, x.node.Limits().DiscardAlignment)
	first, last := (off+a-1)/a*a, (off+n)/a*a
	for i := range got {
		at := off + int64(i)
		inside := at >= first && at < last
		switch {
		case got[i] == x.model[at]:
			if inside && x.f.DiscardZeroes && got[i] != 0 {
				x.t.Fatalf("byte %d is %#x after a discard of [%d, +%d)", at, got[i], off, n)
			}
		case got[i] != 0 && x.f.DiscardZeroes:
			x.t.Fatalf("byte %d is %#x after a discard of [%d, +%d), neither the old byte %#x nor zero", at, got[i], off, n, x.model[at])
		}
	}
}

// compare reads everything and compares it with the model.
func (x *fixture) compare() {
	x.t.Helper()
	size := int64(len(x.model))
	for off := int64(0); off < size; off += 1 << 20 {
		n := min(1<<20, size-off)
		x.same(x.read(off, n), off)
	}
}

func (x *fixture) same(got []byte, off int64) {
	x.t.Helper()
	if want := x.model[off : off+int64(len(got))]; !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		x.t.Fatalf("byte %d is %#x, want %#x (read of %d bytes at %d)", off+int64(i), got[i], want[i], len(got), off)
	}
}

// random returns n bytes without a zero among them.
func random(rng *rand.Rand, n int64) []byte {
	p := make([]byte, n)
	for i := 0; i < len(p); i += 8 {
		var word [8]byte
		binary.LittleEndian.PutUint64(word[:], rng.Uint64()|0x0101010101010101)
		copy(p[i:], word[:])
	}
	return p
}

func newRand() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

// marks are the offsets around which ranges are tried.
func (x *fixture) marks() []int64 {
	l := x.node.Limits()
	size := int64(len(x.model))
	var list []int64
	for _, m := range []int64{0, 512, 4096, l.RequestAlignment, l.PreferredTransfer, 2 * l.PreferredTransfer, 1 << 16, size / 2, size} {
		if m >= 0 && m <= size {
			list = append(list, m)
		}
	}
	return list
}

func testLimits(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.detach()
	l := x.node.Limits()
	pow2 := func(name string, v, low, high int64) {
		if v < low || v > high || v&(v-1) != 0 {
			t.Errorf("%s is %d, want a power of two from %d to %d", name, v, low, high)
		}
	}
	pow2("RequestAlignment", l.RequestAlignment, 1, 65536)
	pow2("MemAlignment", l.MemAlignment, 1, 65536)
	for name, v := range map[string]int64{
		"PreferredTransfer": l.PreferredTransfer, "MaxTransfer": l.MaxTransfer, "MaxZero": l.MaxZero, "MaxDiscard": l.MaxDiscard,
		"DiscardAlignment": l.DiscardAlignment, "ZeroAlignment": l.ZeroAlignment,
	} {
		if v < 0 || v%l.RequestAlignment != 0 && v != 0 && v != 1 {
			t.Errorf("%s is %d, want a multiple of the request alignment %d", name, v, l.RequestAlignment)
		}
	}
	if known := block.FUA | block.MayUnmap | block.NoFallback | block.WriteUnchanged; (l.WriteFlags|l.ZeroFlags)&^known != 0 {
		t.Errorf("flags %#x and %#x have unknown bits", l.WriteFlags, l.ZeroFlags)
	}
	if r := x.root.Size(); r < x.node.Size() || r%l.RequestAlignment != 0 || r-x.node.Size() >= l.RequestAlignment {
		t.Errorf("root size %d for a node of %d bytes", r, x.node.Size())
	}
}

func testContents(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.detach()
	x.compare()
	size := int64(len(x.model))
	for _, m := range x.marks() {
		for _, off := range []int64{m - 3, m - 1, m, m + 1} {
			for _, n := range []int64{1, 2, 511, 512, 513, 4097} {
				if off >= 0 && off+n <= size {
					x.same(x.read(off, n), off)
				}
			}
		}
	}
}

func testRanges(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.detach()
	size := x.root.Size()
	bad := [][2]int64{{size, 1}, {size - 1, 2}, {-1, 1}, {-1, 2}, {size + 1, 0}, {1 << 62, 512}, {1<<63 - 1, 1}, {0, size + 1}}
	for _, b := range bad {
		off, n := b[0], b[1]
		p := bytes.Repeat([]byte{0x5a}, int(min(n, 1<<20)))
		if n > 1<<20 {
			continue
		}
		if err := x.do(func(ctx context.Context) error { return x.root.ReadAt(ctx, p, off) }); !errors.Is(err, block.ErrRange) {
			t.Errorf("read of %d bytes at %d of %d: %v, want ErrRange", n, off, size, err)
		}
	}
	for _, b := range bad {
		off, n := b[0], b[1]
		err := x.do(func(ctx context.Context) error { _, err := x.root.BlockStatus(ctx, off, n, false); return err })
		if err == nil {
			t.Errorf("block status of %d bytes at %d of %d succeeded", n, off, size)
		}
		if l := x.root.Locate(0, off, n); off < 0 && l.Kind != block.LocateAsk {
			t.Errorf("locate of %d bytes at %d of %d: kind %d, want ask", n, off, size, l.Kind)
		}
		if f.ReadOnly || f.Resizes {
			continue
		}
		for name, req := range map[string]func(ctx context.Context) error{
			"zero":    func(ctx context.Context) error { return x.root.WriteZeroes(ctx, off, n, 0) },
			"discard": func(ctx context.Context) error { return x.root.Discard(ctx, off, n) },
			"write": func(ctx context.Context) error {
				return x.root.WriteAt(ctx, make([]byte, min(n, 1<<20)), off+max(0, n-1<<20), 0)
			},
		} {
			err := x.do(req)
			if !errors.Is(err, block.ErrRange) && !errors.Is(err, block.ErrNoSpace) {
				t.Errorf("%s of %d bytes at %d of %d: %v, want ErrRange or ErrNoSpace", name, n, off, size, err)
			}
		}
	}
	for _, off := range []int64{0, size / 2, size} {
		x.must("read of nothing", x.do(func(ctx context.Context) error { return x.root.ReadAt(ctx, nil, off) }))
	}
	if !f.ReadOnly {
		for _, off := range []int64{0, size / 2, size} {
			x.must("write of nothing", x.do(func(ctx context.Context) error { return x.root.WriteAt(ctx, nil, off, 0) }))
			x.must("zero of nothing", x.do(func(ctx context.Context) error { return x.root.WriteZeroes(ctx, off, 0, 0) }))
			x.must("discard of nothing", x.do(func(ctx context.Context) error { return x.root.Discard(ctx, off, 0) }))
		}
	}
	x.compare()
}

// walk goes through the status of everything and checks each extent.
func (x *fixture) walk(step int64, precise bool) (zeroes int64) {
	x.t.Helper()
	size := int64(len(x.model))
	for off := int64(0); off < size; {
		n := min(step, size-off)
		var e block.Extent
		x.must("block status", x.do(func(ctx context.Context) (err error) {
			e, err = x.root.BlockStatus(ctx, off, n, precise)
			return err
		}))
		if e.Length < 1 || e.Length > n {
			x.t.Fatalf("status of %d bytes at %d has length %d", n, off, e.Length)
		}
		want := x.model[off : off+e.Length]
		if e.Flags&block.StatusZero != 0 {
			zeroes += e.Length
			if !block.IsZero(want) {
				x.t.Fatalf("status at %d says %d bytes are zero, and they are not", off, e.Length)
			}
		} else if e.Flags&block.StatusData == 0 {
			x.t.Fatalf("status at %d is %#x, neither data nor zero", off, e.Flags)
		}
		if eof := off+e.Length == size; eof != (e.Flags&block.StatusEOF != 0) {
			x.t.Fatalf("status at %d has flags %#x; ends at the end of the node: %t", off, e.Flags, eof)
		}
		if e.Flags&block.StatusOffset != 0 {
			x.behind(e, want)
		}
		off += e.Length
	}
	return zeroes
}

// behind checks that the file that an extent names holds the data there.
func (x *fixture) behind(e block.Extent, want []byte) {
	x.t.Helper()
	if e.File == nil {
		x.t.Fatalf("an extent has an offset and no file")
	}
	if e.Flags&block.StatusZero != 0 {
		return
	}
	r, err := x.subject.Graph.AttachRoot(x.ctx, block.RootConfig{User: "conformance, behind", Node: e.File, Perm: block.PermConsistentRead, Shared: block.PermAll})
	x.must("attach to the file of an extent", err)
	got := make([]byte, len(want))
	n := max(0, min(int64(len(got)), r.Size()-e.Offset)) // past the end of the file are zeroes
	err = r.Do(x.ctx, func(ctx context.Context) error { return r.ReadAt(ctx, got[:n], e.Offset) })
	x.must("read behind the node", errors.Join(err, r.Detach(x.ctx)))
	if !bytes.Equal(got, want) {
		x.t.Fatalf("node '%s' does not hold the extent of %d bytes at %d", e.File.Name(), e.Length, e.Offset)
	}
}

func testStatus(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.detach()
	size := int64(len(x.model))
	if !f.ReadOnly {
		rng := newRand()
		for range 20 {
			off := rng.Int64N(size)
			n := min(rng.Int64N(40000)+1, size-off)
			switch rng.IntN(3) {
			case 0:
				x.write(random(rng, n), off, 0)
			case 1:
				x.must("zero", x.zero(off, n, block.MayUnmap))
			case 2:
				x.discard(off, n)
			}
		}
	}
	for _, precise := range []bool{false, true} {
		zeroes := x.walk(size, precise)
		if f.Holes && precise && zeroes == 0 {
			t.Errorf("no zero extent was found")
		}
		x.walk(min(size, 4096), precise)
		x.walk(1<<16-1, precise)
	}
}

// locate checks one answer and returns it.
func (x *fixture) locate(off, n int64) block.Location {
	x.t.Helper()
	var l block.Location
	var got []byte
	x.must("locate", x.do(func(context.Context) error {
		l = x.root.Locate(1, off, n)
		if l.Kind == block.LocateData && l.File != nil && l.Length >= 1 && l.Length <= n {
			p := make([]byte, l.Length)
			got = p[:l.File.ReadNowait(p, l.Offset)]
		}
		return nil
	}))
	if l.Kind != block.LocateAsk && (l.Length < 1 || l.Length > n) {
		x.t.Fatalf("locate of %d bytes at %d has length %d", n, off, l.Length)
	}
	switch l.Kind {
	case block.LocateZero:
		if !block.IsZero(x.model[off : off+l.Length]) {
			x.t.Fatalf("locate at %d says %d bytes are zero, and they are not", off, l.Length)
		}
	case block.LocateData:
		if l.File == nil {
			x.t.Fatalf("locate at %d has no file", off)
		}
		x.same(got, off)
	}
	return l
}

func testLocate(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.detach()
	size := int64(len(x.model))
	rng := newRand()
	for round := range 3 {
		x.compare() // now what it needs is in memory
		known := 0
		for range 200 {
			off := rng.Int64N(size)
			n := min(rng.Int64N(1<<17)+1, size-off)
			if x.locate(off, n).Kind != block.LocateAsk {
				known++
			}
		}
		if f.Locates && known == 0 {
			t.Fatalf("round %d: locate never knew", round)
		}
		if f.ReadOnly {
			continue
		}
		for range 10 {
			off := rng.Int64N(size)
			n := min(rng.Int64N(40000)+1, size-off)
			switch rng.IntN(3) {
			case 0:
				x.write(random(rng, n), off, 0)
				x.locate(off, n)
			case 1:
				x.must("zero", x.zero(off, n, block.MayUnmap))
				x.locate(off, n)
			case 2:
				x.discard(off, n)
				x.locate(off, n)
			}
		}
	}
}

func testParallelReads(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.detach()
	size := int64(len(x.model))
	x.parallel(8, 100, func(worker int, rng *rand.Rand, ctx context.Context) error {
		off := rng.Int64N(size)
		p := make([]byte, min(rng.Int64N(1<<16)+1, size-off))
		if err := x.root.ReadAt(ctx, p, off); err != nil {
			return err
		}
		if !bytes.Equal(p, x.model[off:off+int64(len(p))]) {
			return fmt.Errorf("read of %d bytes at %d is not what the disk holds", len(p), off)
		}
		return nil
	})
}

// parallel runs f rounds times in each of several workers, each with a lane of its own.
func (x *fixture) parallel(workers, rounds int, f func(worker int, rng *rand.Rand, ctx context.Context) error) {
	x.t.Helper()
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			lane := x.root.NewLane(block.Shard(w), nil)
			defer lane.Close()
			ctx := lane.Context(x.ctx)
			rng := rand.New(rand.NewPCG(7, uint64(w)))
			for range rounds {
				a, ok := lane.Begin()
				if !ok {
					errs[w] = errors.New("the lane is drained")
					return
				}
				err := f(w, rng, ctx)
				lane.End(a)
				if err != nil {
					errs[w] = err
					return
				}
			}
		})
	}
	wg.Wait()
	x.must("parallel requests", errors.Join(errs...))
}

func testPrefetch(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.detach()
	size := int64(len(x.model))
	for _, n := range []int64{1, 513, size} {
		x.must("prefetch", x.do(func(ctx context.Context) error { return x.root.Prefetch(ctx, 0, n) }))
	}
	x.compare()
}

func testReadOnly(t *testing.T, f Factory) {
	ro := f
	ro.ReadOnly = true
	x := open(t, ro)
	defer x.close()
	for name, req := range map[string]func(ctx context.Context) error{
		"write":   func(ctx context.Context) error { return x.root.WriteAt(ctx, []byte{1}, 0, 0) },
		"zero":    func(ctx context.Context) error { return x.root.WriteZeroes(ctx, 0, 512, block.MayUnmap) },
		"discard": func(ctx context.Context) error { return x.root.Discard(ctx, 0, 512) },
	} {
		if err := x.do(req); block.Errno(err) != block.Errno(block.ErrReadOnly) {
			t.Errorf("%s on a read-only node: %v, want EPERM", name, err)
		}
	}
	x.flush()
}

// testModel runs random requests against a byte model.
func testModel(t *testing.T, f Factory) {
	rapid.Check(t, func(rt *rapid.T) {
		x := open(rt, f)
		defer x.close()
		size := int64(len(x.model))
		marks := x.marks()
		ranges := rapid.Custom(func(rt *rapid.T) [2]int64 {
			at := rapid.SampledFrom(marks).Draw(rt, "near") + rapid.Int64Range(-600, 600).Draw(rt, "by")
			if rapid.Bool().Draw(rt, "anywhere") {
				at = rapid.Int64Range(0, size-1).Draw(rt, "offset")
			}
			at = min(max(at, 0), size-1)
			n := rapid.OneOf(rapid.Int64Range(1, 1024), rapid.Int64Range(1, 70_000), rapid.SampledFrom([]int64{512, 4096, 1 << 16})).Draw(rt, "length")
			return [2]int64{at, min(n, size-at)}
		})
		seed := rapid.Uint64().Draw(rt, "seed")
		rng := rand.New(rand.NewPCG(seed, 0))
		rt.Repeat(map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				r := ranges.Draw(rt, "range")
				x.write(random(rng, r[1]), r[0], rapid.SampledFrom([]block.ReqFlags{0, 0, 0, block.FUA}).Draw(rt, "flags"))
			},
			"zero": func(rt *rapid.T) {
				r := ranges.Draw(rt, "range")
				flags := rapid.SampledFrom([]block.ReqFlags{0, block.MayUnmap, block.FUA | block.MayUnmap, block.NoFallback | block.MayUnmap, block.NoFallback}).Draw(rt, "flags")
				if err := x.zero(r[0], r[1], flags); err != nil && !(flags&block.NoFallback != 0 && errors.Is(err, block.ErrNotSupported)) {
					rt.Fatalf("zero of %d bytes at %d, flags %#x: %v", r[1], r[0], flags, err)
				}
			},
			"discard": func(rt *rapid.T) { r := ranges.Draw(rt, "range"); x.discard(r[0], r[1]) },
			"read":    func(rt *rapid.T) { r := ranges.Draw(rt, "range"); x.same(x.read(r[0], r[1]), r[0]) },
			"locate":  func(rt *rapid.T) { r := ranges.Draw(rt, "range"); x.locate(r[0], r[1]) },
			"flush":   func(*rapid.T) { x.flush() },
			"status":  func(*rapid.T) { x.walk(size, true) },
			"reopen": func(*rapid.T) {
				x.detach()
				x.attach(false)
			},
		})
	})
}

func testAlignment(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.close()
	size := int64(len(x.model))
	rng := newRand()
	for _, m := range x.marks() {
		for _, d := range []int64{-513, -512, -1, 0, 1, 511, 512} {
			for _, n := range []int64{1, 2, 511, 512, 513, 1025, 5000} {
				off := m + d
				if off < 0 || off+n > size {
					continue
				}
				x.write(random(rng, n), off, 0)
				from, to := max(0, off-3), min(size, off+n+3)
				x.same(x.read(from, to-from), from)
			}
		}
	}
}

// own gives worker w of several its stripes: n bytes in each stripe of workers*n bytes.
func own(rng *rand.Rand, w, workers int, n, size int64) (off, length int64) {
	stripes := size / (int64(workers) * n)
	off = (rng.Int64N(stripes)*int64(workers) + int64(w)) * n
	from := rng.Int64N(n)
	return off + from, rng.Int64N(n-from) + 1
}

func testParallelWriters(t *testing.T, f Factory) {
	for _, stripe := range []int64{7, 100, 512, 3000} {
		x := open(t, f)
		const workers = 4
		size := int64(len(x.model))
		// Each worker writes its own bytes, so each knows what they are; neighbours
		// share sectors, blocks and clusters.
		x.parallel(workers, 60, func(w int, rng *rand.Rand, ctx context.Context) error {
			off, n := own(rng, w, workers, stripe, size)
			p := random(rng, n)
			if err := x.root.WriteAt(ctx, p, off, 0); err != nil {
				return err
			}
			copy(x.model[off:], p)
			got := make([]byte, n)
			if err := x.root.ReadAt(ctx, got, off); err != nil {
				return err
			}
			if !bytes.Equal(got, p) {
				return fmt.Errorf("%d bytes at %d do not read as they were written", n, off)
			}
			return nil
		})
		x.close()
	}
}

func testParallelEverything(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.close()
	const workers, stripe = 5, 3000
	size := int64(len(x.model))
	x.parallel(workers, 80, func(w int, rng *rand.Rand, ctx context.Context) error {
		off, n := own(rng, w, workers, stripe, size)
		mine := x.model[off : off+n]
		switch rng.IntN(6) {
		case 0, 1:
			p := random(rng, n)
			if err := x.root.WriteAt(ctx, p, off, 0); err != nil {
				return err
			}
			copy(mine, p)
		case 2:
			if err := x.root.WriteZeroes(ctx, off, n, block.MayUnmap); err != nil {
				return err
			}
			clear(mine)
		case 3:
			if err := x.root.Discard(ctx, off, n); err != nil {
				return err
			}
			return x.root.ReadAt(ctx, mine, off) // whatever it is now, it stays
		case 4:
			if w == 0 {
				return x.root.Flush(ctx)
			}
			_, err := x.root.BlockStatus(ctx, off, n, false)
			return err
		}
		if l := x.root.Locate(block.Shard(w), off, n); l.Kind == block.LocateData {
			got := make([]byte, l.Length)
			got = got[:l.File.ReadNowait(got, l.Offset)]
			if !bytes.Equal(got, mine[:len(got)]) {
				return fmt.Errorf("located bytes at %d are not those written", off)
			}
		} else if l.Kind == block.LocateZero && !block.IsZero(mine[:l.Length]) {
			return fmt.Errorf("%d bytes at %d were located as zero", l.Length, off)
		}
		got := make([]byte, n)
		if err := x.root.ReadAt(ctx, got, off); err != nil {
			return err
		}
		if !bytes.Equal(got, mine) {
			return fmt.Errorf("%d bytes at %d do not read as they were left", n, off)
		}
		return nil
	})
}

func testFUA(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.close()
	rng := newRand()
	size := int64(len(x.model))
	for range 30 {
		off := rng.Int64N(size)
		n := min(rng.Int64N(20000)+1, size-off)
		x.write(random(rng, n), off, block.FUA)
		off = rng.Int64N(size)
		n = min(rng.Int64N(20000)+1, size-off)
		x.must("zero with FUA", x.zero(off, n, block.FUA))
	}
}

func testZeroFlags(t *testing.T, f Factory) {
	for _, flags := range []block.ReqFlags{0, block.MayUnmap, block.FUA, block.NoFallback, block.NoFallback | block.MayUnmap, block.NoFallback | block.MayUnmap | block.FUA} {
		x := open(t, f)
		rng := newRand()
		size := int64(len(x.model))
		align := max(1, x.node.Limits().ZeroAlignment)
		x.write(random(rng, size), 0, 0)
		aligned := [][2]int64{{0, align}, {size / 2 / align * align, 2 * align}, {0, size / align * align}}
		odd := [][2]int64{{1, 1}, {511, 2}, {align - 1, align + 2}, {size - 1, 1}, {size - 700, 700}, {0, size}}
		for i, r := range append(aligned, odd...) {
			off, n := r[0], r[1]
			if off < 0 || off+n > size {
				continue
			}
			err := x.zero(off, n, flags)
			switch {
			case err == nil:
			case flags&block.NoFallback == 0, !errors.Is(err, block.ErrNotSupported), i < len(aligned) && f.FastZero:
				t.Fatalf("zero of %d bytes at %d, flags %#x: %v", n, off, flags, err)
			}
			from, to := max(0, off-1000), min(size, off+n+1000)
			x.same(x.read(from, to-from), from)
			x.write(random(rng, n), off, 0)
		}
		x.close()
	}
}

func testNoFallback(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.close()
	rng := newRand()
	size := int64(len(x.model))
	x.write(random(rng, size/2), 0, 0)
	for range 50 {
		off := rng.Int64N(size)
		n := min(rng.Int64N(size)+1, size-off)
		if err := x.zero(off, n, block.NoFallback); err != nil && !errors.Is(err, block.ErrNotSupported) {
			t.Fatalf("zero of %d bytes at %d: %v", n, off, err)
		}
		x.compare() // the model changed only if it succeeded
		x.write(random(rng, min(1000, size-off)), off, 0)
	}
}

func testDiscard(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.close()
	rng := newRand()
	size := int64(len(x.model))
	x.write(random(rng, size), 0, 0)
	a := max(1, x.node.Limits().DiscardAlignment)
	fixed := [][2]int64{{0, 1}, {1, a}, {a - 1, 2}, {0, a}, {a, 2 * a}, {size - 1, 1}, {size - a, a}, {size - 700, 700}}
	for i := range 40 {
		off := rng.Int64N(size)
		n := min(rng.Int64N(100_000)+1, size-off)
		if i < len(fixed) {
			off, n = fixed[i][0], fixed[i][1]
		}
		if off < 0 || off+n > size {
			continue
		}
		x.discard(off, n)
		x.compare() // outside nothing has changed
		x.write(random(rng, n), off, 0)
	}
	x.discard(0, size)
}

func testFailedWrites(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.close()
	size := x.root.Size()
	p := random(newRand(), 4096)
	if !f.Resizes {
		for _, off := range []int64{size - 1, size - 512, size - 4095, size} {
			err := x.do(func(ctx context.Context) error { return x.root.WriteAt(ctx, p, off, 0) })
			if !errors.Is(err, block.ErrNoSpace) && !errors.Is(err, block.ErrRange) {
				t.Errorf("write of %d bytes at %d of %d: %v, want ErrNoSpace or ErrRange", len(p), off, size, err)
			}
		}
	}
	if pad := size - x.node.Size(); pad > 0 {
		err := x.do(func(ctx context.Context) error { return x.root.WriteAt(ctx, p[:pad+1], size-pad-1, 0) })
		if block.Errno(err) != block.Errno(block.ErrReadOnly) {
			t.Errorf("write into the padding: %v, want EPERM", err)
		}
		x.must("write of zeroes into the padding", x.do(func(ctx context.Context) error {
			return x.root.WriteAt(ctx, make([]byte, pad), size-pad, 0)
		}))
		tail := x.read(size-pad, pad)
		if !block.IsZero(tail) {
			t.Errorf("the padding does not read as zero")
		}
	}
	x.compare()
}

func testBuffers(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.close()
	rng := newRand()
	size := int64(len(x.model))
	for _, n := range []int64{1, 512, 4096, 5000, 1 << 16} {
		off := rng.Int64N(size - n + 1)
		p := random(rng, n)
		q := bytes.Clone(p)
		x.write(p, off, 0)
		if !bytes.Equal(p, q) {
			t.Fatalf("a write of %d bytes changed its buffer", n)
		}
		for i := range p {
			p[i] = 0xee // the node must not see this
		}
		x.same(x.read(off, n), off)
		got := x.read(off, n)
		for i := range got {
			got[i] = 0xee // nor this
		}
		x.same(x.read(off, n), off)
	}
}

func testReopen(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.close()
	rng := newRand()
	size := int64(len(x.model))
	for range 5 {
		for range 5 {
			off := rng.Int64N(size)
			n := min(rng.Int64N(50_000)+1, size-off)
			x.write(random(rng, n), off, 0)
			off = rng.Int64N(size)
			n = min(rng.Int64N(50_000)+1, size-off)
			x.must("zero", x.zero(off, n, block.MayUnmap))
		}
		x.detach() // without a flush: the close does it
		x.attach(false)
		x.compare()
	}
}

func testResize(t *testing.T, f Factory) {
	x := open(t, f)
	defer x.close()
	size := int64(len(x.model))
	for _, to := range []int64{size + 1<<16, size / 2, size/2 + 1<<16, size} {
		x.must("truncate", x.do(func(ctx context.Context) error { return x.root.Truncate(ctx, to) }))
		if x.node.Size() != to {
			t.Fatalf("size is %d after a truncate to %d", x.node.Size(), to)
		}
		if old := int64(len(x.model)); to < old {
			x.model = x.model[:to:to]
		} else {
			x.model = append(x.model, make([]byte, to-old)...)
		}
		x.compare()
		x.write([]byte("end"), to-3, 0)
	}
}
