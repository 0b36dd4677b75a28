package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// With this variable set the test binary is nbdserve itself, so that processes,
// signals and exit statuses are real.
const asCommand = "NBDSERVE_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		os.Exit(run(os.Args, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

const patience = 30 * time.Second // for what takes milliseconds

// A process is a running nbdserve.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdout chan string // lines
	stderr chan string
	lines  []string // of standard error, as far as they were waited for
}

// command describes nbdserve with these arguments.
func command(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	// The race detector otherwise waits a second at exit.
	cmd.Env = append(os.Environ(), asCommand+"=1", "GORACE=atexit_sleep_ms=0")
	return cmd
}

// start starts cmd; it is killed at the end of the test if it is still there.
func start(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, cmd: cmd}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.stdout, p.stderr = lines(stdout), lines(stderr)
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
		if t.Failed() {
			for line := range p.stderr {
				p.lines = append(p.lines, line)
			}
			t.Logf("standard error of %q:\n%s", cmd.Args[1:], strings.Join(p.lines, "\n"))
		}
	})
	return p
}

func lines(r io.Reader) chan string {
	ch := make(chan string, 10000)
	go func() {
		defer close(ch)
		for s := bufio.NewScanner(r); s.Scan(); {
			ch <- s.Text()
		}
	}()
	return ch
}

// line returns the next line of standard output.
func (p *process) line() string {
	p.t.Helper()
	select {
	case l, ok := <-p.stdout:
		if !ok {
			p.t.Fatalf("%q ended its output", p.cmd.Args[1:])
		}
		return l
	case <-time.After(patience):
		p.t.Fatalf("%q prints nothing", p.cmd.Args[1:])
	}
	return ""
}

// logged waits for a line of standard error that contains text.
func (p *process) logged(text string) string {
	p.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case l, ok := <-p.stderr:
			if !ok {
				p.t.Fatalf("%q ended without logging %q", p.cmd.Args[1:], text)
			}
			p.lines = append(p.lines, l)
			if strings.Contains(l, text) {
				return l
			}
		case <-timeout:
			p.t.Fatalf("%q does not log %q", p.cmd.Args[1:], text)
		}
	}
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// status waits for the end, and returns the exit status.
func (p *process) status() int {
	p.t.Helper()
	// All output first: Wait closes the pipes.
	timeout := time.After(patience)
	for stdout, stderr := p.stdout, p.stderr; stdout != nil || stderr != nil; {
		select {
		case _, ok := <-stdout:
			if !ok {
				stdout = nil
			}
		case l, ok := <-stderr:
			if !ok {
				stderr = nil
			} else {
				p.lines = append(p.lines, l)
			}
		case <-timeout:
			p.t.Fatalf("%q does not end", p.cmd.Args[1:])
		}
	}
	err := p.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.t.Fatal(err)
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *process) end() {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	if s := p.status(); s != 0 {
		p.t.Errorf("%q: exit status %d after SIGTERM", p.cmd.Args[1:], s)
	}
}

// makeDisk makes a raw disk of 1 MiB.
func makeDisk(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	writeFile(t, path, bytes.Repeat([]byte{0xaa}, 1<<20))
	return path
}

// serveDisk serves a new disk on a unix socket.
func serveDisk(t *testing.T, args ...string) (p *process, socket string) {
	t.Helper()
	disk := makeDisk(t)
	socket = filepath.Join(filepath.Dir(disk), "s")
	p = start(t, command(append([]string{"serve", disk, "--format=raw", "--print-uri", "--listen=unix:" + socket}, args...)...))
	if uri := p.line(); !strings.HasPrefix(uri, "nbd+unix:///") || !strings.HasSuffix(uri, "?socket="+socket) {
		t.Errorf("printed URI: %s", uri)
	}
	return p, socket
}

const exportSize = 1 << 20

