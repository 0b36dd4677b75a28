package block_test

import (
	"context"
	"sync"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

const cowBlock = 512

// cowOptions configure a node of the driver "cow": a format in memory with a
// backing child. Blocks that it holds are in data, in whole blocks of cowBlock bytes.
type cowOptions struct {
	size int64
	file string // what ExactFilename says
	mu   sync.RWMutex
	data map[int64][]byte // by block; nil: a zero block

	hmu    sync.Mutex
	header string // backing file name
	fail   error  // of ChangeBackingFile
}

// failWith has ChangeBackingFile fail, or not.
func (o *cowOptions) failWith(err error) {
	o.hmu.Lock()
	defer o.hmu.Unlock()
	o.fail = err
}

type cow struct {
	node *block.Node
	o    *cowOptions
}

func cowDriver() *block.Driver {
	return &block.Driver{
		Name:       "cow",
		Kind:       block.Format,
		Backing:    true,
		NewOptions: func() any { return &cowOptions{} },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			c := &cow{o.Node(), o.Config.Options.(*cowOptions)}
			if c.o.data == nil {
				c.o.data = make(map[int64][]byte)
			}
			if o.Config.Children["backing"] == nil {
				return c, nil
			}
			_, err := o.OpenChild(ctx, "backing", block.RoleCOW, nil)
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

// overlay describes an empty image over backing, which may be nil.
func overlay(name string, size int64, backing *block.Config) *block.Config {
	return cowConfig(name, &cowOptions{size: size, file: "/images/" + name}, backing)
}

// below fills p with what the node reads where it holds nothing.
func (c *cow) below(ctx context.Context, p []byte, off int64) error {
	clear(p)
	e := c.node.Backing()
	if e == nil || off >= e.Size() {
		return nil
	}
	return e.ReadAt(ctx, p[:min(int64(len(p)), e.Size()-off)], off)
}

// each calls f for the part of p in each block, with what is held of it.
func each(p []byte, off int64, f func(part []byte, at, in int64) error) error {
	for len(p) > 0 {
		at, in := off/cowBlock, off%cowBlock
		n := min(int64(len(p)), cowBlock-in)
		if err := f(p[:n], at, in); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (c *cow) ReadAt(ctx context.Context, p []byte, off int64) error {
	c.o.mu.RLock()
	defer c.o.mu.RUnlock()
	return each(p, off, func(part []byte, at, in int64) error {
		d, ok := c.o.data[at]
		if !ok {
			return c.below(ctx, part, at*cowBlock+in)
		}
		clear(part)
		if d != nil {
			copy(part, d[in:])
		}
		return nil
	})
}

func (c *cow) WriteAt(ctx context.Context, p []byte, off int64, _ block.ReqFlags) error {
	c.o.mu.Lock()
	defer c.o.mu.Unlock()
	if off+int64(len(p)) > c.o.size {
		return block.ErrNoSpace
	}
	return each(p, off, func(part []byte, at, in int64) error {
		d, ok := c.o.data[at]
		if d == nil {
			d = make([]byte, cowBlock)
			if !ok {
				if err := c.below(ctx, d, at*cowBlock); err != nil {
					return err
				}
			}
			c.o.data[at] = d
		}
		copy(d[in:], part)
		return nil
	})
}

func (c *cow) BlockStatus(_ context.Context, off, n int64, _ bool) (block.Extent, error) {
	c.o.mu.RLock()
	defer c.o.mu.RUnlock()
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
	case ok || c.node.Backing() == nil:
		return block.StatusZero | block.StatusAllocated
	}
	return 0
}

func (c *cow) BackingFile() (name, format string) {
	c.o.hmu.Lock()
	defer c.o.hmu.Unlock()
	return c.o.header, ""
}

func (c *cow) ChangeBackingFile(_ context.Context, name, _ string) error {
	c.o.hmu.Lock()
	defer c.o.hmu.Unlock()
	if c.o.fail != nil {
		return c.o.fail
	}
	c.o.header = name
	return nil
}

func (c *cow) Filename() string            { return c.o.file }
func (c *cow) Flush(context.Context) error { return nil }
func (c *cow) Size() int64                 { return c.o.size }
func (c *cow) Limits() block.Limits        { return block.Limits{RequestAlignment: 1, MemAlignment: 1} }
func (c *cow) Close(context.Context) error { return nil }

func TestTheCOWNodeOfTheseTestsConforms(t *testing.T) {
	blocktest.Conformance(t, blocktest.Factory{
		New: func(t blocktest.TB) blocktest.Subject {
			s := blocktest.StoreOf([]byte("what is below"))
			contents := make([]byte, 66_000)
			copy(contents, s.Bytes())
			return blocktest.Subject{
				Graph:    newGraph(t),
				Config:   overlay("top", 66_000, blocktest.MemoryConfig(s)),
				Contents: contents,
			}
		},
	})
}
