package integration

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// output collects what a program says, and can be read meanwhile.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
	seen *sync.Cond
	done bool
}

func newOutput() *output {
	o := new(output)
	o.seen = sync.NewCond(&o.mu)
	return o
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.seen.Broadcast()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// lines waits for n whole lines, or for the end of the program, and returns those there are.
func (o *output) lines(n int) []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	for bytes.Count(o.text.Bytes(), []byte{'\n'}) < n && !o.done {
		o.seen.Wait()
	}
	return strings.Split(strings.TrimSuffix(o.text.String(), "\n"), "\n")
}

func (o *output) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.done = true
	o.seen.Broadcast()
}

// A server is a running `nbdserve serve`.
type server struct {
	t              testing.TB
	cmd            *exec.Cmd
	socket         string // its first unix socket
	stdout, stderr *output
	exited         chan struct{}
}

// start serves as args say, by the binary that looks for data races, and returns when
// the server says that it is ready. Without --listen among args it listens on a unix
// socket of its own. At the end of the test it is stopped with SIGTERM, and must exit
// with 0 and leave no socket.
func start(t testing.TB, args ...string) *server {
	t.Helper()
	return startBinary(t, raceBinary, args...)
}

func startBinary(t testing.TB, binary string, args ...string) *server {
	t.Helper()
	socket := ""
	for i, arg := range args {
		if arg == "--listen" && socket == "" {
			socket, _ = strings.CutPrefix(args[i+1], "unix:")
		}
	}
	if !slices.Contains(args, "--listen") {
		socket = filepath.Join(tempDir(t), "s")
		args = append([]string{"--listen", "unix:" + socket}, args...)
	}
	return startCommand(t, exec.Command(binary, append([]string{"serve"}, args...)...), socket)
}

// startCommand starts a prepared command that becomes a server.
func startCommand(t testing.TB, cmd *exec.Cmd, socket string) *server {
	t.Helper()
	s := &server{t: t, cmd: cmd, socket: socket, stdout: newOutput(), stderr: newOutput(), exited: make(chan struct{})}
	ready := notifySocket(t)
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+ready.path)
	cmd.Stdout, cmd.Stderr = s.stdout, s.stderr
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		cmd.Wait() // the exit status is in ProcessState
		s.stdout.end()
		s.stderr.end()
		close(s.exited)
	}()
	t.Cleanup(s.stop)
	select {
	case err := <-ready.result:
		if err != nil {
			t.Fatalf("%s: %v\n%s", cmd, err, s.stderr)
		}
	case <-s.exited:
		t.Fatalf("%s: %s before it was ready\n%s", cmd, cmd.ProcessState, s.stderr)
	case <-time.After(patience):
		s.dump()
		t.Fatalf("%s: not ready\n%s", cmd, s.stderr)
	}
	return s
}

// A notification is the far end of sd_notify.
type notification struct {
	path   string
	result chan error // gets nil on READY=1
}

func notifySocket(t testing.TB) *notification {
	t.Helper()
	n := &notification{path: filepath.Join(tempDir(t), "n"), result: make(chan error, 1)}
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: n.path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	t.Cleanup(func() { c.Close(); <-ended })
	go func() {
		defer close(ended)
		p := make([]byte, 4096)
		for {
			k, err := c.Read(p)
			if err != nil {
				return
			}
			if slices.Contains(strings.Split(string(p[:k]), "\n"), "READY=1") {
				select {
				case n.result <- nil:
				default:
				}
			}
		}
	}()
	return n
}

func (s *server) running() bool {
	select {
	case <-s.exited:
		return false
	default:
		return true
	}
}

func (s *server) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.t.Error(err)
	}
}

// wait waits for the end of the server and returns its exit status.
func (s *server) wait() int {
	s.t.Helper()
	select {
	case <-s.exited:
	case <-time.After(patience):
		s.dump()
		s.t.Fatalf("%s does not end", s.cmd)
	}
	return s.cmd.ProcessState.ExitCode()
}

