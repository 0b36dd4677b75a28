package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
)

// patience bounds each wait for something that is expected to happen soon.
const patience = 60 * time.Second

// tempDir is a folder for one test. Its path is short, as those of sockets must be.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(scratch, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// command prepares a program that is killed when the test takes too long.
func command(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}

type result struct {
	code           int
	stdout, stderr string
}

// try runs a program and returns what it said and its exit status.
func try(t testing.TB, name string, args ...string) result {
	t.Helper()
	return finish(t, command(t, name, args...))
}

func finish(t testing.TB, cmd *exec.Cmd) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v\n%s%s", cmd, err, &stdout, &stderr)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// run runs a program that must succeed, and returns its standard output.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	r := try(t, name, args...)
	if r.code != 0 {
		t.Fatalf("%s %s: exit status %d\n%s%s", name, strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

func decode[T any](t testing.TB, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("not the JSON that was expected: %v\n%s", err, text)
	}
	return v
}

// noise returns n bytes that depend on seed alone and do not compress.
func noise(seed uint64, n int) []byte {
	p := make([]byte, n)
	fill(seed, p)
	return p
}

func fill(seed uint64, p []byte) {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	rand.NewChaCha8(key).Read(p)
}

func writeFile(t testing.TB, path string, data []byte) string {
	t.Helper()
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// patchyFile makes a raw image with data, holes and zeroes, different for each seed.
func patchyFile(t testing.TB, path string, seed uint64, size int64) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(seed, 1))
	for off := int64(0); off < size; {
		n := min(size-off, 64*kib*(1+r.Int64N(16)))
		switch r.IntN(3) {
		case 0:
			_, err = f.WriteAt(noise(seed+uint64(off), int(n)), off)
		case 1:
			_, err = f.WriteAt(make([]byte, n), off)
		}
		if err != nil {
			t.Fatal(err)
		}
		off += n
	}
	return path
}

func checksum(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// allocated is the space that a file takes on its disk, in bytes.
func allocated(t testing.TB, path string) int64 {
	t.Helper()
	run(t, "sync", "-f", path) // delayed allocation counts at writeback
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// convert makes an image of raw with qemu-img.
func convert(t testing.TB, raw, format, path string, options ...string) string {
	t.Helper()
	run(t, "qemu-img", append(append([]string{"convert", "-q", "-f", "raw", "-O", format}, options...), raw, path)...)
	return path
}

// identical demands that two images have the same contents and size.
func identical(t testing.TB, formatA, a, formatB, b string) {
	t.Helper()
	r := try(t, "qemu-img", "compare", "-f", formatA, "-F", formatB, a, b)
	if r.code != 0 || strings.Contains(r.stdout+r.stderr, "mismatch") { // other sizes are a warning to it
		t.Errorf("%s and %s differ: %s%s", a, b, r.stdout, r.stderr)
	}
}

// clean demands that qemu-img and nbdserve find nothing wrong in a qcow2 image.
func clean(t testing.TB, path string) {
	t.Helper()
	for _, tool := range [][]string{{"qemu-img", "check", "-f", "qcow2"}, {raceBinary, "image", "check", "--format", "qcow2"}} {
		if r := try(t, tool[0], append(tool[1:], path)...); r.code != 0 {
			t.Errorf("%s: exit status %d\n%s%s", filepath.Base(tool[0]), r.code, r.stdout, r.stderr)
		}
	}
}
