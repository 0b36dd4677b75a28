package hostdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"golang.org/x/sys/unix"
)

// openDescriptors counts the descriptors of this process that lead to path.
func openDescriptors(t testing.TB, path string) int {
	t.Helper()
	var want unix.Stat_t
	if err := unix.Stat(path, &want); err != nil {
		t.Fatal(err)
	}
	fds, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		var st unix.Stat_t
		if unix.Stat(fd, &st) == nil && st.Dev == want.Dev && st.Ino == want.Ino {
			n++
		}
	}
	return n
}

// A disk is a node with a root that lets it become inactive.
type disk struct {
	t       testing.TB
	g       *block.Graph
	n       *block.Node
	r       *block.Root
	resized atomic.Int32
}

func newDisk(t testing.TB, cfg *block.Config, perm, share block.Perm) *disk {
	t.Helper()
	d := &disk{t: t, g: newGraph(t)}
	var err error
	if d.n, err = d.g.Open(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	d.r, err = d.g.AttachRoot(ctx, block.RootConfig{
		User: "export", Node: d.n, Perm: perm, Shared: share,
		AllowInactive: func() error { return nil }, OnResize: func() { d.resized.Add(1) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(d.r.Detach(ctx), d.g.Release(ctx, d.n)); err != nil {
			t.Error(err)
		}
	})
	return d
}

func (d *disk) setActive(active bool) {
	d.t.Helper()
	if err := d.g.SetActive(ctx, active, d.n); err != nil {
		d.t.Fatalf("set active %t: %v", active, err)
	}
}

func (d *disk) read(off, n int64) []byte {
	d.t.Helper()
	p := make([]byte, n)
	do(d.t, d.r, func(ctx context.Context) error { return d.r.ReadAt(ctx, p, off) })
	return p
}

func (d *disk) write(p []byte, off int64) {
	d.t.Helper()
	do(d.t, d.r, func(ctx context.Context) error { return d.r.WriteAt(ctx, p, off, 0) })
}

// eachKind runs f with a file and with a device of some size.
func eachKind(t *testing.T, size int64, f func(t *testing.T, path, file string)) {
	t.Run("file", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "disk")
		newFile(t, file, filled(1, 4096), size)
		f(t, file, file)
	})
	t.Run("device", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "disk")
		newFile(t, file, filled(1, 4096), size)
		f(t, loopDevice(t, file, 512), file)
	})
}

func TestG36NoLocksWhileInactive(t *testing.T) {
	eachKind(t, 1<<20, func(t *testing.T, path, _ string) {
		for _, direct := range []bool{false, true} {
			cfg := config(path)
			cfg.Cache.Direct = direct
			d := newDisk(t, cfg, rw, cr)
			locked := lockedBytes(t, path)
			if want := "100 101 201 202 203"; locked != want {
				t.Errorf("locked: %s, want %s", locked, want)
			}
			other := newDisk(t, func() *block.Config { c := config(path); c.Inactive = true; return c }(), rw, cr)
			wantLockError(t, other.g.SetActive(ctx, true, other.n), `"write" lock`, os.Getpid(), "hostdev.test")
			d.write(filled(2, 512), 0)
			d.setActive(false)
			if got, open := lockedBytes(t, path), openDescriptors(t, path); got != "" || open != 0 {
				t.Errorf("inactive: bytes %s locked, %d descriptors open", got, open)
			}
			other.setActive(true)
			if got := other.read(0, 512); !bytes.Equal(got, filled(2, 512)) {
				t.Errorf("the other one reads %x", got[:4])
			}
			other.write(filled(3, 512), 0)
			wantLockError(t, d.g.SetActive(ctx, true, d.n), `"write" lock`, os.Getpid(), "hostdev.test")
			if d.n.Active() {
				t.Errorf("active without the lock")
			}
			other.setActive(false)
			d.setActive(true)
			if got := d.read(0, 512); !bytes.Equal(got, filled(3, 512)) {
				t.Errorf("read %x", got[:4])
			}
			if got := lockedBytes(t, path); got != locked {
				t.Errorf("locked again: %s, before: %s", got, locked)
			}
			d.setActive(false)
		}
	})
}

