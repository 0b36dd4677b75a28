package hostdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

func TestG7DeviceIsKnownByLooking(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "disk")
	newFile(t, file, nil, 1<<20)
	link := filepath.Join(dir, "link")
	dev := loopDevice(t, file, 512)
	if err := os.Symlink(dev, link); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{
		file: 0, dev: 100, link: 100, "/dev/null": 100, dir: 0, filepath.Join(dir, "missing"): 0,
	} {
		if got := isDevice(path); got != want {
			t.Errorf("%s scores %d, want %d", path, got, want)
		}
	}
}

func TestOpenRefusals(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "disk")
	newFile(t, file, nil, 1<<20)
	dev := loopDevice(t, file, 512)
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	g := newGraph(t)
	for _, c := range []struct {
		driver, path, text string
	}{
		{"file", dev, "'file' driver requires '" + dev + "' to be a regular file"},
		{"file", dir, "'file' driver requires '" + dir + "' to be a regular file"},
		{"file", fifo, "'file' driver requires '" + fifo + "' to be a regular file"},
		{"host_device", file, "'host_device' driver requires '" + file + "' to be either a character or block device"},
		{"file", filepath.Join(dir, "missing"), "Could not open '" + filepath.Join(dir, "missing") + "': no such file or directory"},
		{"file", "", "The 'file' block driver requires a file name"},
		{"file", file + "\x00x", "Could not open"},
	} {
		n, err := g.Open(ctx, &block.Config{Driver: c.driver, Options: &Options{Filename: c.path}})
		if err == nil {
			err = errors.Join(errors.New("it was opened"), g.Release(ctx, n))
		}
		if !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s %q: %v, want %s", c.driver, c.path, err, c.text)
		}
	}
	if _, err := g.Open(ctx, &block.Config{Driver: "file", Options: 5}); err == nil || !strings.Contains(err.Error(), "int") {
		t.Errorf("options of another type: %v", err)
	}
}

func TestReadOnlyDeviceIsRefusedForWriting(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	newFile(t, file, nil, 1<<20)
	dev := command(t, "losetup", "--read-only", "--find", "--show", file)
	t.Cleanup(func() { command(t, "losetup", "-d", dev) })
	_, err := hold(t, config(dev), rw, shared)
	if !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), dev) {
		t.Errorf("got %v, want EROFS and the name of the device", err)
	}
	ro := config(dev)
	ro.ReadOnly = true
	mustHold(t, ro, cr, shared)
}

func TestOpenLeavesNoDescriptors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	newFile(t, file, nil, 1<<20)
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	release := mustHold(t, config(file), rw, shared) // whatever the runtime opens, it has by now
	release()
	before := count()
	for _, cache := range []block.CacheMode{buffered, direct} {
		cfg := config(file)
		cfg.Cache = cache
		mustHold(t, cfg, rw, shared)()
	}
	bad := config(file)
	bad.Driver = "host_device"
	if _, err := hold(t, bad, rw, shared); err == nil {
		t.Error("a file was opened as a device")
	}
	if after := count(); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestLimitsComeFromTheDevice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	newFile(t, file, nil, 1<<20)
	for _, sector := range []int64{512, 4096} {
		dev := loopDevice(t, file, int(sector))
		rotational := command(t, "cat", "/sys/class/block/"+filepath.Base(dev)+"/queue/rotational") == "1"
		for _, cache := range []block.CacheMode{buffered, direct} {
			cfg := config(dev)
			cfg.Cache = cache
			n, _ := opened(t, cfg)
			l := n.Limits()
			if l.LogicalBlockSize != sector || l.PhysicalBlockSize < sector || l.Rotational != rotational {
				t.Errorf("sector %d: limits are %+v", sector, l)
			}
			want := int64(1)
			if cache.Direct {
				want = sector
			}
			if l.RequestAlignment != want {
				t.Errorf("sector %d, %+v: request alignment is %d, want %d", sector, cache, l.RequestAlignment, want)
			}
			if l.PreferredTransfer < 4096 || n.Size() != 1<<20 {
				t.Errorf("preferred transfer is %d, size %d", l.PreferredTransfer, n.Size())
			}
		}
	}
	// Where the kernel does not tell, trial must not find less than it would have told.
	cfg := config(file)
	cfg.Cache = direct
	n, _ := opened(t, cfg)
	if a, ok := tryDirect(n.fd); !ok || a < n.Limits().RequestAlignment {
		t.Errorf("trial finds alignment %d, %t; the kernel says %d", a, ok, n.Limits().RequestAlignment)
	}
}

