package blocktest

import (
	"context"
	"sync/atomic"

	"github.com/nbdserve/nbdserve/block"
)

// Nothing is an instance that holds nothing and whose requests cost nothing, for
// benchmarks of what lies above and for disks of any size.
type Nothing struct {
	Length int64         // bytes
	Grown  *atomic.Int64 // if not nil, the length, which writes increase
	Limit  block.Limits
}

func (n Nothing) ReadAt(context.Context, []byte, int64) error { return nil }

func (n Nothing) WriteAt(_ context.Context, p []byte, off int64, _ block.ReqFlags) error {
	if n.Grown != nil {
		n.Grown.Store(max(n.Grown.Load(), off+int64(len(p))))
	}
	return nil
}

func (n Nothing) Size() int64 {
	if n.Grown != nil {
		return n.Grown.Load()
	}
	return n.Length
}

func (n Nothing) Flush(context.Context) error { return nil }
func (n Nothing) Limits() block.Limits        { return n.Limit }
func (n Nothing) Close(context.Context) error { return nil }
