package hostdev

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

const (
	cr     = block.PermConsistentRead
	rw     = block.PermConsistentRead | block.PermWrite
	shared = block.PermAll
)

// hold opens node and root with the permissions given. Its end is the test's, or that of the function returned.
func hold(t testing.TB, cfg *block.Config, perm, share block.Perm) (release func(), err error) {
	t.Helper()
	g := newGraph(t)
	n, err := g.Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: perm, Shared: share})
	if err != nil {
		return nil, errors.Join(err, g.Release(ctx, n))
	}
	release = sync.OnceFunc(func() {
		if err := errors.Join(r.Detach(ctx), g.Release(ctx, n)); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(release)
	return release, nil
}

func mustHold(t testing.TB, cfg *block.Config, perm, share block.Perm) (release func()) {
	t.Helper()
	release, err := hold(t, cfg, perm, share)
	if err != nil {
		t.Fatal(err)
	}
	return release
}

// qemuIO starts a qemu-io that has the image open until the test ends, and returns its process id.
func qemuIO(t testing.TB, args ...string) int {
	t.Helper()
	cmd := exec.Command("qemu-io", args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := errors.Join(in.Close(), cmd.Wait())
		if err != nil {
			t.Error(err)
		}
	})
	// It answers once the image is open.
	if _, err := io.WriteString(in, "length\n"); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('B')
	if err != nil {
		t.Fatalf("qemu-io %s: %v, after %q", strings.Join(args, " "), err, line)
	}
	return cmd.Process.Pid
}

func qemuImage(t testing.TB, format string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk."+format)
	command(t, "qemu-img", "create", "-q", "-f", format, path, "1M")
	if err := os.Truncate(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	return path
}

func wantLockError(t testing.TB, err error, lock string, pid int, program string) {
	t.Helper()
	var held *LockError
	if !errors.As(err, &held) || !errors.Is(err, block.ErrBusy) {
		t.Fatalf("got %v, want a LockError", err)
	}
	if held.Lock != lock {
		t.Errorf("lock is %s, want %s", held.Lock, lock)
	}
	if len(held.Holders) != 1 || held.Holders[0] != (Holder{pid, program}) {
		t.Errorf("holders are %v, want process %d (%s)", held.Holders, pid, program)
	}
	for _, part := range []string{"Failed to get " + lock, "Is another process using the image [" + held.Filename + "]?"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not contain %q", err, part)
		}
	}
}

func TestQEMUExcludesUs(t *testing.T) {
	path := qemuImage(t, "qcow2")
	pid := qemuIO(t, path) // holds write and does not share it
	for _, driver := range []func(*block.Config){
		func(*block.Config) {},
		func(c *block.Config) { c.Cache.Direct = true },
	} {
		cfg := config(path)
		driver(cfg)
		_, err := hold(t, cfg, rw, shared)
		wantLockError(t, err, `"write" lock`, pid, "qemu-io")
	}
	ro := config(path)
	ro.ReadOnly = true
	_, err := hold(t, ro, cr, cr)
	wantLockError(t, err, `shared "write" lock`, pid, "qemu-io")
	mustHold(t, ro, cr, shared)
}

func TestQEMUExcludesUsFromDevice(t *testing.T) {
	file := qemuImage(t, "qcow2")
	dev := loopDevice(t, file, 512)
	pid := qemuIO(t, "-f", "qcow2", dev)
	_, err := hold(t, config(dev), rw, shared)
	wantLockError(t, err, `"write" lock`, pid, "qemu-io")
}

func TestWeExcludeQEMU(t *testing.T) {
	path := qemuImage(t, "qcow2")
	dev := loopDevice(t, qemuImage(t, "qcow2"), 512)
	for _, path := range []string{path, dev} {
		release := mustHold(t, config(path), rw, cr)
		for _, c := range []struct {
			args []string
			text string
		}{
			{[]string{"qemu-io", "-f", "raw", "-c", "write 0 512", path}, `Failed to get "write" lock`},
			{[]string{"qemu-io", "-f", "qcow2", "-c", "write 0 512", path}, `Failed to get "write" lock`},
			{[]string{"qemu-img", "info", path}, `Failed to get shared "write" lock`},
			{[]string{"qemu-nbd", "-t", "-f", "raw", "-k", filepath.Join(t.TempDir(), "s"), path}, `Failed to get "write" lock`},
		} {
			out, err := exec.Command(c.args[0], c.args[1:]...).CombinedOutput()
			if err == nil || !strings.Contains(string(out), c.text) {
				t.Errorf("%v: %v, %s\nwant %s", c.args, err, out, c.text)
			}
		}
		command(t, "qemu-img", "info", "-U", path)
		release()
		command(t, "qemu-io", "-f", "qcow2", "-c", "write 0 512", path)
	}
}

