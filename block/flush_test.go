package block_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// Others may have written to the file before, so the first flush is a real one.
func TestG35FlushIsSkippedWhileNothingWasWritten(t *testing.T) {
	r, l := logged(t, 4096, asIs)
	from := 0
	must(t, r.Flush(ctx))
	must(t, r.Flush(ctx))
	wantReached(t, l, &from, "flush")
	for _, c := range []struct {
		request func() error
		reached string
	}{
		{func() error { return r.WriteAt(block.WithShard(ctx, 3), []byte{1}, 0, 0) }, "write 0+1"},
		{func() error { return r.WriteZeroes(block.WithShard(ctx, 7), 0, 512, 0) }, "zero 0+512"},
		{func() error { return r.Discard(ctx, 0, 512) }, "discard 0+512"},
	} {
		must(t, c.request())
		must(t, r.Flush(ctx))
		must(t, r.Flush(block.WithShard(ctx, 9)))
		wantReached(t, l, &from, c.reached, "flush")
	}
	must(t, r.ReadAt(ctx, make([]byte, 512), 0))
	must(t, r.Flush(ctx))
	wantReached(t, l, &from)
}

func TestG35FlushAfterAResizeIsARealOne(t *testing.T) {
	l := blocktest.NewLog(blocktest.NewStore(4096))
	r := attached(t, opened(t, newGraph(t), blocktest.CrashConfig(l)), "x", all, all)
	must(t, r.Flush(ctx))
	from := len(l.Entries())
	must(t, r.Truncate(ctx, 8192))
	must(t, r.Flush(ctx))
	must(t, r.Flush(ctx))
	wantReached(t, l, &from, "truncate 8192+0", "flush")
}

// What is durable when it is answered needs no flush; what is not does, also where the
// flush that FUA stands for comes after it.
func TestG35FlushAfterFUA(t *testing.T) {
	r, l := logged(t, 4096, asIs)
	must(t, r.Flush(ctx))
	from := len(l.Entries())
	must(t, r.WriteAt(ctx, []byte{1}, 0, block.FUA))
	must(t, r.WriteZeroes(ctx, 512, 512, block.FUA))
	must(t, r.Flush(ctx))
	wantReached(t, l, &from, "write fua 0+1", "zero fua 512+512")
	must(t, r.WriteAt(ctx, []byte{1}, 0, 0))
	must(t, r.WriteAt(ctx, []byte{1}, 1, block.FUA))
	must(t, r.Flush(ctx))
	wantReached(t, l, &from, "write 0+1", "write fua 1+1", "flush")
}

// A write that fails may have changed something.
func TestG35FlushAfterAFailedRequestIsARealOne(t *testing.T) {
	fail := errors.New("no")
	d := &counting{Nothing: blocktest.Nothing{Length: 4096}}
	g := blocktest.NewGraph(t, d.driver(block.Protocol))
	r := attached(t, opened(t, g, &block.Config{Driver: "counting"}), "x", rd|wr, rd)
	must(t, r.Flush(ctx))
	d.write = fail
	wantError(t, r.WriteAt(ctx, []byte{1}, 0, 0), fail)
	must(t, r.Flush(ctx))
	wantError(t, r.WriteAt(ctx, []byte{1}, 0, block.FUA), fail)
	must(t, r.Flush(ctx))
	must(t, r.Flush(ctx))
	if d.flushes != 3 {
		t.Errorf("%d flushes reached the driver", d.flushes)
	}
	// A flush that failed is tried again each time, until one succeeds.
	d.write, d.flush = nil, syscall.EIO
	must(t, r.Flush(ctx))
	must(t, r.WriteAt(ctx, []byte{1}, 0, 0))
	wantError(t, r.Flush(ctx), syscall.EIO)
	wantError(t, r.Flush(ctx), syscall.EIO)
	d.flush = nil
	must(t, r.Flush(ctx))
	must(t, r.Flush(ctx))
	if d.flushes != 6 {
		t.Errorf("%d flushes reached the driver", d.flushes)
	}
}

// counting counts what reaches it.
type counting struct {
	blocktest.Nothing
	write, flush    error // what requests return
	writes, flushes int
	fua             bool // of the last write
	during          func()
}

func (c *counting) WriteAt(_ context.Context, _ []byte, _ int64, flags block.ReqFlags) error {
	c.writes++
	c.fua = flags&block.FUA != 0
	return c.write
}

func (c *counting) Flush(context.Context) error {
	c.flushes++
	err := c.flush
	if c.during != nil {
		c.during()
	}
	return err
}

func (c *counting) Limits() block.Limits { return block.Limits{WriteFlags: block.FUA} }

func (c *counting) driver(kind block.DriverKind) *block.Driver {
	return &block.Driver{Name: "counting", Kind: kind, Open: func(context.Context, *block.Opening) (block.Instance, error) { return c, nil }}
}