// dump makes a server that hangs show its goroutines, and ends it.
func (s *server) dump() {
	s.cmd.Process.Signal(syscall.SIGQUIT)
	select {
	case <-s.exited:
	case <-time.After(5 * time.Second):
		s.cmd.Process.Kill()
		<-s.exited
	}
	s.t.Logf("%s", s.stderr)
}

// stop ends the server with SIGTERM, if it still runs, and demands an orderly end.
func (s *server) stop() {
	s.t.Helper()
	if s.running() {
		s.signal(syscall.SIGTERM)
		if code := s.wait(); code != 0 {
			s.t.Errorf("%s: exit status %d after SIGTERM\n%s", s.cmd, code, s.stderr)
		}
		s.noSocket()
	}
	s.noRace()
}

func (s *server) noSocket() {
	s.t.Helper()
	if s.socket == "" {
		return
	}
	if _, err := os.Lstat(s.socket); !errors.Is(err, os.ErrNotExist) {
		s.t.Errorf("the socket is still there after the end: %v", err)
	}
}

func (s *server) noRace() {
	s.t.Helper()
	if text := s.stderr.String(); strings.Contains(text, "WARNING: DATA RACE") || strings.Contains(text, "panic:") {
		s.t.Errorf("%s", text)
	}
}

// kill ends the server as `kill -9` does.
func (s *server) kill() {
	s.t.Helper()
	s.signal(syscall.SIGKILL)
	s.wait()
	s.noRace()
}

// uri is the URI of the default export on the server's unix socket.
func (s *server) uri() string { return unixURI(s.socket, "") }

func unixURI(socket, export string) string {
	return fmt.Sprintf("nbd+unix:///%s?socket=%s", export, socket)
}

// status is a field of /proc/PID/status, in KiB.
func (s *server) status(field string) int {
	s.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.Atoi(strings.Fields(value)[0])
			if err != nil {
				s.t.Fatal(err)
			}
			return n
		}
	}
	s.t.Fatalf("/proc/PID/status has no %s", field)
	return 0
}

// refused runs nbdserve with args, which must fail at once: exit status 1 and one
// line that has all of the texts.
func refused(t testing.TB, args []string, texts ...string) {
	t.Helper()
	oneLine(t, try(t, raceBinary, args...), args, texts...)
}

func oneLine(t testing.TB, r result, args []string, texts ...string) {
	t.Helper()
	what := "nbdserve " + strings.Join(args, " ")
	if r.code != 1 {
		t.Errorf("%s: exit status %d, expected 1\n%s%s", what, r.code, r.stdout, r.stderr)
	}
	lines := strings.Split(strings.TrimSuffix(r.stderr, "\n"), "\n")
	if len(lines) != 1 || !strings.HasPrefix(lines[0], "nbdserve: ") {
		t.Errorf("%s: expected one line that begins with 'nbdserve: ', got\n%s", what, r.stderr)
	}
	for _, text := range texts {
		if !strings.Contains(r.stderr, text) {
			t.Errorf("%s: the error does not say '%s':\n%s", what, text, r.stderr)
		}
	}
}

// await waits until a program has said text, and returns all that it has said.
func (o *output) await(t testing.TB, text string) string {
	t.Helper()
	return o.awaitTimes(t, text, 1)
}

// awaitTimes is await for a text that is said n times.
func (o *output) awaitTimes(t testing.TB, text string, n int) string {
	t.Helper()
	late := false
	timer := time.AfterFunc(patience, func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		late = true
		o.seen.Broadcast()
	})
	defer timer.Stop()
	o.mu.Lock()
	defer o.mu.Unlock()
	for bytes.Count(o.text.Bytes(), []byte(text)) < n {
		if o.done || late {
			t.Fatalf("the program does not say '%s' %d times (ended: %v): %s", text, n, o.done, &o.text)
		}
		o.seen.Wait()
	}
	return o.text.String()
}