func TestG36AnotherProgramHasTheLock(t *testing.T) {
	path := qemuImage(t, "raw")
	d := newDisk(t, config(path), rw, cr)
	d.setActive(false)
	t.Run("qemu-io", func(t *testing.T) {
		pid := qemuIO(t, "-f", "raw", path)
		err := d.g.SetActive(ctx, true, d.n)
		wantLockError(t, err, `shared "write" lock`, pid, "qemu-io")
		if d.n.Active() || lockedBytes(t, path) != "" || openDescriptors(t, path) != 0 {
			t.Errorf("active %t, locked %s, %d descriptors", d.n.Active(), lockedBytes(t, path), openDescriptors(t, path))
		}
	})
	d.setActive(true)
}

func TestG22ActivationSeesWhatOthersDid(t *testing.T) {
	eachKind(t, 1<<20, func(t *testing.T, path, file string) {
		d := newDisk(t, config(path), rw, cr)
		if got := d.read(0, 512); !bytes.Equal(got, filled(1, 512)) {
			t.Errorf("read %x", got[:4])
		}
		user, err := os.Open(path) // so that a device keeps its cache
		if err != nil {
			t.Fatal(err)
		}
		defer user.Close()
		d.setActive(false)
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err == nil {
			_, err = f.WriteAt(filled(7, 4096), 0)
			err = errors.Join(err, f.Truncate(2<<20), f.Sync(), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		if path != file {
			command(t, "losetup", "--set-capacity", path)
		}
		if size, err := d.r.PeekSize(ctx); err != nil || size != 2<<20 {
			t.Errorf("an inactive node has %d bytes (%v)", size, err)
		}
		if d.resized.Load() != 0 || openDescriptors(t, path) != 1 {
			t.Errorf("told %d times, %d descriptors, one of them the test's", d.resized.Load(), openDescriptors(t, path))
		}
		d.setActive(true)
		if got := d.read(0, 512); !bytes.Equal(got, filled(7, 512)) {
			t.Errorf("read %x, want what was written meanwhile", got[:4])
		}
		if d.r.Size() != 2<<20 || d.resized.Load() != 1 {
			t.Errorf("size %d, told %d times", d.r.Size(), d.resized.Load())
		}
	})
}

func TestG22ActivationSeesAReplacedFile(t *testing.T) {
	dir := t.TempDir()
	path, next := filepath.Join(dir, "disk"), filepath.Join(dir, "next")
	newFile(t, path, filled(1, 4096), 1<<20)
	d := newDisk(t, config(path), rw, cr)
	d.setActive(false)
	newFile(t, next, filled(9, 4096), 3<<20)
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
	d.setActive(true)
	if got := d.read(0, 512); !bytes.Equal(got, filled(9, 512)) || d.r.Size() != 3<<20 {
		t.Errorf("%d bytes, %x", d.r.Size(), got[:4])
	}
	if got := lockedBytes(t, path); got != "100 101 201 202 203" {
		t.Errorf("of the new file are locked: %s", got)
	}
	d.setActive(false)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.g.SetActive(ctx, true, d.n); !errors.Is(err, syscall.ENOENT) || d.n.Active() {
			t.Errorf("without the file: active %t, %v", d.n.Active(), err)
		}
		if _, err := d.r.PeekSize(ctx); !errors.Is(err, syscall.ENOENT) {
			t.Errorf("size without the file: %v", err)
		}
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := d.g.SetActive(ctx, true, d.n); err == nil || !strings.Contains(err.Error(), "to be a regular file") {
		t.Errorf("a directory in place of the file: %v", err)
	}
}

func TestG22FailedFlushKeepsTheNodeActiveAndLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	newFile(t, path, nil, 1<<20)
	g := newGraph(t)
	n, err := g.Open(ctx, config(path))
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "export", Node: n, Perm: rw, Shared: cr, AllowInactive: func() error { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	locked := lockedBytes(t, path)
	_ = n.Instance().(*node).flush.latch(path, syscall.EIO)
	for range 2 {
		err := g.SetActive(ctx, false, n)
		var flush *FlushError
		if !errors.As(err, &flush) || !strings.Contains(err.Error(), "Failed to inactivate node") || !n.Active() {
			t.Errorf("active %t, %v", n.Active(), err)
		}
		if got := lockedBytes(t, path); got != locked {
			t.Errorf("locked: %s, before: %s", got, locked)
		}
	}
	if err := errors.Join(r.Detach(ctx), g.Release(ctx, n)); !errors.Is(err, syscall.EIO) {
		t.Errorf("close: %v", err)
	}
}

func TestG22OpenedInactiveHoldsNothing(t *testing.T) {
	eachKind(t, 1<<20, func(t *testing.T, path, _ string) {
		other := newDisk(t, config(path), rw, cr)
		before := openDescriptors(t, path)
		cfg := config(path)
		cfg.Inactive = true
		d := newDisk(t, cfg, rw, cr)
		if got := openDescriptors(t, path); got != before || d.r.Size() != 1<<20 {
			t.Errorf("%d descriptors, before %d; %d bytes", got, before, d.r.Size())
		}
		err := d.r.Do(ctx, func(ctx context.Context) error { return d.r.ReadAt(ctx, make([]byte, 512), 0) })
		if !errors.Is(err, block.ErrInactive) {
			t.Errorf("read: %v", err)
		}
		other.setActive(false)
		d.setActive(true)
		d.read(0, 512)
		d.setActive(false)
	})
	g := newGraph(t)
	cfg := config(filepath.Join(t.TempDir(), "missing"))
	cfg.Inactive = true
	if _, err := g.Open(ctx, cfg); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("a missing file opened inactive: %v", err)
	}
}

// An inactive file is read for the header of a format that is opened over it.
func TestG22InactiveFileCanBeLookedAt(t *testing.T) {
	eachKind(t, 1<<20, func(t *testing.T, path, _ string) {
		cfg := config(path)
		cfg.Inactive = true
		d := newDisk(t, cfg, cr, shared)
		n := d.n.Instance().(*node)
		p := make([]byte, 8192)
		if err := n.ReadAt(ctx, p, 0); err != nil || !bytes.Equal(p, append(filled(1, 4096), make([]byte, 4096)...)) {
			t.Errorf("read: %v", err)
		}
		if got := openDescriptors(t, path); got != 0 {
			t.Errorf("%d descriptors are left", got)
		}
	})
}

func TestP10GrownFileIsNoticedOnRequest(t *testing.T) {
	eachKind(t, 1<<20, func(t *testing.T, path, file string) {
		d := newDisk(t, config(path), rw, cr)
		for i, size := range []int64{2 << 20, 2 << 20, 1 << 19} {
			if err := os.Truncate(file, size); err != nil {
				t.Fatal(err)
			}
			if path != file {
				command(t, "losetup", "--set-capacity", path)
			}
			got, err := d.g.RefreshSize(ctx, d.n)
			if err != nil || got != size || d.r.Size() != size {
				t.Errorf("size %d, root %d, want %d (%v)", got, d.r.Size(), size, err)
			}
			if told := d.resized.Load(); told != []int32{1, 1, 2}[i] {
				t.Errorf("told %d times", told)
			}
		}
		err := d.r.Do(ctx, func(ctx context.Context) error { return d.r.ReadAt(ctx, make([]byte, 512), 1<<20) })
		if !errors.Is(err, block.ErrRange) {
			t.Errorf("read of what is gone: %v", err)
		}
		d.setActive(false)
		if _, err := d.g.RefreshSize(ctx, d.n); !errors.Is(err, block.ErrInactive) {
			t.Errorf("refresh of an inactive node: %v", err)
		}
	})
}

// reopen gives d's node other options.
func (d *disk) reopen(change func(c *block.Config)) error {
	c := *d.n.ExplicitConfig()
	change(&c)
	return d.g.Reopen(ctx, block.ReopenRequest{Node: d.n, Config: &c})
}

// state describes what a reopen may change.
func (d *disk) state(path string) string {
	n := d.n.Instance().(*node)
	flags, err := unix.FcntlInt(uintptr(n.fd), unix.F_GETFL, 0)
	write := d.r.Do(ctx, func(ctx context.Context) error { return d.r.WriteAt(ctx, filled(1, 512), 0, 0) })
	return fmt.Sprintf("config %p flags %#x (%v) fd %d tail %d locks %s limits %+v descriptors %d write %v", d.n.Config(), flags, err, n.fd, n.tail, lockedBytes(d.t, path), n.limits, openDescriptors(d.t, path), write)
}

func TestG21FileChangesItsDescriptors(t *testing.T) {
	eachKind(t, 1<<20, func(t *testing.T, path, _ string) {
		d := newDisk(t, config(path), cr, cr)
		n := d.n.Instance().(*node)
		locked := lockedBytes(t, path)
		open := openDescriptors(t, path)
		for i, c := range []struct {
			readOnly, direct, noFlush bool
		}{{true, false, false}, {false, false, false}, {true, true, false}, {false, true, true}, {false, false, true}, {false, false, false}} {
			err := d.reopen(func(cfg *block.Config) {
				cfg.ReadOnly, cfg.Cache = c.readOnly, block.CacheMode{Direct: c.direct, NoFlush: c.noFlush}
			})
			if err != nil {
				t.Fatal(err)
			}
			flags, err := unix.FcntlInt(uintptr(n.fd), unix.F_GETFL, 0)
			if err != nil || flags&unix.O_ACCMODE == unix.O_RDWR == c.readOnly || flags&unix.O_DIRECT != 0 != c.direct {
				t.Errorf("%d: flags %#x (%v)", i, flags, err)
			}
			if n.noFlush != c.noFlush || d.n.Limits().RequestAlignment > 1 != c.direct {
				t.Errorf("%d: no-flush %t, alignment %d", i, n.noFlush, d.n.Limits().RequestAlignment)
			}
			if got := lockedBytes(t, path); got != locked {
				t.Errorf("%d: locked %s, before %s", i, got, locked)
			}
			if got := openDescriptors(t, path); got > open+2 { // a lock of its own, a tail
				t.Errorf("%d: %d descriptors, %d at first", i, got, open)
			}
			if got := d.read(1, 511); !bytes.Equal(got, filled(1, 511)) {
				t.Errorf("%d: read %x", i, got[:4])
			}
		}
		other := config(path)
		other.Inactive = true
		o := newDisk(t, other, rw, cr)
		wantLockError(t, o.g.SetActive(ctx, true, o.n), `"write" lock`, os.Getpid(), "hostdev.test")
	})
}

// A reopen of an inactive node counts from its activation on.
func TestG21ReopenOfAnInactiveFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	newFile(t, path, filled(1, 4096), 1<<20)
	d := newDisk(t, config(path), cr, cr)
	d.setActive(false)
	if err := d.reopen(func(c *block.Config) { c.ReadOnly, c.Cache.Direct = true, true }); err != nil {
		t.Fatal(err)
	}
	if got := openDescriptors(t, path); got != 0 || d.n.Active() {
		t.Errorf("%d descriptors, active %t", got, d.n.Active())
	}
	d.setActive(true)
	flags, err := unix.FcntlInt(uintptr(d.n.Instance().(*node).fd), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_DIRECT == 0 {
		t.Errorf("flags %#x (%v)", flags, err)
	}
	if got := d.read(1, 511); !bytes.Equal(got, filled(1, 511)) {
		t.Errorf("read %x", got[:4])
	}
}

func TestG21FileThatIsReplacedMeanwhileStaysTheSame(t *testing.T) {
	dir := t.TempDir()
	path, next := filepath.Join(dir, "disk"), filepath.Join(dir, "next")
	newFile(t, path, filled(1, 4096), 1<<20)
	d := newDisk(t, config(path), cr, cr)
	newFile(t, next, filled(9, 4096), 3<<20)
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
	if err := d.reopen(func(c *block.Config) { c.ReadOnly = true }); err != nil {
		t.Fatal(err)
	}
	if got := d.read(0, 512); !bytes.Equal(got, filled(1, 512)) {
		t.Errorf("read %x", got[:4])
	}
}

func TestG21FailureLeavesDescriptorsAndLocks(t *testing.T) {
	eachKind(t, 1<<20, func(t *testing.T, path, _ string) {
		g := newGraph(t)
		faults := new(blocktest.Faults)
		top, err := g.Open(ctx, blocktest.FaultConfig(faults, config(path)))
		if err != nil {
			t.Fatal(err)
		}
		r, err := g.AttachRoot(ctx, block.RootConfig{User: "export", Node: top, Perm: rw, Shared: cr})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := errors.Join(r.Detach(ctx), g.Release(ctx, top)); err != nil {
				t.Error(err)
			}
		}()
		d := &disk{t: t, g: g, n: top.Child("file").Node(), r: r}
		before := d.state(path)
		for _, op := range []blocktest.Op{blocktest.OpFlush, blocktest.OpReopen, blocktest.OpApply} {
			faults.Add(blocktest.Fault{Op: op, Err: syscall.EIO})
			c := *top.ExplicitConfig()
			c.ReadOnly, c.Cache.Direct = true, true
			if err := g.Reopen(ctx, block.ReopenRequest{Node: top, Config: &c, Force: true}); !errors.Is(err, syscall.EIO) {
				t.Errorf("%s: %v", op, err)
			}
			faults.Clear()
			if after := d.state(path); after != before {
				t.Errorf("%s: after  %s\nbefore %s", op, after, before)
			}
		}
	})
}

