package block_test

import (
	"context"
	"sync"

	"github.com/nbdserve/nbdserve/block"
)

const cowBlock = 512

// cowOptions configure a node of the driver "cow": a format in memory with a
// backing child. Blocks that it holds are in data, in whole blocks of cowBlock bytes.
type cowOptions struct {
	size int64
	mu   sync.Mutex
	data map[int64][]byte // by block; nil: a zero block
}

type cow struct {
	o       *cowOptions
	backing *block.Edge
}

func cowDriver() *block.Driver {
	return &block.Driver{
		Name:       "cow",
		Kind:       block.Format,
		NewOptions: func() any { return &cowOptions{} },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			c := &cow{o: o.Config.Options.(*cowOptions)}
			if o.Config.Children["backing"] == nil {
				return c, nil
			}
			var err error
			c.backing, err = o.OpenChild(ctx, "backing", block.RoleCOW, nil)
			return c, err
		},
	}
}

func cowConfig(name string, o *cowOptions, backing *block.Config) *block.Config {
	c := &block.Config{Driver: "cow", NodeName: name, Options: o}
	if backing != nil {
		c.Children = map[string]*block.Config{"backing": backing}
	}
	return c
}

func (c *cow) ReadAt(ctx context.Context, p []byte, off int64) error {
	c.o.mu.Lock()
	defer c.o.mu.Unlock()
	for i := range p {
		at := off + int64(i)
		d, ok := c.o.data[at/cowBlock]
		switch {
		case ok && d != nil:
			p[i] = d[at%cowBlock]
		case !ok && c.backing != nil && at < c.backing.Size():
			if err := c.backing.ReadAt(ctx, p[i:i+1], at); err != nil {
				return err
			}
		default:
			p[i] = 0
		}
	}
	return nil
}

func (c *cow) WriteAt(_ context.Context, p []byte, off int64, _ block.ReqFlags) error {
	return block.ErrNotSupported
}

func (c *cow) BlockStatus(_ context.Context, off, n int64, _ bool) (block.Extent, error) {
	c.o.mu.Lock()
	defer c.o.mu.Unlock()
	flags := c.flags(off)
	length := cowBlock - off%cowBlock
	for length < n && c.flags(off+length) == flags {
		length += cowBlock
	}
	return block.Extent{Flags: flags, Length: min(length, n)}, nil
}

func (c *cow) flags(off int64) block.StatusFlags {
	d, ok := c.o.data[off/cowBlock]
	switch {
	case ok && d != nil:
		return block.StatusData | block.StatusAllocated
	case ok || c.backing == nil:
		return block.StatusZero | block.StatusAllocated
	}
	return 0
}

func (c *cow) Flush(context.Context) error { return nil }
func (c *cow) Size() int64                 { return c.o.size }
func (c *cow) Limits() block.Limits        { return block.Limits{RequestAlignment: 1} }
func (c *cow) Close(context.Context) error { return nil }
