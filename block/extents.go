package block

import (
	"context"
	"iter"
)

// Extents goes through the extents of [off, off+length), which lies inside the node,
// with neighbours joined that are the same; see [Edge.BlockStatus]. same tells whether b
// may be told as more of a; nil: where flags, depth and place go on. It is asked for
// each piece that is found, so it can also end an extent that takes long to find. With
// an error come the bytes that it is about as an extent without flags, and it is the last.
func (e *Edge) Extents(ctx context.Context, off, length int64, precise bool, same func(a, b Extent) bool) iter.Seq2[Extent, error] {
	return extents(off, length, same, func(off, length int64) (Extent, error) {
		return e.BlockStatus(ctx, off, length, precise)
	})
}

// Extents is [Edge.Extents].
func (r *Root) Extents(ctx context.Context, off, length int64, precise bool, same func(a, b Extent) bool) iter.Seq2[Extent, error] {
	return extents(off, length, same, func(off, length int64) (Extent, error) {
		return r.BlockStatus(ctx, off, length, precise)
	})
}

func extents(off, length int64, same func(a, b Extent) bool, status func(off, length int64) (Extent, error)) iter.Seq2[Extent, error] {
	if same == nil {
		same = Extent.goesOn
	}
	return func(yield func(Extent, error) bool) {
		var x Extent // found, and not told yet
		for at := off; at < off+length; {
			next, err := status(at, off+length-at)
			if err != nil {
				if x.Length == 0 || yield(x, nil) {
					yield(Extent{Length: off + length - at}, err)
				}
				return
			}
			at += next.Length
			switch {
			case x.Length == 0:
				x = next
			case same(x, next):
				x.Length += next.Length
				x.Flags |= next.Flags & StatusEOF
			case !yield(x, nil):
				return
			default:
				x = next
			}
		}
		if x.Length > 0 {
			yield(x, nil)
		}
	}
}

// goesOn tells whether next is more of x.
func (x Extent) goesOn(next Extent) bool {
	if x.Flags&^StatusEOF != next.Flags&^StatusEOF || x.Depth != next.Depth {
		return false
	}
	return x.Flags&StatusOffset == 0 || x.File == next.File && x.Offset+x.Length == next.Offset
}
