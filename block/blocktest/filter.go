package blocktest

import (
	"context"

	"github.com/nbdserve/nbdserve/block"
)

// filter passes everything on to its child.
type filter struct{ file *block.Edge }

func openFilter(ctx context.Context, o *block.Opening) (filter, error) {
	e, err := o.OpenChild(ctx, "file", block.RoleFiltered|block.RolePrimary, nil)
	return filter{e}, err
}

func (f filter) ReadAt(ctx context.Context, p []byte, off int64) error {
	return f.file.ReadAt(ctx, p, off)
}

func (f filter) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	return f.file.WriteAt(ctx, p, off, flags)
}

func (f filter) WriteZeroes(ctx context.Context, off, n int64, flags block.ReqFlags) error {
	return f.file.WriteZeroes(ctx, off, n, flags)
}

func (f filter) Discard(ctx context.Context, off, n int64) error { return f.file.Discard(ctx, off, n) }

func (f filter) BlockStatus(ctx context.Context, off, n int64, precise bool) (block.Extent, error) {
	return f.file.BlockStatus(ctx, off, n, precise)
}

func (f filter) Locate(shard block.Shard, off, n int64) block.Location {
	return f.file.Locate(shard, off, n)
}

func (f filter) Prefetch(ctx context.Context, off, n int64) error {
	return f.file.Prefetch(ctx, off, n)
}

func (f filter) Truncate(ctx context.Context, size int64) error { return f.file.Truncate(ctx, size) }
func (f filter) Flush(ctx context.Context) error                { return f.file.Flush(ctx) }
func (f filter) Size() int64                                    { return f.file.Size() }
func (f filter) Limits() block.Limits                           { return f.file.Limits() }
func (f filter) Close(context.Context) error                    { return nil }
