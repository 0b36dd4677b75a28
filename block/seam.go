package block

import (
	"context"
	"errors"
	"fmt"
	"math"
)

// maxOffset bounds where a request may end, so that it can be aligned without overflow.
const maxOffset = math.MaxInt64 &^ (1<<30 - 1)

// sane tells whether off and length can be added up.
func sane(off, length int64) bool {
	return off >= 0 && length >= 0 && off <= maxOffset && length <= maxOffset-off
}

// fail says where err happened, unless a node below has said so.
func (n *Node) fail(op string, off, length int64, err error) error {
	if err == nil {
		return nil
	}
	return n.located(op, off, length, err)
}

func (n *Node) located(op string, off, length int64, err error) error {
	var at *NodeError
	if errors.As(err, &at) {
		return err
	}
	return &NodeError{Node: n.name, Op: op, Off: off, Length: length, Err: err}
}

// readable checks a range that must lie inside the node.
func (n *Node) readable(off, length int64) error {
	if !sane(off, length) || off+length > n.inst.Size() {
		return ErrRange
	}
	return nil
}

// writable checks permission and range of a write.
func (e *Edge) writable(off, length int64, flags ReqFlags) error {
	perm := e.perm.load()
	need := PermWrite
	if flags&WriteUnchanged != 0 {
		need |= PermWriteUnchanged
	}
	if perm&need == 0 {
		if e.Node().cfg().ReadOnly {
			return ErrReadOnly
		}
		return ErrPermission
	}
	if !sane(off, length) {
		return ErrRange
	}
	if perm&PermResize == 0 && off+length > e.Node().inst.Size() {
		return ErrNoSpace
	}
	return nil
}

// ReadAt fills p, which stays the caller's, from byte off on. The range must lie
// inside the node ([ErrRange]). It reads everything or fails.
func (e *Edge) ReadAt(ctx context.Context, p []byte, off int64) error {
	n := e.Node()
	if err := n.readable(off, int64(len(p))); err != nil {
		return n.fail("read", off, int64(len(p)), err)
	}
	if len(p) == 0 {
		return nil
	}
	n.countRead(ShardOf(ctx), int64(len(p)))
	return n.fail("read", off, int64(len(p)), n.read(ctx, p, off))
}

// read aligns.
func (n *Node) read(ctx context.Context, p []byte, off int64) error {
	a := n.lim().RequestAlignment
	if (off|int64(len(p)))&(a-1) == 0 {
		return n.readAligned(ctx, p, off)
	}
	head, tail := off&^(a-1), (off+int64(len(p))+a-1)&^(a-1)
	if tail-head <= 2*a {
		b := GetBuffer(int(tail - head))
		defer PutBuffer(b)
		if err := n.readAligned(ctx, b, head); err != nil {
			return err
		}
		copy(p, b[off-head:])
		return nil
	}
	// First block, whole blocks, last block.
	if cut := -off & (a - 1); cut != 0 {
		if err := n.read(ctx, p[:cut], off); err != nil {
			return err
		}
		p, off = p[cut:], off+cut
	}
	whole := int64(len(p)) &^ (a - 1)
	if err := n.readAligned(ctx, p[:whole], off); err != nil {
		return err
	}
	if whole == int64(len(p)) {
		return nil
	}
	return n.read(ctx, p[whole:], off+whole)
}

// readAligned splits.
func (n *Node) readAligned(ctx context.Context, p []byte, off int64) error {
	for most := n.lim().MaxTransfer; most > 0 && int64(len(p)) > most; {
		if err := n.inst.ReadAt(ctx, p[:most], off); err != nil {
			return err
		}
		p, off = p[most:], off+most
	}
	return n.inst.ReadAt(ctx, p, off)
}

// WriteAt stores p, which stays the caller's, at byte off. The edge must hold
// [PermWrite] ([ErrPermission], [ErrReadOnly]); past the end of the node it must
// hold [PermResize] too ([ErrNoSpace]).
func (e *Edge) WriteAt(ctx context.Context, p []byte, off int64, flags ReqFlags) error {
	n := e.Node()
	length := int64(len(p))
	if err := e.writable(off, length, flags); err != nil {
		return n.fail("write", off, length, err)
	}
	if length == 0 {
		return nil
	}
	if n.cfg().DetectZeroes != DetectZeroesOff && IsZero(p) {
		zf := flags & (FUA | WriteUnchanged)
		if n.cfg().DetectZeroes == DetectZeroesUnmap {
			zf |= MayUnmap
		}
		return e.WriteZeroes(ctx, off, length, zf)
	}
	n.countWrite(ShardOf(ctx), length)
	return n.fail("write", off, length, n.write(ctx, p, off, flags&(FUA|WriteUnchanged)))
}

