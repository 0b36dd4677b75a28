package block_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"pgregory.net/rapid"
)

func change(t blocktest.TB, n *block.Node, steps ...block.BitmapChange) {
	t.Helper()
	must(t, n.Graph().ChangeBitmaps(ctx, steps...))
}

func add(t blocktest.TB, n *block.Node, o block.BitmapOptions) *block.Bitmap {
	t.Helper()
	change(t, n, block.AddBitmap(n, o))
	b, err := n.Bitmap(o.Name)
	must(t, err)
	return b
}

// dirty lists the dirty ranges of b as "off+length".
func dirty(b *block.Bitmap) string {
	var list []string
	for off, length := range b.Dirty(0, b.Node().Size()) {
		list = append(list, fmt.Sprintf("%d+%d", off, length))
	}
	return strings.Join(list, " ")
}

func wantDirty(t blocktest.TB, b *block.Bitmap, want string) {
	t.Helper()
	if got := dirty(b); got != want {
		t.Errorf("dirty is %q, want %q", got, want)
	}
}

func TestG29BitmapsRecordWhatChangesTheNode(t *testing.T) {
	faults := new(blocktest.Faults)
	n := opened(t, newGraph(t), blocktest.FaultConfig(faults, disk("", 10_000)))
	r := attached(t, n, "x", rd|wr, rd)
	b := add(t, n, block.BitmapOptions{Name: "b", Granularity: 512})
	must(t, r.WriteAt(ctx, []byte{1, 2}, 511, 0))
	must(t, r.WriteZeroes(ctx, 2048, 1, 0))
	must(t, r.Discard(ctx, 4096, 1024))
	must(t, r.ReadAt(ctx, make([]byte, 512), 6144))
	must(t, r.Flush(ctx))
	for op, request := range map[blocktest.Op]func() error{
		blocktest.OpWrite:   func() error { return r.WriteAt(ctx, []byte{1}, 7168, 0) },
		blocktest.OpZero:    func() error { return r.WriteZeroes(ctx, 8192, 1, 0) },
		blocktest.OpDiscard: func() error { return r.Discard(ctx, 9216, 1) },
	} {
		faults.Add(blocktest.Fault{Op: op, Err: syscall.EIO, Times: 1})
		wantError(t, request(), syscall.EIO)
	}
	wantDirty(t, b, "0+1024 2048+512 4096+1024 7168+512 8192+512 9216+512")
	if b.Count() != 4096 {
		t.Errorf("%d bytes are dirty", b.Count())
	}
	must(t, r.WriteAt(ctx, []byte{1}, 9999, 0))
	wantDirty(t, b, "0+1024 2048+512 4096+1024 7168+512 8192+512 9216+784")
	for _, c := range []struct {
		off, length, n int64
		dirty          bool
	}{{0, 10_000, 1024, true}, {1000, 10, 10, true}, {1023, 100, 1, true}, {1024, 8976, 1024, false}, {9999, 1, 1, true}, {5120, 100, 100, false}} {
		if dirty, n := b.Extent(c.off, c.length); dirty != c.dirty || n != c.n {
			t.Errorf("extent at %d of %d: %t for %d bytes", c.off, c.length, dirty, n)
		}
	}
	var cut []int64
	for off, length := range b.Dirty(100, 2050) {
		cut = append(cut, off, length)
	}
	if !slices.Equal(cut, []int64{100, 924, 2048, 2}) {
		t.Errorf("between 100 and 2050 there is %v", cut)
	}
}

func TestG29OptionsOfABitmap(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("d", 1<<20))
	long := strings.Repeat("n", 1023)
	for _, o := range []block.BitmapOptions{{Name: "b"}, {Name: long}, {Name: "c", Granularity: 512}, {Name: "d", Granularity: 1 << 31}} {
		add(t, n, o)
	}
	for _, c := range []struct {
		o    block.BitmapOptions
		text string
	}{
		{block.BitmapOptions{}, "Bitmap name cannot be empty"},
		{block.BitmapOptions{Name: "b"}, "Bitmap already exists: b"},
		{block.BitmapOptions{Name: long + "n"}, "Bitmap name too long: " + long + "n"},
		{block.BitmapOptions{Name: "e", Granularity: 256}, "Granularity must be power of 2 and at least 512"},
		{block.BitmapOptions{Name: "e", Granularity: -512}, "Granularity must be power of 2 and at least 512"},
		{block.BitmapOptions{Name: "e", Granularity: 1000}, "Granularity must be power of 2 and at least 512"},
		{block.BitmapOptions{Name: "e", Granularity: 1 << 32}, "Granularity must be at most 2147483648"},
		{block.BitmapOptions{Name: "e", Persistent: true}, "Can't store persistent bitmaps to d"},
	} {
		if err := g.ChangeBitmaps(ctx, block.AddBitmap(n, c.o)); err == nil || err.Error() != c.text {
			t.Errorf("%+v: %v, want %q", c.o, err, c.text)
		}
	}
	if got := len(n.Bitmaps()); got != 4 {
		t.Errorf("there are %d bitmaps", got)
	}
}