// connect makes a client in the transmission phase, by NBD_OPT_EXPORT_NAME.
func connect(t *testing.T, network, address string) net.Conn {
	t.Helper()
	c, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	greeting := make([]byte, 18)
	if _, err := io.ReadFull(c, greeting); err != nil || string(greeting[:16]) != "NBDMAGICIHAVEOPT" {
		t.Fatalf("greeting %q, %v", greeting, err)
	}
	hello := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	hello = append(hello, "IHAVEOPT"...)
	hello = binary.BigEndian.AppendUint32(hello, 1) // NBD_OPT_EXPORT_NAME
	hello = binary.BigEndian.AppendUint32(hello, 0)
	if _, err := c.Write(hello); err != nil {
		t.Fatal(err)
	}
	var reply [10]byte
	if _, err := io.ReadFull(c, reply[:]); err != nil {
		t.Fatal(err)
	}
	if size := binary.BigEndian.Uint64(reply[:]); size != exportSize {
		t.Fatalf("export of %d bytes", size)
	}
	return c
}

// request encodes a request without payload.
func request(typ uint16, cookie, off uint64, length uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0x25609513)
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint16(b, typ)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint32(b, length)
}

const (
	cmdRead = 0
	cmdDisc = 2
)

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func TestServesUntilSigterm(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		p, socket := serveDisk(t)
		c := connect(t, "unix", socket) // an idle client holds nothing up
		if _, err := c.Write(request(cmdRead, 1, 4096, 512)); err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, 16+512)
		if _, err := io.ReadFull(c, answer); err != nil || !bytes.Equal(answer[16:], bytes.Repeat([]byte{0xaa}, 512)) {
			t.Errorf("read: %v", err)
		}
		p.signal(sig)
		if s := p.status(); s != 0 {
			t.Errorf("exit status %d after %v", s, sig)
		}
		if exists(socket) {
			t.Errorf("the socket is still there after %v", sig)
		}
	}
}

func TestIgnoredSignalsStayIgnored(t *testing.T) {
	cmd := command()
	cmd.Path, cmd.Args = "/bin/sh", []string{"sh", "-c", `trap "" HUP INT; exec "$@"`, "sh", os.Args[0], "serve", makeDisk(t), "-f", "raw",
		"--listen=tcp:localhost:0", "--print-uri"}
	p := start(t, cmd)
	p.line()
	p.signal(syscall.SIGHUP)
	p.signal(syscall.SIGINT)
	p.signal(syscall.SIGTERM)
	if s := p.status(); s != 0 {
		t.Errorf("exit status %d", s)
	}
	if text := strings.Join(p.lines, "\n"); !strings.Contains(text, "signal=terminated") || strings.Contains(text, "cutting") {
		t.Errorf("log:\n%s", text)
	}
}

func TestSecondSignalCuts(t *testing.T) {
	p, socket := serveDisk(t)
	c := connect(t, "unix", socket)
	// This client asks for more than sockets hold, and receives none of it.
	for i := range uint64(64) {
		if _, err := c.Write(request(cmdRead, i, 0, exportSize)); err != nil {
			t.Fatal(err)
		}
	}
	p.signal(syscall.SIGTERM)
	p.logged("ending")
	p.signal(syscall.SIGTERM)
	p.logged("cutting all connections")
	if s := p.status(); s != 0 {
		t.Errorf("exit status %d", s)
	}
}

