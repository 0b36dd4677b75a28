package integration

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func newImage(t testing.TB, args ...string) string {
	t.Helper()
	disk := filepath.Join(tempDir(t), "disk")
	run(t, "qemu-img", append(append([]string{"create", "-q", "-f", "qcow2"}, args...), disk, "16M")...)
	return disk
}

// patch changes bytes of a file.
func patch(t testing.TB, path string, off int64, change func(p []byte), n int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, n)
	if _, err := f.ReadAt(p, off); err != nil {
		t.Fatal(err)
	}
	change(p)
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

// refusedToServe demands that serving fails and leaves no socket.
func refusedToServe(t testing.TB, args []string, texts ...string) {
	t.Helper()
	socket := filepath.Join(tempDir(t), "s")
	refused(t, append([]string{"serve", "--listen", "unix:" + socket}, args...), texts...)
	if _, err := os.Lstat(socket); err == nil {
		t.Error("a server that did not start left its socket")
	}
}

func TestImagesThatCannotBeServedRight(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)

	bitmap := newImage(t)
	run(t, "qemu-img", "bitmap", "--add", bitmap, "b0")
	refusedToServe(t, []string{"--format", "qcow2", bitmap}, "bitmap", "read-only")
	if got := run(t, "nbdinfo", "--size", start(t, "--format", "qcow2", "--read-only", bitmap).uri()); got != fmt.Sprintln(16*mib) {
		t.Errorf("an image with a bitmap is served read-only as %s", got)
	}

	refusedToServe(t, []string{"--format", "qcow2", newImage(t, "-o", "extended_l2=on")}, "extended L2")
	refusedToServe(t, []string{"--format", "qcow2", "--read-only", newImage(t, "-o", "extended_l2=on")}, "extended L2")
	refusedToServe(t, []string{"--format", "qcow2", newImage(t, "-o", "data_file="+filepath.Join(dir, "data"))}, "data file")
	for method := range byte(2) { // AES, LUKS
		encrypted := newImage(t)
		patch(t, encrypted, 32, func(p []byte) { p[3] = 1 + method }, 4)
		refusedToServe(t, []string{"--format", "qcow2", encrypted}, "ncrypt")
		refusedToServe(t, []string{"--format", "qcow2", "--read-only", encrypted}, "ncrypt")
	}

	corrupt := newImage(t)
	patch(t, corrupt, 72, func(p []byte) { p[7] |= 2 }, 8)
	refusedToServe(t, []string{"--format", "qcow2", corrupt}, "corrupt")
	if got := run(t, "nbdinfo", "--size", start(t, "--format", "qcow2", "--read-only", corrupt).uri()); got != fmt.Sprintln(16*mib) {
		t.Errorf("an image marked corrupt is served read-only as %s", got)
	}

	unknown := newImage(t)
	patch(t, unknown, 72, func(p []byte) { p[0] |= 0x80 }, 8)
	refusedToServe(t, []string{"--format", "qcow2", unknown}, "eature")

	base := newImage(t)
	formatless := newImage(t, "-b", base, "-F", "qcow2")
	patch(t, formatless, 0, func(p []byte) {
		const backingFormat = 0xe2792aca
		at := bytes.Index(p, binary.BigEndian.AppendUint32(nil, backingFormat))
		binary.BigEndian.PutUint32(p[at:], 0x12345678) // an extension that nobody knows
	}, 512)
	refusedToServe(t, []string{"--format", "qcow2", formatless}, "backing", "format", "rebase")

	missing := newImage(t, "-b", base, "-F", "qcow2")
	if err := os.Remove(base); err != nil {
		t.Fatal(err)
	}
	refusedToServe(t, []string{"--format", "qcow2", missing}, base, "no such file")
}

func TestBackingLoopIsRefused(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", a, "1M")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", a, "-F", "qcow2", b)
	run(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-b", b, "-F", "qcow2", a)
	refusedToServe(t, []string{"--format", "qcow2", b}, a)
	refusedToServe(t, []string{"--format", "qcow2", "--read-only", a}, b)
}

func TestImagesThatCannotBeOpened(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	raw := patchyFile(t, filepath.Join(dir, "raw"), 1, mib)
	refusedToServe(t, []string{"--format", "qcow2", raw}, raw, "not a qcow2 image")
	refusedToServe(t, []string{"--format", "raw", filepath.Join(dir, "nothing")}, filepath.Join(dir, "nothing"), "no such file")
	refusedToServe(t, []string{filepath.Join(dir, "nothing")}, "no such file")
	refusedToServe(t, []string{"--format", "raw", dir}, dir, "regular file")
	refusedToServe(t, []string{"--format", "vmdk", raw}, "vmdk", "qcow2")

	truncated := newImage(t)
	if err := os.Truncate(truncated, 50); err != nil {
		t.Fatal(err)
	}
	refusedToServe(t, []string{"--format", "qcow2", truncated}, truncated)

	if err := os.Chmod(raw, 0o400); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	as := []string{"--reuid=65534", "--regid=65534", "--clear-groups", raceBinary, "serve", "--listen", "unix:/nonexistent/s", "--format", "raw", raw}
	oneLine(t, try(t, "setpriv", as...), as, raw, "ermission denied")
}

