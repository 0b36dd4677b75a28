package hostdev

import (
	"context"
	"errors"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

// An inactive node has nothing open: its device can be taken down, its file be
// replaced. What it reads then, for a format that looks at its header, it opens for
// that read alone.

// Inactivate implements [block.Activator].
func (n *node) Inactivate(ctx context.Context) error {
	if n.self.ReadOnly() {
		return nil
	}
	return n.Flush(ctx)
}

// Deactivate implements [block.Activator].
func (n *node) Deactivate() {
	if err := errors.Join(n.dropLocks(), n.closeFiles()); err != nil {
		n.self.Graph().Log().Warn("an inactive image did not close well", "node", n.self.Name(), "err", err)
	}
}

// PreActivate implements [block.PreActivator]: it opens whatever the path leads to now.
func (n *node) PreActivate(context.Context) error {
	f, size, err := openFiles(n.filename, n.filename, n.self.Config(), n.kinds)
	if err != nil {
		return err
	}
	n.use(f)
	n.size.Store(size)
	n.forget()
	return n.makeLocks(n.self.Config())
}

// Activate implements [block.Activator]. The locks are held by now, and what others have
// written before that is to be seen.
func (n *node) Activate(ctx context.Context) error {
	if n.kind == blockDevice && !n.direct {
		if err := n.dropCache(); err != nil {
			return err
		}
	}
	return n.Refresh(ctx)
}

// dropCache makes the kernel read a device anew, which another host may have written.
func (n *node) dropCache() error {
	err := retry(func() error { return unix.IoctlSetInt(n.fd, unix.BLKFLSBUF, 0) })
	if err == unix.EACCES || err == unix.EPERM {
		// Not ours to flush; what is clean can go nevertheless, and we have written nothing.
		err = retry(func() error { return unix.Fadvise(n.fd, 0, 0, unix.FADV_DONTNEED) })
	}
	if err != nil {
		return fmt.Errorf("drop the cache of '%s': %w", n.filename, err)
	}
	return nil
}

// forget drops what was found out about the file by using it.
func (n *node) forget() {
	n.noDsync.Store(false)
	n.allocates.Store(false)
	n.seekless.Store(false)
	n.tailWritten.Store(false)
	n.lacks.forget()
	n.status.invalidate()
}

// Peek implements [block.Peeker].
func (n *node) Peek(context.Context) (block.Peeked, error) {
	err := n.glance(func(fd int, kind fileKind) error {
		size, err := kind.sizeOf(fd)
		if err == nil {
			n.size.Store(size)
		}
		return err
	})
	return block.Peeked{Size: n.size.Load()}, err
}

// glance opens the file for look alone.
func (n *node) glance(look func(fd int, kind fileKind) error) error {
	slot := n.work.begin(opSeek)
	defer n.work.end(slot)
	fd, err := openFile(n.filename, unix.O_CLOEXEC|unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return n.failed(err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := retry(func() error { return unix.Fstat(fd, &st) }); err != nil {
		return n.failed(err)
	}
	f := noFiles(n.filename)
	if err := f.checkKind(&st, n.kinds); err != nil {
		return err
	}
	return look(fd, f.kind)
}

// peekAt reads while the node is inactive.
func (n *node) peekAt(p []byte, off int64) error {
	return n.glance(func(fd int, kind fileKind) error {
		if kind == blockDevice {
			// As in Activate, as far as anybody may.
			_ = unix.Fadvise(fd, off, int64(len(p)), unix.FADV_DONTNEED)
		}
		want := n.clip(off, int64(len(p)))
		clear(p[want:])
		for got := int64(0); got < want; {
			k, err := pread(fd, p[got:want], off+got)
			if err == nil && k == 0 {
				err = unix.EIO // it has become shorter
			}
			if err != nil {
				return fmt.Errorf("read of '%s': %w", n.filename, err)
			}
			got += int64(k)
		}
		return nil
	})
}
