package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// edits are changes that cross clusters of every size; they fit a disk of 16 MiB.
var edits = []string{"-c", "write -P 31 0 3", "-c", "write -P 32 100k 1000k", "-c", "write -z 2000001 300003", "-c", "write -z -u 4M 3M",
	"-c", "write -f -P 33 7654321 65537", "-c", "write -P 34 16777215 1", "-c", "flush"}

// edit makes the same changes through a server as on a raw image, and demands that
// the disk then is the raw image, over NBD and for qemu-img.
func edit(t testing.TB, format, disk, twin string, options ...string) {
	t.Helper()
	s := start(t, append([]string{"--format", format, disk}, options...)...)
	identical(t, "raw", twin, "raw", s.uri())
	run(t, "qemu-io", append(append([]string{"-f", "raw", "-d", "unmap"}, edits...), s.uri())...)
	run(t, "qemu-io", append(append([]string{"-f", "raw"}, edits...), twin)...)
	identical(t, "raw", twin, "raw", s.uri())
	s.stop()
	identical(t, "raw", twin, format, disk)
	if format == "qcow2" {
		clean(t, disk)
	}
}

func TestImagesMadeByQemu(t *testing.T) {
	t.Parallel()
	source := patchyFile(t, filepath.Join(tempDir(t), "source"), 21, 16*mib)
	for _, options := range []string{
		"compat=0.10", "compat=0.10,cluster_size=512", "compat=1.1,cluster_size=512", "cluster_size=4k", "cluster_size=64k", "cluster_size=2M",
		"compat=0.10,cluster_size=2M", "refcount_bits=1", "refcount_bits=2,cluster_size=4k", "refcount_bits=8", "refcount_bits=64",
		"refcount_bits=64,cluster_size=512", "lazy_refcounts=on", "preallocation=metadata", "preallocation=full,cluster_size=2M",
		"-c compression_type=zlib", "-c compression_type=zstd", "-c compat=0.10", "-c cluster_size=4k,compression_type=zstd", "-c cluster_size=2M,compression_type=zstd",
	} {
		t.Run(options, func(t *testing.T) {
			dir := tempDir(t)
			var args []string
			if plain, compressed := strings.CutPrefix(options, "-c "); compressed {
				args = []string{"-c", "-o", plain}
			} else {
				args = []string{"-o", options}
			}
			disk := convert(t, source, "qcow2", filepath.Join(dir, "disk"), args...)
			twin := filepath.Join(dir, "twin")
			run(t, "cp", "--sparse=always", source, twin)
			edit(t, "qcow2", disk, twin)
		})
	}
}

func TestInternalSnapshotsStayAsTheyAre(t *testing.T) {
	t.Parallel()
	for _, options := range []string{"cluster_size=64k", "cluster_size=4k,refcount_bits=8", "compat=0.10"} {
		t.Run(options, func(t *testing.T) {
			dir := tempDir(t)
			first := patchyFile(t, filepath.Join(dir, "first"), 22, 16*mib)
			disk := convert(t, first, "qcow2", filepath.Join(dir, "disk"), "-o", options)
			run(t, "qemu-img", "snapshot", "-c", "one", disk)
			second := filepath.Join(dir, "second")
			run(t, "cp", "--sparse=always", first, second)
			edit(t, "qcow2", disk, second)
			run(t, "qemu-img", "snapshot", "-c", "two", disk)
			third := patchyFile(t, filepath.Join(dir, "third"), 23, 16*mib)
			s := start(t, "--format", "qcow2", disk)
			run(t, "nbdcopy", "--connections=4", third, s.uri())
			s.stop()
			clean(t, disk)
			identical(t, "raw", third, "qcow2", disk)
			for name, want := range map[string]string{"one": first, "two": second} {
				got := filepath.Join(dir, "got")
				run(t, "qemu-img", "convert", "-f", "qcow2", "-l", "snapshot.name="+name, "-O", "raw", disk, got)
				identical(t, "raw", want, "raw", got)
			}
			run(t, "qemu-img", "snapshot", "-d", "one", disk)
			clean(t, disk)
		})
	}
}

func TestBackingFilesOfOtherSizes(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"raw", "qcow2"} {
		for _, baseSize := range []int64{0, 1000, 5*mib + 512, 16 * mib, 30 * mib} {
			if format == "qcow2" && baseSize == 1000 {
				baseSize = 1024 // qemu-img would round it
			}
			t.Run(fmt.Sprintf("%s of %d bytes", format, baseSize), func(t *testing.T) {
				dir := tempDir(t)
				raw := patchyFile(t, filepath.Join(dir, "raw"), 24, baseSize)
				base := convert(t, raw, format, filepath.Join(dir, "base"))
				before := checksum(t, base)
				middle, top := filepath.Join(dir, "middle"), filepath.Join(dir, "top")
				run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", base, "-F", format, middle, "10M")
				run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top, "16M")
				twin := filepath.Join(dir, "twin")
				run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, twin)
				edit(t, "qcow2", top, twin)
				if checksum(t, base) != before {
					t.Error("the base image has changed")
				}
			})
		}
	}
}

