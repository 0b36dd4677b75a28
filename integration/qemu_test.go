package integration

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

func TestQemuImgOverNBD(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	source := patchyFile(t, filepath.Join(dir, "source"), 11, 32*mib)
	disk := filepath.Join(dir, "disk.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", disk, "32M")
	s := start(t, "--format", "qcow2", disk)
	info := decode[struct {
		VirtualSize int64 `json:"virtual-size"`
		Format      string
	}](t, run(t, "qemu-img", "info", "--output=json", s.uri()))
	if info.VirtualSize != 32*mib || info.Format != "raw" {
		t.Errorf("qemu-img info shows %+v", info)
	}
	run(t, "qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", source, s.uri())
	identical(t, "raw", source, "raw", s.uri())
	back := filepath.Join(dir, "back.qcow2")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", s.uri(), back)
	identical(t, "raw", source, "qcow2", back)
	run(t, "qemu-img", "bench", "-q", "-f", "raw", "-d", "64", "-c", "5000", s.uri())
	run(t, "qemu-img", "bench", "-q", "-f", "raw", "-d", "16", "-c", "2000", "-w", "--flush-interval=200", s.uri())
	s.stop()
	clean(t, disk)
}

func TestQcow2InsideARawExport(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	source := patchyFile(t, filepath.Join(dir, "source"), 12, 16*mib)
	container := writeFile(t, filepath.Join(dir, "container"), make([]byte, 24*mib))
	s := start(t, "--format", "raw", container)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", s.uri(), "16M")
	run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", source, s.uri())
	run(t, "qemu-img", "check", "-f", "qcow2", s.uri())
	identical(t, "raw", source, "qcow2", s.uri())
	s.stop()
	identical(t, "raw", source, "qcow2", container)
}

func TestQemuIoEveryCommandFlag(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			disk := filepath.Join(dir, format)
			run(t, "qemu-img", "create", "-q", "-f", format, disk, "16M")
			s := start(t, "--format", format, disk)
			commands := []string{
				"write -P 1 0 4M", // what the others change
				"write -f -P 2 0 64k", "read -P 2 0 64k", "read -P 1 64k 64k",
				"write -z 100k 100k", "read -P 0 100k 100k", "read -P 1 200k 56k", "read -P 1 64k 36k",
				"write -z -u 512k 256k", "read -P 0 512k 256k",
				"write -z -f 1M 64k", "read -P 0 1M 64k",
				"write -z -n 1088k 64k", "read -P 0 1088k 64k", // fast zero succeeds
				"write -z -u -f 1152k 64k", "read -P 0 1152k 64k",
				"write -z 12345 777", "read -P 0 12345 777", "read -P 2 12344 1", "read -P 2 13122 100",
				"discard 2M 1M", "read -P 0 2M 1M",
				"discard 3333333 4444", "read -P 1 3145728 187605", "read -P 1 3337777 4000",
				"writev -P 3 5M 1k 2k 513", "readv -P 3 5M 1k 2k 513",
				"aio_write -P 4 6M 1M", "aio_write -f -P 5 7M 1M", "aio_write -z 8M 1M", "aio_write -z -u 9M 1M", "aio_flush",
				"aio_read -P 4 6M 1M", "aio_read -P 5 7M 1M", "aio_read -P 0 8M 2M", "aio_flush",
				"flush", "length", "map",
				"reopen -r", "read -P 4 6M 1M",
				"reopen -w", "write -P 6 10M 333", "read -P 6 10M 333",
				"write -P 7 16777215 1", "read -P 7 16777215 1",
			}
			var args []string
			for _, c := range commands {
				args = append(args, "-c", c)
			}
			out := run(t, "qemu-io", append(append([]string{"-f", "raw", "-d", "unmap"}, args...), s.uri())...)
			if strings.Contains(out, "failed") || strings.Contains(out, "rror") {
				t.Errorf("qemu-io: %s", out)
			}
			// The same commands straight on a second image must give the same disk; where
			// a trim is unaligned its edges are the server's choice, so they are written.
			twin := filepath.Join(dir, format+".twin")
			run(t, "qemu-img", "create", "-q", "-f", format, twin, "16M")
			run(t, "qemu-io", append(append([]string{"-f", format, "-d", "unmap"}, args...), twin)...)
			fix := fmt.Sprintf("write -P 8 %d %d", 3333333, 4444)
			run(t, "qemu-io", "-f", "raw", "-c", fix, "-c", "flush", s.uri())
			run(t, "qemu-io", "-f", format, "-c", fix, twin)
			s.stop()
			identical(t, format, disk, format, twin)
			if format == "qcow2" {
				clean(t, disk)
			}
		})
	}
}

// The first measure of the whole: an overlay is written by two clients, and its base stays as it was.
func TestOverlayIsWrittenAndItsBaseIsNot(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	twin := patchyFile(t, filepath.Join(dir, "twin"), 13, 64*mib)
	base := convert(t, twin, "qcow2", filepath.Join(dir, "base.qcow2"))
	before := checksum(t, base)
	top := filepath.Join(dir, "top.qcow2")
	cmd := command(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2") // a relative name
	cmd.Dir = dir
	if r := finish(t, cmd); r.code != 0 {
		t.Fatal(r)
	}
	s := start(t, "--format", "qcow2", top)
	identical(t, "raw", twin, "raw", s.uri())
	changes := []string{"-c", "write -P 17 5M 777k", "-c", "write -z 20000000 1234567", "-c", "write -f -P 18 33333333 3",
		"-c", "write -z -u 40M 2M", "-c", "write -P 20 67108863 1", "-c", "flush"}
	run(t, "qemu-io", append(append([]string{"-f", "raw"}, changes...), s.uri())...)
	run(t, "qemu-io", append(append([]string{"-f", "raw"}, changes...), twin)...)
	identical(t, "raw", twin, "raw", s.uri())
	s.stop()
	clean(t, top)
	identical(t, "raw", twin, "qcow2", top)

	// Over it goes all of another disk.
	patchyFile(t, twin, 14, 64*mib)
	s = start(t, "--format", "qcow2", top)
	run(t, "nbdcopy", "--connections=4", "--flush", twin, s.uri())
	s.stop()
	clean(t, top)
	identical(t, "raw", twin, "qcow2", top)
	if checksum(t, base) != before {
		t.Error("the base image has changed")
	}
}
