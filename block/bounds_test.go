package block_test

import (
	"math"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

func TestRangesWhoseEndOverflowsAreRefused(t *testing.T) {
	n := opened(t, newGraph(t), disk("d", 4096))
	r := attached(t, n, "test", rd|wr, rd)
	grower := attached(t, opened(t, newGraph(t), disk("d", 4096)), "test", rd|wr|rs, rd)
	for _, c := range []struct{ off, length int64 }{
		{math.MaxInt64 - 1<<30, 1 << 30}, {math.MaxInt64 &^ (1<<30 - 1), math.MaxInt64 &^ (1<<30 - 1)},
		{math.MaxInt64, math.MaxInt64}, {4096, math.MaxInt64}, {-1, 1}, {1, -1},
	} {
		_, err := r.BlockStatus(ctx, c.off, c.length, true)
		wantError(t, err, block.ErrRange)
		wantError(t, r.Prefetch(ctx, c.off, c.length), block.ErrRange)
		wantError(t, r.Discard(ctx, c.off, c.length), block.ErrRange)
		wantError(t, r.WriteZeroes(ctx, c.off, c.length, 0), block.ErrRange)
		wantError(t, grower.WriteZeroes(ctx, c.off, c.length, 0), block.ErrRange)
		if l := r.Locate(0, c.off, c.length); l.Kind != block.LocateAsk {
			t.Errorf("bytes at %d are located", c.off)
		}
	}
}

// The parts that the driver zeroed itself, without FUA, are made durable too when
// the rest is written with FUA.
func TestZeroRefusedHalfwayIsDurableAsAWhole(t *testing.T) {
	l := blocktest.NewLog(blocktest.NewStore(4096))
	c := blocktest.CrashConfig(l)
	limits := &c.Options.(*blocktest.CrashOptions).Limits
	limits.ZeroFlags, limits.MaxZero = 0, 1024
	faults := new(blocktest.Faults)
	faults.Add(blocktest.Fault{Op: blocktest.OpZero, Skip: 2, Err: block.ErrNotSupported})
	r := attached(t, opened(t, newGraph(t), blocktest.FaultConfig(faults, c)), "x", rd|wr, rd)
	from := 0
	must(t, r.WriteZeroes(ctx, 0, 4096, block.FUA))
	wantReached(t, l, &from, "zero 0+1024", "zero 1024+1024", "write fua 2048+2048", "flush")
}
