// Package blkverify is the filter driver "blkverify": every request goes to two
// children, and what they answer is compared.
package blkverify

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"syscall"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/filter"
)

// Driver returns the driver "blkverify". Its children are "raw", which holds the right
// data, and "test", which is verified and gives the answers. They have the same size,
// and nobody else writes to them.
//
// A request on which they differ fails with EIO, and the error, which is logged too,
// says where. Discards are not passed on, as what a discarded range reads as is up to
// each child, and a flush goes to "test" only.
func Driver() *block.Driver {
	return &block.Driver{
		Name:     "blkverify",
		Kind:     block.Filter,
		Children: []string{"raw", "test"},
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			raw, err := filter.Open(ctx, o, "raw")
			if err != nil {
				return nil, err
			}
			test, err := o.OpenChild(ctx, "test", block.RoleData, nil)
			if err != nil {
				return nil, err
			}
			if raw.Size() != test.Size() {
				return nil, fmt.Errorf("blkverify node '%s': 'raw' has %d bytes, 'test' has %d: %w", o.NodeName, raw.Size(), test.Size(), block.ErrInvalid)
			}
			raw.Align = test.Limits().RequestAlignment
			return &node{
				raw: raw, test: filter.Pass{Child: test, Align: raw.Limits().RequestAlignment},
				log: o.Node().Graph().Log().With("node", o.NodeName),
			}, nil
		},
	}
}

// maxTransfer bounds a request, and with it the buffer to compare with, in bytes.
const maxTransfer = 16 << 20

// A node is a blkverify node.
type node struct {
	raw, test filter.Pass
	log       *slog.Logger

	// mu is held for writing while the children change: writes that overlap could
	// come in another order to one than to the other.
	mu sync.RWMutex
}

var _ interface {
	block.Instance
	block.Zeroer
	block.StatusReporter
	block.Reopener
} = (*node)(nil)

// both does a request on both children.
func (n *node) both(what string, off, length int64, f func(filter.Pass) error) error {
	err, rawErr := f(n.test), f(n.raw)
	if (err == nil) == (rawErr == nil) {
		return err
	}
	said := func(err error) string {
		if err == nil {
			return "succeeds"
		}
		return "fails: " + err.Error()
	}
	return n.mismatch(fmt.Sprintf("%s of %d bytes at offset %d: 'raw' %s, 'test' %s", what, length, off, said(rawErr), said(err)))
}

func (n *node) mismatch(text string) error {
	n.log.Error("blkverify: the children differ", "request", text)
	return &mismatchError{"blkverify: " + text}
}

type mismatchError struct{ text string }

func (e *mismatchError) Error() string { return e.text }
func (e *mismatchError) Unwrap() error { return syscall.EIO }

// ReadAt implements [block.Instance].
func (n *node) ReadAt(ctx context.Context, p []byte, off int64) error {
	b := block.GetBuffer(len(p))
	defer block.PutBuffer(b)
	n.mu.RLock()
	defer n.mu.RUnlock()
	err := n.both("read", off, int64(len(p)), func(c filter.Pass) error {
		if c == n.raw {
			return c.ReadAt(ctx, b, off)
		}
		return c.ReadAt(ctx, p, off)
	})
	if err != nil {
		return err
	}
	for i := range p {
		if p[i] != b[i] {
			return n.mismatch(fmt.Sprintf("read of %d bytes at offset %d: contents mismatch at offset %d: 'raw' has %#02x, 'test' has %#02x",
				len(p), off, off+int64(i), b[i], p[i]))
		}
	}
	return nil
}

// WriteAt implements [block.Instance].
func (n *node) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.both("write", off, int64(len(p)), func(c filter.Pass) error { return c.WriteAt(ctx, p, off, flags) })
}

// WriteZeroes implements [block.Zeroer].
func (n *node) WriteZeroes(ctx context.Context, off, length int64, flags block.ReqFlags) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.both("zero", off, length, func(c filter.Pass) error { return c.WriteZeroes(ctx, off, length, flags) })
}

// BlockStatus implements [block.StatusReporter].
func (n *node) BlockStatus(ctx context.Context, off, length int64, precise bool) (block.Extent, error) {
	return n.test.BlockStatus(ctx, off, length, precise)
}

// Flush implements [block.Instance].
func (n *node) Flush(ctx context.Context) error { return n.test.Flush(ctx) }

// Size implements [block.Instance].
func (n *node) Size() int64 { return n.test.Size() }

// Limits implements [block.Instance]. They are what both can do. One child might zero
// where the other does not, so zeroing without fallback is not offered.
func (n *node) Limits() block.Limits {
	l, r := n.test.Limits(), n.raw.Limits()
	l.MemAlignment = max(l.MemAlignment, r.MemAlignment)
	for _, m := range [][2]*int64{{&l.MaxTransfer, &r.MaxTransfer}, {&l.MaxZero, &r.MaxZero}} {
		if *m[0] == 0 || *m[1] != 0 && *m[1] < *m[0] {
			*m[0] = *m[1]
		}
	}
	if l.MaxTransfer == 0 || l.MaxTransfer > maxTransfer {
		l.MaxTransfer = maxTransfer
	}
	l.WriteFlags = block.FUA
	l.ZeroFlags = block.FUA | block.MayUnmap
	return l
}

// PrepareReopen implements [block.Reopener]: no option of its own can change.
func (n *node) PrepareReopen(context.Context, *block.Reopening) (block.Switch, error) {
	return block.NoSwitch{}, nil
}

// Close implements [block.Instance].
func (n *node) Close(ctx context.Context) error {
	return errors.Join(n.test.Close(ctx), n.raw.Close(ctx))
}
