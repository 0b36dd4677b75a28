package main

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestListenAddresses(t *testing.T) {
	for s, want := range map[string]address{
		"unix:/run/a.sock":       {"unix", "/run/a.sock"},
		"unix:a.sock":            {"unix", "a.sock"},
		"unix:@a":                {"unix", "./@a"},
		"unix:a:b":               {"unix", "a:b"},
		"tcp:localhost:10810":    {"tcp", "localhost:10810"},
		"tcp:localhost":          {"tcp", "localhost:10809"},
		"tcp:":                   {"tcp", ":10809"},
		"tcp::0":                 {"tcp", ":0"},
		"tcp:[::1]:7":            {"tcp", "[::1]:7"},
		"tcp:[::1]":              {"tcp", "[::1]:10809"},
		"tcp:::1":                {"tcp", "[::1]:10809"},
		"tcp:192.0.2.1:00010809": {"tcp", "192.0.2.1:10809"},
	} {
		if got, err := parseListen(s); err != nil || got != want {
			t.Errorf("parseListen(%q) = %v, %v, want %v", s, got, err, want)
		}
	}
}

func TestUrisAreWhatClientsRead(t *testing.T) {
	unixAddr, tcp := &net.UnixAddr{Name: "s", Net: "unix"}, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 10809}
	for _, c := range []struct {
		addr         net.Addr
		socket, name string
		want         string
	}{
		{unixAddr, "/run/s", "", "nbd+unix:///?socket=/run/s"},
		{unixAddr, "/run/a b&c=d+e?#%.sock", "x y", "nbd+unix:///x%20y?socket=/run/a%20b%26c%3Dd%2Be%3F%23%25.sock"},
		{unixAddr, "/run/s", "/a/b", "nbd+unix:///%2Fa/b?socket=/run/s"},
		{unixAddr, "/run/s", "ä", "nbd+unix:///%C3%A4?socket=/run/s"},
		{tcp, "", "disk0", "nbd://127.0.0.1/disk0"},
		{&net.TCPAddr{IP: net.IPv6loopback, Port: 7}, "", "", "nbd://[::1]:7/"},
		{&net.TCPAddr{IP: net.IPv6unspecified, Port: 7}, "", "", "nbd://localhost:7/"},
		{&net.TCPAddr{IP: net.IPv4zero, Port: 10809}, "", "", "nbd://localhost/"},
		{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1080}, "", "", "nbd://127.0.0.1:1080/"},
	} {
		if got := uriOf(c.addr, c.socket, c.name); got != c.want {
			t.Errorf("uriOf(%v, %q, %q) = %q, want %q", c.addr, c.socket, c.name, got, c.want)
		}
	}
}

func mustListen(t *testing.T, path string) *listener {
	t.Helper()
	l, err := listen(address{"unix", path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestSocketThatNobodyListensOnIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	old := mustListen(t, path)
	if _, err := listen(address{"unix", path}); err == nil || !strings.Contains(err.Error(), "another server listens there") {
		t.Errorf("second listener on a socket: %v", err)
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Fatalf("Close removed the socket, so there is nothing stale to test with: %v", err)
	}
	mustListen(t, path)
}

// Clients wait for the socket to appear, and connect at once.
func TestSocketAcceptsWhenItAppears(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	for range 200 {
		connected := make(chan error)
		go func() {
			for {
				c, err := net.Dial("unix", path)
				if errors.Is(err, fs.ErrNotExist) {
					continue
				}
				if err == nil {
					err = c.Close()
				}
				connected <- err
				return
			}
		}()
		l := mustListen(t, path)
		if err := <-connected; err != nil {
			t.Fatalf("the socket is there, but %v", err)
		}
		if err := errors.Join(l.Close(), l.unlink()); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left in the folder: %v %v", left, err)
	}
	long := filepath.Join(dir, strings.Repeat("l", maxSocketPath-len(dir)-1)) // no room for another name
	if c, err := net.Dial("unix", mustListen(t, long).path); err != nil {
		t.Error(err)
	} else if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestOnlyOurOwnSocketIsRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	first := mustListen(t, path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second := mustListen(t, path)
	if err := first.unlink(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the socket of another was removed: %v", err)
	}
	for range 2 { // the second time it is gone already
		if err := second.unlink(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("our own socket is still there: %v", err)
	}
}

func TestDefaultSocketLiesInTheRunDirectory(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("RUNTIME_DIRECTORY", "")
	t.Setenv("XDG_RUNTIME_DIR", dir)
	a, err := defaultListen("images/disk.qcow2")
	if want := (address{"unix", dir + "/nbdserve/disk.qcow2.sock"}); err != nil || a != want {
		t.Errorf("default socket: %v, %v, want %v", a, err, want)
	}
	if info, err := os.Stat(dir + "/nbdserve"); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("run directory: %v, %v", info, err)
	}
	t.Setenv("RUNTIME_DIRECTORY", dir+":"+dir+"/other")
	if a, err := defaultListen("disk.raw"); err != nil || a.target != dir+"/disk.raw.sock" {
		t.Errorf("default socket in systemd's RuntimeDirectory: %v, %v", a, err)
	}

	// A run directory of somebody else's choice is not used.
	if err := os.RemoveAll(dir + "/nbdserve"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(t.TempDir(), dir+"/nbdserve"); err != nil {
		t.Fatal(err)
	}
	t.Setenv("RUNTIME_DIRECTORY", "")
	if a, err := defaultListen("disk.raw"); err == nil {
		t.Errorf("default socket behind a symbolic link: %v", a)
	}
}