// write aligns: what is not whole blocks is read, changed and written back, with
// no other write to these blocks meanwhile.
func (n *Node) write(ctx context.Context, p []byte, off int64, flags ReqFlags) error {
	a := n.lim().RequestAlignment
	if a == 1 && !n.writes.tracked.Load() {
		return n.writeAligned(ctx, p, off, flags)
	}
	length := int64(len(p))
	head, tail := off&^(a-1), (off+length+a-1)&^(a-1)
	serial := (off|length)&(a-1) != 0
	w := n.beginWrite(head, tail-head, serial)
	defer n.endWrite(w)
	if err := n.growTo(ctx, off+length); err != nil {
		return err
	}
	if !serial {
		return n.writeAligned(ctx, p, off, flags)
	}
	if tail-head <= 2*a {
		return n.modify(ctx, p, off, head, tail, flags)
	}
	if cut := -off & (a - 1); cut != 0 {
		if err := n.modify(ctx, p[:cut], off, head, head+a, flags); err != nil {
			return err
		}
		p, off = p[cut:], off+cut
	}
	whole := int64(len(p)) &^ (a - 1)
	if err := n.writeAligned(ctx, p[:whole], off, flags); err != nil {
		return err
	}
	if whole == int64(len(p)) {
		return nil
	}
	return n.modify(ctx, p[whole:], off+whole, off+whole, tail, flags)
}

// growTo makes a node whose requests are aligned reach to end before a write there.
// Only this makes such a node longer, one at a time: the driver could not tell
// growth from the padding of its last block, and a truncation beside a write that
// grows the node would cut off what that has written.
func (n *Node) growTo(ctx context.Context, end int64) error {
	if n.truncater == nil || end <= n.inst.Size() || n.lim().RequestAlignment == 1 {
		return nil
	}
	n.gmu.Lock()
	defer n.gmu.Unlock()
	size := n.inst.Size()
	if end <= size {
		return nil
	}
	err := n.truncater.Truncate(ctx, end)
	if errors.Is(err, ErrNotSupported) {
		return fmt.Errorf("the end is at byte %d, which cannot be changed: %w", size, ErrNoSpace)
	}
	return err
}

// modify puts p into the blocks [head, tail).
func (n *Node) modify(ctx context.Context, p []byte, off, head, tail int64, flags ReqFlags) error {
	b := GetBuffer(int(tail - head))
	defer PutBuffer(b)
	a := n.lim().RequestAlignment
	there := b
	if end := (n.inst.Size() + a - 1) &^ (a - 1); tail > end {
		// The node grows: past its end there is nothing to keep.
		there = b[:max(0, end-head)]
		clear(b[len(there):])
	}
	n.debugModify(off > head, EventPwritevRMWHead, off+int64(len(p)) < tail, EventPwritevRMWTail)
	if len(there) > 0 {
		if err := n.readAligned(ctx, there, head); err != nil {
			return err
		}
	}
	n.debugModify(off > head, EventPwritevRMWAfterHead, off+int64(len(p)) < tail, EventPwritevRMWAfterTail)
	copy(b[off-head:], p)
	return n.writeAligned(ctx, b, head, flags)
}

// writeAligned splits, and emulates FUA where the driver lacks it.
func (n *Node) writeAligned(ctx context.Context, p []byte, off int64, flags ReqFlags) error {
	native := flags & n.lim().WriteFlags
	n.debug(EventPwritev)
	for most := n.lim().MaxTransfer; most > 0 && int64(len(p)) > most; {
		if err := n.inst.WriteAt(ctx, p[:most], off, native); err != nil {
			return err
		}
		p, off = p[most:], off+most
	}
	if err := n.inst.WriteAt(ctx, p, off, native); err != nil {
		return err
	}
	n.debug(EventPwritevDone)
	return n.emulateFUA(ctx, flags, native)
}

func (n *Node) emulateFUA(ctx context.Context, flags, native ReqFlags) error {
	if flags&^native&FUA != 0 {
		return n.inst.Flush(ctx)
	}
	return nil
}