func TestOnceEndsWithTheLastClient(t *testing.T) {
	p, socket := serveDisk(t, "--once")
	first, second := connect(t, "unix", socket), connect(t, "unix", socket)
	if _, err := first.Write(request(cmdDisc, 0, 0, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, first); err != nil {
		t.Fatal(err)
	}
	// One client has left, the other is served still.
	if _, err := second.Write(request(cmdRead, 0, 0, 512)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(second, make([]byte, 16+512)); err != nil {
		t.Fatal(err)
	}
	second.Close()
	if s := p.status(); s != 0 {
		t.Errorf("exit status %d", s)
	}
}

func TestRunEndsWithTheStatusOfTheCommand(t *testing.T) {
	disk := makeDisk(t)
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -KILL $$": 128 + 9} {
		p := start(t, command("serve", disk, "-f", "raw", "--listen=tcp:localhost:0", "--run", script))
		if s := p.status(); s != want {
			t.Errorf("--run '%s': exit status %d, want %d", script, s, want)
		}
	}
}

func TestRunTellsTheCommandWhereToConnect(t *testing.T) {
	dir := t.TempDir()
	p := start(t, command("serve", makeDisk(t), "-f", "raw", "--name=a b", "--listen=unix:"+dir+"/s", "--listen=tcp:127.0.0.1:0",
		"--run", `test -S "$unixsocket" && echo "$uri|$unixsocket|$port|$exportname|$nbd" && nbdinfo --size "$uri"`))
	if got, want := p.line(), "nbd+unix:///a%20b?socket="+dir+"/s|"+dir+"/s||a b|nbd:unix:"+dir+"/s"; got != want {
		t.Errorf("the command saw %s, want %s", got, want)
	}
	if size := p.line(); size != strconv.Itoa(exportSize) {
		t.Errorf("nbdinfo by $uri: %s", size)
	}
	if s := p.status(); s != 0 {
		t.Errorf("exit status %d", s)
	}
	p = start(t, command("serve", makeDisk(t), "-f", "raw", "--listen=tcp:127.0.0.1:0", "--run", `echo "$uri|$unixsocket|$port"`))
	if m := regexp.MustCompile(`^nbd://127\.0\.0\.1:(\d+)/\|\|(\d+)$`).FindStringSubmatch(p.line()); m == nil || m[1] != m[2] {
		t.Errorf("the command saw %q", m)
	}
	p.status()
}

func TestRunHasASocketOfItsOwn(t *testing.T) {
	dir := t.TempDir()
	cmd := command("serve", makeDisk(t), "-f", "raw", "--run", `echo "$unixsocket"; nbdinfo --size "$uri"`)
	cmd.Env = append(cmd.Env, "TMPDIR="+dir)
	p := start(t, cmd)
	socket := p.line()
	if !strings.HasPrefix(socket, dir+"/") {
		t.Errorf("socket: %s", socket)
	}
	if size := p.line(); size != strconv.Itoa(exportSize) {
		t.Errorf("nbdinfo: %s", size)
	}
	if s := p.status(); s != 0 {
		t.Errorf("exit status %d", s)
	}
	if exists(filepath.Dir(socket)) {
		t.Error("the socket's folder is still there")
	}
}

func TestSigtermGoesToTheCommandFirst(t *testing.T) {
	p := start(t, command("serve", makeDisk(t), "-f", "raw", "--listen=tcp:localhost:0",
		"--run", `trap 'nbdinfo --size "$uri"; exit 5' TERM; echo ready; while :; do sleep 0.01; done`))
	if l := p.line(); l != "ready" {
		t.Fatal(l)
	}
	p.signal(syscall.SIGTERM)
	if size := p.line(); size != strconv.Itoa(exportSize) {
		t.Errorf("nbdinfo while the server is told to end: %s", size)
	}
	if s := p.status(); s != 5 {
		t.Errorf("exit status %d, want 5", s)
	}
}

func TestExitWithParent(t *testing.T) {
	cmd := command()
	cmd.Path, cmd.Args = "/bin/sh", []string{"sh", "-c", `"$@" & wait`, "sh", os.Args[0], "serve", makeDisk(t), "-f", "raw",
		"--listen=tcp:localhost:0", "--exit-with-parent", "--print-uri"}
	p := start(t, cmd)
	p.line()
	p.signal(syscall.SIGKILL) // the shell
	p.logged("ending: the parent process has ended")
	if s := p.status(); s != -1 { // waits until the server, which holds the pipes, has ended
		t.Errorf("exit status of the killed shell: %d", s)
	}
}

func TestListensOnAllThatItIsTold(t *testing.T) {
	dir := t.TempDir()
	p := start(t, command("serve", "--print-uri", "--listen=unix:"+dir+"/a,b", "--listen=tcp:127.0.0.1:0", makeDisk(t), "-f", "raw", "--listen=tcp:[::1]:0"))
	for _, pattern := range []string{`^nbd\+unix:///\?socket=.*/a%2Cb$`, `^nbd://127\.0\.0\.1:\d+/$`, `^nbd://\[::1\]:\d+/$`} {
		uri := p.line()
		if !regexp.MustCompile(pattern).MatchString(uri) {
			t.Errorf("printed URI %s, want %s", uri, pattern)
		}
		if out, err := exec.Command("nbdinfo", "--size", uri).CombinedOutput(); err != nil || string(out) != fmt.Sprintln(exportSize) {
			t.Errorf("nbdinfo %s: %s, %v", uri, out, err)
		}
	}
	p.end()
}

func TestOptionsBehindTheImageCount(t *testing.T) {
	_, socket := serveDisk(t, "--read-only")
	out, err := exec.Command("nbdinfo", "--is", "read-only", "nbd+unix:///?socket="+socket).CombinedOutput()
	if err != nil {
		t.Errorf("served with --read-only behind the image, it is writable: %s, %v", out, err)
	}
}

func TestFailedStartLeavesNoSocket(t *testing.T) {
	dir := t.TempDir()
	l := mustListen(t, dir+"/taken")
	p := start(t, command("serve", makeDisk(t), "-f", "raw", "--listen=unix:"+dir+"/s", "--listen=unix:"+l.path))
	if s := p.status(); s != 1 {
		t.Errorf("exit status %d", s)
	}
	if last := p.lines[len(p.lines)-1]; last != "nbdserve: cannot listen on unix:"+l.path+": another server listens there; stop it or choose another path with --listen" {
		t.Errorf("error: %s", last)
	}
	if exists(dir + "/s") {
		t.Error("the first socket was left behind")
	}
	if !exists(l.path) {
		t.Error("the socket of another server was removed")
	}
}

func TestImageInUseIsRefusedAndItsHolderNamed(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk.qcow2")
	if status, _, stderr := runArgs("image", "create", "-f", "qcow2", disk, "1M"); status != 0 {
		t.Fatal(stderr)
	}
	p := start(t, command("serve", disk, "--print-uri", "--listen=tcp:localhost:0"))
	p.line()
	second := start(t, command("serve", disk, "--listen=tcp:localhost:0"))
	if s := second.status(); s != 1 {
		t.Errorf("exit status %d", s)
	}
	if text := strings.Join(second.lines, "\n"); !strings.Contains(text, `lock`) || !strings.Contains(text, strconv.Itoa(p.cmd.Process.Pid)) || strings.Count(text, "\n") != 0 {
		t.Errorf("the error does not name process %d, or is no single line: %s", p.cmd.Process.Pid, text)
	}
	// A look at it is refused as well, but can be forced.
	if status, _, stderr := runArgs("image", "info", disk); status != 1 || !strings.Contains(stderr, "lock") {
		t.Errorf("image info of an image in use: status %d, %s", status, stderr)
	}
	if status, _, stderr := runArgs("image", "info", "--force-share", disk); status != 0 {
		t.Errorf("image info --force-share of an image in use: %s", stderr)
	}
	p.end()
}

// activate runs nbdserve with sockets as systemd hands them over.
func activate(t *testing.T, pid string, files []*os.File, args ...string) *process {
	t.Helper()
	cmd := command()
	cmd.Path, cmd.Args = "/bin/sh", append([]string{"sh", "-c", `LISTEN_PID=` + pid + ` LISTEN_FDS=` + strconv.Itoa(len(files)) +
		` LISTEN_FDNAMES=nbd exec "$@"`, "sh", os.Args[0], "serve", makeDisk(t), "-f", "raw", "--print-uri"}, args...)
	cmd.ExtraFiles = files
	return start(t, cmd)
}

func fileOf(t *testing.T, l interface{ File() (*os.File, error) }) *os.File {
	t.Helper()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestSocketActivation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	u, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	p := activate(t, "$$", []*os.File{fileOf(t, u.(*net.UnixListener)), fileOf(t, tcp.(*net.TCPListener))})
	if uri := p.line(); uri != "nbd+unix:///?socket="+path {
		t.Errorf("first URI: %s", uri)
	}
	if uri := p.line(); uri != "nbd://"+tcp.Addr().String()+"/" {
		t.Errorf("second URI: %s", uri)
	}
	connect(t, "unix", path)
	connect(t, "tcp", tcp.Addr().String())
	p.end()
	if !exists(path) {
		t.Error("a socket that systemd made was removed")
	}
}

func TestSocketActivationRefusals(t *testing.T) {
	dir := t.TempDir()
	l := mustListen(t, dir+"/s")
	pair, err := net.Dial("unix", dir+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer pair.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, c := range []struct {
		file *os.File
		args []string
		want string
	}{
		{fileOf(t, l.Listener.(*net.UnixListener)), []string{"--listen=tcp:localhost:0"}, "nbdserve: --listen cannot be given where systemd opens the sockets (LISTEN_FDS is 1)"},
		{fileOf(t, pair.(*net.UnixConn)), nil, "nbdserve: socket activation: file descriptor 3: this is not a listening socket"},
		{null, nil, "nbdserve: socket activation: file descriptor 3: this is not a listening socket"},
	} {
		p := activate(t, "$$", []*os.File{c.file}, c.args...)
		if s := p.status(); s != 1 || len(p.lines) != 1 || p.lines[0] != c.want {
			t.Errorf("status %d, %q, want %q", s, p.lines, c.want)
		}
	}
	// Sockets for another process are not ours.
	p := activate(t, "1", []*os.File{null}, "--listen=unix:"+dir+"/own")
	if uri := p.line(); uri != "nbd+unix:///?socket="+dir+"/own" {
		t.Errorf("URI: %s", uri)
	}
	p.end()
}

func TestSystemdIsToldWhenTheServerIsReadyAndWhenItStops(t *testing.T) {
	dir := t.TempDir()
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: dir + "/notify", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	cmd := command("serve", makeDisk(t), "-f", "raw", "--listen=unix:"+dir+"/s")
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+dir+"/notify")
	p := start(t, cmd)
	next := func() string {
		t.Helper()
		if err := notify.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4096)
		n, err := notify.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	if m := next(); !strings.HasPrefix(m, "READY=1\nSTATUS=Serving ") {
		t.Errorf("first message: %q", m)
	}
	connect(t, "unix", dir+"/s")
	p.signal(syscall.SIGTERM)
	if m := next(); m != "STOPPING=1" {
		t.Errorf("second message: %q", m)
	}
	if s := p.status(); s != 0 {
		t.Errorf("exit status %d", s)
	}
}

func TestMetricsOfARunningServer(t *testing.T) {
	p, socket := serveDisk(t, "--metrics=localhost:0", "--name=disk0")
	m := regexp.MustCompile(`url=(http://\S+)/metrics`).FindStringSubmatch(p.logged("serving metrics"))
	if m == nil {
		t.Fatal("the log does not tell the URL")
	}
	get := func(path string) (int, string) {
		t.Helper()
		r, err := http.Get(m[1] + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, string(b)
	}
	c := connect(t, "unix", socket)
	if _, err := c.Write(request(cmdRead, 1, 0, 4096)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 16+4096)); err != nil {
		t.Fatal(err)
	}
	_, text := get("/metrics")
	for _, line := range []string{
		`nbdserve_connections{export="disk0"} 1`,
		`nbdserve_requests_total{export="disk0",op="read",result="ok"} 1`,
		`nbdserve_request_bytes_total{export="disk0",op="read"} 4096`,
		`nbdserve_requests_in_flight{export="disk0",op="read"} 0`,
		`nbdserve_request_duration_seconds_count{export="disk0",op="read"} 1`,
		`nbdserve_export_drained{export="disk0"} 0`,
		`nbdserve_oldest_request_seconds{export="disk0"} 0`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("the scrape lacks %s", line)
		}
	}
	if !regexp.MustCompile(`nbdserve_node_requests_total\{driver="file",node="[^"]+",op="read"\} [1-9]`).MatchString(text) {
		t.Error("the scrape does not count the read on the file node")
	}
	for path, want := range map[string]int{"/healthz": 200, "/readyz": 200, "/readyz?export=disk0": 200, "/readyz?export=disk1": 404} {
		if code, text := get(path); code != want {
			t.Errorf("GET %s: %d %s, want %d", path, code, text, want)
		}
	}
	p.end()
}

