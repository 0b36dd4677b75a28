package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// A captive is the command of --run.
type captive struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // of Wait; valid after done
}

// startCaptive runs command in a shell, told by variables where to connect: uri,
// unixsocket, port and exportname; nbd is what older clients take for a URI.
func startCaptive(command, uri, export string, l *listener) (*captive, error) {
	cmd := exec.Command("/bin/sh", "-c", command)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	socket, port, nbd := l.socketPath(), "", ""
	if tcp, ok := l.Addr().(*net.TCPAddr); ok {
		port = strconv.Itoa(tcp.Port)
		nbd = "nbd:localhost:" + port
	} else {
		nbd = "nbd:unix:" + socket
	}
	// What systemd said to us is not for the command.
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "NOTIFY_SOCKET=") || strings.HasPrefix(v, "LISTEN_") || strings.HasPrefix(v, "WATCHDOG_")
	})
	cmd.Env = append(env, "uri="+uri, "nbd="+nbd, "unixsocket="+socket, "port="+port, "exportname="+export)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("--run: cannot start the shell: %w", err)
	}
	c := &captive{cmd: cmd, done: make(chan struct{})}
	go func() {
		c.err = cmd.Wait()
		close(c.done)
	}()
	return c, nil
}

// ended tells when the command has ended. It is nil, which never tells, without one.
func (c *captive) ended() <-chan struct{} {
	if c == nil {
		return nil
	}
	return c.done
}

// signal passes a signal on; a command that has ended takes none.
func (c *captive) signal(s os.Signal) error {
	if err := c.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("--run: cannot signal the command: %w", err)
	}
	return nil
}

// status is how the command ended, as a shell would report it. It waits for the end.
func (c *captive) status() error {
	<-c.done
	var exit *exec.ExitError
	switch {
	case c.err == nil:
		return nil
	case !errors.As(c.err, &exit):
		return fmt.Errorf("--run: %w", c.err)
	}
	if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return &exitError{code: 128 + int(ws.Signal())}
	}
	return &exitError{code: exit.ExitCode()}
}
