package blocktest_test

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"pgregory.net/rapid"
)

func TestStoreAgainstModel(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		model := make([]byte, 20_000)
		s := blocktest.NewStore(20_000)
		type copied struct {
			store *blocktest.Store
			model []byte
		}
		var clones []copied
		ranges := func(rt *rapid.T) (off, n int64) {
			off = rapid.Int64Range(0, int64(len(model))).Draw(rt, "off")
			return off, rapid.Int64Range(0, 9000).Draw(rt, "n")
		}
		grow := func(end int64) {
			if end > int64(len(model)) {
				model = append(model, make([]byte, end-int64(len(model)))...)
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				off, n := ranges(rt)
				p := bytes.Repeat([]byte{byte(rapid.IntRange(1, 255).Draw(rt, "byte"))}, int(n))
				s.Write(p, off)
				grow(off + n)
				copy(model[off:], p)
			},
			"zero": func(rt *rapid.T) {
				off, n := ranges(rt)
				s.Zero(off, n, rapid.Bool().Draw(rt, "unmap"))
				grow(off + n)
				clear(model[off : off+n])
			},
			"truncate": func(rt *rapid.T) {
				size := rapid.Int64Range(1, 40_000).Draw(rt, "size")
				s.Truncate(size)
				grow(size)
				model = model[:size:size]
			},
			"clone": func(*rapid.T) { clones = append(clones, copied{s.Clone(), bytes.Clone(model)}) },
			"": func(rt *rapid.T) {
				if !bytes.Equal(s.Bytes(), model) {
					rt.Fatalf("the store differs from the model")
				}
				for off := int64(0); off < s.Size(); {
					allocated, n := s.Extent(off, s.Size()-off)
					if n < 1 || !allocated && !block.IsZero(model[off:off+n]) {
						rt.Fatalf("extent of %d bytes at %d is no hole", n, off)
					}
					off += n
				}
			},
		})
		for _, c := range clones {
			if !bytes.Equal(c.store.Bytes(), c.model) {
				rt.Fatalf("a clone changed with the original")
			}
		}
		path := filepath.Join(dir, "saved")
		if err := s.Save(path); err != nil {
			rt.Fatalf("%v", err)
		}
		if l, err := blocktest.LoadStore(path); err != nil || !bytes.Equal(l.Bytes(), model) {
			rt.Fatalf("saved and loaded, the store differs: %v", err)
		}
	})
}

func TestStoreKnowsItsHoles(t *testing.T) {
	s := blocktest.NewStore(1 << 40)
	s.Write([]byte{1}, 1<<30)
	s.Zero(0, 1<<40, true) // at once, however large
	if s.Allocated() != 0 {
		t.Errorf("%d bytes allocated", s.Allocated())
	}
	s.Zero(4096, 1024, false)
	s.Write([]byte{1}, 8192)
	if s.Allocated() != 1536 {
		t.Errorf("%d bytes allocated, want 1536", s.Allocated())
	}
	if a, n := s.Extent(4096, 8192); !a || n != 1024 {
		t.Errorf("extent %t %d", a, n)
	}
	if a, n := s.Extent(5120, 8192); a || n != 3072 {
		t.Errorf("extent %t %d", a, n)
	}
}

// record makes a log by requests to a crash node of 2 KiB.
func record(t *testing.T, f func(r *block.Root)) *blocktest.Log {
	t.Helper()
	l := blocktest.NewLog(blocktest.NewStore(2048))
	g := blocktest.NewGraph(t)
	n, err := g.Open(t.Context(), blocktest.CrashConfig(l))
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.AttachRoot(t.Context(), block.RootConfig{User: "test", Node: n, Perm: block.PermAll, Shared: block.PermAll})
	if err != nil {
		t.Fatal(err)
	}
	f(r)
	if err := errors.Join(r.Detach(t.Context()), g.Release(t.Context(), n)); err != nil {
		t.Fatal(err)
	}
	return l
}

// final lists the first byte of each sector in the states of the cut at a moment, without repetitions.
func final(l *blocktest.Log, plan blocktest.Plan) []string {
	var list []string
	for s := range l.States(plan) {
		p := s.Disk.Bytes()
		var heads []byte
		for at := 0; at < len(p); at += blocktest.SectorSize {
			heads = append(heads, p[at])
		}
		list = append(list, fmt.Sprint(heads))
	}
	slices.Sort(list)
	return slices.Compact(list)
}

func sector(b byte) []byte { return bytes.Repeat([]byte{b}, blocktest.SectorSize) }

