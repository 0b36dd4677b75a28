package block

import (
	"context"
	"sync/atomic"
)

// A Shard picks a cell of sharded counters. Connections get different ones, so
// that nothing is shared between them on the hot path.
type Shard uint8

// NumShards is the number of cells of a [Counter].
const NumShards = 16

type cell struct {
	v atomic.Int64
	_ [56]byte // a cache line each
}

// A Counter is a sum kept in cells of their own cache lines. The zero value is ready.
type Counter struct{ cells [NumShards]cell }

// Add adds n. It may be called in parallel.
func (c *Counter) Add(s Shard, n int64) { c.cells[s%NumShards].v.Add(n) }

// Load sums the cells.
func (c *Counter) Load() int64 {
	var sum int64
	for i := range c.cells {
		sum += c.cells[i].v.Load()
	}
	return sum
}

type laneContext struct {
	context.Context
	shard Shard
	yield func(n int) // see YieldingContext; may be nil
}

// WithShard returns a context whose requests count in shard s. One is made a
// connection, none a request.
func WithShard(ctx context.Context, s Shard) context.Context { return &laneContext{ctx, s, nil} }

// ShardOf tells the shard of a request's context, 0 where it has none.
func ShardOf(ctx context.Context) Shard {
	if l, ok := ctx.(*laneContext); ok {
		return l.shard
	}
	return 0
}
