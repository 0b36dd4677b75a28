package integration

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// loopMount mounts the file system in a file. It is unmounted by the function that is returned, or at the end of the test.
func loopMount(t testing.TB, file string, options string) (dir string, unmount func()) {
	t.Helper()
	dir = tempDir(t)
	run(t, "mount", "-o", "loop"+options, file, dir)
	mounted := true
	unmount = func() {
		t.Helper()
		if mounted {
			mounted = false
			run(t, "umount", dir)
		}
	}
	t.Cleanup(unmount)
	return dir, unmount
}

// loopDevice makes a block device of a file.
func loopDevice(t testing.TB, file string, sector string) string {
	t.Helper()
	device := strings.TrimSpace(run(t, "losetup", "--find", "--show", "--sector-size", sector, file))
	t.Cleanup(func() { run(t, "losetup", "-d", device) })
	return device
}

// fuseFile shows an export as a file.
func fuseFile(t testing.TB, uri string) (file string, unmount func()) {
	t.Helper()
	dir := tempDir(t)
	file = filepath.Join(dir, "nbd")
	writeFile(t, file, nil)
	pidfile := filepath.Join(tempDir(t), "pid")
	appears := watchFile(t, pidfile)
	said := newOutput()
	cmd := exec.Command("nbdfuse", "--pidfile", pidfile, file, uri)
	cmd.Stdout, cmd.Stderr = said, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case <-appears:
	case err := <-ended:
		t.Fatalf("nbdfuse: %v\n%s", err, said)
	}
	mounted := true
	unmount = func() {
		t.Helper()
		if !mounted {
			return
		}
		mounted = false
		run(t, "fusermount3", "-u", file)
		if err := <-ended; err != nil {
			t.Errorf("nbdfuse: %v\n%s", err, said)
		}
	}
	t.Cleanup(unmount)
	return file, unmount
}

// watchFile tells when a file that is not there yet has been written and closed.
func watchFile(t testing.TB, path string) <-chan struct{} {
	t.Helper()
	fd, err := syscall.InotifyInit1(syscall.IN_CLOEXEC | syscall.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	if _, err := syscall.InotifyAddWatch(fd, filepath.Dir(path), syscall.IN_CLOSE_WRITE|syscall.IN_MOVED_TO|syscall.IN_CREATE); err != nil {
		t.Fatal(err)
	}
	there, ended := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { f.Close(); <-ended })
	go func() {
		defer close(ended)
		for p := make([]byte, 4096); ; {
			if st, err := os.Stat(path); err == nil && (st.Size() > 0 || st.Mode().Type() == os.ModeSocket) {
				close(there)
				return
			}
			if _, err := f.Read(p); err != nil {
				return
			}
		}
	}()
	return there
}

// A real tree in a real file system, on a mount over the server: it reads as it was
// made, is written, trimmed, checked; and trimming frees the space of the image.
func TestMountedFileSystem(t *testing.T) {
	t.Parallel()
	tree := filepath.Join(strings.TrimSpace(run(t, "go", "env", "GOROOT")), "src", "net")
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			dir := tempDir(t)
			fs, disk := filepath.Join(dir, "fs"), filepath.Join(dir, "disk")
			run(t, "mke2fs", "-q", "-t", "ext4", "-E", "discard", "-d", tree, fs, "128M")
			convert(t, fs, format, disk)
			if err := os.Remove(fs); err != nil {
				t.Fatal(err)
			}
			s := start(t, "--format", format, disk)
			file, unfuse := fuseFile(t, s.uri())
			mnt, unmount := loopMount(t, file, ",discard")
			run(t, "diff", "-r", "--no-dereference", "-x", "lost+found", tree, mnt)
			empty := allocated(t, disk)
			copied := filepath.Join(mnt, "copy")
			run(t, "cp", "-a", tree, copied)
			writeFile(t, filepath.Join(mnt, "big"), noise(1, 32*mib))
			run(t, "sync", "-f", mnt)
			full := allocated(t, disk)
			if full < empty+32*mib {
				t.Errorf("writing 32 MiB and a tree took %d bytes", full-empty)
			}
			run(t, "diff", "-r", "--no-dereference", tree, copied)
			if err := errors.Join(os.Remove(filepath.Join(mnt, "big")), os.RemoveAll(copied)); err != nil {
				t.Fatal(err)
			}
			run(t, "sync", "-f", mnt)
			run(t, "fstrim", mnt)
			run(t, "sync", "-f", mnt)
			run(t, "diff", "-r", "--no-dereference", "-x", "lost+found", tree, mnt)
			unmount()
			run(t, "e2fsck", "-fn", file)
			unfuse()
			s.stop() // frees what was held back for readers
			if trimmed := allocated(t, disk); trimmed > full-30*mib {
				t.Errorf("after the trim the image takes %d bytes, %d before it, %d when the tree was new", trimmed, full, empty)
			}
			if format == "qcow2" {
				clean(t, disk)
			}
			back := convertBack(t, format, disk)
			run(t, "e2fsck", "-fn", back)
		})
	}
}

func convertBack(t testing.TB, format, disk string) string {
	t.Helper()
	back := filepath.Join(tempDir(t), "back")
	run(t, "qemu-img", "convert", "-f", format, "-O", "raw", disk, back)
	return back
}

func TestTrimFreesSpace(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"raw", "qcow2"} {
		for mode, freed := range map[string]bool{"unmap": true, "ignore": false} {
			disk := filepath.Join(tempDir(t), "disk")
			run(t, "qemu-img", "create", "-q", "-f", format, disk, "64M")
			s := start(t, "--format", format, "--discard", mode, disk)
			run(t, "qemu-io", "-f", "raw", "-c", "write -P 1 0 64M", "-c", "flush", s.uri())
			full := allocated(t, disk)
			run(t, "qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 8M 48M", "-c", "flush", s.uri())
			s.stop()
			if got := full-allocated(t, disk) >= 47*mib; got != freed {
				t.Errorf("%s, --discard %s: %d bytes before the trim, %d after", format, mode, full, allocated(t, disk))
			}
			if format == "qcow2" {
				clean(t, disk)
			}
		}
	}
}

func TestDetectZeroes(t *testing.T) {
	t.Parallel()
	for mode, sparse := range map[string]bool{"off": false, "unmap": true} {
		disk := filepath.Join(tempDir(t), "disk")
		run(t, "qemu-img", "create", "-q", "-f", "raw", disk, "32M")
		s := start(t, "--format", "raw", "--detect-zeroes", mode, disk)
		run(t, "qemu-io", "-f", "raw", "-c", "write -P 1 0 16M", "-c", "write -P 0 0 16M", "-c", "flush", s.uri())
		s.stop()
		if got := allocated(t, disk); (got < mib) != sparse {
			t.Errorf("--detect-zeroes %s: the file takes %d bytes", mode, got)
		}
	}
}