func TestRawSizesAreExact(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 511, 1000, 4097} {
		data := noise(1, size)
		disk := writeFile(t, filepath.Join(tempDir(t), "disk"), data)
		s := start(t, "--format", "raw", disk)
		if got := run(t, "nbdinfo", "--size", s.uri()); got != fmt.Sprintln(size) {
			t.Errorf("a file of %d bytes is served as %s", size, got)
		}
		c := connect(t, s)
		p := make([]byte, size)
		if err := c.readAt(p, 0); err != nil || !bytes.Equal(p, data) {
			t.Errorf("reading all %d bytes: %v", size, err)
		}
		if err := c.writeAt([]byte{77}, int64(size-1)); err != nil {
			t.Errorf("writing the last of %d bytes: %v", size, err)
		}
		if err := c.writeAt([]byte{77}, int64(size)); err != requestError(28) {
			t.Errorf("writing past %d bytes: %v, expected ENOSPC", size, err)
		}
		c.Close()
		s.stop()
		data[size-1] = 77
		if got, err := os.ReadFile(disk); err != nil || !bytes.Equal(got, data) {
			t.Errorf("the file of %d bytes is not as written: %v", size, err)
		}
	}
}

func TestProbedRawKeepsItsFormat(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	disk := patchyFile(t, filepath.Join(dir, "disk"), 1, mib)
	qcow2 := filepath.Join(dir, "qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", qcow2, "1M")
	header, err := os.ReadFile(qcow2)
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, disk)
	if !strings.Contains(s.stderr.await(t, "raw"), disk) {
		t.Errorf("no warning that the format was guessed: %s", s.stderr)
	}
	c := connect(t, s)
	if err := c.writeAt(header[:512], 0); err != requestError(errPermNBD) {
		t.Errorf("writing a qcow2 header to a disk that was taken for raw: %v, expected EPERM", err)
	}
	if err := c.writeAt(noise(9, 512), 0); err != nil {
		t.Errorf("writing something else there: %v", err)
	}
	// Where raw was asked for, anything goes; and qcow2 is recognised.
	s.stop()
	s = start(t, "--format", "raw", disk)
	if err := connect(t, s).writeAt(header[:512], 0); err != nil {
		t.Error(err)
	}
	s.stop()
	s = start(t, qcow2)
	if got := run(t, "nbdinfo", "--size", s.uri()); got != fmt.Sprintln(mib) {
		t.Errorf("a qcow2 image that was probed has size %s", got)
	}
}

func TestOffsetAndSize(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	data := noise(25, 4*mib)
	raw := writeFile(t, filepath.Join(dir, "raw"), data)
	for format, disk := range map[string]string{"raw": raw, "qcow2": convert(t, raw, "qcow2", filepath.Join(dir, "qcow2"))} {
		want := bytes.Clone(data)
		for _, window := range [][2]int{{mib, 2 * mib}, {1234567, 7654}, {4*mib - 1000, 1000}} {
			off, size := window[0], window[1]
			s := start(t, "--format", format, "--offset", fmt.Sprint(off), "--size", fmt.Sprint(size), disk)
			c := connect(t, s)
			if c.size != int64(size) {
				t.Errorf("%s: --offset %d --size %d serves %d bytes", format, off, size, c.size)
			}
			p := make([]byte, size)
			if err := c.readAt(p, 0); err != nil || !bytes.Equal(p, want[off:off+size]) {
				t.Errorf("%s: what is served at --offset %d is not what is there: %v", format, off, err)
			}
			fill(uint64(off), want[off:off+size])
			if err := c.writeAt(want[off:off+size], 0); err != nil {
				t.Error(err)
			}
			if err := c.readAt(p[:1], int64(size)); err != requestError(errInvalNBD) {
				t.Errorf("reading past --size: %v, expected EINVAL", err)
			}
			c.Close()
			s.stop()
		}
		back := convertBack(t, format, disk)
		if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: the disk is not as written: %v", format, err)
		}
	}
	s := start(t, "--format", "raw", "--offset", "3M", raw)
	if got := run(t, "nbdinfo", "--size", s.uri()); got != fmt.Sprintln(mib) {
		t.Errorf("--offset 3M of 4 MiB serves %s", got)
	}
	s.stop()
	refused(t, []string{"serve", "--format", "raw", "--offset", "5M", raw}, "5242880", "4194304")
	refused(t, []string{"serve", "--format", "raw", "--offset", "3M", "--size", "2M", raw}, "2097152")
}

// An ext4 of our own: the folder for temporary files may be on a file system without direct I/O.
func ext4(t testing.TB, size string) string {
	t.Helper()
	file := filepath.Join(tempDir(t), "ext4")
	run(t, "mke2fs", "-q", "-t", "ext4", file, size)
	dir, _ := loopMount(t, file, "")
	return dir
}

