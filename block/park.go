package block

import "context"

// WaitingContext is [Lane.Context] for a connection that runs its requests on a bounded
// number of workers: parked(1) is called when one of the requests begins to wait for
// something other than work, and parked(-1) when it goes on, so that its worker need
// not count meanwhile. They are called on the goroutine of the request.
func (l *Lane) WaitingContext(ctx context.Context, parked func(n int)) context.Context {
	return &laneContext{ctx, l.shard, parked}
}

// Parked runs wait, in which a request waits for the time to pass or for a limit, and
// not for a device or another request.
func Parked(ctx context.Context, wait func()) {
	if l, ok := ctx.(*laneContext); ok && l.parked != nil {
		l.parked(1)
		defer l.parked(-1)
	}
	wait()
}
