package integration

import (
	"net"
	"path/filepath"
	"strings"
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

func TestOtherClients(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	source := patchyFile(t, filepath.Join(dir, "source"), 10, 8*mib)
	s := start(t, "--format", "raw", "--name", "disk", "--print-uri", source, "--listen", "unix:"+filepath.Join(dir, "s"), "--listen", "tcp:127.0.0.1:0")
	if out := run(t, "qemu-nbd", "--list", "--socket", s.socket); !strings.Contains(out, "'disk'") || !strings.Contains(out, "8388608") || !strings.Contains(out, "base:allocation") {
		t.Errorf("qemu-nbd --list shows %s", out)
	}
	host, port, err := net.SplitHostPort(strings.TrimSuffix(strings.TrimPrefix(s.stdout.lines(2)[1], "nbd://"), "/disk"))
	if err != nil {
		t.Fatal(err)
	}
	if out := run(t, "nbd-client", "-l", host, port); !strings.Contains(out, "disk") {
		t.Errorf("nbd-client -l shows %s", out)
	}
	back := filepath.Join(dir, "back")
	run(t, "nbdkit", "-r", "-U", "-", "nbd", "uri="+unixURI(s.socket, "disk"), "--run", `nbdcopy "$uri" `+back)
	identical(t, "raw", source, "raw", back)
}