func TestSizesAreExact(t *testing.T) {
	for _, size := range []int64{0, 1, 511, 1000, 1<<40 + 1} {
		path := filepath.Join(t.TempDir(), "disk")
		newFile(t, path, nil, size)
		n, r := opened(t, config(path))
		if n.Size() != size || r.Size() != size || r.Limits().RequestAlignment != 1 {
			t.Errorf("a file of %d bytes has %d, its root %d", size, n.Size(), r.Size())
		}
	}
}

func TestCreate(t *testing.T) {
	dir := t.TempDir()
	stat := func(path string) (size, blocks int64) {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Size, st.Blocks * 512
	}
	path := filepath.Join(dir, "disk")
	for _, c := range []struct {
		size          int64
		prealloc      Prealloc
		least, atMost int64 // bytes allocated
	}{
		{1 << 20, PreallocOff, 0, 8192},
		{3<<20 + 1, PreallocFalloc, 3 << 20, 4 << 20},
		{1<<20 + 1, PreallocFull, 1 << 20, 2 << 20},
		{0, PreallocFalloc, 0, 0},
		{0, PreallocFull, 0, 0},
	} {
		newFile(t, path, filled(1, 2<<20), 2<<20) // is emptied
		if _, err := makeFile(path, c.size, c.prealloc); err != nil {
			t.Fatal(err)
		}
		size, blocks := stat(path)
		if size != c.size || blocks < c.least || blocks > c.atMost {
			t.Errorf("%+v: %d bytes, %d allocated", c, size, blocks)
		}
		if got, err := os.ReadFile(path); err != nil || !block.IsZero(got) {
			t.Errorf("%+v: the new file is not zero (%v)", c, err)
		}
	}
}

func TestCreateDoesNotTouchImagesInUse(t *testing.T) {
	path := qemuImage(t, "qcow2")
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	unchanged := func(who string) {
		t.Helper()
		_, err := makeFile(path, 1<<20, PreallocOff)
		var held *LockError
		if !errors.As(err, &held) {
			t.Errorf("image in use by %s: %v, want a LockError", who, err)
		}
		if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
			t.Errorf("image in use by %s was changed (%v)", who, err)
		}
	}
	ro := config(path)
	ro.ReadOnly = true
	release := mustHold(t, ro, cr, shared)
	unchanged("a reader of ours")
	release()
	qemuIO(t, "-r", path)
	unchanged("qemu-io")
}

func TestCreateThatFailsLeavesNoFile(t *testing.T) {
	dir := t.TempDir()
	command(t, "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", dir)
	t.Cleanup(func() { command(t, "umount", "--lazy", dir) })
	path := filepath.Join(dir, "disk")
	for _, p := range []Prealloc{PreallocFalloc, PreallocFull} {
		if _, err := makeFile(path, 1<<20, p); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("preallocation %s: %v, want ENOSPC", p, err)
		}
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("preallocation %s: the file is still there (%v)", p, err)
		}
	}
	if _, err := makeFile(filepath.Join(dir, "no", "disk"), 1, 0); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("missing directory: %v, want ENOENT", err)
	}
	if _, err := makeFile(path, -1, 0); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("negative size: %v, want ErrInvalid", err)
	}
	if _, err := makeFile(dir, 1, 0); err == nil {
		t.Error("a directory was made an image")
	}
}

func TestCreateOnDevice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	newFile(t, file, filled(1, 1<<20), 1<<20)
	dev := loopDevice(t, file, 512)
	if _, err := makeFile(dev, 1<<20, PreallocOff); err != nil {
		t.Error(err)
	}
	if _, err := makeFile(dev, 1<<20+1, PreallocOff); !errors.Is(err, block.ErrNoSpace) {
		t.Errorf("got %v, want ErrNoSpace", err)
	}
}

// The image that qemu-io writes is the one that we read, holes and all.
func TestQEMUAgreesOnTheMap(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	newFile(t, path, nil, 8<<20)
	_, r := opened(t, config(path))
	for _, off := range []int64{0, 1 << 20, 5<<20 + 4096} {
		do(t, r, func(ctx context.Context) error { return r.WriteAt(ctx, filled(9, 8192), off, 0) })
	}
	var ours strings.Builder
	for off := int64(0); off < 8<<20; {
		do(t, r, func(ctx context.Context) error {
			x, err := r.BlockStatus(ctx, off, 8<<20-off, true)
			if x.Flags&block.StatusData != 0 {
				fmt.Fprintf(&ours, "%s %s\n", hex(off), hex(x.Length))
			}
			off += x.Length
			return err
		})
	}
	out, err := exec.Command("qemu-img", "map", "-f", "raw", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	var theirs strings.Builder
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); f[0] != "Offset" {
			theirs.WriteString(f[0] + " " + f[1] + "\n")
		}
	}
	if ours.String() != theirs.String() {
		t.Errorf("our data extents:\n%sqemu-img's:\n%s", &ours, &theirs)
	}
}

func hex(v int64) string {
	if v == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", v)
}
