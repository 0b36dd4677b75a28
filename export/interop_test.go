package export

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestClientsThatPeopleUse is a spot check; the integration suite does more.
func TestClientsThatPeopleUse(t *testing.T) {
	dir := t.TempDir()
	r := fileRig(t, dir, 8<<20)
	sock := filepath.Join(dir, "s")
	l, err := net.Listen("unix", sock)
	must(t, err)
	serving := make(chan error, 1)
	go func() { serving <- r.s.Serve(l) }()
	uri := "nbd+unix:///disk?socket=" + sock
	run := func(argv ...string) string {
		t.Helper()
		out, err := exec.CommandContext(soon(t), argv[0], argv[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
		}
		return string(out)
	}
	for _, want := range []string{"export-size: 8388608", "base:allocation", "can_multi_conn: true", "can_fast_zero: true", "block_size_maximum: 33554432"} {
		if out := run("nbdinfo", uri); !strings.Contains(out, want) {
			t.Errorf("nbdinfo: no %q in\n%s", want, out)
		}
	}
	if out := run("nbdinfo", "--list", "nbd+unix:///?socket="+sock); !strings.Contains(out, `export="disk"`) {
		t.Errorf("nbdinfo --list:\n%s", out)
	}
	run("nbdcopy", "--connections=4", uri, filepath.Join(dir, "copy"))
	copied, err := os.ReadFile(filepath.Join(dir, "copy"))
	must(t, err)
	if !bytes.Equal(copied, pattern(0, 8<<20)) {
		t.Error("nbdcopy: the copy differs")
	}
	out := run("qemu-io", "-f", "raw", "-c", "w -P 5 1k 3M", "-c", "w -f -P 6 4M 64k", "-c", "w -z 5M 1M", "-c", "w -z -u 6M 64k", "-c", "discard 7M 64k", "-c", "flush",
		"-c", "r -P 5 1k 3M", "-c", "r -P 6 4M 64k", "-c", "r -P 0 5M 1M", "-c", "r -P 0 6M 64k", uri)
	if strings.Contains(out, "failed") {
		t.Errorf("qemu-io:\n%s", out)
	}
	if out := run("nbdinfo", "--map", uri); !strings.Contains(out, "hole,zero") {
		t.Errorf("nbdinfo --map:\n%s", out)
	}
	run("/usr/bin/python3", "-m", "nbdsh", "-c", "h.set_strict_mode(0)", "-u", uri, "-c", `
size = h.get_size()
for f, want in ((lambda: h.pread(512, size), 22), (lambda: h.pwrite(b'x' * 512, size), 28), (lambda: h.zero(512, size), 28),
                (lambda: h.trim(512, size), 22), (lambda: h.pread(512, 0, 0x80), 22), (lambda: h.pwrite(b'x' * 33 * 1024 * 1024, 0), 28)):
    try:
        f()
    except nbd.Error as e:
        assert e.errnum == want, (e.errnum, want)
    else:
        raise AssertionError('it worked')
h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(4096, 0) == bytearray(4096)
`)
	must(t, r.s.Shutdown(soon(t)))
	must(t, <-serving)
}
