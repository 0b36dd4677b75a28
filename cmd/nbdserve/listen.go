package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

const (
	defaultPort   = 10809
	maxSocketPath = 107 // bytes of sun_path without its final zero
)

// An address is where to listen, as --listen says it.
type address struct {
	network string // "unix" or "tcp"
	target  string // path, or host:port
}

// parseListen reads unix:PATH or tcp:HOST[:PORT]. An empty HOST means all addresses.
func parseListen(s string) (address, error) {
	network, target, _ := strings.Cut(s, ":")
	switch network {
	case "unix":
		if target == "" {
			return address{}, fmt.Errorf("--listen '%s' names no socket: say unix:PATH", s)
		}
		if len(target) > maxSocketPath {
			return address{}, fmt.Errorf("UNIX socket path '%s' is too long: %d bytes, at most %d are allowed", target, len(target), maxSocketPath)
		}
		if target[0] == '@' {
			target = "./" + target // a file, not Go's name for an abstract socket
		}
		return address{network, target}, nil
	case "tcp":
		host, port, err := net.SplitHostPort(target)
		if err != nil { // no port, or not well formed
			bracketed := strings.HasPrefix(target, "[") && strings.HasSuffix(target, "]")
			if bracketed {
				target = target[1 : len(target)-1]
			}
			host, port = target, strconv.Itoa(defaultPort)
			if isIPv6 := strings.Contains(host, ":") && net.ParseIP(host) != nil; strings.ContainsAny(host, ":[]") && !isIPv6 || bracketed && !isIPv6 {
				return address{}, fmt.Errorf("--listen '%s' is not tcp:HOST:PORT (IPv6 addresses stand in brackets)", s)
			}
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil {
			return address{}, fmt.Errorf("--listen '%s': port '%s' is not a number from 0 to 65535", s, port)
		} else {
			port = strconv.FormatUint(n, 10)
		}
		return address{network, net.JoinHostPort(host, port)}, nil
	}
	return address{}, fmt.Errorf("--listen '%s' is neither unix:PATH nor tcp:HOST:PORT", s)
}

// A listener is a listening socket and what belongs to it.
type listener struct {
	net.Listener
	path string      // absolute path of a unix socket that we made, "" for others
	made fs.FileInfo // the socket that we made there
}

// listen makes the socket of a. A unix socket that nobody listens on any more is replaced.
func listen(a address) (*listener, error) {
	if a.network == "tcp" {
		l, err := net.Listen("tcp", a.target)
		if err != nil {
			return nil, fmt.Errorf("cannot listen on tcp:%s: %w", a.target, reason(err))
		}
		return &listener{Listener: l}, nil
	}
	if err := removeStale(a.target); err != nil {
		return nil, err
	}
	path, err := filepath.Abs(a.target)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on unix:%s: %w", a.target, err)
	}
	l, err := listenUnix(a.target)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on unix:%s: %w", a.target, reason(err))
	}
	made, err := os.Lstat(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("the socket just made is gone: %w", err), l.Close())
	}
	return &listener{Listener: l, path: path, made: made}, nil
}

// listenUnix makes a socket that accepts from the moment on at which it appears at
// path, where nothing may be: bind makes the file before listen lets anybody
// connect, so that happens under another name, if there is room for one.
func listenUnix(path string) (*net.UnixListener, error) {
	hidden := filepath.Join(filepath.Dir(path), fmt.Sprintf(".%s.%d", filepath.Base(path), os.Getpid()))
	if len(hidden) > maxSocketPath {
		hidden = path
	} else if err := os.Remove(hidden); err != nil && !errors.Is(err, fs.ErrNotExist) { // of a process that had our id
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: hidden, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // unlink looks first whether it is still ours
	if hidden == path {
		return l, nil
	}
	err = unix.Renameat2(unix.AT_FDCWD, hidden, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) { // not on this file system
		err = os.Rename(hidden, path)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close(), os.Remove(hidden))
	}
	return l, nil
}

// reason takes the address, which the caller names itself, out of a net error.
func reason(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	var call *os.SyscallError
	if errors.As(err, &call) {
		err = call.Err
	}
	return err
}