func TestSharedWritersLiveTogether(t *testing.T) {
	path := qemuImage(t, "raw")
	qemuIO(t, "-f", "raw", path) // shares everything
	mustHold(t, config(path), rw, shared)
	mustHold(t, config(path), rw, shared)
	_, err := hold(t, config(path), rw, cr)
	var held *LockError
	if !errors.As(err, &held) || held.Lock != `shared "write" lock` || len(held.Holders) != 2 {
		t.Errorf("got %v, want that two others write", err)
	}
}

func TestTwoNodesOfOneProcessExcludeEachOther(t *testing.T) {
	path := qemuImage(t, "raw")
	release := mustHold(t, config(path), rw, cr)
	_, err := hold(t, config(path), rw, shared)
	if err == nil || !strings.Contains(err.Error(), "this process") {
		t.Errorf("got %v, want an error that names this process", err)
	}
	release()
	mustHold(t, config(path), rw, cr)
}

func TestForceShareAndNoIOHoldNothing(t *testing.T) {
	path := qemuImage(t, "qcow2")
	qemuIO(t, path)
	force := config(path)
	force.ReadOnly, force.ForceShare = true, true
	mustHold(t, force, cr, cr)
	look := config(path)
	look.ReadOnly, look.NoIO = true, true
	mustHold(t, look, 0, 0)
	off := config(path)
	off.Options.(*Options).Locking = LockingOff
	mustHold(t, off, rw, cr)
	if got := lockedBytes(t, path); got != "" {
		t.Errorf("bytes %s are locked", got)
	}
}

// lockedBytes lists the bytes 100 to 209 of a file that this process has locked.
func lockedBytes(t testing.TB, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	var found []string
	for at := int64(permBase); at < unshareBase+10; at++ {
		if hasLock("/proc/self/fdinfo", &st, at, func(int) bool { return false }) {
			found = append(found, strconv.FormatInt(at, 10))
		}
	}
	return strings.Join(found, " ")
}

func TestLocksFollowTheTransaction(t *testing.T) {
	path := qemuImage(t, "raw")
	n, _ := opened(t, config(path))
	others := config(path)
	others.ReadOnly = true

	// The root of opened has read, write and resize, and shares all.
	want := func(what, bytes string) {
		t.Helper()
		if got := lockedBytes(t, path); got != bytes {
			t.Errorf("%s: bytes %q are locked, want %q", what, got, bytes)
		}
	}
	want("open", "100 101 103")
	if err := n.CheckPerm(cr, cr); err != nil {
		t.Fatal(err)
	}
	want("check", "100 101 103 201 202 203")
	n.AbortPerm()
	want("abort", "100 101 103")
	if err := n.CheckPerm(cr, cr); err != nil {
		t.Fatal(err)
	}
	n.SetPerm(cr, cr)
	want("set", "100 201 202 203")

	release := mustHold(t, others, cr, shared)
	if err := n.CheckPerm(rw, 0); err == nil {
		t.Fatal("a reader of ours was ignored")
	}
	want("refused", "100 201 202 203")
	release()
	if err := n.CheckPerm(rw, 0); err != nil {
		t.Fatal(err)
	}
	n.SetPerm(rw, 0)
	want("granted", "100 101 200 201 202 203")
	if err := n.CheckPerm(0, shared); err != nil {
		t.Fatal(err)
	}
	n.SetPerm(0, shared)
	want("released", "")
}

