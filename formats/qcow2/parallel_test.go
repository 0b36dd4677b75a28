package qcow2

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// TestParallelRequestsInTheSameClusters has several users, each with bytes of its
// own in every cluster, so that allocations, discards and zeroes of one meet those
// of the others all the time.
func TestParallelRequestsInTheSameClusters(t *testing.T) {
	for _, c := range []struct {
		opts    CreateOptions
		backing bool
	}{
		{CreateOptions{ClusterSize: 4096, RefcountBits: 16}, false},
		{CreateOptions{ClusterSize: 4096, RefcountBits: 2}, true},
		{CreateOptions{ClusterSize: 65536, RefcountBits: 16}, true},
		{CreateOptions{ClusterSize: 512, RefcountBits: 64}, false},
	} {
		t.Run(fmt.Sprintf("cluster %d backing %t", c.opts.ClusterSize, c.backing), func(t *testing.T) {
			c.opts.Size = 1 << 20
			s := emptyStore(t, c.opts)
			model := make([]byte, c.opts.Size)
			var backing *block.Config
			if c.backing {
				copy(model, pattern(9, c.opts.Size/2))
				backing = blocktest.MemoryConfig(blocktest.StoreOf(model[:c.opts.Size/2]))
			}
			cfg := storeNode(s, backing)
			cfg.Options = &Options{L2CacheSize: 1, RefcountCacheSize: 1}
			d := openDisk(t, testGraph(t), cfg)
			var wg sync.WaitGroup
			const users = 6
			for u := range users {
				wg.Add(1)
				go func() {
					defer wg.Done()
					user{d, model, int64(u), users}.run(300)
				}()
			}
			wg.Wait()
			d.compare(model)
			d.close()
			checkStore(t, s, false)
			d.open()
			d.compare(model)
		})
	}
}

// A user owns each nth block of 700 bytes, so that blocks share clusters of all sizes.
type user struct {
	d     *disk
	model []byte
	i, n  int64
}

const blockLen = 700

func (u user) run(requests int) {
	rng := rand.New(rand.NewPCG(uint64(u.i), 1))
	lane := u.d.root.NewLane(block.Shard(u.i), nil)
	defer lane.Close()
	ctx := lane.Context(context.Background())
	blocks := int64(len(u.model)) / blockLen / u.n
	for range requests {
		off := (rng.Int64N(blocks)*u.n + u.i) * blockLen
		mine := u.model[off : off+blockLen]
		a, ok := lane.Begin()
		if !ok {
			u.d.t.Errorf("the lane is drained")
			return
		}
		var err error
		switch rng.IntN(6) {
		case 0, 1:
			p := pattern(rng.Uint64(), blockLen)
			err = u.d.root.WriteAt(ctx, p, off, 0)
			copy(mine, p)
		case 2:
			err = u.d.root.WriteZeroes(ctx, off, blockLen, block.MayUnmap)
			clear(mine)
		case 3:
			err = u.d.root.WriteZeroes(ctx, off, blockLen, 0)
			clear(mine)
		case 4:
			p := make([]byte, blockLen)
			if err = u.d.root.ReadAt(ctx, p, off); err == nil && firstDifference(p, mine) >= 0 {
				err = fmt.Errorf("user %d reads something else than it wrote at %d", u.i, off)
			}
		case 5:
			if err = u.d.root.Flush(ctx); err == nil {
				// Less than a cluster, or clusters that are nobody else's.
				err = u.d.root.Discard(ctx, off, blockLen)
			}
			if err == nil {
				err = u.d.root.ReadAt(ctx, mine, off)
			}
		}
		lane.End(a)
		if err != nil {
			u.d.t.Errorf("%v", err)
			return
		}
	}
}

// TestAllocationsWaitForThoseInFlight holds an allocating write at its data and
// starts other requests for the same cluster meanwhile (rule R6).
func TestAllocationsWaitForThoseInFlight(t *testing.T) {
	const cluster = 65536
	for name, c := range map[string]struct {
		request func(ctx context.Context, r *block.Root) error
		want    func(model []byte)
	}{
		"write": {
			func(ctx context.Context, r *block.Root) error { return r.WriteAt(ctx, []byte{7}, 9, 0) },
			func(model []byte) { model[9] = 7 },
		},
		"discard": {
			func(ctx context.Context, r *block.Root) error { return r.Discard(ctx, 0, 2*cluster) },
			func(model []byte) { clear(model[:2*cluster]) },
		},
		"zero": {
			func(ctx context.Context, r *block.Root) error { return r.WriteZeroes(ctx, 0, 2*cluster, 0) },
			func(model []byte) { clear(model[:2*cluster]) },
		},
		"unmap": {
			func(ctx context.Context, r *block.Root) error {
				return r.WriteZeroes(ctx, 0, 2*cluster, block.MayUnmap)
			},
			func(model []byte) { clear(model[:2*cluster]) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := emptyStore(t, CreateOptions{Size: 4 * cluster})
			d := openDisk(t, testGraph(t), storeNode(s, nil))
			im := d.image()
			model := make([]byte, 4*cluster)
			// An allocation that another request has begun and not filled.
			var a *allocation
			d.must(func(ctx context.Context) (err error) {
				a, err = im.allocate(ctx, 0, 1, wantData)
				return err
			})
			done := make(chan error)
			go func() { done <- d.do(func(ctx context.Context) error { return c.request(ctx, d.root) }) }()
			p := pattern(1, 100)
			d.must(func(ctx context.Context) error {
				if err := im.fill(ctx, a, p, 5); err != nil {
					return err
				}
				select {
				case <-done:
					t.Error("the request did not wait for the allocation")
				default:
				}
				return im.link(ctx, a, false)
			})
			copy(model[5:], p)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			c.want(model)
			d.compare(model)
			d.close()
			checkStore(t, s, false)
		})
	}
}