// above describes a filter over the node of that name.
func above(name string) *block.Config { return blocktest.SlowConfig(blocktest.NewGate(), ref(name)) }

// storer is an image with a cluster size that stores bitmaps of some names.
type storer struct {
	blocktest.Nothing
	info block.ImageInfo
}

func (s storer) ImageInfo() block.ImageInfo { return s.info }

func (s storer) CanStoreBitmap(name string, granularity int64) error {
	if granularity > 1<<20 {
		return fmt.Errorf("%d is too much: %w", granularity, block.ErrNotSupported)
	}
	return nil
}

func storerDriver(info block.ImageInfo) *block.Driver {
	return &block.Driver{Name: "storer", Kind: block.Protocol, Open: func(context.Context, *block.Opening) (block.Instance, error) {
		return storer{blocktest.Nothing{Length: 1 << 40}, info}, nil
	}}
}

func TestG29DefaultGranularityIsTheClusterSize(t *testing.T) {
	for cluster, want := range map[int64]int64{0: 64 << 10, 512: 4096, 4096: 4096, 32 << 10: 32 << 10, 64 << 10: 64 << 10, 2 << 20: 64 << 10} {
		g := blocktest.NewGraph(t, testDriver(), storerDriver(block.ImageInfo{ClusterSize: cluster}))
		n := opened(t, g, &block.Config{Driver: "storer", NodeName: "s"})
		top := opened(t, g, above("s"))
		for _, n := range []*block.Node{n, top} {
			if b := add(t, n, block.BitmapOptions{Name: "b"}); b.Granularity() != want {
				t.Errorf("clusters of %d: granularity %d on %s, want %d", cluster, b.Granularity(), n.Name(), want)
			}
		}
	}
}

func TestG29OnlyTheDriverMakesABitmapPersistent(t *testing.T) {
	g := blocktest.NewGraph(t, storerDriver(block.ImageInfo{}))
	n := opened(t, g, &block.Config{Driver: "storer", NodeName: "s"})
	if b := add(t, n, block.BitmapOptions{Name: "b", Persistent: true}); !b.Persistent() || !b.Info().Persistent {
		t.Errorf("it is not persistent")
	}
	err := g.ChangeBitmaps(ctx, block.AddBitmap(n, block.BitmapOptions{Name: "c", Granularity: 2 << 20, Persistent: true}))
	wantError(t, err, block.ErrNotSupported, "Can't make bitmap 'c' persistent in 's': 2097152 is too much")
}

func TestG29MemoryOfABitmapIsBounded(t *testing.T) {
	g := blocktest.NewGraph(t, storerDriver(block.ImageInfo{}))
	n := opened(t, g, &block.Config{Driver: "storer", NodeName: "s"}) // 1 TiB
	add(t, n, block.BitmapOptions{Name: "fits", Granularity: 512})
	// 4 EiB at 512 bytes and at 64 KiB.
	big := blocktest.NewGraph(t, &block.Driver{Name: "big", Kind: block.Protocol, Open: func(context.Context, *block.Opening) (block.Instance, error) {
		return blocktest.Nothing{Length: 1 << 62}, nil
	}})
	n = opened(t, big, &block.Config{Driver: "big"})
	err := big.ChangeBitmaps(ctx, block.AddBitmap(n, block.BitmapOptions{Name: "b"}))
	wantError(t, err, block.ErrNoSpace, "Bitmap 'b' would take up to", "at most 536870912 are allowed", "larger granularity than 65536")
}

