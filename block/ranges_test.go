package block_test

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// held opens a tracked node whose requests wait at a gate.
func held(t *testing.T) (*block.Root, *blocktest.Gate) {
	t.Helper()
	gate := blocktest.NewGate()
	n := opened(t, newGraph(t), blocktest.SlowConfig(gate, disk("", 1<<20)))
	r := attached(t, n, "x", rd|wr, rd)
	must(t, n.Graph().TrackWrites(ctx, n))
	return r, gate
}

// A request that overlaps one with Serialising waits for it, and the other way round;
// what does not overlap goes on, and so do plain writes beside plain writes.
func TestG35SerialisingRequestsKeepOthersOut(t *testing.T) {
	const off, length = 8192, 4096
	kinds := map[string]func(r *block.Root, off int64, flags block.ReqFlags) error{
		"write": func(r *block.Root, off int64, f block.ReqFlags) error {
			return r.WriteAt(ctx, bytes.Repeat([]byte{1}, length), off, f)
		},
		"zero":    func(r *block.Root, off int64, f block.ReqFlags) error { return r.WriteZeroes(ctx, off, length, f) },
		"discard": func(r *block.Root, off int64, _ block.ReqFlags) error { return r.Discard(ctx, off, length) },
		"read": func(r *block.Root, off int64, _ block.ReqFlags) error {
			return r.ReadSerialised(ctx, make([]byte, length), off)
		},
	}
	serial := func(kind string, f block.ReqFlags) bool {
		return kind == "read" || kind != "discard" && f&block.Serialising != 0
	}
	for first, a := range kinds {
		for second, b := range kinds {
			for _, fa := range []block.ReqFlags{0, block.Serialising} {
				for _, fb := range []block.ReqFlags{0, block.Serialising} {
					r, gate := held(t)
					gate.Hold(blocktest.OpWrite, blocktest.OpZero, blocktest.OpDiscard, blocktest.OpRead)
					done := make(chan error, 3)
					go func() { done <- a(r, off, fa) }()
					must(t, gate.WaitHeld(ctx, 1))
					go func() { done <- b(r, off+length-1, fb) }()
					// Beside both, so that it is held when the second has had its time.
					go func() { done <- a(r, off+2*length, fa) }()
					wait := serial(first, fa) || serial(second, fb)
					if !wait {
						must(t, gate.WaitHeld(ctx, 3))
					} else {
						must(t, gate.WaitHeld(ctx, 2))
						if gate.Held() != 2 {
							t.Errorf("%s (%#x) and %s (%#x), which overlap, are in flight together", first, fa, second, fb)
						}
					}
					gate.ReleaseAll()
					for range 3 {
						must(t, <-done)
					}
				}
			}
		}
	}
}

func TestG35SerialisingNeedsATrackedNode(t *testing.T) {
	n := opened(t, newGraph(t), disk("d", 1<<20))
	r := attached(t, n, "x", rd|wr, rd)
	p := make([]byte, 512)
	for _, err := range []error{r.WriteAt(ctx, p, 0, block.Serialising), r.WriteZeroes(ctx, 0, 512, block.Serialising), r.ReadSerialised(ctx, p, 0)} {
		wantError(t, err, block.ErrInvalid, "writes to node 'd' are not tracked")
	}
	must(t, n.Graph().TrackWrites(ctx, n))
	must(t, n.Graph().TrackWrites(ctx, n))
	must(t, r.WriteAt(ctx, p, 0, block.Serialising))
}

