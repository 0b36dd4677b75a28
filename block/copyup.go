package block

import (
	"context"
	"errors"
)

// copyStep is how much CopyUp copies at once, in bytes, unless a cluster is larger.
const copyStep = 1 << 20

// CopyUp writes into the child what it reads from its backing chain in
// [off, off+length), in whole clusters, and returns how many bytes that were. A layer of
// the chain counts if it lies up to depth below the child (1: its backing node); what
// comes from further down is left alone, and so is what no layer holds. Zeroes are
// copied as such, without taking up space where the child can do that.
//
// No write to the child is in flight meanwhile in the range that is being copied, so
// nothing that was written is overwritten with what was there before. The edge must hold
// [PermWriteUnchanged] ([ErrPermission], [ErrReadOnly]), by which the child knows that
// it has to keep writes apart; whoever takes that permission while the child is in use
// waits for what is in flight then ([Grace]) before the first CopyUp.
func (e *Edge) CopyUp(ctx context.Context, off, length int64, depth int) (copied int64, err error) {
	n := e.Node()
	if err := e.writable(off, length, WriteUnchanged); err != nil {
		return 0, n.fail("copy", off, length, err)
	}
	g := n.copyGranule()
	for end := off + length; off < end; {
		x, err := e.BlockStatus(ctx, off, end-off, false)
		if err != nil {
			return copied, err
		}
		if !x.isBelow(depth) {
			off += x.Length
			continue
		}
		from := off &^ (g - 1)
		to := min(from+max(copyStep, g), (off+x.Length+g-1)&^(g-1))
		k, err := e.copyUp(ctx, from, to, depth)
		copied += k
		if err != nil {
			return copied, n.fail("copy", from, to-from, err)
		}
		off = to
	}
	return copied, nil
}

// copyGranule is what is copied as a whole: a cluster.
func (n *Node) copyGranule() int64 {
	l := n.lim()
	if p := l.PreferredTransfer; p > l.RequestAlignment && p&(p-1) == 0 && p <= 16<<20 {
		return p
	}
	return l.RequestAlignment
}

// isCopiedUp tells whether a user may call CopyUp. Graph.mu is held.
func (n *Node) isCopiedUp() bool {
	for _, e := range n.parents {
		// Other roles pass the permission on, but write for themselves.
		if e.role&RoleFiltered != 0 && e.perm.load()&PermWriteUnchanged != 0 {
			return true
		}
	}
	return false
}

// isBelow tells whether what is there comes from a layer up to depth below.
func (x *Extent) isBelow(depth int) bool {
	return x.Flags&StatusAllocated != 0 && 0 < x.Depth && x.Depth <= depth
}

// copyUp copies what is to be copied between from and to, which are multiples of the granule.
func (e *Edge) copyUp(ctx context.Context, from, to int64, depth int) (copied int64, err error) {
	n := e.Node()
	w := n.beginWrite(from, to-from, true)
	defer n.endWrite(w)
	buf := GetBuffer(int(to - from))
	defer PutBuffer(buf)
	a, g := n.lim().RequestAlignment, n.copyGranule()
	// The node may have become shorter.
	for to = min(to, n.inst.Size()); from < to; {
		// What was written before this range was taken is there now.
		x, err := e.BlockStatus(ctx, from, to-from, false)
		if err != nil {
			return copied, err
		}
		if !x.isBelow(depth) {
			from += x.Length
			continue
		}
		start := from &^ (g - 1)
		next := min((from+x.Length+g-1)&^(g-1), to)
		b := buf[:(next+a-1)&^(a-1)-start]
		if err := n.readAligned(ctx, b, start); err != nil {
			return copied, err
		}
		n.debug(EventCorWrite)
		if err := n.storeUnchanged(ctx, b, start); err != nil {
			return copied, err
		}
		copied += next - start
		from = next
	}
	return copied, nil
}

// storeUnchanged writes whole blocks that read as p already.
func (n *Node) storeUnchanged(ctx context.Context, p []byte, off int64) error {
	length := int64(len(p))
	if n.zeroer != nil && IsZero(p) && (n.lim().MaxZero == 0 || length <= n.lim().MaxZero) {
		// The range holds nothing yet, so this gives nothing up.
		err := n.zeroer.WriteZeroes(ctx, off, length, (MayUnmap|WriteUnchanged)&n.lim().ZeroFlags)
		if !errors.Is(err, ErrNotSupported) {
			return err
		}
	}
	return n.writeAligned(ctx, p, off, WriteUnchanged)
}