// A bitmap that a node has outgrown lacks changes, and says so.
func TestG29ABitmapThatIsOutgrownIsInconsistent(t *testing.T) {
	length := new(atomic.Int64)
	length.Store(1 << 20)
	g := blocktest.NewGraph(t, &block.Driver{Name: "grows", Kind: block.Protocol, Open: func(context.Context, *block.Opening) (block.Instance, error) {
		return blocktest.Nothing{Grown: length}, nil
	}})
	n := opened(t, g, &block.Config{Driver: "grows"})
	r := attached(t, n, "x", all, all)
	b := add(t, n, block.BitmapOptions{Name: "b", Granularity: 512})
	must(t, r.WriteAt(ctx, []byte{1}, 0, 0))
	must(t, r.WriteAt(ctx, []byte{1}, 1<<41-1, 0)) // the last byte that it can note
	if i := b.Info(); i.Inconsistent || i.Count != 1024 {
		t.Errorf("the bitmap is %+v", i)
	}
	must(t, r.WriteAt(ctx, []byte{1}, 1<<41, 0))
	if i := b.Info(); !i.Inconsistent || i.Recording {
		t.Errorf("the bitmap is %+v", i)
	}
	_, err := b.Use()
	wantError(t, err, nil, "Bitmap 'b' is inconsistent and cannot be used")
	change(t, n, block.RemoveBitmap(n, "b"))
}

func TestG29WhatABitmapMayBeUsedFor(t *testing.T) {
	const (
		missing      = "Dirty bitmap 'b' not found"
		readOnly     = "Bitmap 'b' is readonly and cannot be modified"
		inconsistent = "Bitmap 'b' is inconsistent and cannot be used"
		busy         = "Bitmap 'b' is currently in use by another operation and cannot be used"
	)
	use := func(n *block.Node) error {
		b, err := n.Bitmap("b")
		if err != nil {
			return err
		}
		done, err := b.Use()
		if err == nil {
			done()
		}
		return err
	}
	step := func(f func(n *block.Node, name string) block.BitmapChange) func(*block.Node) error {
		return func(n *block.Node) error { return n.Graph().ChangeBitmaps(ctx, f(n, "b")) }
	}
	calls := []struct {
		name                                  string
		call                                  func(*block.Node) error
		missing, readOnly, inconsistent, busy string // the error; "" for none
	}{
		{"remove", step(block.RemoveBitmap), missing, readOnly, "", busy},
		{"clear", step(block.ClearBitmap), missing, readOnly, inconsistent, busy},
		{"enable", step(block.EnableBitmap), missing, "", inconsistent, busy},
		{"disable", step(block.DisableBitmap), missing, "", inconsistent, busy},
		{"use", use, missing, "", inconsistent, busy},
		{"merge into", func(n *block.Node) error {
			return n.Graph().ChangeBitmaps(ctx, block.MergeBitmaps(n, "b", block.BitmapSource{Node: n, Name: "other"}))
		}, missing, readOnly, inconsistent, busy},
		{"merge from", func(n *block.Node) error {
			return n.Graph().ChangeBitmaps(ctx, block.MergeBitmaps(n, "other", block.BitmapSource{Node: n, Name: "b"}))
		}, missing, "", inconsistent, busy},
	}
	for _, c := range calls {
		for state, want := range map[string]string{"missing": c.missing, "readonly": c.readOnly, "inconsistent": c.inconsistent, "busy": c.busy, "usable": ""} {
			n := opened(t, newGraph(t), disk("d", 1<<20))
			add(t, n, block.BitmapOptions{Name: "other"})
			if state != "missing" {
				b := add(t, n, block.BitmapOptions{Name: "b", ReadOnly: state == "readonly", Inconsistent: state == "inconsistent"})
				if state == "busy" {
					done, err := b.Use()
					must(t, err)
					defer done()
				}
			}
			err := c.call(n)
			if want == "" && err != nil || want != "" && (err == nil || !strings.HasPrefix(err.Error(), want)) {
				t.Errorf("%s of a bitmap that is %s: %v, want %q", c.name, state, err, want)
			}
		}
	}
}

func TestG29ReadOnlyBitmapForbidsChanges(t *testing.T) {
	n := opened(t, newGraph(t), disk("d", 1<<20))
	r := attached(t, n, "x", all, all)
	add(t, n, block.BitmapOptions{Name: "b", ReadOnly: true})
	for _, err := range []error{r.WriteAt(ctx, []byte{1}, 0, 0), r.WriteZeroes(ctx, 0, 1, 0), r.Discard(ctx, 0, 1), r.Truncate(ctx, 10)} {
		wantError(t, err, syscall.EPERM, "bitmap 'b' of the node is read-only")
	}
	must(t, r.ReadAt(ctx, make([]byte, 1), 0))
	must(t, r.Flush(ctx))
}