func TestSocketsThatCannotBeMade(t *testing.T) {
	t.Parallel()
	disk := newImage(t)
	dir := tempDir(t)
	s := start(t, "--format", "qcow2", newImage(t), "--listen", "unix:"+filepath.Join(dir, "s"), "--listen", "tcp:127.0.0.1:0", "--print-uri")
	refused(t, []string{"serve", "--format", "qcow2", "--listen", "unix:" + s.socket, disk}, s.socket, "another server listens")
	address := strings.TrimSuffix(strings.TrimPrefix(s.stdout.lines(2)[1], "nbd://"), "/")
	refused(t, []string{"serve", "--format", "qcow2", "--listen", "tcp:" + address, disk}, address, "in use")
	// What was bound before the one that failed is taken away again.
	refusedToServe(t, []string{"--format", "qcow2", "--listen", "unix:" + s.socket, disk}, "another server")
	plain := writeFile(t, filepath.Join(dir, "plain"), nil)
	refused(t, []string{"serve", "--format", "qcow2", "--listen", "unix:" + plain, disk}, plain, "not a socket")
	refused(t, []string{"serve", "--format", "qcow2", "--listen", "unix:/nonexistent/s", disk}, "/nonexistent/s", "no such file")
	// The server noticed nothing.
	run(t, "nbdinfo", s.uri())

	// A socket that nobody listens on is no obstacle.
	s.kill()
	if _, err := os.Lstat(s.socket); err != nil {
		t.Fatal(err)
	}
	again := start(t, "--format", "qcow2", disk, "--listen", "unix:"+s.socket)
	run(t, "nbdinfo", again.uri())
}

// holder is a client of QEMU's that has an image open until it is told to end.
func holder(t testing.TB, args ...string) (pid int, release func()) {
	t.Helper()
	cmd := command(t, "qemu-io", args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "length\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil { // it is open when it tells its length
		t.Fatalf("%q %v", line, err)
	}
	return cmd.Process.Pid, func() {
		io.WriteString(in, "quit\n")
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", cmd, err)
		}
	}
}

func TestImageInUseByQemu(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"raw", "qcow2"} {
		disk := filepath.Join(tempDir(t), "disk")
		run(t, "qemu-img", "create", "-q", "-f", format, disk, "16M")
		pid, release := holder(t, "-f", format, disk)
		refusedToServe(t, []string{"--format", format, disk}, "lock", disk, fmt.Sprint(pid), "qemu-io")
		release()
		s := start(t, "--format", format, disk)
		s.stop()
	}

	// A reader keeps writers out, and lets readers in.
	disk := newImage(t)
	pid, release := holder(t, "-f", "qcow2", disk)
	refused(t, []string{"image", "check", "--format", "qcow2", disk}, "lock", fmt.Sprint(pid), "qemu-io")
	release()
	pid, release = holder(t, "-r", "-f", "qcow2", disk)
	refusedToServe(t, []string{"--format", "qcow2", disk}, "lock", fmt.Sprint(pid), "qemu-io")
	start(t, "--read-only", "--format", "qcow2", disk).stop()
	release()

	// qemu-nbd, and a disk that is in use as a backing file.
	top := newImage(t, "-b", disk, "-F", "qcow2")
	dir := tempDir(t)
	socket := filepath.Join(dir, "s")
	there := watchFile(t, socket)
	cmd := command(t, "qemu-nbd", "-t", "-f", "qcow2", "-k", socket, top)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-there
	run(t, "nbdinfo", unixURI(socket, "")) // answered when the image is open
	refusedToServe(t, []string{"--format", "qcow2", top}, "lock", fmt.Sprint(cmd.Process.Pid), "qemu-nbd")
	refusedToServe(t, []string{"--format", "qcow2", disk}, "lock", fmt.Sprint(cmd.Process.Pid), "qemu-nbd")
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Error(err)
	}
	cmd.Wait()
	start(t, "--format", "qcow2", top).stop()
}