// WriteZeroes makes [off, off+length) read as zero, by the driver's own means where
// it has them and by writing zeroes where not. With [NoFallback] it fails with
// [ErrNotSupported] and changes nothing instead of writing much. [MayUnmap] is
// ignored unless the node was opened with Unmap. Errors are those of WriteAt.
func (e *Edge) WriteZeroes(ctx context.Context, off, length int64, flags ReqFlags) error {
	n := e.Node()
	if err := e.writable(off, length, flags); err != nil {
		return n.fail("zero", off, length, err)
	}
	if length == 0 {
		return nil
	}
	if !n.cfg().Unmap {
		flags &^= MayUnmap
	}
	n.stats[ShardOf(ctx)%NumShards].zeroes.Add(1)
	return n.fail("zero", off, length, n.zero(ctx, off, length, flags))
}

// zero aligns: the middle of whole blocks first, so that nothing has changed if
// that is refused.
func (n *Node) zero(ctx context.Context, off, length int64, flags ReqFlags) error {
	a := n.lim().RequestAlignment
	if a == 1 && !n.writes.tracked.Load() {
		return n.zeroAligned(ctx, off, length, flags)
	}
	first, last := (off+a-1)&^(a-1), (off+length)&^(a-1)
	if first >= last {
		return n.writeZeroBytes(ctx, off, length, flags)
	}
	w := n.beginWrite(first, last-first, false)
	err := n.growTo(ctx, last)
	if err == nil {
		err = n.zeroAligned(ctx, first, last-first, flags)
	}
	n.endWrite(w)
	if err != nil {
		return err
	}
	if err := n.writeZeroBytes(ctx, off, first-off, flags); err != nil {
		return err
	}
	return n.writeZeroBytes(ctx, last, off+length-last, flags)
}

// zeroAligned splits, falls back and emulates FUA.
func (n *Node) zeroAligned(ctx context.Context, off, length int64, flags ReqFlags) error {
	if n.zeroer == nil || flags&^n.lim().ZeroFlags&NoFallback != 0 {
		if flags&NoFallback != 0 {
			return ErrNotSupported
		}
		return n.writeZeroBytes(ctx, off, length, flags)
	}
	n.debug(EventPwritevZero)
	native := flags & n.lim().ZeroFlags
	most := n.lim().MaxZero
	if most <= 0 {
		most = math.MaxInt64
	}
	done := int64(0)
	for done < length {
		step := min(length-done, most)
		err := n.zeroer.WriteZeroes(ctx, off+done, step, native)
		// Once a part is zeroed it is too late to refuse.
		if errors.Is(err, ErrNotSupported) && (flags&NoFallback == 0 || done > 0) {
			if done == 0 {
				return n.writeZeroBytes(ctx, off, length, flags)
			}
			step = length - done
			err = n.writeZeroBytes(ctx, off+done, step, flags)
		}
		if err != nil {
			return err
		}
		done += step
	}
	return n.emulateFUA(ctx, flags, native)
}

// writeZeroBytes writes zeroes as data.
func (n *Node) writeZeroBytes(ctx context.Context, off, length int64, flags ReqFlags) error {
	if length == 0 {
		return nil
	}
	for length > 0 {
		step := min(length, int64(len(zeroes)))
		if err := n.write(ctx, zeroes[:step], off, flags&(n.lim().WriteFlags&FUA|WriteUnchanged)); err != nil {
			return err
		}
		off, length = off+step, length-step
	}
	return n.emulateFUA(ctx, flags, n.lim().WriteFlags)
}

// Discard tells the node that the contents of [off, off+length) are not needed any
// more. It is a hint: nothing happens unless the node was opened with Unmap, and a
// driver that cannot is no error. Other errors are those of WriteAt.
func (e *Edge) Discard(ctx context.Context, off, length int64) error {
	n := e.Node()
	if err := e.writable(off, length, 0); err != nil {
		return n.fail("discard", off, length, err)
	}
	n.stats[ShardOf(ctx)%NumShards].discards.Add(1)
	if !n.cfg().Unmap || n.discarder == nil || length == 0 {
		return nil
	}
	return n.fail("discard", off, length, n.discard(ctx, off, length))
}

func (n *Node) discard(ctx context.Context, off, length int64) error {
	end := off + length
	if a := n.lim().RequestAlignment; a > 1 {
		if end == n.inst.Size() {
			end += a - 1
		}
		off, end = (off+a-1)&^(a-1), end&^(a-1)
		if off >= end {
			return nil
		}
	}
	if n.lim().RequestAlignment > 1 || n.writes.tracked.Load() {
		w := n.beginWrite(off, end-off, false)
		defer n.endWrite(w)
	}
	most := n.lim().MaxDiscard
	if most <= 0 {
		most = math.MaxInt64
	}
	for off < end {
		step := min(end-off, most)
		if err := n.discarder.Discard(ctx, off, step); err != nil {
			if errors.Is(err, ErrNotSupported) {
				return nil
			}
			return err
		}
		off += step
	}
	return nil
}