// A write that ends while a flush runs, and a flush that fails then, make the next one real.
func TestG35AFlushCoversOnlyWhatCameBefore(t *testing.T) {
	d := &counting{Nothing: blocktest.Nothing{Length: 4096}}
	g := blocktest.NewGraph(t, d.driver(block.Protocol))
	r := attached(t, opened(t, g, &block.Config{Driver: "counting"}), "x", rd|wr, rd)
	d.during = func() {
		d.during = nil
		must(t, r.WriteAt(ctx, []byte{1}, 0, 0))
	}
	must(t, r.Flush(ctx))
	must(t, r.Flush(ctx))
	must(t, r.Flush(ctx))
	if d.flushes != 2 {
		t.Errorf("%d flushes reached the driver, want 2", d.flushes)
	}
	must(t, r.WriteAt(ctx, []byte{1}, 0, 0))
	d.during = func() {
		d.during, d.flush = nil, syscall.EIO
		wantError(t, r.Flush(ctx), syscall.EIO)
		d.flush = nil
	}
	must(t, r.Flush(ctx))
	must(t, r.Flush(ctx))
	if d.flushes != 5 {
		t.Errorf("%d flushes reached the driver, want 5", d.flushes)
	}
}

// Formats and filters may hold back what no request has caused, so they are always asked.
func TestG35FormatsAndFiltersAreAlwaysAskedToFlush(t *testing.T) {
	for _, kind := range []block.DriverKind{block.Format, block.Filter} {
		d := &counting{Nothing: blocktest.Nothing{Length: 4096}}
		g := blocktest.NewGraph(t, d.driver(kind))
		r := attached(t, opened(t, g, &block.Config{Driver: "counting"}), "x", rd|wr, rd)
		must(t, r.Flush(ctx))
		must(t, r.Flush(ctx))
		if d.flushes != 2 {
			t.Errorf("%s: %d flushes reached the driver, want 2", kind, d.flushes)
		}
	}
}

func TestG35ReadOnlyAndUnsafeNodesAreNotFlushed(t *testing.T) {
	for _, c := range []*block.Config{{ReadOnly: true}, {Cache: block.CacheMode{NoFlush: true}}} {
		d := &counting{Nothing: blocktest.Nothing{Length: 4096}}
		g := blocktest.NewGraph(t, d.driver(block.Protocol))
		c.Driver = "counting"
		perm := rd
		if !c.ReadOnly {
			perm |= wr
		}
		n := open(t, g, c)
		r := attach(t, n, "x", perm, rd)
		if !c.ReadOnly {
			must(t, r.WriteAt(ctx, []byte{1}, 0, block.FUA))
			if d.fua {
				t.Errorf("a write with FUA reached a node that makes nothing durable")
			}
		}
		must(t, r.Flush(ctx))
		detach(t, r)
		release(t, g, n)
		if d.flushes != 0 {
			t.Errorf("%+v: %d flushes reached the driver", c, d.flushes)
		}
	}
	// A format above is flushed, and it is the file that does nothing.
	d := &counting{Nothing: blocktest.Nothing{Length: 4096}}
	g := blocktest.NewGraph(t, d.driver(block.Format))
	r := attached(t, opened(t, g, &block.Config{Driver: "counting", Cache: block.CacheMode{NoFlush: true}}), "x", rd|wr, rd)
	must(t, r.Flush(ctx))
	if d.flushes != 1 {
		t.Errorf("the format was flushed %d times", d.flushes)
	}
}

// Writers and flushers run in all shards: when a flush has returned, what was written
// before it began is covered by one that reached the disk, skipped or not.
func TestG35SkippedFlushesCoverWhatWasWritten(t *testing.T) {
	const workers, requests = 6, 300
	l := blocktest.NewLog(blocktest.NewStore(workers * requests))
	r := attached(t, opened(t, newGraph(t), blocktest.CrashConfig(l)), "x", rd|wr, rd)
	type span struct{ begin, end int64 }
	var flushed [workers][]span
	var ended [workers * requests]int64 // when the write of a byte was answered
	var group sync.WaitGroup
	for w := range workers {
		group.Go(func() {
			c := block.WithShard(ctx, block.Shard(w))
			rng := rand.New(rand.NewPCG(1, uint64(w)))
			for i := range requests {
				if rng.IntN(3) > 0 {
					at := w*requests + i
					if err := r.WriteAt(c, []byte{1}, int64(at), 0); err != nil {
						t.Error(err)
					}
					ended[at] = l.Mark()
					continue
				}
				s := span{begin: l.Mark()}
				if err := r.Flush(c); err != nil {
					t.Error(err)
				}
				s.end = l.Mark()
				flushed[w] = append(flushed[w], s)
			}
		})
	}
	group.Wait()
	var writes, flushes []blocktest.Entry
	for _, e := range l.Entries() {
		if e.Op == blocktest.OpFlush {
			flushes = append(flushes, e)
		} else {
			writes = append(writes, e)
		}
	}
	asked := 0
	for w := range workers {
		asked += len(flushed[w])
		for _, f := range flushed[w] {
			for _, x := range writes {
				if ended[x.Off] > f.begin {
					continue
				}
				if !slices.ContainsFunc(flushes, func(e blocktest.Entry) bool { return e.Start > x.End && e.End < f.end }) {
					t.Fatalf("flush %d-%d does not cover write %s, which was answered at %d", f.begin, f.end, x, ended[x.Off])
				}
			}
		}
	}
	t.Logf("%d of %d flushes reached the disk", len(flushes), asked)
}
