package block_test

import (
	"context"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// nothingRoot is a root on a node of which only the seam costs something.
func nothingRoot(b *testing.B, align int64) *block.Root {
	b.Helper()
	g := blocktest.NewGraph(b, &block.Driver{Name: "nothing", Kind: block.Protocol,
		Open: func(context.Context, *block.Opening) (block.Instance, error) {
			return blocktest.Nothing{Length: 1 << 40, Limit: block.Limits{RequestAlignment: align}}, nil
		}})
	return attached(b, opened(b, g, &block.Config{Driver: "nothing"}), "bench", rd|wr, all)
}

func BenchmarkSeam(b *testing.B) {
	p := make([]byte, 4096)
	p[0] = 1
	for _, c := range []struct {
		name  string
		align int64
		do    func(ctx context.Context, r *block.Root, off int64) error
	}{
		{"read", 1, func(ctx context.Context, r *block.Root, off int64) error { return r.ReadAt(ctx, p, off) }},
		{"write", 1, func(ctx context.Context, r *block.Root, off int64) error { return r.WriteAt(ctx, p, off, 0) }},
		{"write/aligned", 4096, func(ctx context.Context, r *block.Root, off int64) error { return r.WriteAt(ctx, p, off, 0) }},
		{"flush", 1, func(ctx context.Context, r *block.Root, _ int64) error { return r.Flush(ctx) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			r := nothingRoot(b, c.align)
			lane := block.WithShard(ctx, 1)
			b.ReportAllocs()
			for i := int64(0); b.Loop(); i++ {
				if err := c.do(lane, r, i<<12&(1<<30-1)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