// Flush makes every write that returned before the call durable.
func (e *Edge) Flush(ctx context.Context) error {
	n := e.Node()
	n.stats[ShardOf(ctx)%NumShards].flushes.Add(1)
	if n.cfg().ReadOnly {
		return nil
	}
	n.debug(EventFlushToDisk)
	return n.fail("flush", 0, 0, n.inst.Flush(ctx))
}

// Prefetch makes the range resident in memory where the driver can. It is a hint.
func (e *Edge) Prefetch(ctx context.Context, off, length int64) error {
	n := e.Node()
	if err := n.readable(off, length); err != nil {
		return n.fail("prefetch", off, length, err)
	}
	if n.prefetcher == nil || length == 0 {
		return nil
	}
	return n.fail("prefetch", off, length, n.prefetcher.Prefetch(ctx, off, length))
}

// Truncate sets the size in bytes; growth reads as zero. The edge must hold [PermResize].
func (e *Edge) Truncate(ctx context.Context, size int64) error {
	n := e.Node()
	switch {
	case e.perm.load()&PermResize == 0:
		return n.fail("truncate", size, 0, ErrPermission)
	case size < 0 || size > maxOffset:
		return n.fail("truncate", size, 0, ErrRange)
	case n.truncater == nil:
		return n.fail("truncate", size, 0, ErrNotSupported)
	}
	return n.fail("truncate", size, 0, n.truncater.Truncate(ctx, size))
}

// Locate tells where the bytes from off on lie, for at most length bytes, without
// waiting. The range must lie inside the node and not be empty; it says
// [LocateAsk] where not.
func (e *Edge) Locate(shard Shard, off, length int64) Location {
	n := e.Node()
	if n.locator == nil || length <= 0 || n.readable(off, length) != nil {
		return Location{Kind: LocateAsk, Length: length}
	}
	l := n.locator.Locate(shard, off, length)
	if l.Kind != LocateAsk {
		n.countRead(shard, l.Length)
	}
	return l
}

// BlockStatus tells the status at off and for how many bytes it holds, at most
// length (1 or more). What this node does not hold itself is looked up along its
// COW children; past the end of a shorter one there are zeroes. precise asks for
// zero detection where it costs.
func (e *Edge) BlockStatus(ctx context.Context, off, length int64, precise bool) (Extent, error) {
	n := e.Node()
	if err := n.readable(off, length); err != nil {
		return Extent{}, n.fail("block status", off, length, err)
	}
	if length == 0 {
		return Extent{}, n.fail("block status", off, length, ErrInvalid)
	}
	n.stats[ShardOf(ctx)%NumShards].statuses.Add(1)
	x, err := n.blockStatus(ctx, off, length, precise)
	if cow := n.Backing(); err == nil && x.Flags&StatusAllocated == 0 && cow != nil {
		x, err = cow.statusBelow(ctx, off, x.Length, precise)
	}
	if err != nil {
		return Extent{}, n.fail("block status", off, length, err)
	}
	if off+x.Length == n.inst.Size() {
		x.Flags |= StatusEOF
	}
	return x, nil
}

// statusBelow answers for a range that the parent does not hold.
func (e *Edge) statusBelow(ctx context.Context, off, length int64, precise bool) (Extent, error) {
	size := e.Size()
	if off >= size {
		return Extent{Flags: StatusZero | StatusAllocated, Length: length, Depth: 1}, nil
	}
	x, err := e.BlockStatus(ctx, off, min(length, size-off), precise)
	x.Depth++
	x.Flags &^= StatusEOF
	return x, err
}

// blockStatus asks the driver, in whole blocks.
func (n *Node) blockStatus(ctx context.Context, off, length int64, precise bool) (Extent, error) {
	if n.status == nil {
		return Extent{Flags: StatusData | StatusAllocated, Length: length}, nil
	}
	a := n.lim().RequestAlignment
	head := off &^ (a - 1)
	tail := (off + length + a - 1) &^ (a - 1)
	if size := n.inst.Size(); tail > size {
		tail = size
	}
	x, err := n.status.BlockStatus(ctx, head, tail-head, precise)
	if err != nil {
		return Extent{}, err
	}
	x.Length = min(x.Length-(off-head), length)
	if x.Length <= 0 {
		// Part of a block differs from the rest; the whole block counts as data.
		return Extent{Flags: StatusData | StatusAllocated, Length: min(head+a-off, length)}, nil
	}
	if x.Flags&StatusOffset != 0 {
		x.Offset += off - head
	}
	return x, nil
}