func TestQemuIsKeptOutOfAServedImage(t *testing.T) {
	t.Parallel()
	base := newImage(t)
	disk := newImage(t, "-b", base, "-F", "qcow2")
	s := start(t, "--format", "qcow2", disk)
	for _, args := range [][]string{
		{"qemu-io", "-f", "qcow2", "-c", "length", disk},
		{"qemu-io", "-r", "-f", "qcow2", "-c", "length", disk},
		{"qemu-img", "info", disk},
		{"qemu-img", "check", disk},
		{"qemu-nbd", "-t", "-f", "qcow2", "-k", filepath.Join(tempDir(t), "q"), disk},
		{"qemu-io", "-f", "qcow2", "-c", "length", base},
	} {
		r := try(t, args[0], args[1:]...)
		if said := r.stdout + r.stderr; r.code == 0 || !strings.Contains(said, "lock") {
			t.Errorf("%s works on a served image: exit status %d %s", strings.Join(args, " "), r.code, said)
		}
	}
	run(t, "qemu-img", "info", "-U", disk)
	run(t, "qemu-io", "-r", "-f", "qcow2", "-c", "length", base) // a backing file may have other readers

	pid := fmt.Sprint(s.cmd.Process.Pid)
	refusedToServe(t, []string{"--format", "qcow2", disk}, "lock", disk, pid, "nbdserve")
	refusedToServe(t, []string{"--read-only", "--format", "qcow2", disk}, "lock", pid)
	refusedToServe(t, []string{"--format", "qcow2", base}, "lock", pid)
	refused(t, []string{"image", "check", disk}, "lock", pid)
	refused(t, []string{"image", "create", "-f", "qcow2", disk, "1M"}, "lock", pid)
	run(t, raceBinary, "image", "check", "--force-share", disk)
	run(t, raceBinary, "image", "info", "--force-share", disk)
	c := connect(t, s)
	if err := c.writeAt(noise(1, 100*kib), 12345); err != nil {
		t.Error(err)
	}
	run(t, raceBinary, "image", "check", "--force-share", disk)
	s.stop()
	clean(t, disk)
	run(t, "qemu-io", "-f", "qcow2", "-c", "length", disk)
}

func TestReadersShareAnImage(t *testing.T) {
	t.Parallel()
	disk := newImage(t)
	first, second := start(t, "--read-only", "--format", "qcow2", disk), start(t, "--read-only", "--format", "qcow2", disk)
	run(t, "nbdinfo", first.uri())
	run(t, "nbdinfo", second.uri())
	run(t, "qemu-img", "check", disk)
	refusedToServe(t, []string{"--format", "qcow2", disk}, "lock")
}

func TestShareRW(t *testing.T) {
	t.Parallel()
	disk := patchyFile(t, filepath.Join(tempDir(t), "disk"), 1, mib)
	one, two := start(t, "--share-rw", "--format", "raw", disk), start(t, "--share-rw", "--format", "raw", disk)
	a, b := connect(t, one), connect(t, two)
	want, got := noise(5, 10000), make([]byte, 10000)
	if err := a.writeAt(want, 777); err != nil {
		t.Error(err)
	}
	if err := b.readAt(got, 777); err != nil || !bytes.Equal(got, want) {
		t.Errorf("one server does not show what was written through the other: %v", err)
	}
	// Who does not share is kept out.
	refusedToServe(t, []string{"--format", "raw", disk}, "lock")
}

func TestCommandLinesThatMakeNoSense(t *testing.T) {
	t.Parallel()
	disk := newImage(t)
	for _, c := range []struct {
		args  []string
		texts []string
	}{
		{nil, []string{"command"}},
		{[]string{"serv"}, []string{"serv", "serve"}},
		{[]string{"serve"}, []string{"IMAGE"}},
		{[]string{"serve", disk, disk}, []string{"IMAGE"}},
		{[]string{"serve", disk, "--read-onyl"}, []string{"--read-onyl", "--read-only"}},
		{[]string{"serve", disk, "--cache", "sometimes"}, []string{"sometimes", "writeback"}},
		{[]string{"serve", disk, "--discard=no"}, []string{"no", "ignore"}},
		{[]string{"serve", disk, "--detect-zeroes", "unmap", "--discard", "ignore"}, []string{"detect-zeroes", "discard"}},
		{[]string{"serve", disk, "--offset", "1x"}, []string{"--offset", "1x"}},
		{[]string{"serve", disk, "--size", "-5"}, []string{"--size"}},
		{[]string{"serve", disk, "--max-clients", "many"}, []string{"--max-clients", "many"}},
		{[]string{"serve", disk, "--listen", "here"}, []string{"here", "unix:PATH"}},
		{[]string{"serve", disk, "--listen", "tcp:127.0.0.1:99999"}, []string{"99999"}},
		{[]string{"serve", disk, "--listen", "unix:" + strings.Repeat("x", 200)}, []string{"too long"}},
		{[]string{"serve", disk, "--name", strings.Repeat("x", 4097)}, []string{"too long"}},
		{[]string{"serve", disk, "--log-level", "loud"}, []string{"loud", "info"}},
		{[]string{"serve", disk, "--metrics", "nowhere"}, []string{"--metrics", "nowhere"}},
		{[]string{"serve", disk, "--once", "--run", "true"}, []string{"--once", "--run"}},
		{[]string{"serve", disk, "--name"}, []string{"--name"}},
		{[]string{"image", "create", disk + ".new"}, []string{}},
		{[]string{"image", "frob"}, []string{"frob"}},
	} {
		refused(t, c.args, c.texts...)
	}
}
