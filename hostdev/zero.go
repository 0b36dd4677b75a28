package hostdev

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

// lacks holds what was found out to be unsupported, so that it is not tried again.
type lacks struct {
	punch, zeroRange, allocate, zeroOut, discard, fiemap atomic.Bool
}

func (l *lacks) forget() {
	for _, lacking := range []*atomic.Bool{&l.punch, &l.zeroRange, &l.allocate, &l.zeroOut, &l.discard, &l.fiemap} {
		lacking.Store(false)
	}
}

// zeroPiece bounds one step of punching and allocating, in bytes: tmpfs does these
// in memory, and starts again when a signal comes.
const zeroPiece = 16 << 20

// zeroes is written to the parts of blocks at the ends of a range. It is never changed.
var zeroes = make([]byte, 64<<10)

// WriteZeroes implements [block.Zeroer]. It honours MayUnmap and NoFallback. Past
// the end a regular file grows.
func (n *node) WriteZeroes(_ context.Context, off, length int64, flags block.ReqFlags) error {
	length = n.padded(off, length)
	end := off + length
	if length <= 0 {
		return nil
	}
	if n.kind != regularFile && end > n.size.Load() {
		return fmt.Errorf("device '%s' ends at byte %d: %w", n.filename, n.size.Load(), block.ErrNoSpace)
	}
	slot := n.work.begin(opZero)
	defer n.work.end(slot)
	var err error
	switch n.kind {
	case regularFile:
		err = n.zeroFile(off, end, flags&block.MayUnmap != 0)
	case blockDevice:
		err = n.zeroDevice(off, end, flags)
	default:
		return block.ErrNotSupported
	}
	n.status.invalidate()
	switch err {
	case nil:
		n.grow(end)
		return nil
	case block.ErrNotSupported:
		return err
	}
	n.growToFile()
	return n.writeError(err)
}

func (n *node) zeroFile(off, end int64, unmap bool) error {
	if !unmap {
		return n.zeroRange(off, end)
	}
	inside := min(end, n.size.Load())
	err := n.punch(off, inside)
	if err == block.ErrNotSupported {
		return n.zeroRange(off, end)
	}
	if err != nil || end <= max(off, inside) {
		return err
	}
	// The last byte makes the file grow; unlike truncation this never shrinks it under a parallel write.
	if n.tail < 0 {
		_, err = pwrite(n.fd, zeroes[:1], end-1)
		return err
	}
	_, err = pwrite(n.tail, zeroes[:1], end-1)
	n.tailWritten.Store(true)
	return err
}

// punch makes a hole of [off, end), which lies inside the file or is empty.
func (n *node) punch(off, end int64) error {
	if off >= end {
		return nil
	}
	return n.try(&n.lacks.punch, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, end)
}

// try runs fallocate unless it is known to be lacking.
func (n *node) try(lacking *atomic.Bool, mode uint32, off, end int64) error {
	if lacking.Load() {
		return block.ErrNotSupported
	}
	err := fallocate(n.fd, mode, off, end-off)
	switch {
	case err == nil:
		return nil
	case unsupported(err):
		lacking.Store(true)
		return block.ErrNotSupported
	case err == unix.EINVAL:
		return block.ErrNotSupported // this range only
	}
	return err
}

// zeroRange zeroes [off, end) so that it is provisioned.
func (n *node) zeroRange(off, end int64) error {
	err := n.try(&n.lacks.zeroRange, unix.FALLOC_FL_ZERO_RANGE, off, end)
	if err != block.ErrNotSupported {
		return err
	}
	// Whether allocating works must be known before something is punched.
	if !n.allocates.Load() {
		if err := n.try(&n.lacks.allocate, unix.FALLOC_FL_KEEP_SIZE, off, end); err != nil {
			return err
		}
		n.allocates.Store(true)
	}
	for off < end {
		next := min(end, off+zeroPiece)
		if err := n.punch(off, min(next, n.size.Load())); err != nil {
			return err
		}
		if err := fallocate(n.fd, 0, off, next-off); err != nil {
			return err
		}
		off = next
	}
	return nil
}

// zeroDevice zeroes the whole blocks in [off, end) first, so that nothing has
// changed if that is refused, and writes the parts of blocks.
func (n *node) zeroDevice(off, end int64, flags block.ReqFlags) error {
	b := n.limits.LogicalBlockSize
	first, last := roundUp(off, b), roundDown(end, b)
	if first >= last {
		return n.writeZeroes(off, end)
	}
	if err := n.zeroBlocks(first, last, flags); err != nil {
		return err
	}
	if err := n.writeZeroes(off, first); err != nil {
		return err
	}
	return n.writeZeroes(last, end)
}

func (n *node) zeroBlocks(off, end int64, flags block.ReqFlags) error {
	if flags&block.MayUnmap != 0 {
		// On a device this never falls back to writing.
		if err := n.punch(off, end); err != block.ErrNotSupported {
			return err
		}
	}
	// The kernel would write zeroes itself. It finds out late what a device cannot do.
	if n.lacks.zeroOut.Load() || flags&block.NoFallback != 0 && n.queue.number("write_zeroes_max_bytes") == 0 {
		return block.ErrNotSupported
	}
	err := ioctlRange(n.fd, unix.BLKZEROOUT, off, end-off)
	if unsupported(err) {
		n.lacks.zeroOut.Store(true)
		return block.ErrNotSupported
	}
	if err == unix.EINVAL {
		return block.ErrNotSupported
	}
	return err
}

func (n *node) writeZeroes(off, end int64) error {
	for off < end {
		k, err := n.writeSome(zeroes[:min(int64(len(zeroes)), end-off)], off, false)
		if err != nil {
			return err
		}
		off += int64(k)
	}
	return nil
}

// Discard implements [block.Discarder].
func (n *node) Discard(_ context.Context, off, length int64) error {
	end := off + n.clip(off, length)
	if off >= end || n.kind == charDevice {
		return nil
	}
	slot := n.work.begin(opDiscard)
	defer n.work.end(slot)
	var err error
	if n.kind == regularFile {
		err = n.punch(off, end)
	} else {
		err = n.discardBlocks(off, end)
	}
	n.status.invalidate()
	if err != nil && err != block.ErrNotSupported {
		return fmt.Errorf("discard in '%s': %w", n.filename, err)
	}
	return err
}

func (n *node) discardBlocks(off, end int64) error {
	b := n.limits.LogicalBlockSize
	off, end = roundUp(off, b), roundDown(end, b)
	if off >= end {
		return nil
	}
	if n.lacks.discard.Load() {
		return block.ErrNotSupported
	}
	err := ioctlRange(n.fd, unix.BLKDISCARD, off, end-off)
	if unsupported(err) {
		n.lacks.discard.Store(true)
		return block.ErrNotSupported
	}
	return err
}
