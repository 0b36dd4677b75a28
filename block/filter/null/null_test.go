package null_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"github.com/nbdserve/nbdserve/block/filter/null"
)

var ctx = context.Background()

func TestNullConforms(t *testing.T) {
	for _, zeroes := range []bool{false, true} {
		for _, driver := range []string{"null-co", "null-aio"} {
			t.Run(driver, func(t *testing.T) {
				// What is written is gone, so only reading can be tested.
				blocktest.Conformance(t, blocktest.Factory{
					New: func(t blocktest.TB) blocktest.Subject {
						return blocktest.Subject{
							Graph:    blocktest.NewGraph(t, null.Drivers()...),
							Config:   &block.Config{Driver: driver, Options: &null.Options{Size: 100_001, ReadZeroes: zeroes}},
							Contents: make([]byte, 100_001),
						}
					},
					ReadOnly: true, Locates: true, Holes: zeroes,
				})
			})
		}
	}
}

// opened opens a node with a root that may write.
func opened(t *testing.T, o any) *block.Root {
	t.Helper()
	g := blocktest.NewGraph(t, null.Drivers()...)
	n, err := g.Open(ctx, &block.Config{Driver: "null-co", Unmap: true, Options: o})
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermConsistentRead | block.PermWrite})
	if err := errors.Join(err, g.Release(ctx, n)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Detach(ctx); err != nil {
			t.Error(err)
		}
	})
	return r
}

func TestNullForgetsWhatIsWritten(t *testing.T) {
	r := opened(t, nil)
	if r.Size() != 1<<30 {
		t.Errorf("size %d, want 1 GiB", r.Size())
	}
	p := bytes.Repeat([]byte{1}, 4096)
	err := r.Do(ctx, func(ctx context.Context) error {
		return errors.Join(r.WriteAt(ctx, p, 0, block.FUA), r.WriteZeroes(ctx, 0, 512, block.NoFallback), r.Discard(ctx, 0, 512), r.Flush(ctx),
			// The buffer does not keep what was in it: that may be somebody else's.
			r.ReadAt(ctx, p, 0))
	})
	if err != nil || !block.IsZero(p) {
		t.Errorf("%v, read %v...", err, p[:8])
	}
}

func TestNullTakesItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := opened(t, &null.Options{Size: 1 << 20, LatencyNs: 1_000_000})
		p := make([]byte, 512)
		for name, f := range map[string]func(context.Context) error{
			"read": func(ctx context.Context) error { return r.ReadAt(ctx, p, 0) }, "write": func(ctx context.Context) error { return r.WriteAt(ctx, p, 0, 0) },
			"zero": func(ctx context.Context) error { return r.WriteZeroes(ctx, 0, 512, 0) }, "discard": func(ctx context.Context) error { return r.Discard(ctx, 0, 512) },
			"flush": r.Flush,
		} {
			began := time.Now()
			if err := r.Do(ctx, f); err != nil {
				t.Error(err)
			}
			if took := time.Since(began); took != time.Millisecond {
				t.Errorf("%s took %v", name, took)
			}
		}
		if l := r.Locate(0, 0, 512); l.Kind != block.LocateAsk {
			t.Errorf("located without waiting: %+v", l)
		}
	})
}

func TestNullRefusesBadOptions(t *testing.T) {
	g := blocktest.NewGraph(t, null.Drivers()...)
	for text, o := range map[string]*null.Options{
		"latency-ns is invalid: invalid argument": {Size: 1, LatencyNs: -1},
		"size is invalid: invalid argument":       {Size: -1},
	} {
		if _, err := g.Open(ctx, &block.Config{Driver: "null-co", Options: o}); err == nil || err.Error() != text {
			t.Errorf("%v, want %s", err, text)
		}
	}
}