// TestFreedClustersStayWhileARequestMayKnowThem holds a request in flight over a discard.
func TestFreedClustersStayWhileARequestMayKnowThem(t *testing.T) {
	const cluster = 65536
	s := emptyStore(t, CreateOptions{Size: 64 * cluster})
	d := openDisk(t, testGraph(t), storeNode(s, nil))
	im := d.image()
	old := pattern(1, 16*cluster)
	d.write(old, 0)
	d.flush()
	lane := d.root.NewLane(1, nil)
	a, _ := lane.Begin()
	l := im.Locate(1, 3*cluster, cluster)
	if l.Kind != block.LocateData {
		t.Fatalf("a cluster that was written is not located: %+v", l)
	}
	d.must(func(ctx context.Context) error { return d.root.Discard(ctx, 0, 16*cluster) })
	d.flush()
	d.write(pattern(2, 16*cluster), 32*cluster)
	d.flush()
	got := make([]byte, cluster)
	l.File.ReadNowait(got, l.Offset)
	if firstDifference(got, old[3*cluster:4*cluster]) >= 0 {
		t.Error("a cluster was given away under a request that had located it")
	}
	if n := limboBytes(im); n != 16*cluster {
		t.Errorf("%d bytes are in limbo, want %d", n, 16*cluster)
	}
	lane.End(a)
	lane.Close()
	waitFor(t, func() bool { return limboBytes(im) == 0 })
	before := s.Size()
	d.write(pattern(3, 16*cluster), 16*cluster)
	if s.Size() != before {
		t.Errorf("the file grew from %d to %d bytes instead of reusing what was freed", before, s.Size())
	}
	d.close()
	checkStore(t, s, false)
}

func limboBytes(im *image) int64 {
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.limbo.clusters << im.clusterBits
}

// waitFor waits for what happens in the background.
func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen within 10 seconds")
		}
	}
}

// TestDiscardedSpaceIsGivenBackWithoutAFlush relies on the image's own flush.
func TestDiscardedSpaceIsGivenBackWithoutAFlush(t *testing.T) {
	const cluster = 65536
	s := emptyStore(t, CreateOptions{Size: 64 * cluster})
	d := openDisk(t, testGraph(t), storeNode(s, nil))
	empty := s.Allocated()
	d.write(pattern(1, 32*cluster), 0)
	full := s.Allocated()
	d.must(func(ctx context.Context) error { return d.root.Discard(ctx, 0, 64*cluster) })
	waitFor(t, func() bool { return s.Allocated() <= full-32*cluster })
	d.close()
	if s.Allocated() > empty+2*cluster {
		t.Errorf("%d bytes are allocated after all was discarded, %d before all was written", s.Allocated(), empty)
	}
	checkStore(t, s, false)
}

// TestDrainPausesTheBackgroundWork keeps what was freed until the drain has ended.
func TestDrainPausesTheBackgroundWork(t *testing.T) {
	const cluster = 65536
	s := emptyStore(t, CreateOptions{Size: 64 * cluster})
	g := testGraph(t)
	d := openDisk(t, g, storeNode(s, nil))
	im := d.image()
	d.write(pattern(1, 8*cluster), 0)
	d.must(func(ctx context.Context) error { return d.root.Discard(ctx, 0, 8*cluster) })
	if err := g.DrainBegin(context.Background(), d.node); err != nil {
		t.Fatal(err)
	}
	if err := im.flushMetadata(context.Background()); err != nil {
		t.Fatal(err)
	}
	im.reaper.pauseMu.Lock()
	running := im.reaper.running
	im.reaper.pauseMu.Unlock()
	if running || limboBytes(im) != 8*cluster {
		t.Errorf("background work is running: %t; %d bytes in limbo", running, limboBytes(im))
	}
	g.DrainEnd(d.node)
	waitFor(t, func() bool { return limboBytes(im) == 0 })
	d.close()
	checkStore(t, s, false)
}