func TestG29BitmapsFollowTheSize(t *testing.T) {
	n := opened(t, newGraph(t), disk("d", 1<<20))
	r := attached(t, n, "x", all, all)
	b := add(t, n, block.BitmapOptions{Name: "b", Granularity: 512})
	frozen := add(t, n, block.BitmapOptions{Name: "frozen", Granularity: 4096})
	must(t, r.WriteZeroes(ctx, 0, 1<<20, 0))
	change(t, n, block.DisableBitmap(n, "frozen"))
	must(t, r.Truncate(ctx, 10_000))
	wantDirty(t, b, "0+10000")
	wantDirty(t, frozen, "0+10000")
	must(t, r.Truncate(ctx, 2<<20))
	wantDirty(t, b, "0+10240")
	wantDirty(t, frozen, "0+12288")
	must(t, r.WriteAt(ctx, []byte{1}, 3<<20, 0))
	wantDirty(t, b, "0+10240 3145728+1")
	wantDirty(t, frozen, "0+12288")
	must(t, r.Truncate(ctx, 0))
	must(t, r.Truncate(ctx, 4<<20))
	wantDirty(t, b, "")
}

func TestG29BitmapsStayWithTheirNode(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("d", 1<<20))
	r := attached(t, n, "x", rd|wr, all)
	b := add(t, n, block.BitmapOptions{Name: "b", Granularity: 4096})
	f, err := g.InsertFilter(ctx, above("d"), n)
	must(t, err)
	must(t, r.WriteAt(ctx, []byte{1}, 0, 0))
	nearer := add(t, f, block.BitmapOptions{Name: "b", Granularity: 4096})
	must(t, r.WriteAt(ctx, []byte{1}, 8192, 0))
	if found, err := f.FindBitmap("b"); err != nil || found != nearer {
		t.Errorf("the bitmap of the node itself is not found: %v", err)
	}
	change(t, f, block.RemoveBitmap(f, "b"))
	if found, err := f.FindBitmap("b"); err != nil || found != b || found.Node() != n {
		t.Errorf("the bitmap is not found through the filter: %v", err)
	}
	must(t, g.RemoveFilter(ctx, f))
	release(t, g, f)
	must(t, r.WriteAt(ctx, []byte{1}, 16384, 0))
	wantDirty(t, b, "0+4096 8192+4096 16384+4096")
	_, err = n.FindBitmap("none")
	wantError(t, err, block.ErrInvalid, "Bitmap 'none' is not found")
}

func TestG29BitmapIsFoundDownTheBackingChain(t *testing.T) {
	g := newGraph(t)
	top := opened(t, g, cowConfig("top", &cowOptions{size: 4096}, cowConfig("base", &cowOptions{size: 4096}, nil)))
	base := g.Lookup("base")
	b := add(t, base, block.BitmapOptions{Name: "b"})
	if found, err := top.FindBitmap("b"); err != nil || found != b {
		t.Errorf("not found: %v", err)
	}
	if _, err := top.Bitmap("b"); err == nil {
		t.Errorf("the overlay has the bitmap of its backing node")
	}
}

func TestG29MergeJoinsBitmapsOfAnyGranularity(t *testing.T) {
	for _, c := range []struct {
		to, from int64
		want     string
	}{
		{4096, 4096, "0+4096 8192+4096 36864+4096"},
		{512, 8192, "0+512 8192+8192 32768+8192"},
		{16384, 512, "0+16384 32768+16384"},
	} {
		g := newGraph(t)
		n := opened(t, g, disk("d", 1<<20))
		other := opened(t, g, disk("e", 1<<20))
		r, ro := attached(t, n, "x", rd|wr, all), attached(t, other, "y", rd|wr, all)
		to := add(t, n, block.BitmapOptions{Name: "to", Granularity: c.to})
		must(t, r.WriteAt(ctx, []byte{1}, 0, 0))
		from := add(t, other, block.BitmapOptions{Name: "from", Granularity: c.from})
		must(t, ro.WriteAt(ctx, []byte{1}, 9000, 0))
		must(t, ro.WriteAt(ctx, []byte{1}, 37000, 0))
		before := dirty(from)
		change(t, n, block.MergeBitmaps(n, "to", block.BitmapSource{Node: other, Name: "from"}))
		wantDirty(t, to, c.want)
		wantDirty(t, from, before)
	}
	g := newGraph(t)
	n, other := opened(t, g, disk("d", 1<<20)), opened(t, g, disk("e", 1<<19))
	add(t, n, block.BitmapOptions{Name: "to"})
	add(t, other, block.BitmapOptions{Name: "from"})
	err := g.ChangeBitmaps(ctx, block.MergeBitmaps(n, "to", block.BitmapSource{Node: other, Name: "from"}))
	wantError(t, err, block.ErrInvalid, "Bitmaps are of different sizes (destination size is 1048576, source size is 524288) and can't be merged")
}

