package block_test

import (
	"bytes"
	"context"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// A parent that may resize writes behind an unaligned end of a node with request
// alignment: the node grows to exactly the end of the write, and nothing is lost.
func TestSeamGrowsAlignedNodeExactly(t *testing.T) {
	for _, c := range []struct{ size, off, n, want int64 }{
		{1000, 1000, 20, 1020},
		{1000, 1100, 700, 1800},
		{1000, 990, 5000, 5990},
		{1000, 1000, 24, 1024},
		{1024, 4096, 512, 4608},
		{0, 0, 100, 100},
	} {
		ctx := context.Background()
		g := blocktest.NewGraph(t, blocktest.Memory(t))
		n, err := g.Open(ctx, &block.Config{Driver: "memory", Options: &blocktest.MemoryOptions{
			Store: blocktest.NewStore(c.size), Limits: block.Limits{RequestAlignment: 512}}})
		if err != nil {
			t.Fatal(err)
		}
		r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermAll, Shared: block.PermAll})
		if err != nil {
			t.Fatal(err)
		}
		p := bytes.Repeat([]byte{0xa5}, int(c.n))
		err = r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, p, c.off, 0) })
		if err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		if n.Size() != c.want {
			t.Errorf("%+v: size is %d", c, n.Size())
		}
		got := make([]byte, c.n)
		if err := r.Do(ctx, func(ctx context.Context) error { return r.ReadAt(ctx, got, c.off) }); err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		if !bytes.Equal(got, p) {
			t.Errorf("%+v: what was written does not read back", c)
		}
		if err := r.Detach(ctx); err != nil {
			t.Fatal(err)
		}
		if err := g.Release(ctx, n); err != nil {
			t.Fatal(err)
		}
	}
}
