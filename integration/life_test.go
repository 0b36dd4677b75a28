package integration

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestPrintURIOfSeveralListeners(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	one, two := filepath.Join(dir, "one"), filepath.Join(dir, "with space")
	s := start(t, "--format", "qcow2", "--name", "disk", newImage(t), "--print-uri", "--listen", "unix:"+one,
		"--listen", "tcp:127.0.0.1:0", "--listen=unix:"+two, "--listen", "tcp:[::1]:0")
	uris := s.stdout.lines(4)
	if len(uris) != 4 || uris[0] != "nbd+unix:///disk?socket="+one {
		t.Errorf("--print-uri prints %q", uris)
	}
	for i, uri := range uris {
		if strings.HasPrefix(uri, "nbd+unix:") != (i%2 == 0) {
			t.Errorf("URI %d is %s", i, uri)
		}
		if got := run(t, "nbdinfo", "--size", uri); got != fmt.Sprintln(16*mib) {
			t.Errorf("%s has size %s", uri, got)
		}
	}
	s.stop()
	if _, err := os.Lstat(two); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a socket is left: %v", err)
	}
}

func TestDefaultSocketIsInTheRunDirectory(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	disk := newImage(t)
	cmd := exec.Command(raceBinary, "serve", "--print-uri", "--format", "qcow2", disk)
	cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+dir)
	s := startCommand(t, cmd, filepath.Join(dir, "nbdserve", "disk.sock"))
	if uri := s.stdout.lines(1)[0]; uri != s.uri() {
		t.Errorf("--print-uri prints %s, expected %s", uri, s.uri())
	}
	run(t, "nbdinfo", s.uri())
}

// The socket is there, and accepts, when READY comes; and not before the image is locked.
func TestReadyMeansThatClientsCanConnect(t *testing.T) {
	t.Parallel()
	disk := newImage(t)
	for range 10 {
		s := start(t, "--format", "qcow2", disk)
		connect(t, s).Close()
		s.stop()
	}
	socket := filepath.Join(tempDir(t), "s")
	there := watchFile(t, socket)
	cmd := command(t, raceBinary, "serve", "--format", "qcow2", "--listen", "unix:"+socket, disk)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-there
	if r := try(t, "qemu-io", "-f", "qcow2", "-c", "length", disk); r.code == 0 {
		t.Error("the socket is there, and the image is not locked")
	}
	c, err := dialNBD(socket)
	if err != nil {
		t.Errorf("the socket is there, and cannot be connected to: %v", err)
	} else {
		c.Close()
	}
	if err := errors.Join(cmd.Process.Signal(syscall.SIGTERM), cmd.Wait()); err != nil {
		t.Error(err)
	}
}

func TestEverySignalToEndEndsInOrder(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		disk := newImage(t)
		s := start(t, "--format", "qcow2", disk)
		c := connect(t, s) // an idle client does not hold it up
		if err := c.writeAt(noise(1, mib), 0); err != nil {
			t.Error(err)
		}
		s.signal(sig)
		if code := s.wait(); code != 0 {
			t.Errorf("exit status %d after %v\n%s", code, sig, s.stderr)
		}
		s.noSocket()
		clean(t, disk)
		if _, err := c.r.ReadByte(); err != io.EOF {
			t.Errorf("the client sees %v, expected the end of the connection", err)
		}
	}
}

// What the server had read when SIGTERM came is answered, all of it, and then the connection ends.
func TestRequestsInFlightAtSIGTERMAreAnswered(t *testing.T) {
	t.Parallel()
	s := start(t, "--format", "qcow2", newImage(t))
	c := connect(t, s)
	const n = 100
	for range n { // one segment, so that one receive gets them all
		if err := c.request(cmdRead, 0, 0, 100*kib, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.w.Flush(); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if _, code, err := c.reply(); err != nil || code != 0 {
			t.Fatalf("answer %d of %d: error %d, %v\n%s", i, n, code, err, s.stderr)
		}
		if _, err := io.CopyN(io.Discard, c.r, 100*kib); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			s.signal(syscall.SIGTERM)
			s.stderr.await(t, "ending")
		}
	}
	if _, err := c.r.ReadByte(); err != io.EOF {
		t.Errorf("behind the answers comes %v, expected the end", err)
	}
	if code := s.wait(); code != 0 {
		t.Errorf("exit status %d\n%s", code, s.stderr)
	}
}