func TestG29FailedTransactionLeavesAllBitmapsAsTheyWere(t *testing.T) {
	g := newGraph(t)
	n, other := opened(t, g, disk("d", 1<<20)), opened(t, g, disk("e", 1<<20))
	r := attached(t, n, "x", rd|wr, all)
	add(t, n, block.BitmapOptions{Name: "a"})
	add(t, n, block.BitmapOptions{Name: "b", Disabled: true})
	add(t, other, block.BitmapOptions{Name: "c"})
	must(t, r.WriteAt(ctx, []byte{1}, 0, 0))
	describe := func() string {
		text := ""
		for _, n := range []*block.Node{n, other} {
			for _, b := range n.Bitmaps() {
				text += fmt.Sprintf("%s: %+v %s\n", n.Name(), b.Info(), dirty(b))
			}
		}
		return text
	}
	before := describe()
	steps := []block.BitmapChange{
		block.AddBitmap(n, block.BitmapOptions{Name: "new"}),
		block.MergeBitmaps(n, "new", block.BitmapSource{Node: n, Name: "a"}),
		block.DisableBitmap(n, "a"),
		block.ClearBitmap(n, "a"),
		block.EnableBitmap(n, "b"),
		block.MergeBitmaps(n, "b", block.BitmapSource{Node: n, Name: "a"}),
		block.RemoveBitmap(other, "c"),
		block.AddBitmap(other, block.BitmapOptions{Name: "c", Granularity: 512}),
	}
	for i := range len(steps) + 1 {
		err := g.ChangeBitmaps(ctx, slices.Insert(slices.Clone(steps), i, block.ClearBitmap(other, "none"))...)
		wantError(t, err, block.ErrInvalid, "Dirty bitmap 'none' not found")
		if after := describe(); after != before {
			t.Fatalf("with an error in step %d:\n%swas\n%s", i, after, before)
		}
		must(t, r.WriteAt(ctx, []byte{1}, 0, 0))
		if after := describe(); after != before {
			t.Fatalf("recording differs after an error in step %d:\n%swas\n%s", i, after, before)
		}
	}
	must(t, g.ChangeBitmaps(ctx, steps...))
	if after := describe(); after == before {
		t.Errorf("nothing changed without an error")
	}
}