func TestCutLosesWhatWasNotFlushedOnly(t *testing.T) {
	l := record(t, func(r *block.Root) {
		ctx := t.Context()
		must := func(err error) {
			if err != nil {
				t.Fatal(err)
			}
		}
		must(r.WriteAt(ctx, sector(1), 0, 0))
		must(r.WriteAt(ctx, sector(2), 512, 0))
		must(r.WriteAt(ctx, sector(3), 1024, block.FUA))
	})
	entries := l.Entries() // the flush of the detach comes after the writes
	before := entries[2].End
	if got, want := final(l, blocktest.Plan{From: before, To: before, PerCut: 8}), []string{"[0 0 3 0]", "[0 2 3 0]", "[1 0 3 0]", "[1 2 3 0]"}; !slices.Equal(got, want) {
		t.Errorf("before the flush: %v, want %v", got, want)
	}
	// FUA counts only when it has ended.
	during := entries[2].Start
	if got := final(l, blocktest.Plan{From: during, To: during, PerCut: 8}); !slices.Contains(got, "[1 2 0 0]") || !slices.Contains(got, "[0 0 3 0]") {
		t.Errorf("during the write with FUA: %v", got)
	}
	after := entries[3].End
	if got, want := final(l, blocktest.Plan{From: after, To: after, PerCut: 8}), []string{"[1 2 3 0]"}; !slices.Equal(got, want) {
		t.Errorf("after the flush: %v, want %v", got, want)
	}
	if started := entries[3].Start; len(final(l, blocktest.Plan{From: started, To: started, PerCut: 8})) != 4 {
		t.Errorf("a flush that has not ended counts")
	}
}

func TestLaterWriteToASectorWinsOverAnEarlierOne(t *testing.T) {
	l := record(t, func(r *block.Root) {
		for b := range byte(3) {
			if err := r.WriteAt(t.Context(), sector(b+1), 0, 0); err != nil {
				t.Fatal(err)
			}
		}
	})
	at := l.Entries()[2].End
	if got, want := final(l, blocktest.Plan{From: at, To: at, PerCut: 8}), []string{"[0 0 0 0]", "[1 0 0 0]", "[2 0 0 0]", "[3 0 0 0]"}; !slices.Equal(got, want) {
		t.Errorf("states %v, want %v", got, want)
	}
}

func TestTornWritesKeepSectorsWhole(t *testing.T) {
	l := record(t, func(r *block.Root) {
		if err := r.WriteAt(t.Context(), bytes.Repeat([]byte{7}, 1500), 300, 0); err != nil {
			t.Fatal(err)
		}
	})
	torn := false
	for seed := range uint64(20) {
		for s := range l.States(blocktest.Plan{To: l.Entries()[0].End, PerCut: 2, Torn: true, Seed: seed}) {
			p := s.Disk.Bytes()
			kept := 0
			for _, part := range [][]byte{p[300:512], p[512:1024], p[1024:1536], p[1536:1800]} {
				switch {
				case bytes.Equal(part, bytes.Repeat([]byte{7}, len(part))):
					kept++
				case !block.IsZero(part):
					t.Fatalf("a sector was torn")
				}
			}
			torn = torn || kept == 1 || kept == 2 || kept == 3
		}
	}
	if !torn {
		t.Errorf("no write was torn")
	}
}

func TestZeroesDiscardsAndTruncatesMayBeLostToo(t *testing.T) {
	l := record(t, func(r *block.Root) {
		ctx := t.Context()
		err := errors.Join(
			r.WriteAt(ctx, bytes.Repeat([]byte{9}, 2048), 0, 0), r.Flush(ctx),
			r.WriteZeroes(ctx, 0, 512, 0), r.Discard(ctx, 512, 512), r.Truncate(ctx, 1024))
		if err != nil {
			t.Fatal(err)
		}
	})
	at := l.Entries()[4].End
	got := final(l, blocktest.Plan{From: at, To: at, PerCut: 8})
	want := []string{"[0 0 9 9]", "[0 0]", "[0 9 9 9]", "[0 9]", "[9 0 9 9]", "[9 0]", "[9 9 9 9]", "[9 9]"}
	if !slices.Equal(got, want) {
		t.Errorf("states %v, want %v", got, want)
	}
}