// A client that sends reads and never receives holds up neither the first SIGTERM for ever nor the second at all.
func TestSecondSIGTERMCuts(t *testing.T) {
	t.Parallel()
	disk := newImage(t)
	s := start(t, "--format", "qcow2", disk)
	c := connect(t, s)
	for range 64 {
		if err := c.request(cmdRead, 0, 0, mib, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.w.Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.r.Peek(16); err != nil { // it is answering
		t.Fatal(err)
	}
	s.signal(syscall.SIGTERM)
	s.stderr.await(t, "ending")
	s.signal(syscall.SIGTERM)
	if code := s.wait(); code != 0 {
		t.Errorf("exit status %d\n%s", code, s.stderr)
	}
	s.noSocket()
	clean(t, disk)
}

func TestOnceEndsWithTheLastClient(t *testing.T) {
	t.Parallel()
	disk := newImage(t)
	s := start(t, "--once", "--format", "qcow2", disk)
	// Who only looks is no client yet.
	nc, err := net.Dial("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	nc.Close()
	a, b := connect(t, s), connect(t, s)
	if err := a.writeAt(noise(3, 4096), 4096); err != nil {
		t.Error(err)
	}
	a.Close()
	if err := b.writeAt(noise(4, 4096), 8192); err != nil {
		t.Errorf("the server ended while a client was left: %v", err)
	}
	b.Close()
	if code := s.wait(); code != 0 {
		t.Errorf("exit status %d\n%s", code, s.stderr)
	}
	s.noSocket()
	clean(t, disk)
}

func TestRunPassesTheExitStatusOn(t *testing.T) {
	t.Parallel()
	disk := newImage(t)
	for command, want := range map[string]result{
		`nbdinfo --size "$uri"`:                           {0, fmt.Sprintln(16 * mib), ""},
		`nbdsh -u "$uri" -c 'print(h.get_export_name())'`: {0, "disk\n", ""},
		`test -S "$unixsocket" && echo "$exportname"`:     {0, "disk\n", ""},
		"exit 7":         {7, "", ""},
		"kill -9 $$":     {137, "", ""},
		"no-such-tool-x": {127, "", ""},
	} {
		dir := tempDir(t)
		cmd := commandOf(t, dir, "serve", "--log-level", "error", "--format", "qcow2", "--name", "disk", disk, "--run", command)
		r := finish(t, cmd)
		if r.code != want.code || r.stdout != want.stdout {
			t.Errorf("--run '%s': exit status %d, output %q, expected %d and %q\n%s", command, r.code, r.stdout, want.code, want.stdout, r.stderr)
		}
		if left, err := filepath.Glob(filepath.Join(dir, "nbdserve", "*")); err != nil || len(left) > 0 {
			t.Errorf("--run '%s' left %q %v", command, left, err)
		}
	}
	clean(t, disk)
}

// commandOf prepares nbdserve with a run directory of its own.
func commandOf(t testing.TB, dir string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := command(t, raceBinary, args...)
	cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+dir)
	return cmd
}

func TestSIGTERMEndsRunToo(t *testing.T) {
	t.Parallel()
	s := start(t, "--format", "qcow2", newImage(t), "--run", `echo up; exec cat /dev/zero >/dev/null`)
	s.stdout.lines(1)
	s.signal(syscall.SIGTERM)
	if code := s.wait(); code != 128+15 {
		t.Errorf("exit status %d, expected that of a command that SIGTERM ended\n%s", code, s.stderr)
	}
	s.noSocket()
}

func TestExitWithParent(t *testing.T) {
	t.Parallel()
	disk, socket := newImage(t), filepath.Join(tempDir(t), "s")
	// A shell is the parent. It tells the server's process id, and waits.
	parent := command(t, "sh", "-c", `"$@" & echo $!; read end`, "sh", raceBinary, "serve", "--exit-with-parent", "--format", "qcow2", "--listen", "unix:"+socket, disk)
	there := watchFile(t, socket)
	in, err := parent.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	<-there
	c, err := dialNBD(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.writeAt(noise(1, 4096), 0); err != nil {
		t.Error(err)
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	parent.Wait()
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, int(patience.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n != 1 || err != nil {
			t.Fatalf("the server outlives its parent: %v", err)
		}
		break
	}
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	clean(t, disk)
}

// passed is a listening socket to be inherited by a server.
func passed(t testing.TB, network, address string) *os.File {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	f, err := l.(interface{ File() (*os.File, error) }).File()
	if err := errors.Join(err, l.Close()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// activate prepares a server with the environment that systemd would set.
func activate(sockets []*os.File, args ...string) *exec.Cmd {
	script := fmt.Sprintf(`LISTEN_PID=$$ LISTEN_FDS=%d LISTEN_FDNAMES=a:b exec "$@"`, len(sockets))
	cmd := exec.Command("sh", append([]string{"-c", script, "sh", raceBinary, "serve"}, args...)...)
	cmd.ExtraFiles = sockets
	return cmd
}

func TestSocketActivation(t *testing.T) {
	t.Parallel()
	disk, path := newImage(t), filepath.Join(tempDir(t), "s")
	sockets := []*os.File{passed(t, "unix", path), passed(t, "tcp", "127.0.0.1:0")}
	early, err := net.Dial("unix", path) // before there is a server
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	s := startCommand(t, activate(sockets, "--format", "qcow2", "--print-uri", disk), "")
	early.SetDeadline(time.Now().Add(patience))
	greeting := make([]byte, 18)
	if _, err := io.ReadFull(early, greeting); err != nil || string(greeting[:8]) != "NBDMAGIC" {
		t.Errorf("who connected before the server was there gets %q %v", greeting, err)
	}
	uris := s.stdout.lines(2)
	if len(uris) != 2 || uris[0] != unixURI(path, "") || !strings.HasPrefix(uris[1], "nbd://127.0.0.1:") {
		t.Errorf("--print-uri prints %q", uris)
	}
	for _, uri := range uris {
		run(t, "nbdinfo", uri)
	}
	s.stop()
	// The socket is systemd's: it stays.
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("a socket that was passed is gone: %v", err)
	}
	r := finish(t, activate(sockets, "--format", "qcow2", "--listen", "tcp:127.0.0.1:0", disk))
	oneLine(t, r, []string{"serve", "--listen"}, "--listen", "LISTEN_FDS")
}

func TestNbdinfoStartsTheServer(t *testing.T) {
	t.Parallel()
	disk := newImage(t)
	if got := run(t, "nbdinfo", "--size", "--", "[", raceBinary, "serve", "--log-level", "error", "--format", "qcow2", disk, "]"); got != fmt.Sprintln(16*mib) {
		t.Errorf("nbdinfo -- [ nbdserve ... ] says %s", got)
	}
	back := filepath.Join(tempDir(t), "back")
	run(t, "nbdcopy", "--", "[", raceBinary, "serve", "--log-level", "error", "--format", "qcow2", disk, "]", back)
	identical(t, "qcow2", disk, "raw", back)
}

func TestSystemdSocketActivate(t *testing.T) {
	t.Parallel()
	disk, path := newImage(t), filepath.Join(tempDir(t), "s")
	there := watchFile(t, path)
	said := newOutput()
	cmd := command(t, "systemd-socket-activate", "--listen="+path, raceBinary, "serve", "--format", "qcow2", disk)
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-there
	if got := run(t, "nbdinfo", "--size", unixURI(path, "")); got != fmt.Sprintln(16*mib) {
		t.Errorf("size %s", got)
	}
	// It became the server, which ends in order.
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, said)
	}
}

func TestExcessClientsAreToldAndClosed(t *testing.T) {
	t.Parallel()
	s := start(t, "--max-clients", "2", "--format", "qcow2", newImage(t))
	a := connect(t, s)
	// The second client is a process, which will be killed.
	cmd := command(t, "/usr/bin/python3", "-c", prelude+`
h.connect_unix(path)
print("up", flush=True)
sys.stdin.read()
`)
	cmd.Env = append(cmd.Environ(), "unixsocket="+s.socket)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	said := newOutput()
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said.await(t, "up")
	for range 5 {
		c, err := dialNBD(s.socket)
		var told *optionError
		if err == nil {
			c.Close()
			t.Fatal("a third client is served")
		} else if !errors.As(err, &told) || !strings.Contains(told.text, "client") {
			t.Errorf("a third client is not told why: %v", err)
		}
	}
	if err := a.writeAt(noise(1, 4096), 0); err != nil {
		t.Errorf("a client that is served notices: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	deadline := time.Now().Add(patience)
	for {
		c, err := dialNBD(s.socket) // the server learns of the end a moment later
		if err == nil {
			if err := c.flush(); err != nil {
				t.Error(err)
			}
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the slot of a client that was killed does not come back: %v", err)
		}
	}
	if err := a.flush(); err != nil {
		t.Error(err)
	}
}

func TestVersionShowsWhatIsIn(t *testing.T) {
	t.Parallel()
	v := decode[struct {
		Version                      string
		Formats, Protocols, Features []string
	}](t, run(t, raceBinary, "version", "--json"))
	if v.Version == "" || !slices.Contains(v.Formats, "qcow2") || !slices.Contains(v.Formats, "raw") ||
		!slices.Contains(v.Protocols, "file") || !slices.Contains(v.Protocols, "host_device") || !slices.Contains(v.Features, "multi-conn") {
		t.Errorf("version --json shows %+v", v)
	}
}
