package hostdev

import (
	"context"
	"fmt"
	"unsafe"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

// bounceSize bounds the buffer for direct I/O from misaligned memory, in bytes.
const bounceSize = 256 << 10

// clip tells how much of length bytes at off lies before the end. What a request
// has beyond it, up to the request alignment, is padding.
func (n *node) clip(off, length int64) int64 {
	return max(0, min(length, n.size.Load()-off))
}

// padded tells how much of a write of length bytes at off is to be done: all of
// it, but for the padding of the last block.
func (n *node) padded(off, length int64) int64 {
	size := n.size.Load()
	if end := off + length; end > size && end <= roundUp(size, n.limits.RequestAlignment) {
		return max(0, size-off)
	}
	return length
}

// ReadAt implements [block.Instance].
func (n *node) ReadAt(_ context.Context, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	if n.fd < 0 {
		return n.peekAt(p, off)
	}
	slot := n.work.begin(opRead)
	defer n.work.end(slot)
	want := int(n.clip(off, int64(len(p))))
	for got := 0; got < want; {
		k, err := n.readSome(p[got:], off+int64(got))
		if err != nil {
			return fmt.Errorf("read of '%s': %w", n.filename, err)
		}
		if k == 0 {
			return fmt.Errorf("'%s' ends at byte %d, but had %d bytes: something else has truncated it (%w)",
				n.filename, off+int64(got), n.size.Load(), unix.EIO)
		}
		got += k
	}
	clear(p[want:])
	return nil
}

// plain tells whether the data descriptor takes p at off as it is, and else
// whether a copy of p in aligned memory would do.
func (n *node) plain(p []byte, off int64) (asIs, bounce bool) {
	if !n.direct {
		return true, false
	}
	if (off|int64(len(p)))&(n.limits.RequestAlignment-1) != 0 {
		return false, false
	}
	aligned := uintptr(unsafe.Pointer(unsafe.SliceData(p)))&uintptr(n.limits.MemAlignment-1) == 0
	return aligned, !aligned
}

// readSome is pread by the descriptor that p and off call for.
func (n *node) readSome(p []byte, off int64) (int, error) {
	asIs, bounce := n.plain(p, off)
	switch {
	case asIs:
		return pread(n.fd, p, off)
	case bounce:
		b := block.GetBuffer(min(len(p), bounceSize))
		defer block.PutBuffer(b)
		k, err := pread(n.fd, b, off)
		return copy(p, b[:max(0, k)]), err
	default:
		return pread(n.tail, p, off)
	}
}

// WriteAt implements [block.Instance].
func (n *node) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	p = p[:n.padded(off, int64(len(p)))]
	if len(p) == 0 {
		return nil
	}
	end := off + int64(len(p))
	if n.kind != regularFile && end > n.size.Load() {
		return fmt.Errorf("device '%s' ends at byte %d: %w", n.filename, n.size.Load(), block.ErrNoSpace)
	}
	fua := flags&block.FUA != 0
	if fua {
		if err := n.flush.failed(); err != nil {
			return err
		}
	}
	dsync := fua && !n.noDsync.Load()
	if err := n.writeAll(p, off, dsync); err != nil {
		n.growToFile()
		return err
	}
	n.grow(end)
	// noDsync may just have been found out.
	if fua && (!dsync || n.noDsync.Load()) {
		return n.Flush(ctx)
	}
	return nil
}

func (n *node) writeAll(p []byte, off int64, dsync bool) error {
	slot := n.work.begin(opWrite)
	defer n.work.end(slot)
	for len(p) > 0 {
		k, err := n.writeSome(p, off, dsync)
		if err == nil && k == 0 {
			err = unix.EIO
		}
		if err != nil {
			return n.writeError(err)
		}
		p, off = p[k:], off+int64(k)
	}
	return nil
}

// writeSome is pwrite by the descriptor that p and off call for.
func (n *node) writeSome(p []byte, off int64, dsync bool) (int, error) {
	asIs, bounce := n.plain(p, off)
	switch {
	case asIs:
		return n.write(n.fd, p, off, dsync)
	case bounce:
		b := block.GetBuffer(min(len(p), bounceSize))
		defer block.PutBuffer(b)
		copy(b, p)
		return n.write(n.fd, b, off, dsync)
	}
	// The whole blocks of p, if it has any, go directly; else p is the last block or a part of it.
	if whole := int64(len(p)) &^ (n.limits.RequestAlignment - 1); whole > 0 && off&(n.limits.RequestAlignment-1) == 0 {
		return n.writeSome(p[:whole], off, dsync)
	}
	k, err := n.write(n.tail, p, off, dsync)
	n.tailWritten.Store(true)
	return k, err
}