// TestActivationOnConnect: two servers with one disk start, are ready, and whoever
// has the client has the disk.
func TestActivationOnConnect(t *testing.T) {
	disk := makeDisk(t)
	serve := func(socket string) *process {
		p := start(t, command("serve", disk, "--format=raw", "--activation=on-connect", "--activation-linger=0s", "--print-uri", "--metrics=localhost:0", "--listen=unix:"+socket))
		p.line()
		return p
	}
	sockets := []string{disk + ".a", disk + ".b"}
	a, b := serve(sockets[0]), serve(sockets[1])
	m := regexp.MustCompile(`url=(http://\S+)/metrics`).FindStringSubmatch(a.logged("serving metrics"))
	if m == nil {
		t.Fatal("the log does not tell the URL")
	}
	get := func(path string) string {
		t.Helper()
		r, err := http.Get(m[1] + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		text, err := io.ReadAll(r.Body)
		if err != nil || r.StatusCode != http.StatusOK {
			t.Errorf("GET %s: %d %s %v", path, r.StatusCode, text, err)
		}
		return string(text)
	}
	figures := func(lines ...string) {
		t.Helper()
		text := get("/metrics")
		for _, line := range lines {
			if !strings.Contains(text, line+"\n") {
				t.Errorf("the scrape lacks %s", line)
			}
		}
	}
	get("/readyz")
	figures(`nbdserve_export_active{export=""} 0`, `nbdserve_export_activations_total{export="",result="ok"} 0`)
	c := connect(t, "unix", sockets[0])
	a.logged("activated")
	get("/readyz")
	figures(`nbdserve_export_active{export=""} 1`, `nbdserve_export_activations_total{export="",result="ok"} 1`)

	refused, err := net.Dial("unix", sockets[1])
	if err != nil {
		t.Fatal(err)
	}
	defer refused.Close()
	hello := binary.BigEndian.AppendUint32(nil, 3)
	hello = append(hello, "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00"...) // NBD_OPT_EXPORT_NAME ""
	if _, err := refused.Write(hello); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(refused); err != nil || len(rest) != 18 {
		t.Errorf("behind the greeting come %q, %v", rest[min(18, len(rest)):], err)
	}
	if l := b.logged("client refused"); !strings.Contains(l, fmt.Sprintf("process %d", a.cmd.Process.Pid)) {
		t.Errorf("the log does not name the holder: %s", l)
	}
	c.Close()
	a.logged("inactivated")
	figures(`nbdserve_export_active{export=""} 0`, `nbdserve_export_inactivations_total{export="",result="ok"} 1`)
	connect(t, "unix", sockets[1]).Close()
	b.logged("inactivated")
	a.end()
	b.end()
}

func TestLogsAreJsonOnRequest(t *testing.T) {
	p, _ := serveDisk(t, "--log-format=json")
	if l := p.logged("serving"); !strings.HasPrefix(l, `{"time":`) || !strings.Contains(l, `"size":1048576`) {
		t.Errorf("log line: %s", l)
	}
	p.end()
	p, _ = serveDisk(t, "--log-level=error")
	p.end()
	if len(p.lines) != 0 {
		t.Errorf("logged with --log-level=error: %q", p.lines)
	}
}
