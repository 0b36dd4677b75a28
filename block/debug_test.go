package block_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	pass "github.com/nbdserve/nbdserve/block/filter"
)

// A witness is a filter that remembers of what events it was told.
type witness struct {
	pass.Pass
	seen []string
}

// BlockStatus says that the block at 4096 comes from a backing node.
func (w *witness) BlockStatus(ctx context.Context, off, n int64, precise bool) (block.Extent, error) {
	x, err := w.Pass.BlockStatus(ctx, off, n, precise)
	if off == 4096 {
		x.Depth = 1
	}
	return x, err
}

func (w *witness) DebugEvent(e block.DebugEvent)     { w.seen = append(w.seen, e.String()) }
func (*witness) Breakpoint(block.DebugEvent, string) {}
func (*witness) RemoveBreakpoint(string) error       { return nil }
func (*witness) Resume(string) error                 { return nil }
func (*witness) Suspended(string) bool               { return false }

// unaligned is a filter that leaves it to the node below to align.
type unaligned struct{ *witness }

func (u unaligned) Limits() block.Limits {
	l := u.witness.Limits()
	l.RequestAlignment = 1
	return l
}

func TestG27EventsOfTheSeam(t *testing.T) {
	var w, above *witness
	g := blocktest.NewGraph(t, &block.Driver{Name: "witness", Kind: block.Filter, Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
		p, err := pass.Open(ctx, o, "file")
		if w == nil {
			p.Align = 512
			w = &witness{Pass: p}
			return w, err
		}
		above = &witness{Pass: p}
		return unaligned{above}, err
	}})
	over := func(c *block.Config) *block.Config {
		return &block.Config{Driver: "witness", Unmap: true, Children: map[string]*block.Config{"file": c}}
	}
	r := attached(t, opened(t, g, over(over(disk("", 1<<20)))), "test", block.PermConsistentRead|block.PermWrite|block.PermWriteUnchanged, 0)
	for _, c := range []struct {
		what   string
		do     func(ctx context.Context) error
		events string
	}{
		{"write", func(ctx context.Context) error { return r.WriteAt(ctx, make([]byte, 512), 0, 0) }, "pwritev pwritev_done"},
		{"write of the end of a block", func(ctx context.Context) error { return r.WriteAt(ctx, make([]byte, 12), 500, 0) },
			"pwritev_rmw_head pwritev_rmw_after_head pwritev pwritev_done"},
		{"write of the start of a block", func(ctx context.Context) error { return r.WriteAt(ctx, make([]byte, 12), 512, 0) },
			"pwritev_rmw_tail pwritev_rmw_after_tail pwritev pwritev_done"},
		{"write inside a block", func(ctx context.Context) error { return r.WriteAt(ctx, make([]byte, 12), 520, 0) },
			"pwritev_rmw_head pwritev_rmw_tail pwritev_rmw_after_head pwritev_rmw_after_tail pwritev pwritev_done"},
		{"copy", func(ctx context.Context) error {
			_, err := above.Child.CopyUp(ctx, 4096, 512, 1)
			return err
		}, "cor_write"},
		{"zeroes", func(ctx context.Context) error { return r.WriteZeroes(ctx, 0, 512, 0) }, "pwritev_zero"},
		{"flush", r.Flush, "flush_to_disk"},
		{"read", func(ctx context.Context) error { return r.ReadAt(ctx, make([]byte, 512), 0) }, ""},
	} {
		w.seen = nil
		if err := r.Do(ctx, c.do); err != nil {
			t.Errorf("%s: %v", c.what, err)
		}
		if got := strings.Join(w.seen, " "); got != c.events {
			t.Errorf("%s: %s, want %s", c.what, got, c.events)
		}
	}
}

func TestG27EventNames(t *testing.T) {
	for e := block.EventNone; e < block.NumDebugEvents; e++ {
		var got block.DebugEvent
		if err := got.UnmarshalText([]byte(e.String())); err != nil || got != e {
			t.Errorf("%s: %v, %v", e, got, err)
		}
	}
	var e block.DebugEvent
	if err := e.UnmarshalText([]byte("vmstate_load")); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("an event that is not told: %v", err)
	}
}
