package hostdev

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A flusher runs one flush at a time. Who comes while one is running shares the
// next, because the running one may have passed their writes already.
//
// An error stays: the kernel reports a lost write once, and drops the data, so
// that a later fsync that succeeds proves nothing.
type flusher struct {
	mu      sync.Mutex
	ended   sync.Cond // a round has ended; on mu
	running bool
	begun   uint64 // rounds; the last one may be running
	done    uint64 // rounds

	asked, rounds atomic.Int64
	failure       atomic.Pointer[FlushError]
}

// A FlushError is what every flush and every write with FUA of a node returns
// after writes were lost, until the node is opened anew. It stands for EIO.
type FlushError struct {
	Filename string
	Cause    error // what the kernel said first
}

func (e *FlushError) Error() string {
	return fmt.Sprintf("data written to '%s' could not be made durable and may be lost (%v); it must be opened anew", e.Filename, e.Cause)
}

// Unwrap returns EIO, whatever the cause was.
func (e *FlushError) Unwrap() error { return unix.EIO }

// latch makes cause the reason of every failure from now on, unless there is one already.
func (f *flusher) latch(filename string, cause error) error {
	f.failure.CompareAndSwap(nil, &FlushError{filename, cause})
	return f.failure.Load()
}

// failed is the latched error, or nil.
func (f *flusher) failed() error {
	if e := f.failure.Load(); e != nil {
		return e
	}
	return nil
}

// do makes sure that sync was run once from beginning to end since the call. sync latches its error.
func (f *flusher) do(sync func()) error {
	f.asked.Add(1)
	f.mu.Lock()
	defer f.mu.Unlock()
	for want := f.begun + 1; f.done < want; {
		if f.running {
			f.ended.Wait()
			continue
		}
		f.running = true
		f.begun++
		f.mu.Unlock()
		sync()
		f.rounds.Add(1)
		f.mu.Lock()
		f.running = false
		f.done = f.begun
		f.ended.Broadcast()
	}
	return f.failed()
}

// Flush implements [block.Instance] by fdatasync.
func (n *node) Flush(context.Context) error {
	if err := n.flush.failed(); err != nil {
		return err
	}
	return n.flush.do(n.syncFunc)
}

// sync runs fdatasync on every descriptor that data was written by.
func (n *node) sync() {
	slot := n.work.begin(opSync)
	defer n.work.end(slot)
	if n.tailWritten.Swap(false) {
		n.datasync(n.tail)
	}
	n.datasync(n.fd)
}

func (n *node) datasync(fd int) {
	for {
		switch err := unix.Fdatasync(fd); err {
		case nil:
			return
		case unix.EINTR:
		case unix.EINVAL, unix.EROFS:
			if n.kind == charDevice {
				return // nothing that could be flushed
			}
			fallthrough
		default:
			_ = n.flush.latch(n.filename, err)
			return
		}
	}
}