func TestSecondDescriptorOfDirectFileHasNoLocks(t *testing.T) {
	path := qemuImage(t, "raw")
	cfg := config(path)
	cfg.Cache.Direct = true
	n, _ := opened(t, cfg)
	if err := n.CheckPerm(rw, 0); err != nil {
		t.Fatal(err)
	}
	n.SetPerm(rw, 0)
	if err := unix.Close(n.tail); err != nil { // must drop nothing
		t.Fatal(err)
	}
	n.tail = -1
	if got := lockedBytes(t, path); got != "100 101 200 201 202 203" {
		t.Errorf("bytes %s are locked", got)
	}
}

// Each of many that start together wants the file for itself: all but one are
// refused, one is not.
func TestOfManyStartersOneWins(t *testing.T) {
	path := qemuImage(t, "raw")
	g := newGraph(t)
	const starters = 4
	for range 5 {
		var wg sync.WaitGroup
		var won [starters]bool
		var nodes [starters]*block.Node
		for i := range starters {
			var err error
			if nodes[i], err = g.Open(ctx, config(path)); err != nil {
				t.Fatal(err)
			}
		}
		for i := range starters {
			wg.Go(func() {
				inst := nodes[i].Instance().(*node)
				if err := inst.CheckPerm(rw, cr); err == nil {
					inst.SetPerm(rw, cr)
					won[i] = true
				} else if !errors.Is(err, block.ErrBusy) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		winners := 0
		for i := range starters {
			if won[i] {
				winners++
			}
			if err := g.Release(ctx, nodes[i]); err != nil {
				t.Error(err)
			}
		}
		if winners != 1 {
			t.Fatalf("%d of %d starters got the file, want 1", winners, starters)
		}
	}
}

func TestConflictWithWholeFileLockOfOthers(t *testing.T) {
	path := qemuImage(t, "raw")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lk := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk); err != nil {
		t.Fatal(err)
	}
	_, err = hold(t, config(path), rw, shared)
	var held *LockError
	if !errors.As(err, &held) || len(held.Holders) != 1 || held.Holders[0].PID != os.Getpid() {
		t.Errorf("got %v, want a LockError that names this process", err)
	}
}

func TestFileSystemWithoutLocks(t *testing.T) {
	for mode, text := range map[Locking]string{LockingAuto: "", LockingOn: "locking=on"} {
		l := &locks{fd: -1, filename: "disk.img", mode: mode, log: newGraph(t).Log()}
		err := l.check(lockBits{perm: rw})
		if text == "" && (err != nil || l.mode != LockingOff) {
			t.Errorf("locking=%v: %v, want that it goes on without", mode, err)
		}
		if text != "" && (err == nil || !strings.Contains(err.Error(), text) || !errors.Is(err, syscall.EBADF)) {
			t.Errorf("locking=%v: %v, want the cause and %q", mode, err, text)
		}
	}
}

func TestParseLock(t *testing.T) {
	for line, want := range map[string]lockLine{
		"lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:9978000 100 100\n":          {9978000, 100, 100},
		"lock:\t1: POSIX  ADVISORY  WRITE 18278 08:01:12 0 EOF":               {12, 0, unbounded},
		"lock:\t22: OFDLCK ADVISORY  WRITE -1 00:1c:18446744073709551615 0 9": {1<<64 - 1, 0, 9},
	} {
		if got, ok := parseLock(line); !ok || got != want {
			t.Errorf("%q is %+v, %t", line, got, ok)
		}
	}
	for _, line := range []string{
		"", "lock:", "flags:\t0100000", "lock:\t1: FLOCK  ADVISORY  WRITE 3 fe:00:1 0 EOF",
		"lock:\t1: OFDLCK ADVISORY  READ -1 fe:00 1 2", "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:1 2 1",
		"lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:1 -2 1", "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:x 1 1",
	} {
		if got, ok := parseLock(line); ok {
			t.Errorf("%q is %+v, want nothing", line, got)
		}
	}
}

func FuzzParseLock(f *testing.F) {
	f.Add("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:9978000 100 100\n")
	f.Add("lock:\t1: POSIX  ADVISORY  WRITE 18278 08:01:12 0 EOF")
	f.Fuzz(func(t *testing.T, line string) {
		if l, ok := parseLock(line); ok && (l.first < 0 || l.last < l.first) {
			t.Errorf("%q is %+v", line, l)
		}
	})
}