// A reader never sees half of a write.
func TestG35SerialisedReadsAreOfOneMoment(t *testing.T) {
	const writers, readers, blocks = 4, 2, 16
	c := blocktest.MemoryConfig(blocktest.NewStore(blocks * 512))
	c.Options.(*blocktest.MemoryOptions).Limits.MaxTransfer = 512 // each is done in parts
	n := opened(t, newGraph(t), c)
	r := attached(t, n, "x", rd|wr, rd)
	must(t, n.Graph().TrackWrites(ctx, n))
	var group sync.WaitGroup
	for w := range writers {
		group.Go(func() {
			rng := rand.New(rand.NewPCG(3, uint64(w)))
			for range 300 {
				p := bytes.Repeat([]byte{byte(rng.Uint32())}, blocks*512)
				if err := r.WriteAt(ctx, p, 0, block.Serialising); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range readers {
		group.Go(func() {
			p := make([]byte, blocks*512)
			for range 300 {
				if err := r.ReadSerialised(ctx, p, 0); err != nil {
					t.Error(err)
				}
				if i := slices.IndexFunc(p, func(b byte) bool { return b != p[0] }); i >= 0 {
					t.Errorf("byte 0 is %d and byte %d is %d", p[0], i, p[i])
					return
				}
			}
		})
	}
	group.Wait()
}

// Zeroes that are written in parts of blocks are found where the block is zero then;
// data that is zero by itself is not.
func TestG35ZeroesAreDetectedInWholeBlocks(t *testing.T) {
	for mode, zero := range map[block.DetectZeroes]string{block.DetectZeroesOn: "zero", block.DetectZeroesUnmap: "discard"} {
		r, l := logged(t, 3*4096+100, func(c *block.Config, lim *block.Limits) {
			c.DetectZeroes = mode
			lim.RequestAlignment = 4096
		})
		from := 0
		must(t, r.WriteAt(ctx, make([]byte, 100), 0, 0))
		wantReached(t, l, &from, "write 0+4096")
		must(t, r.WriteAt(ctx, make([]byte, 3996), 100, block.FUA))
		wantReached(t, l, &from, zero+" fua 0+4096")
		must(t, r.WriteAt(ctx, []byte{0, 1}, 0, 0))
		wantReached(t, l, &from, "write 0+4096")
		must(t, r.WriteAt(ctx, make([]byte, 8192), 4096, 0))
		wantReached(t, l, &from, zero+" 4096+8192")
		must(t, r.WriteAt(ctx, make([]byte, 8192), 2048, 0))
		wantReached(t, l, &from, zero+" 4096+4096", "write 0+4096", zero+" 8192+4096")
		must(t, r.WriteAt(ctx, make([]byte, 100), 3*4096, 0)) // the last block, in whole
		wantReached(t, l, &from, zero+" 12288+100")
	}
}

// A driver that cannot zero gets the data in one piece.
func TestG35ZeroesAreNotDetectedForADriverThatCannotZero(t *testing.T) {
	d := &counting{Nothing: blocktest.Nothing{Length: 1 << 20}}
	g := blocktest.NewGraph(t, d.driver(block.Protocol))
	r := attached(t, opened(t, g, &block.Config{Driver: "counting", DetectZeroes: block.DetectZeroesOn}), "x", rd|wr, rd)
	must(t, r.WriteAt(ctx, make([]byte, 1<<20), 0, 0))
	if d.writes != 1 {
		t.Errorf("%d writes reached the driver", d.writes)
	}
}

// The fallback of a zero request at the end of a node that ends inside a block does
// not make the node longer.
func TestG35DetectedZeroesDoNotGrowTheNode(t *testing.T) {
	s := blocktest.StoreOf(bytes.Repeat([]byte{7}, 5000))
	c := blocktest.MemoryConfig(s)
	c.DetectZeroes = block.DetectZeroesOn
	o := c.Options.(*blocktest.MemoryOptions)
	o.Limits.RequestAlignment, o.NoZero = 4096, true
	r := attached(t, opened(t, newGraph(t), c), "x", rd|wr|rs, all)
	must(t, r.WriteAt(ctx, make([]byte, 900), 4100, 0))
	must(t, r.WriteAt(ctx, make([]byte, 4), 4096, 0))
	if s.Size() != 5000 || !block.IsZero(s.Bytes()[4096:]) {
		t.Errorf("the node has %d bytes", s.Size())
	}
}
