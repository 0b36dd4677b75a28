package block

import "context"

// The requests of a Root are those of its edge, but for the tail that pads the
// node to its request alignment.

// inside tells how much of a request of length bytes at off concerns the node and
// not the padding, or [ErrRange].
func (r *Root) inside(off, length int64) (int64, error) {
	if !sane(off, length) || off+length > r.Size() {
		return 0, r.edge.Node().fail("request", off, length, ErrRange)
	}
	return min(length, max(0, r.edge.Size()-off)), nil
}

// ReadAt is [Edge.ReadAt].
func (r *Root) ReadAt(ctx context.Context, p []byte, off int64) error {
	n, err := r.inside(off, int64(len(p)))
	if err != nil {
		return err
	}
	clear(p[n:])
	if n == 0 {
		return nil
	}
	return r.edge.ReadAt(ctx, p[:n], off)
}

// WriteAt is [Edge.WriteAt]. A root that holds [PermResize] may write past the end.
func (r *Root) WriteAt(ctx context.Context, p []byte, off int64, flags ReqFlags) error {
	if r.perm&PermResize == 0 && sane(off, int64(len(p))) && off+int64(len(p)) <= r.Size() {
		n, err := r.inside(off, int64(len(p)))
		if err != nil {
			return err
		}
		if !IsZero(p[n:]) {
			return r.edge.Node().fail("write", off+n, int64(len(p))-n, ErrReadOnly)
		}
		if n == 0 {
			return nil
		}
		p = p[:n]
	}
	return r.edge.WriteAt(ctx, p, off, flags|r.writeFlags)
}

// WriteZeroes is [Edge.WriteZeroes].
func (r *Root) WriteZeroes(ctx context.Context, off, length int64, flags ReqFlags) error {
	if r.perm&PermResize == 0 && sane(off, length) && off+length <= r.Size() {
		n, err := r.inside(off, length)
		if err != nil {
			return err
		}
		length = n
		off = min(off, r.edge.Size())
	}
	return r.edge.WriteZeroes(ctx, off, length, flags|r.writeFlags)
}

// Discard is [Edge.Discard].
func (r *Root) Discard(ctx context.Context, off, length int64) error {
	n, err := r.inside(off, length)
	if err != nil {
		return err
	}
	return r.edge.Discard(ctx, min(off, r.edge.Size()), n)
}

// Flush is [Edge.Flush].
func (r *Root) Flush(ctx context.Context) error { return r.edge.Flush(ctx) }

// Prefetch is [Edge.Prefetch].
func (r *Root) Prefetch(ctx context.Context, off, length int64) error {
	n, err := r.inside(off, length)
	if err != nil {
		return err
	}
	return r.edge.Prefetch(ctx, min(off, r.edge.Size()), n)
}

// Truncate is [Edge.Truncate].
func (r *Root) Truncate(ctx context.Context, size int64) error { return r.edge.Truncate(ctx, size) }

// Locate is [Edge.Locate].
func (r *Root) Locate(shard Shard, off, length int64) Location {
	if length > 0 && off >= 0 && off < r.edge.Size() {
		length = min(length, r.edge.Size()-off)
	}
	return r.edge.Locate(shard, off, length)
}

// BlockStatus is [Edge.BlockStatus].
func (r *Root) BlockStatus(ctx context.Context, off, length int64, precise bool) (Extent, error) {
	n, err := r.inside(off, length)
	if err != nil {
		return Extent{}, err
	}
	if n == 0 && length > 0 {
		return Extent{Flags: StatusZero | StatusAllocated | StatusEOF, Length: length}, nil
	}
	x, err := r.edge.BlockStatus(ctx, off, n, precise)
	if err == nil && x.Length == n && n < length && x.Flags&StatusZero != 0 {
		x.Length = length
	}
	return x, err
}
