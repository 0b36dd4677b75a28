package block_test

import (
	"sync/atomic"
	"testing"

	"github.com/nbdserve/nbdserve/block"
)

func TestG17RootsLearnOfAnotherSize(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	small, large := opened(t, g, disk("small", 4096)), opened(t, g, disk("large", 8192))
	top := opened(t, g, node("top", ev, filter, ref("small")))
	var told, other atomic.Int32
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "export", Node: top, Perm: rd, Shared: all, OnResize: func() { told.Add(1) }})
	if err != nil {
		t.Fatal(err)
	}
	defer detach(t, r)
	beside, err := g.AttachRoot(ctx, block.RootConfig{User: "beside", Node: large, Perm: rd, Shared: all, OnResize: func() { other.Add(1) }})
	if err != nil {
		t.Fatal(err)
	}
	defer detach(t, beside)

	if err := g.Replace(ctx, small, large); err != nil {
		t.Fatal(err)
	}
	if r.Size() != 8192 || told.Load() != 1 {
		t.Errorf("size %d, told %d times", r.Size(), told.Load())
	}
	w := attached(t, large, "grower", rd|wr|rs, all)
	if err := w.Truncate(ctx, 10000); err != nil {
		t.Fatal(err)
	}
	large.SizeChanged()
	large.SizeChanged()
	if r.Size() != 10000 || told.Load() != 2 || other.Load() != 1 {
		t.Errorf("size %d; told %d times, and the other %d", r.Size(), told.Load(), other.Load())
	}
}
