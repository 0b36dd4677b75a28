package integration

import (
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

const memoryLimit = 64 * kib // KiB

// hugeImage is a qcow2 image of 1 TiB with all its tables, in a sparse file.
func hugeImage(t testing.TB) string {
	t.Helper()
	dir := tempDir(t)
	if f, err := os.Create(filepath.Join(dir, "try")); err != nil {
		t.Fatal(err)
	} else if err := f.Truncate(2 << 40); err != nil { // a file system that cannot hold it: one that can
		dir = xfs(t)
		f.Close()
	} else {
		f.Close()
	}
	disk := filepath.Join(dir, "disk")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", disk, "1T")
	return disk
}

func xfs(t testing.TB) string {
	t.Helper()
	file := filepath.Join(tempDir(t), "xfs")
	writeFile(t, file, nil)
	if err := os.Truncate(file, 4*gib); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.xfs", "-q", file)
	dir, _ := loopMount(t, file, "")
	return dir
}

// The figures are the largest that the process ever had, so load of others does not matter.
func TestMemoryWithRandomReadsOverATebibyte(t *testing.T) {
	t.Parallel()
	s := startBinary(t, plainBinary, "--format", "qcow2", hugeImage(t))
	c := connect(t, s)
	r := rand.New(rand.NewPCG(1, 2))
	const depth = 16
	p := make([]byte, 4096)
	for range rounds(3000, 30000) {
		for range depth {
			if err := c.request(cmdRead, 0, r.Int64N(c.size/4096)*4096, 4096, nil); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.w.Flush(); err != nil {
			t.Fatal(err)
		}
		for range depth {
			if _, code, err := c.reply(); err != nil || code != 0 {
				t.Fatal(code, err)
			}
			if _, err := io.ReadFull(c.r, p); err != nil {
				t.Fatal(err)
			}
		}
	}
	peak := s.status("VmHWM")
	t.Logf("peak memory %d KiB", peak)
	if peak > memoryLimit {
		t.Errorf("peak memory %d KiB, the limit is %d", peak, memoryLimit)
	}
}

func TestMemoryWithLargeSequentialIO(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"raw", "qcow2"} {
		dir := tempDir(t)
		disk := filepath.Join(dir, "disk")
		run(t, "qemu-img", "create", "-q", "-f", format, disk, "512M")
		s := startBinary(t, plainBinary, "--format", format, disk)
		for _, rw := range []string{"write", "read"} {
			r := finish(t, command(t, "fio", "--ioengine=nbd", "--name=m", "--uri="+s.uri(), "--rw="+rw, "--bs=1m", "--size=512m", "--iodepth=16"))
			if r.code != 0 {
				t.Fatal(r)
			}
		}
		peak := s.status("VmHWM")
		t.Logf("%s: peak memory %d KiB", format, peak)
		if peak > memoryLimit {
			t.Errorf("%s: peak memory %d KiB, the limit is %d", format, peak, memoryLimit)
		}
	}
}
