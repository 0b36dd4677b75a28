package block_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
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

// growing is an instance with a request alignment whose write at slowAt takes until
// another request has got as far as it can.
type growing struct {
	mu      sync.Mutex
	data    []byte
	slowAt  int64
	writing chan struct{} // closed when the slow write has begun
	others  chan struct{} // closed when the other request can go no further without it
	written chan struct{} // closed when the slow write has ended
}

func (g *growing) Limits() block.Limits        { return block.Limits{RequestAlignment: 4096} }
func (g *growing) Flush(context.Context) error { return nil }
func (g *growing) Close(context.Context) error { return nil }

func (g *growing) Size() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return int64(len(g.data))
}

func (g *growing) ReadAt(_ context.Context, p []byte, off int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(p[copy(p, g.data[off:]):])
	return nil
}

func (g *growing) WriteAt(_ context.Context, p []byte, off int64, _ block.ReqFlags) error {
	slow := off == g.slowAt
	if slow {
		close(g.writing)
		<-g.others
		defer close(g.written)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if end, size := off+int64(len(p)), int64(len(g.data)); end > size && (end > (size+4095)&^4095 || slow) {
		g.data = append(g.data, make([]byte, end-size)...)
	}
	copy(g.data[off:], p)
	return nil
}

// Truncate waits for the write in flight, as ftruncate does for the inode's lock.
func (g *growing) Truncate(_ context.Context, size int64) error {
	select {
	case <-g.writing:
		close(g.others)
		<-g.written
	default:
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.data = append(g.data, make([]byte, max(0, size-int64(len(g.data))))...)[:size]
	return nil
}

// Two writes past the end of a node with request alignment at the same time, one of
// whole blocks and one not: the growth of one does not cut off what the other wrote.
func TestSeamGrowthKeepsParallelWrites(t *testing.T) {
	inst := &growing{data: make([]byte, 4096), slowAt: 8192,
		writing: make(chan struct{}), others: make(chan struct{}), written: make(chan struct{})}
	g := blocktest.NewGraph(t, &block.Driver{Name: "growing", Kind: block.Protocol,
		Open: func(context.Context, *block.Opening) (block.Instance, error) { return inst, nil }})
	n, err := g.Open(ctx, &block.Config{Driver: "growing"})
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: all, Shared: all})
	if err != nil {
		t.Fatal(err)
	}
	write := func(b byte, size int, off int64) error {
		return r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, bytes.Repeat([]byte{b}, size), off, 0) })
	}
	whole := make(chan error)
	go func() { whole <- write(1, 4096, 8192) }()
	<-inst.writing
	err = write(2, 100, 4096)
	select {
	case <-inst.others:
	default:
		close(inst.others)
	}
	if err := errors.Join(err, <-whole); err != nil {
		t.Fatal(err)
	}
	want := slices.Concat(make([]byte, 4096), bytes.Repeat([]byte{2}, 100), make([]byte, 3996), bytes.Repeat([]byte{1}, 4096))
	if !bytes.Equal(inst.data, want) {
		t.Errorf("the node has %d bytes, want %d, or other contents", len(inst.data), len(want))
	}
	if err := errors.Join(r.Detach(ctx), g.Release(ctx, n)); err != nil {
		t.Fatal(err)
	}
}
