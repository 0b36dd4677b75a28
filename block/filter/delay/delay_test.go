package delay_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"github.com/nbdserve/nbdserve/block/filter/delay"
)

var ctx = context.Background()

func config(o *delay.Options, file *block.Config) *block.Config {
	return &block.Config{Driver: "delay", Unmap: true, Options: o, Children: map[string]*block.Config{"file": file}}
}

func TestDelayConforms(t *testing.T) {
	blocktest.Conformance(t, blocktest.Factory{
		New: func(t blocktest.TB) blocktest.Subject {
			s := blocktest.NewStore(100_001)
			s.Write(bytes.Repeat([]byte{1, 2, 3}, 14_000), 1000)
			return blocktest.Subject{Graph: blocktest.NewGraph(t, delay.Driver()), Config: config(&delay.Options{Flush: 1}, blocktest.MemoryConfig(s)), Contents: s.Bytes()}
		},
		FastZero: true, Locates: true, Holes: true, Resizes: true, DiscardZeroes: true,
	})
}

func TestDelayIsOfEachKindOfRequest(t *testing.T) {
	o := &delay.Options{Read: delay.Duration(1 * time.Second), Write: delay.Duration(2 * time.Second), Zero: delay.Duration(3 * time.Second),
		Trim: delay.Duration(4 * time.Second), Flush: delay.Duration(5 * time.Second), Extents: delay.Duration(6 * time.Second),
		Cache: delay.Duration(7 * time.Second), Open: delay.Duration(8 * time.Second), Close: delay.Duration(9 * time.Second)}
	synctest.Test(t, func(t *testing.T) {
		took := func(what string, want time.Duration, f func(ctx context.Context) error) {
			t.Helper()
			began := time.Now()
			if err := f(ctx); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			if got := time.Since(began); got != want*time.Second {
				t.Errorf("%s took %v", what, got)
			}
		}
		g := blocktest.NewGraph(t, delay.Driver())
		var n *block.Node
		took("open", 8, func(ctx context.Context) (err error) {
			n, err = g.Open(ctx, config(o, blocktest.MemoryConfig(blocktest.NewStore(1<<20))))
			return err
		})
		r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermConsistentRead | block.PermWrite})
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 512)
		took("read", 1, func(ctx context.Context) error { return r.ReadAt(ctx, p, 0) })
		took("write", 2, func(ctx context.Context) error { return r.WriteAt(ctx, p, 0, 0) })
		took("zero", 3, func(ctx context.Context) error { return r.WriteZeroes(ctx, 0, 512, 0) })
		took("trim", 4, func(ctx context.Context) error { return r.Discard(ctx, 0, 512) })
		took("flush", 5, r.Flush)
		took("extents", 6, func(ctx context.Context) error {
			_, err := r.BlockStatus(ctx, 0, 512, true)
			return err
		})
		took("cache", 7, func(ctx context.Context) error { return r.Prefetch(ctx, 0, 512) })
		if l := r.Locate(0, 0, 512); l.Kind != block.LocateAsk {
			t.Errorf("located without waiting: %+v", l)
		}
		if err := r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, p, 0, 0) }); err != nil {
			t.Error(err)
		}
		if err := r.Detach(ctx); err != nil {
			t.Error(err)
		}
		took("close", 9+5, func(ctx context.Context) error { return g.Release(ctx, n) }) // which flushes
	})
}

func TestDelayDurations(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"0": 0, "2": 2 * time.Second, "0.5": 500 * time.Millisecond, "50ms": 50 * time.Millisecond, "10us": 10 * time.Microsecond, "3ns": 3, "1m": time.Minute,
	} {
		var d delay.Duration
		if err := d.UnmarshalText([]byte(text)); err != nil || time.Duration(d) != want || d.String() != want.String() {
			t.Errorf("%s: %v, %v", text, d, err)
		}
	}
	for _, text := range []string{"", "x", "-1", "-5ms", "5 ms", "NaN", "Inf", "1e300"} {
		var d delay.Duration
		if err := d.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q was taken as %v", text, d)
		}
	}
}

func TestDelayHoldsNoWorker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := blocktest.NewGraph(t, delay.Driver())
		n, err := g.Open(ctx, config(&delay.Options{Read: delay.Duration(time.Second)}, blocktest.MemoryConfig(blocktest.NewStore(1<<20))))
		if err != nil {
			t.Fatal(err)
		}
		r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermConsistentRead})
		if err := errors.Join(err, g.Release(ctx, n)); err != nil {
			t.Fatal(err)
		}
		l := r.NewLane(0, nil)
		var yields []int
		var when []time.Time
		c := l.YieldingContext(ctx, func(n int) { yields, when = append(yields, n), append(when, time.Now()) })
		if err := r.ReadAt(c, make([]byte, 512), 0); err != nil {
			t.Error(err)
		}
		if len(yields) != 2 || yields[0] != 1 || yields[1] != -1 || when[1].Sub(when[0]) != time.Second {
			t.Errorf("yields %v at %v", yields, when)
		}
		l.Close()
		if err := r.Detach(ctx); err != nil {
			t.Error(err)
		}
	})
}
