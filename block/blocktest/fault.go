package blocktest

import (
	"context"
	"fmt"
	"sync"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/filter"
)

// A Fault says which requests of a fault node fail.
type Fault struct {
	Op Op
	// Off and Len are the range that a request must touch; Len 0 matches all.
	Off, Len int64
	// Skip is how many matching requests pass before the first that fails.
	Skip int
	// Times is how many fail then; 0: all.
	Times int
	// Err is the error, e.g. syscall.EIO.
	Err error
}

// Faults are the faults of a node. They may be changed at any time.
type Faults struct {
	mu    sync.Mutex
	list  []*Fault
	fired int
}

// Add adds a fault.
func (f *Faults) Add(x Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.list = append(f.list, &x)
}

// Clear takes all faults away.
func (f *Faults) Clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.list = nil
}

// Fired counts the requests that failed so far.
func (f *Faults) Fired() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fired
}

func (f *Faults) check(op Op, off, n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, x := range f.list {
		if x.Op != op || x.Len != 0 && (off >= x.Off+x.Len || x.Off >= off+n) {
			continue
		}
		if x.Skip > 0 {
			x.Skip--
			continue
		}
		if x.Times == 1 {
			f.list = append(f.list[:i:i], f.list[i+1:]...)
		} else if x.Times > 1 {
			x.Times--
		}
		f.fired++
		return fmt.Errorf("injected fault on %s: %w", op, x.Err)
	}
	return nil
}

// FaultOptions configure a fault node.
type FaultOptions struct{ Faults *Faults }

// FaultConfig describes a writable fault node over child.
func FaultConfig(f *Faults, child *block.Config) *block.Config {
	return &block.Config{Driver: "fault", Unmap: true, Options: &FaultOptions{f}, Children: map[string]*block.Config{"file": child}}
}

// FaultDriver returns the driver "fault", a filter that fails the requests that its
// [Faults] tell. A request that fails does not reach the child.
func FaultDriver() *block.Driver {
	return &block.Driver{
		Name:       "fault",
		Kind:       block.Filter,
		NewOptions: func() any { return &FaultOptions{new(Faults)} },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			f, err := filter.Open(ctx, o, "file")
			if err != nil {
				return nil, err
			}
			faults := o.Config.Options.(*FaultOptions).Faults
			if err := faults.check(OpOpen, 0, 0); err != nil {
				return nil, err
			}
			return &fault{f, faults}, nil
		},
	}
}

type fault struct {
	filter.Pass
	faults *Faults
}

func (f *fault) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := f.faults.check(OpRead, off, int64(len(p))); err != nil {
		return err
	}
	return f.Pass.ReadAt(ctx, p, off)
}

func (f *fault) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	if err := f.faults.check(OpWrite, off, int64(len(p))); err != nil {
		return err
	}
	return f.Pass.WriteAt(ctx, p, off, flags)
}

func (f *fault) WriteZeroes(ctx context.Context, off, n int64, flags block.ReqFlags) error {
	if err := f.faults.check(OpZero, off, n); err != nil {
		return err
	}
	return f.Pass.WriteZeroes(ctx, off, n, flags)
}

func (f *fault) Discard(ctx context.Context, off, n int64) error {
	if err := f.faults.check(OpDiscard, off, n); err != nil {
		return err
	}
	return f.Pass.Discard(ctx, off, n)
}

func (f *fault) BlockStatus(ctx context.Context, off, n int64, precise bool) (block.Extent, error) {
	if err := f.faults.check(OpStatus, off, n); err != nil {
		return block.Extent{}, err
	}
	return f.Pass.BlockStatus(ctx, off, n, precise)
}

// Locate answers "ask me", so that every read meets the faults.
func (f *fault) Locate(_ block.Shard, _, n int64) block.Location {
	return block.Location{Kind: block.LocateAsk, Length: n}
}

func (f *fault) Prefetch(ctx context.Context, off, n int64) error {
	if err := f.faults.check(OpPrefetch, off, n); err != nil {
		return err
	}
	return f.Pass.Prefetch(ctx, off, n)
}

func (f *fault) Truncate(ctx context.Context, size int64) error {
	if err := f.faults.check(OpTruncate, size, 0); err != nil {
		return err
	}
	return f.Pass.Truncate(ctx, size)
}

func (f *fault) Flush(ctx context.Context) error {
	if err := f.faults.check(OpFlush, 0, 0); err != nil {
		return err
	}
	return f.Pass.Flush(ctx)
}

func (f *fault) Close(ctx context.Context) error {
	if err := f.faults.check(OpClose, 0, 0); err != nil {
		return err
	}
	return f.Pass.Close(ctx)
}

// Inactivate implements [block.Activator].
func (f *fault) Inactivate(context.Context) error { return f.faults.check(OpInactivate, 0, 0) }

// Deactivate implements [block.Activator].
func (f *fault) Deactivate() {}

// Activate implements [block.Activator].
func (f *fault) Activate(context.Context) error { return f.faults.check(OpActivate, 0, 0) }

// PrepareReopen implements [block.Reopener].
func (f *fault) PrepareReopen(context.Context, *block.Reopening) (block.Switch, error) {
	return &faultSwitch{faults: f.faults}, f.faults.check(OpReopen, 0, 0)
}

type faultSwitch struct {
	block.NoSwitch
	faults *Faults
}

func (s *faultSwitch) Apply(context.Context) error { return s.faults.check(OpApply, 0, 0) }
