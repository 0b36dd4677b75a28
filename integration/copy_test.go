package integration

import (
	"path/filepath"
	"testing"
)

// listeners are ways to reach a server: options of serve.
var listeners = map[string][]string{"unix": nil, "tcp": {"--listen", "tcp:127.0.0.1:0"}}

func TestNbdcopyInAndOut(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	const size = 48 * mib
	source := patchyFile(t, filepath.Join(dir, "source"), 7, size)
	want := checksum(t, source)
	for network, listen := range listeners {
		for _, format := range []string{"raw", "qcow2"} {
			t.Run(network+"/"+format, func(t *testing.T) {
				disk, back := filepath.Join(tempDir(t), "disk"), filepath.Join(dir, "back")
				run(t, raceBinary, "image", "create", "-f", format, disk, "48M")
				s := start(t, append([]string{"--format", format, "--print-uri", disk}, listen...)...)
				uri := s.stdout.lines(1)[0]
				run(t, "nbdcopy", "--connections=4", "--requests=64", "--flush", source, uri)
				run(t, "nbdcopy", "--connections=4", "--requests=64", uri, back)
				if got := checksum(t, back); got != want {
					t.Error("what was read differs from what was written")
				}
				s.stop()
				identical(t, "raw", source, format, disk)
				if format == "qcow2" {
					clean(t, disk)
				}
			})
		}
	}
}

func TestNbdcopyVariants(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	source := patchyFile(t, filepath.Join(dir, "source"), 8, 12*mib)
	for _, options := range [][]string{
		{"--allocated"}, {"--destination-is-zero"}, {"-S", "4096"}, {"-S", "0"}, {"--no-extents"}, {"--synchronous"}, {"--request-size=33554432", "--requests=2"},
	} {
		disk := filepath.Join(tempDir(t), "disk.qcow2")
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", disk, "12M")
		s := start(t, "--format", "qcow2", disk)
		run(t, "nbdcopy", append(options, source, s.uri())...)
		s.stop()
		identical(t, "raw", source, "qcow2", disk)
		clean(t, disk)
	}
}

func TestCopyBetweenTwoServers(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	source := patchyFile(t, filepath.Join(dir, "source"), 9, 24*mib)
	disk := filepath.Join(dir, "disk.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", disk, "24M")
	from, to := start(t, "--read-only", "--format", "raw", source), start(t, "--format", "qcow2", disk)
	run(t, "nbdcopy", "--connections=4", "--flush", from.uri(), to.uri())
	to.stop()
	identical(t, "raw", source, "qcow2", disk)
	clean(t, disk)
}
