package block_test

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// Writers go on while two trees with a backing node in common become inactive and
// active, read-only and writable, get other options and other backing nodes, with
// failures at random steps. Nothing that was acknowledged is lost, and the graph is
// sound whenever nothing goes on.
func TestG21G22UnderLoad(t *testing.T) {
	g := reGraph(t)
	shared := opened(t, g, re("shared", &reOptions{}))
	other := opened(t, g, re("other", &reOptions{}))
	type tree struct {
		n      *block.Node
		faults *blocktest.Faults
		root   *block.Root
	}
	var trees []*tree
	for _, name := range []string{"a", "b"} {
		tr := &tree{faults: new(blocktest.Faults)}
		c := re(name, &reOptions{})
		c.Children["file"] = blocktest.FaultConfig(tr.faults, c.Children["file"])
		c.Children["backing"] = ref("shared")
		tr.n = opened(t, g, c)
		tr.root = allowing(t, tr.n, "export '"+name+"'", rd|wr, rd)
		trees = append(trees, tr)
	}
	stop := make(chan struct{})
	var writers, changers, begun sync.WaitGroup // begun: all writers have written something
	const writersEach = 2
	last := make([][writersEach]uint64, len(trees))
	begun.Add(len(trees) * writersEach)
	for i, tr := range trees {
		for w := range writersEach {
			writers.Go(func() {
				first := sync.OnceFunc(begun.Done)
				defer first()
				p := make([]byte, 8)
				for n := uint64(1); ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					binary.LittleEndian.PutUint64(p, n)
					err := tr.root.Do(ctx, func(ctx context.Context) error { return tr.root.WriteAt(ctx, p, int64(w)*4096, 0) })
					if err == nil {
						last[i][w] = n
						first()
					} else if !errors.Is(err, syscall.EPERM) {
						t.Errorf("write: %v", err)
						return
					}
				}
			})
		}
		changers.Go(func() {
			begun.Wait()
			rng := rand.New(rand.NewPCG(7, uint64(i)))
			for range 150 {
				op := []blocktest.Op{blocktest.OpInactivate, blocktest.OpActivate, blocktest.OpReopen, blocktest.OpApply}[rng.IntN(4)]
				if rng.IntN(3) == 0 {
					tr.faults.Add(blocktest.Fault{Op: op, Times: 1, Err: errInjected})
				}
				var err error
				switch rng.IntN(3) {
				case 0:
					err = g.SetActive(ctx, rng.IntN(2) == 0, tr.n)
				case 1:
					c := like(tr.n)
					c.ReadOnly = rng.IntN(2) == 0
					c.Cache.NoFlush = rng.IntN(2) == 0
					c.Options = &reOptions{Level: rng.Int64N(5), Fixed: "std"}
					err = g.Reopen(ctx, block.ReopenRequest{Node: tr.n, Config: c, Force: true})
				case 2:
					c := like(tr.n)
					c.Children["backing"] = ref([]string{"shared", "other"}[rng.IntN(2)])
					err = g.Reopen(ctx, block.ReopenRequest{Node: tr.n, Config: c, Force: true})
				}
				// An inactive backing node cannot be given to an active one.
				if err != nil && !errors.Is(err, errInjected) && !errors.Is(err, block.ErrInactive) {
					t.Errorf("change: %v", err)
				}
				tr.faults.Clear()
			}
		})
	}
	changers.Wait()
	close(stop)
	writers.Wait()
	if wrong := g.Verify(); len(wrong) != 0 {
		t.Errorf("%q", wrong)
	}
	if err := g.SetActive(ctx, true, shared, other, trees[0].n, trees[1].n); err != nil {
		t.Fatal(err)
	}
	for i, tr := range trees {
		for w := range writersEach {
			p := make([]byte, 8)
			if err := tr.root.Do(ctx, func(ctx context.Context) error { return tr.root.ReadAt(ctx, p, int64(w)*4096) }); err != nil {
				t.Fatal(err)
			}
			if got := binary.LittleEndian.Uint64(p); got != last[i][w] {
				t.Errorf("tree %d writer %d: read %d, wrote %d last", i, w, got, last[i][w])
			}
			if last[i][w] == 0 {
				t.Errorf("tree %d writer %d never wrote", i, w)
			}
		}
	}
}

var errInjected = errors.New("injected")