// One bitmap is frozen and another started at one moment, again and again while
// writers run: each write is in one of those that recorded at some time between its
// beginning and its end, and, as it falls before or after a switch, in one alone.
func TestG29SwitchingBitmapsLosesNoWrite(t *testing.T) {
	const writers, blocks, rounds = 4, 512, 40
	g := newGraph(t)
	n := opened(t, g, disk("d", writers*blocks*512))
	r := attached(t, n, "x", rd|wr, all)
	add(t, n, block.BitmapOptions{Name: "all", Granularity: 512})
	add(t, n, block.BitmapOptions{Name: "0", Granularity: 512})
	stop := make(chan struct{})
	var written [writers]int64
	var group sync.WaitGroup
	for w := range int64(writers) {
		lane := r.NewLane(block.Shard(w), nil)
		group.Go(func() {
			defer lane.Close()
			c := lane.Context(ctx)
			for i := int64(0); ; i++ {
				select {
				case <-stop:
					written[w] = min(i, blocks)
					return
				default:
				}
				err := r.Do(c, func(c context.Context) error { return r.WriteAt(c, []byte{1}, (w*blocks+i%blocks)*512, 0) })
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range rounds {
		name, next := fmt.Sprint(i), fmt.Sprint(i+1)
		must(t, g.ChangeBitmaps(ctx, block.DisableBitmap(n, name), block.AddBitmap(n, block.BitmapOptions{Name: next, Granularity: 512})))
	}
	close(stop)
	group.Wait()
	union := add(t, n, block.BitmapOptions{Name: "union", Granularity: 512, Disabled: true})
	for i := range rounds + 1 {
		change(t, n, block.MergeBitmaps(n, "union", block.BitmapSource{Node: n, Name: fmt.Sprint(i)}))
	}
	all, _ := n.Bitmap("all")
	if dirty(union) != dirty(all) {
		t.Errorf("the bitmaps together have %s, not %s", dirty(union), dirty(all))
	}
	for w := range int64(writers) {
		if written[w] == 0 {
			continue
		}
		if d, length := all.Extent(w*blocks*512, written[w]*512); !d || length != written[w]*512 {
			t.Errorf("writer %d wrote %d blocks, and %d bytes are %t", w, written[w], length, d)
		}
	}
}

// A model of bitmaps as sets of granules is compared after random changes.
func TestG29BitmapsAgainstAModel(t *testing.T) {
	type model struct {
		granularity int64
		disabled    bool
		dirty       map[int64]bool
	}
	rapid.Check(t, func(rt *rapid.T) {
		g := newGraph(rt)
		size := int64(rapid.IntRange(1, 300_000).Draw(rt, "size"))
		n := opened(rt, g, disk("d", size))
		r := attached(rt, n, "x", all, all)
		models := map[string]*model{}
		name := rapid.SampledFrom([]string{"a", "b", "c"})
		granularity := rapid.SampledFrom([]int64{512, 1024, 4096, 65536})
		touch := func(off, length int64) {
			for _, m := range models {
				for k := off; !m.disabled && k < min(off+length, size); k++ {
					m.dirty[k/m.granularity] = true
				}
			}
		}
		step := func(name string, s block.BitmapChange, possible bool, then func()) {
			err := g.ChangeBitmaps(ctx, s)
			if (err == nil) != possible {
				rt.Fatalf("%s: %v", name, err)
			}
			if possible {
				then()
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				off := int64(rapid.IntRange(0, int(size)).Draw(rt, "off"))
				length := min(size-off, int64(rapid.IntRange(1, 70_000).Draw(rt, "length")))
				switch rapid.IntRange(0, 3).Draw(rt, "kind") {
				case 0:
					must(rt, r.WriteAt(ctx, make([]byte, length), off, 0))
				case 1:
					must(rt, r.WriteZeroes(ctx, off, length, 0))
				case 2:
					must(rt, r.Discard(ctx, off, length))
				case 3:
					must(rt, r.WriteAt(ctx, make([]byte, length+10), off, 0))
					length += 10
					size = max(size, off+length)
				}
				touch(off, length)
			},
			"truncate": func(rt *rapid.T) {
				size = int64(rapid.IntRange(0, 300_000).Draw(rt, "size"))
				must(rt, r.Truncate(ctx, size))
				for _, m := range models {
					for k := range m.dirty {
						if k*m.granularity >= size {
							delete(m.dirty, k)
						}
					}
				}
			},
			"add": func(rt *rapid.T) {
				name, m := name.Draw(rt, "name"), &model{granularity.Draw(rt, "granularity"), rapid.Bool().Draw(rt, "disabled"), map[int64]bool{}}
				o := block.BitmapOptions{Name: name, Granularity: m.granularity, Disabled: m.disabled}
				step("add", block.AddBitmap(n, o), models[name] == nil, func() { models[name] = m })
			},
			"remove": func(rt *rapid.T) {
				name := name.Draw(rt, "name")
				step("remove", block.RemoveBitmap(n, name), models[name] != nil, func() { delete(models, name) })
			},
			"clear": func(rt *rapid.T) {
				name := name.Draw(rt, "name")
				step("clear", block.ClearBitmap(n, name), models[name] != nil, func() { clear(models[name].dirty) })
			},
			"enable": func(rt *rapid.T) {
				name := name.Draw(rt, "name")
				step("enable", block.EnableBitmap(n, name), models[name] != nil, func() { models[name].disabled = false })
			},
			"disable": func(rt *rapid.T) {
				name := name.Draw(rt, "name")
				step("disable", block.DisableBitmap(n, name), models[name] != nil, func() { models[name].disabled = true })
			},
			"merge": func(rt *rapid.T) {
				to, from := name.Draw(rt, "to"), name.Draw(rt, "from")
				step("merge", block.MergeBitmaps(n, to, block.BitmapSource{Node: n, Name: from}), models[to] != nil && models[from] != nil, func() {
					a, b := models[to], models[from]
					for k := range b.dirty {
						for at := k * b.granularity; at < min((k+1)*b.granularity, size); at++ {
							a.dirty[at/a.granularity] = true
						}
					}
				})
			},
			"": func(rt *rapid.T) {
				if len(n.Bitmaps()) != len(models) {
					rt.Fatalf("there are %d bitmaps, not %d", len(n.Bitmaps()), len(models))
				}
				for _, b := range n.Bitmaps() {
					m := models[b.Name()]
					var want []string
					for k := int64(0); k*m.granularity < size; k++ {
						if !m.dirty[k] {
							continue
						}
						first := k * m.granularity
						for m.dirty[k+1] {
							k++
						}
						want = append(want, fmt.Sprintf("%d+%d", first, min((k+1)*m.granularity, size)-first))
					}
					if got := dirty(b); got != strings.Join(want, " ") {
						rt.Fatalf("%s has %s, not %s", b.Name(), got, want)
					}
					if i := b.Info(); i.Count != int64(len(m.dirty))*m.granularity || i.Recording == m.disabled {
						rt.Fatalf("%s is %+v, but %d granules are dirty, disabled %t", b.Name(), i, len(m.dirty), m.disabled)
					}
				}
			},
		})
	})
}

// Writers run while bitmaps are added, cleared, merged, frozen and removed. When they
// have ended, every block that was written after the last clear is dirty.
func TestG29ChangesOfBitmapsRaceWithWriters(t *testing.T) {
	const writers, blocks = 4, 256
	g := newGraph(t)
	n := opened(t, g, disk("d", writers*blocks*4096))
	r := attached(t, n, "x", rd|wr, all)
	b := add(t, n, block.BitmapOptions{Name: "b", Granularity: 4096})
	var stop, cleared atomic.Bool
	var after [writers]atomic.Int64 // blocks written since the clear, counted by writers
	var group sync.WaitGroup
	for w := range int64(writers) {
		lane := r.NewLane(block.Shard(w), nil)
		group.Go(func() {
			defer lane.Close()
			c := lane.Context(ctx)
			for i := int64(0); !stop.Load() || after[w].Load() < blocks; i++ {
				seen := cleared.Load()
				off := (w*blocks + i%blocks) * 4096
				if seen {
					off = (w*blocks + after[w].Load()%blocks) * 4096
				}
				if err := r.Do(c, func(c context.Context) error { return r.WriteAt(c, []byte{1}, off, 0) }); err != nil {
					t.Error(err)
				}
				if seen {
					after[w].Add(1)
				}
			}
		})
	}
	for i := range 20 {
		must(t, g.ChangeBitmaps(ctx, block.AddBitmap(n, block.BitmapOptions{Name: "c", Granularity: 512 << (i % 5)})))
		must(t, g.ChangeBitmaps(ctx, block.ClearBitmap(n, "b")))
		must(t, g.ChangeBitmaps(ctx, block.MergeBitmaps(n, "c", block.BitmapSource{Node: n, Name: "b"}), block.DisableBitmap(n, "b")))
		must(t, g.ChangeBitmaps(ctx, block.EnableBitmap(n, "b"), block.RemoveBitmap(n, "c")))
	}
	must(t, g.ChangeBitmaps(ctx, block.ClearBitmap(n, "b")))
	cleared.Store(true)
	for i := range 20 {
		must(t, g.ChangeBitmaps(ctx, block.AddBitmap(n, block.BitmapOptions{Name: fmt.Sprint(i)})))
		must(t, g.ChangeBitmaps(ctx, block.MergeBitmaps(n, fmt.Sprint(i), block.BitmapSource{Node: n, Name: "b"})))
	}
	stop.Store(true)
	group.Wait()
	wantDirty(t, b, fmt.Sprintf("0+%d", writers*blocks*4096))
}

func TestG29ABusyBitmapHasOneUser(t *testing.T) {
	n := opened(t, newGraph(t), disk("d", 1<<20))
	b := add(t, n, block.BitmapOptions{Name: "b"})
	done, err := b.Use()
	must(t, err)
	if _, err := b.Use(); !errors.Is(err, block.ErrBusy) {
		t.Errorf("a second user: %v", err)
	}
	if !b.Info().Busy {
		t.Errorf("it is not busy")
	}
	done()
	done, err = b.Use()
	must(t, err)
	done()
}