func TestCacheNone(t *testing.T) {
	t.Parallel()
	dir := ext4(t, "128M")
	source := patchyFile(t, filepath.Join(tempDir(t), "source"), 26, 16*mib)
	for _, format := range []string{"raw", "qcow2"} {
		for _, mode := range []string{"none", "directsync", "writethrough", "unsafe"} {
			disk := convert(t, source, format, filepath.Join(dir, "disk"))
			twin := filepath.Join(tempDir(t), "twin")
			run(t, "cp", "--sparse=always", source, twin)
			edit(t, format, disk, twin, "--cache", mode)
			if err := os.Remove(disk); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// With a minimum block size the end of an odd file is padded: the padding reads as zero and cannot be written.
func TestTailOfAFileWithDirectIO(t *testing.T) {
	t.Parallel()
	data := noise(27, mib+1000)
	disk := writeFile(t, filepath.Join(ext4(t, "32M"), "disk"), data)
	s := start(t, "--format", "raw", "--cache", "none", disk)
	e := decode[serverInfo](t, run(t, "nbdinfo", "--json", s.uri())).Exports[0]
	if e.MinBlock != 512 && e.MinBlock != 4096 {
		t.Fatalf("minimum block size %d with direct I/O", e.MinBlock)
	}
	if padded := (mib + 1000 + e.MinBlock - 1) / e.MinBlock * e.MinBlock; e.Size != padded {
		t.Errorf("a file of %d bytes is served as %d, expected %d", len(data), e.Size, padded)
	}
	c := connect(t, s)
	last := e.Size - e.MinBlock
	block := make([]byte, e.MinBlock)
	want := make([]byte, e.MinBlock)
	copy(want, data[last:])
	if err := c.readAt(block, last); err != nil || !bytes.Equal(block, want) {
		t.Errorf("the last block is not the file's end and zeroes: %v", err)
	}
	fill(28, want[:mib+1000-last])
	if err := c.writeAt(want, last); err != nil {
		t.Errorf("writing the last block with zeroes behind the end: %v", err)
	}
	bad := bytes.Repeat([]byte{7}, int(e.MinBlock))
	if err := c.writeAt(bad, last); err != requestError(errPermNBD) {
		t.Errorf("writing something behind the end: %v, expected EPERM", err)
	}
	if err := c.flush(); err != nil {
		t.Error(err)
	}
	if err := c.readAt(block, last); err != nil || !bytes.Equal(block, want) {
		t.Errorf("the last block is not as written: %v", err)
	}
	c.Close()
	s.stop()
	copy(data[last:], want)
	if got, err := os.ReadFile(disk); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the file is not as written, or not as long: %d bytes, %v", len(got), err)
	}
}

func TestBlockDeviceWith4KiBSectors(t *testing.T) {
	t.Parallel()
	for _, cache := range []string{"writeback", "none"} {
		dir := tempDir(t)
		source := patchyFile(t, filepath.Join(dir, "source"), 29, 16*mib)
		backing := writeFile(t, filepath.Join(dir, "backing"), make([]byte, 16*mib))
		device := loopDevice(t, backing, "4096")
		s := start(t, "--format", "raw", "--cache", cache, device)
		e := decode[serverInfo](t, run(t, "nbdinfo", "--json", s.uri())).Exports[0]
		if e.Size != 16*mib || e.PreferBlock < 4096 || cache == "none" && e.MinBlock != 4096 {
			t.Errorf("--cache %s: %+v", cache, e)
		}
		run(t, "nbdcopy", "--connections=4", "--flush", source, s.uri())
		identical(t, "raw", source, "raw", s.uri())
		// The client aligns to the minimum block size where it must.
		run(t, "qemu-io", append(append([]string{"-f", "raw", "-d", "unmap"}, edits...), s.uri())...)
		run(t, "qemu-io", append(append([]string{"-f", "raw"}, edits...), source)...)
		identical(t, "raw", source, "raw", s.uri())
		run(t, "qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 8M 4M", "-c", "write -z -u 12M 1M", "-c", "read -P 0 12M 1M", "-c", "flush", s.uri())
		s.stop()
		if got := allocated(t, backing); got > 13*mib {
			t.Errorf("--cache %s: after a trim of 4 MiB and zeroing 1 MiB the file below takes %d bytes", cache, got)
		}
		// qcow2 on a device.
		run(t, raceBinary, "image", "create", "-f", "qcow2", device, "8M")
		s = start(t, "--format", "qcow2", "--cache", cache, device)
		run(t, "qemu-io", "-f", "raw", "-c", "write -P 3 1000 100k", "-c", "read -P 3 1000 100k", "-c", "flush", s.uri())
		s.stop()
		clean(t, device)
	}
}

func TestDeviceOfOddSectorCount(t *testing.T) {
	t.Parallel()
	device := loopDevice(t, writeFile(t, filepath.Join(tempDir(t), "backing"), make([]byte, 1001*512)), "512")
	s := start(t, "--format", "raw", device)
	c := connect(t, s)
	if c.size != 1001*512 {
		t.Errorf("size %d", c.size)
	}
	if err := errors.Join(c.writeAt(noise(1, 512), 1000*512), c.flush()); err != nil {
		t.Error(err)
	}
}
