package hostdev

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

func newFlusher() *flusher {
	f := new(flusher)
	f.ended.L = &f.mu
	return f
}

func TestFlushesThatComeDuringOneShareTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFlusher()
		gate := make(chan struct{})
		var running, most atomic.Int32
		sync := func() {
			most.Store(max(most.Load(), running.Add(1)))
			<-gate
			running.Add(-1)
		}
		var done atomic.Int32
		flush := func() {
			if err := f.do(sync); err != nil {
				t.Error(err)
			}
			done.Add(1)
		}
		go flush()
		synctest.Wait()
		for range 10 {
			go flush()
		}
		synctest.Wait()
		gate <- struct{}{}
		synctest.Wait()
		// The ten began after the first round, so its end is not theirs.
		if done.Load() != 1 {
			t.Errorf("%d flushes are done after the first round, want 1", done.Load())
		}
		gate <- struct{}{}
		synctest.Wait()
		if done.Load() != 11 || f.rounds.Load() != 2 || most.Load() != 1 {
			t.Errorf("%d flushes in %d rounds, %d at a time; want 11 in 2, 1 at a time", done.Load(), f.rounds.Load(), most.Load())
		}
	})
}

func TestFlushErrorReachesAllThatShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFlusher()
		gate := make(chan struct{})
		var failed atomic.Int32
		for range 5 {
			go func() {
				err := f.do(func() { <-gate; _ = f.latch("disk", unix.ENOSPC) })
				if errors.Is(err, syscall.EIO) && strings.Contains(err.Error(), "no space") {
					failed.Add(1)
				}
			}()
		}
		synctest.Wait()
		close(gate)
		synctest.Wait()
		if failed.Load() != 5 {
			t.Errorf("%d of 5 flushes failed with EIO and the cause", failed.Load())
		}
	})
}

// fullDevice returns a loop device on a file system that has no room for its data.
func fullDevice(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	command(t, "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", dir)
	t.Cleanup(func() { command(t, "umount", "--lazy", dir) })
	file := filepath.Join(dir, "disk")
	newFile(t, file, nil, 8<<20)
	return loopDevice(t, file, 512)
}

func TestLostWriteFailsEveryLaterFlush(t *testing.T) {
	dev := fullDevice(t)
	n, r := opened(t, config(dev))
	do(t, r, func(ctx context.Context) error { return r.WriteAt(ctx, filled(1, 2<<20), 0, 0) })
	for i := range 3 {
		err := r.Do(ctx, r.Flush)
		var flush *FlushError
		if !errors.As(err, &flush) || block.Errno(err) != syscall.EIO {
			t.Fatalf("flush %d: %v, want a FlushError that is EIO", i, err)
		}
	}
	// The kernel has forgotten by now.
	if err := unix.Fdatasync(n.fd); err != nil {
		t.Errorf("fdatasync still says %v: the test proves nothing", err)
	}
	err := r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, filled(1, 512), 0, block.FUA) })
	if block.Errno(err) != syscall.EIO {
		t.Errorf("write with FUA: %v, want EIO", err)
	}
	do(t, r, func(ctx context.Context) error { return r.WriteAt(ctx, filled(1, 512), 0, 0) })
	if n.Measurements()[2].Value != 1 {
		t.Error("the metric does not say that the error is latched")
	}
}

func TestLostWriteWithFUAFailsEveryLaterFlush(t *testing.T) {
	_, r := opened(t, config(fullDevice(t)))
	for i := range 2 {
		err := r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, filled(1, 2<<20), 0, block.FUA) })
		if block.Errno(err) != syscall.EIO {
			t.Fatalf("write %d with FUA: %v, want EIO", i, err)
		}
	}
	if err := r.Do(ctx, r.Flush); block.Errno(err) != syscall.EIO {
		t.Errorf("flush: %v, want EIO", err)
	}
}

func TestNoFlushNeverSyncs(t *testing.T) {
	cfg := config(fullDevice(t))
	cfg.Cache.NoFlush = true
	n, r := opened(t, cfg)
	do(t, r, func(ctx context.Context) error { return r.WriteAt(ctx, filled(1, 2<<20), 0, block.FUA) })
	do(t, r, r.Flush)
	if n.flush.rounds.Load() != 0 {
		t.Error("fdatasync was called")
	}
}

func TestFullFileSystemIsNoSpaceAndDoesNotLatch(t *testing.T) {
	dir := t.TempDir()
	command(t, "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", dir)
	t.Cleanup(func() { command(t, "umount", "--lazy", dir) })
	path := filepath.Join(dir, "disk")
	newFile(t, path, nil, 8<<20)
	_, r := opened(t, config(path))
	for _, flags := range []block.ReqFlags{0, block.FUA} {
		err := r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, filled(1, 2<<20), 0, flags) })
		if !errors.Is(err, block.ErrNoSpace) {
			t.Errorf("write with flags %#x: %v, want ErrNoSpace", flags, err)
		}
	}
	do(t, r, r.Flush)
}

// What a failed write has left past the end is part of the node: parents take what
// lies past its end for zeroes.
func TestFailedGrowthIsPartOfTheNode(t *testing.T) {
	dir := t.TempDir()
	command(t, "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", dir)
	t.Cleanup(func() { command(t, "umount", "--lazy", dir) })
	path := filepath.Join(dir, "disk")
	newFile(t, path, nil, 0)
	n, r := opened(t, config(path))
	err := r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, filled(1, 2<<20), 0, 0) })
	if !errors.Is(err, block.ErrNoSpace) {
		t.Errorf("write: %v, want ErrNoSpace", err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Size() == 0 || st.Size() != n.Size() {
		t.Errorf("the node has %d bytes, the file %d (%v)", n.Size(), st.Size(), err)
	}
}

func TestParallelFlushesOfRealFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	newFile(t, path, nil, 1<<20)
	n, r := opened(t, config(path))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for k := range 5 {
				err := r.Do(ctx, func(ctx context.Context) error {
					return errors.Join(r.WriteAt(ctx, filled(byte(k), 4096), int64(i)*4096, 0), r.Flush(ctx))
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	asked, rounds := n.flush.asked.Load(), n.flush.rounds.Load()
	if asked != 40 || rounds > asked || rounds < 5 {
		t.Errorf("%d flushes in %d rounds", asked, rounds)
	}
}
