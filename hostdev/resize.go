package hostdev

import (
	"context"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

// Size implements [block.Instance].
func (n *node) Size() int64 { return n.size.Load() }

// Truncate implements [block.Truncater] for regular files. A device keeps its
// size; asking for any other is [block.ErrNotSupported].
func (n *node) Truncate(_ context.Context, size int64) error {
	if n.kind != regularFile {
		if size == n.size.Load() {
			return nil
		}
		return fmt.Errorf("device '%s' has %d bytes, which cannot be changed to %d: %w", n.filename, n.size.Load(), size, block.ErrNotSupported)
	}
	slot := n.work.begin(opTruncate)
	defer n.work.end(slot)
	if err := retry(func() error { return unix.Ftruncate(n.fd, size) }); err != nil {
		return fmt.Errorf("resize of '%s' to %d bytes: %w", n.filename, size, err)
	}
	n.size.Store(size)
	n.status.invalidate()
	return nil
}

// Refresh implements [block.Refresher].
func (n *node) Refresh(context.Context) error {
	slot := n.work.begin(opSeek)
	defer n.work.end(slot)
	size, err := n.kind.sizeOf(n.fd)
	if err != nil {
		return fmt.Errorf("size of '%s': %w", n.filename, err)
	}
	n.size.Store(size)
	n.status.invalidate()
	return nil
}