func TestManyPendingWritesGiveAsManyStatesAsAskedFor(t *testing.T) {
	l := record(t, func(r *block.Root) {
		for i := range 40 {
			if err := r.WriteAt(t.Context(), sector(byte(i+1)), int64(i%4)*512, 0); err != nil {
				t.Fatal(err)
			}
		}
	})
	at := l.Entries()[39].End
	n := 0
	for range l.States(blocktest.Plan{From: at, To: at, PerCut: 9, Torn: true}) {
		n++
	}
	if n != 9 {
		t.Errorf("%d states, want 9", n)
	}
}

func TestFaultsHitWhatTheySay(t *testing.T) {
	f := new(blocktest.Faults)
	g := blocktest.NewGraph(t)
	n, err := g.Open(t.Context(), blocktest.FaultConfig(f, blocktest.MemoryConfig(blocktest.NewStore(4096))))
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.AttachRoot(t.Context(), block.RootConfig{User: "test", Node: n, Perm: block.PermAll, Shared: block.PermAll})
	if err != nil {
		t.Fatal(err)
	}
	write := func(off int64) error { return r.WriteAt(t.Context(), sector(1), off, 0) }
	f.Add(blocktest.Fault{Op: blocktest.OpWrite, Off: 1024, Len: 1, Skip: 1, Times: 2, Err: syscall.ENOSPC})
	var got []syscall.Errno
	for _, off := range []int64{1024, 0, 1024, 512, 600, 1024} {
		got = append(got, block.Errno(write(off)))
	}
	if want := []syscall.Errno{0, 0, syscall.ENOSPC, 0, syscall.ENOSPC, 0}; !slices.Equal(got, want) {
		t.Errorf("errors %v, want %v", got, want)
	}
	f.Add(blocktest.Fault{Op: blocktest.OpWrite, Err: syscall.EIO})
	for range 3 {
		if err := write(0); !errors.Is(err, syscall.EIO) {
			t.Errorf("error %v", err)
		}
	}
	f.Clear()
	if err := errors.Join(write(0), r.Detach(t.Context()), g.Release(t.Context(), n)); err != nil {
		t.Error(err)
	}
	if f.Fired() != 5 {
		t.Errorf("%d faults fired, want 5", f.Fired())
	}
}

// spy is a test that fails without failing.
type spy struct {
	*testing.T
	cleanups []func()
	errors   int
}

func (s *spy) Name() string                      { return s.T.Name() + "/spy" }
func (s *spy) Cleanup(f func())                  { s.cleanups = append(s.cleanups, f) }
func (s *spy) Errorf(format string, args ...any) { s.errors++ }

func (s *spy) end() {
	for i := len(s.cleanups) - 1; i >= 0; i-- {
		s.cleanups[i]()
	}
}

func TestGraphThatIsLeftOpenFailsItsTest(t *testing.T) {
	s := &spy{T: t}
	g := blocktest.NewGraph(s)
	n, err := g.Open(t.Context(), blocktest.MemoryConfig(blocktest.NewStore(512)))
	if err != nil {
		t.Fatal(err)
	}
	s.end()
	if s.errors != 1 {
		t.Errorf("%d errors for a node left", s.errors)
	}
	if err := g.Release(t.Context(), n); err != nil {
		t.Error(err)
	}
}

func TestRequestThatBreaksTheContractFailsItsTest(t *testing.T) {
	s := &spy{T: t}
	g := blocktest.NewGraph(s)
	n, err := g.Open(t.Context(), blocktest.MemoryConfig(blocktest.NewStore(512)))
	if err != nil {
		t.Fatal(err)
	}
	i := n.Instance()
	for _, err := range []error{
		i.ReadAt(t.Context(), make([]byte, 1), 512),
		i.ReadAt(t.Context(), nil, 0),
		i.WriteAt(t.Context(), make([]byte, 1), -1, 0),
		i.WriteAt(t.Context(), make([]byte, 1), 0, block.MayUnmap),
	} {
		if err == nil {
			t.Errorf("a bad request succeeded")
		}
	}
	if s.errors != 4 {
		t.Errorf("%d errors, want 4", s.errors)
	}
	if err := g.Release(t.Context(), n); err != nil {
		t.Error(err)
	}
	s.end()
}

func TestGoroutineThatIsLeftFailsItsTest(t *testing.T) {
	defer blocktest.SetGoroutineWait(0)()
	s := &spy{T: t}
	blocktest.NewGraph(s)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		<-stop
		close(done)
	}()
	s.end()
	if s.errors != 1 {
		t.Errorf("%d errors for a goroutine left", s.errors)
	}
	close(stop)
	<-done
}