func TestG21ReadOnlyDeviceStaysReadOnly(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	newFile(t, file, filled(1, 4096), 1<<20)
	dev := loopDevice(t, file, 512)
	command(t, "blockdev", "--setro", dev)
	cfg := config(dev)
	cfg.ReadOnly = true
	d := newDisk(t, cfg, cr, cr)
	before := d.state(dev)
	err := d.reopen(func(c *block.Config) { c.ReadOnly = false })
	if !errors.Is(err, syscall.EROFS) && !errors.Is(err, syscall.EACCES) {
		t.Errorf("read-write: %v", err)
	}
	if after := d.state(dev); after != before {
		t.Errorf("after  %s\nbefore %s", after, before)
	}
	if err := d.reopen(func(c *block.Config) { c.ReadOnly, c.AutoReadOnly = false, true }); err != nil || !d.n.ReadOnly() {
		t.Errorf("auto-read-only: read-only %t, %v", d.n.ReadOnly(), err)
	}
	command(t, "blockdev", "--setrw", dev)
	if err := d.reopen(func(c *block.Config) { c.ReadOnly, c.AutoReadOnly = false, true }); err != nil || d.n.ReadOnly() {
		t.Errorf("read-write: read-only %t, %v", d.n.ReadOnly(), err)
	}
}

func TestG21OptionsOfAFileThatCannotChange(t *testing.T) {
	dir := t.TempDir()
	path, other := filepath.Join(dir, "disk"), filepath.Join(dir, "other")
	newFile(t, path, nil, 1<<20)
	newFile(t, other, nil, 1<<20)
	cfg := config(path)
	cfg.Options = &Options{Filename: path, Locking: LockingOn}
	d := newDisk(t, cfg, cr, shared)
	for _, c := range []struct {
		options *Options
		text    string
	}{
		{&Options{Filename: other, Locking: LockingOn}, "Cannot change the option 'filename'"},
		{&Options{Filename: path, Locking: LockingOff}, "Cannot change the option 'locking'"},
		{&Options{Filename: path}, "Option 'locking' cannot be reset to its default value"},
		{nil, "Option 'filename' cannot be reset to its default value"},
	} {
		err := d.reopen(func(cfg *block.Config) {
			cfg.Options = nil
			if c.options != nil {
				cfg.Options = c.options
			}
		})
		if err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("got %v, want %s", err, c.text)
		}
	}
}