// write writes once. A failure of the synchronous part, after which the kernel
// has forgotten what was lost, is told from one of writing by writing again.
func (n *node) write(fd int, p []byte, off int64, dsync bool) (int, error) {
	if n.nowait == nowaitPlain && len(p) <= inlineWrite {
		return pwriteNowait(fd, p, off)
	}
	if !dsync || n.noDsync.Load() {
		return pwrite(fd, p, off)
	}
	k, err := writev2(fd, p, off, unix.RWF_DSYNC)
	if err == nil {
		return k, nil
	}
	if unsupported(err) {
		n.noDsync.Store(true)
		return pwrite(fd, p, off)
	}
	if _, again := pwrite(fd, p, off); again == nil || err == unix.EIO {
		return 0, n.flush.latch(n.filename, err)
	}
	return 0, err
}

func (n *node) writeError(err error) error {
	if err == unix.ENOSPC {
		err = block.ErrNoSpace
	}
	return fmt.Errorf("write to '%s': %w", n.filename, err)
}

// grow notes that the node reaches at least to end.
func (n *node) grow(end int64) {
	for {
		size := n.size.Load()
		if end <= size || n.size.CompareAndSwap(size, end) {
			return
		}
	}
}

// growToFile notes what a write that failed has added to the file: the parents rely
// on zeroes past the end.
func (n *node) growToFile() {
	if n.kind == regularFile {
		if size, err := n.kind.sizeOf(n.fd); err == nil {
			n.grow(size)
		}
	}
}

// Locate implements [block.Locator].
func (n *node) Locate(_ block.Shard, off, length int64) block.Location {
	if n.direct {
		return block.Location{Kind: block.LocateAsk, Length: length}
	}
	return block.Location{Kind: block.LocateData, Stable: true, Length: length, Offset: off, File: n}
}

// Fd implements [block.HostFile].
func (n *node) Fd() int {
	if n.direct {
		return -1
	}
	return n.fd
}

// nowaitMode says how a descriptor is read without waiting.
type nowaitMode uint8

const (
	nowaitNever nowaitMode = iota // it cannot
	nowaitFlag                    // by RWF_NOWAIT
	nowaitPlain                   // by any read: the data is in memory, and there alone, so writes do not wait either
)

// ReadNowait implements [block.HostFile].
func (n *node) ReadNowait(p []byte, off int64) int {
	if len(p) == 0 {
		return 0
	}
	flags := 0
	switch n.nowait {
	case nowaitNever:
		return 0
	case nowaitFlag:
		flags = unix.RWF_NOWAIT
	}
	k, errno := readv2(n.fd, p, off, flags)
	if errno != 0 {
		return 0
	}
	return k
}

// Prefetch implements [block.Prefetcher] by reading, because the kernel's own
// ways are hints that return before the data is there.
func (n *node) Prefetch(_ context.Context, off, length int64) error {
	if n.direct || n.nowait == nowaitPlain {
		return nil
	}
	end := off + n.clip(off, length)
	b := block.GetBuffer(bounceSize)
	defer block.PutBuffer(b)
	for off < end {
		k, err := n.prefetchSome(b[:min(bounceSize, end-off)], off, end)
		if err != nil {
			return fmt.Errorf("read of '%s': %w", n.filename, err)
		}
		if k == 0 {
			return nil
		}
		off += int64(k)
	}
	return nil
}

func (n *node) prefetchSome(p []byte, off, end int64) (int, error) {
	slot := n.work.begin(opPrefetch)
	defer n.work.end(slot)
	// The device works on the next piece while this one is copied.
	if next := off + int64(len(p)); next < end {
		_ = unix.Fadvise(n.fd, next, min(bounceSize, end-next), unix.FADV_WILLNEED)
	}
	return pread(n.fd, p, off)
}

func roundUp(n, align int64) int64   { return (n + align - 1) &^ (align - 1) }
func roundDown(n, align int64) int64 { return n &^ (align - 1) }