// removeStale makes way for a socket at path: it removes one that nobody listens
// on, and refuses to touch anything else.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("cannot listen on unix:%s: %w", path, err)
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("cannot listen on unix:%s: a file that is not a socket is there; remove it or choose another path", path)
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
		return fmt.Errorf("cannot listen on unix:%s: another server listens there; stop it or choose another path with --listen", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("cannot listen on unix:%s: cannot tell whether another server listens there: %w", path, reason(err))
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove the stale socket %s: %w", path, err)
	}
	return nil
}

// unlink removes the socket's file, if it is still the one that we made.
func (l *listener) unlink() error {
	if l.path == "" {
		return nil
	}
	info, err := os.Lstat(l.path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(info, l.made) {
		return nil
	}
	if err == nil {
		err = os.Remove(l.path)
	}
	return err
}

// public tells whether clients on other hosts may reach the listener.
func (l *listener) public() bool {
	tcp, ok := l.Addr().(*net.TCPAddr)
	return ok && !tcp.IP.IsLoopback()
}

// activated returns the sockets that systemd, or whoever does as it does, has
// opened for us (LISTEN_PID, LISTEN_FDS); none if we were started without.
func activated() ([]*listener, error) {
	var ls []*listener
	fail := func(err error) ([]*listener, error) {
		return nil, errors.Join(err, closeAll(ls))
	}
	for i, f := range activation.Files(true) {
		l, err := inherit(f)
		if err != nil {
			return fail(fmt.Errorf("socket activation: file descriptor %d: %w", 3+i, err))
		}
		ls = append(ls, l)
	}
	return ls, nil
}

// inherit makes a listener of a file that we were started with, and closes the file.
func inherit(f *os.File) (*listener, error) {
	defer f.Close() // FileListener duplicates it
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	accepting := 0
	if cerr := raw.Control(func(fd uintptr) { accepting, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN) }); cerr != nil {
		return nil, cerr
	}
	if err != nil || accepting == 0 {
		return nil, errors.New("this is not a listening socket")
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	if n := l.Addr().Network(); n != "unix" && n != "tcp" {
		return nil, errors.Join(fmt.Errorf("a %s socket: only unix and TCP stream sockets are served", n), l.Close())
	}
	return &listener{Listener: l}, nil
}

// socketPath is the path for the URI of a unix listener, one that we did not make too.
func (l *listener) socketPath() string {
	if l.path != "" {
		return l.path
	}
	if u, ok := l.Addr().(*net.UnixAddr); ok {
		return u.Name
	}
	return ""
}

// closeAll closes sockets that never served, and removes what they left.
func closeAll(ls []*listener) error {
	var errs []error
	for _, l := range ls {
		errs = append(errs, l.Close(), l.unlink())
	}
	return errors.Join(errs...)
}

// runDirectory is where the default sockets are: systemd's RuntimeDirectory,
// $XDG_RUNTIME_DIR/nbdserve, /run/nbdserve for root, else a folder of the user's own
// in the folder for temporary files. It is made if needed.
func runDirectory() (string, error) {
	if dir, _, _ := strings.Cut(os.Getenv("RUNTIME_DIRECTORY"), ":"); dir != "" {
		return dir, nil
	}
	dir := ""
	switch xdg := os.Getenv("XDG_RUNTIME_DIR"); {
	case xdg != "":
		dir = filepath.Join(xdg, "nbdserve")
	case os.Geteuid() == 0:
		dir = "/run/nbdserve"
	default:
		dir = filepath.Join(os.TempDir(), fmt.Sprintf("nbdserve-%d", os.Geteuid()))
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("cannot make the run directory: %w; choose a socket with --listen unix:PATH", err)
	}
	// In a folder that all may write to, somebody else may have been first.
	info, err := os.Lstat(dir)
	if err != nil {
		return "", err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !info.IsDir() || !ok || int(st.Uid) != os.Geteuid() {
		return "", fmt.Errorf("run directory %s is not a folder of user %d; choose a socket with --listen unix:PATH", dir, os.Geteuid())
	}
	return dir, nil
}

// defaultListen is the socket for an image when --listen is not given.
func defaultListen(image string) (address, error) {
	dir, err := runDirectory()
	if err != nil {
		return address{}, err
	}
	return parseListen("unix:" + filepath.Join(dir, filepath.Base(image)+".sock"))
}
