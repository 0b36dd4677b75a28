package block_test

import (
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// The extents of a chain have a layer each, end where the deciding layer changes, and
// cover every byte once: joined by depth they are what the model says.
func TestG35ExtentsOfAChainAreJoinedByLayer(t *testing.T) {
	rng := rand.New(rand.NewPCG(2, 2))
	for _, sizes := range [][]int64{{5000}, {5000, 3000}, {5000, 2048, 9000}, {9000, 700, 8192, 100}, {4096, 0, 4096}} {
		for range 20 {
			n, _, depth := chain(t, rng, sizes)
			r := attached(t, n, "x", rd, all)
			off := rng.Int64N(sizes[0])
			length := rng.Int64N(sizes[0]-off) + 1
			var got, want []int64
			byDepth := func(a, b block.Extent) bool { return a.Depth == b.Depth }
			for x, err := range r.Extents(ctx, off, length, true, byDepth) {
				must(t, err)
				got = append(got, int64(x.Depth), x.Length)
			}
			for k := off; k < off+length; k++ {
				if k == off || depth[k] != depth[k-1] {
					want = append(want, int64(depth[k]), 0)
				}
				want[len(want)-1]++
			}
			if !slices.Equal(got, want) {
				t.Fatalf("%v at %d+%d: depths and lengths %v, want %v", sizes, off, length, got, want)
			}
		}
	}
}

func TestG35ExtentsWithoutARuleAreTheSameInAll(t *testing.T) {
	s := blocktest.NewStore(1 << 16)
	s.Write(make([]byte, 8192), 8192)
	n := opened(t, newGraph(t), blocktest.MemoryConfig(s))
	r := attached(t, n, "x", rd, all)
	var last block.Extent
	end := int64(0)
	for x, err := range r.Extents(ctx, 0, 1<<16, true, nil) {
		must(t, err)
		if x.Flags&block.StatusOffset == 0 || x.Offset != end || end > 0 && x.Flags == last.Flags {
			t.Errorf("extent %+v after %+v", x, last)
		}
		last, end = x, end+x.Length
	}
	if end != 1<<16 || last.Flags&block.StatusEOF == 0 {
		t.Errorf("the extents end at %d with %+v", end, last)
	}
	// The rule is asked for each piece, and may end an extent early; so may who looks.
	count := 0
	for _, err := range r.Extents(ctx, 0, 1<<16, true, func(a, b block.Extent) bool { return false }) {
		must(t, err)
		if count++; count == 2 {
			break
		}
	}
	if count != 2 {
		t.Errorf("%d extents", count)
	}
}

func TestG35ExtentsBeforeAnErrorAreTold(t *testing.T) {
	faults := new(blocktest.Faults)
	s := blocktest.NewStore(1 << 16)
	s.Write(make([]byte, 8192), 8192)
	r := attached(t, opened(t, newGraph(t), blocktest.FaultConfig(faults, blocktest.MemoryConfig(s))), "x", rd, all)
	faults.Add(blocktest.Fault{Op: blocktest.OpStatus, Skip: 1, Err: syscall.EIO})
	var found []int64
	var failed error
	for x, err := range r.Extents(ctx, 0, 1<<16, true, nil) {
		found, failed = append(found, x.Length), err
	}
	if !slices.Equal(found, []int64{8192, 1<<16 - 8192}) {
		t.Errorf("lengths %v", found)
	}
	wantError(t, failed, syscall.EIO, "block status")
}
