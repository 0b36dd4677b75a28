package block

import "context"

// YieldingContext is [Lane.Context] for those who run requests on a bounded number of
// workers: yield(1) is called when a request begins to wait for something that needs no
// worker, so that another may have its place, and yield(-1) when it goes on. They are
// called on the goroutine of the request, maybe several times.
func (l *Lane) YieldingContext(ctx context.Context, yield func(n int)) context.Context {
	return &laneContext{ctx, l.shard, yield}
}

// Yield runs wait, in which a request waits for time to pass or for a limit, and not
// for a device or another request. Meanwhile its worker does not count.
func Yield(ctx context.Context, wait func()) {
	if l, ok := ctx.(*laneContext); ok && l.yield != nil {
		l.yield(1)
		defer l.yield(-1)
	}
	wait()
}
