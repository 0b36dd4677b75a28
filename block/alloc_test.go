package block_test

import (
	"context"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// Admission, the seam and locating allocate nothing.
func TestRequestsAllocateNothing(t *testing.T) {
	ctx := context.Background()
	g := blocktest.NewGraph(t, blocktest.Memory(t))
	n, err := g.Open(ctx, blocktest.MemoryConfig(blocktest.StoreOf(make([]byte, 1<<20))))
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermConsistentRead | block.PermWrite, Shared: block.PermAll})
	if err != nil {
		t.Fatal(err)
	}
	lane := r.NewLane(1, nil)
	laneCtx := lane.Context(ctx)
	p := make([]byte, 4096)
	request := func() {
		a, ok := lane.Begin()
		if !ok {
			t.Fatal("drained")
		}
		r.Locate(1, 8192, 4096)
		if err := r.ReadAt(laneCtx, p, 4096); err != nil {
			t.Fatal(err)
		}
		if err := r.WriteAt(laneCtx, p, 4096, 0); err != nil {
			t.Fatal(err)
		}
		lane.End(a)
	}
	if allocs := testing.AllocsPerRun(1000, request); allocs > 0 {
		t.Errorf("%v allocations a request", allocs)
	}
	must(t, g.TrackWrites(ctx, n))
	add(t, n, block.BitmapOptions{Name: "b"})
	if allocs := testing.AllocsPerRun(1000, request); allocs > 0 {
		t.Errorf("%v allocations a request where writes are tracked and there is a bitmap", allocs)
	}
	lane.Close()
	if err := r.Detach(ctx); err != nil {
		t.Fatal(err)
	}
	if err := g.Release(ctx, n); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkAdmission(b *testing.B) {
	ctx := context.Background()
	g := blocktest.NewGraph(b, blocktest.Memory(b))
	n, err := g.Open(ctx, blocktest.MemoryConfig(blocktest.NewStore(1<<20)))
	if err != nil {
		b.Fatal(err)
	}
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "bench", Node: n, Shared: block.PermAll})
	if err != nil {
		b.Fatal(err)
	}
	lane := r.NewLane(1, nil)
	for b.Loop() {
		a, _ := lane.Begin()
		lane.End(a)
	}
	lane.Close()
	if err := r.Detach(ctx); err != nil {
		b.Fatal(err)
	}
	if err := g.Release(ctx, n); err != nil {
		b.Fatal(err)
	}
}
