package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdserve/nbdserve/block"
)

// memTarget is a file in memory. It grows when it is written past its end.
type memTarget struct {
	data []byte
	log  func(op string, off int64, p []byte) // nil, or told of each change before it is made
}

func (m *memTarget) Size() int64 { return int64(len(m.data)) }

func (m *memTarget) ReadAt(_ context.Context, p []byte, off int64) error {
	if off < 0 || off > m.Size() || int64(len(p)) > m.Size()-off {
		return block.ErrRange
	}
	copy(p, m.data[off:])
	return nil
}

func (m *memTarget) WriteAt(_ context.Context, p []byte, off int64, _ block.ReqFlags) error {
	if m.log != nil {
		m.log("write", off, p)
	}
	if end := off + int64(len(p)); end > m.Size() {
		m.data = append(m.data, make([]byte, end-m.Size())...)
	}
	copy(m.data[off:], p)
	return nil
}

func (m *memTarget) Flush(context.Context) error {
	if m.log != nil {
		m.log("flush", 0, nil)
	}
	return nil
}

func (m *memTarget) Truncate(_ context.Context, size int64) error {
	m.data = append(m.data[:min(size, m.Size())], make([]byte, max(size-m.Size(), 0))...)
	return nil
}

// fileTarget is a file on disk.
type fileTarget struct{ *os.File }

func (f fileTarget) Size() int64 {
	fi, err := f.Stat()
	if err != nil {
		return 0
	}
	return fi.Size()
}

func (f fileTarget) ReadAt(_ context.Context, p []byte, off int64) error {
	_, err := f.File.ReadAt(p, off)
	return err
}

func (f fileTarget) WriteAt(_ context.Context, p []byte, off int64, _ block.ReqFlags) error {
	_, err := f.File.WriteAt(p, off)
	return err
}

func (f fileTarget) Flush(context.Context) error                  { return nil }
func (f fileTarget) Truncate(_ context.Context, size int64) error { return f.File.Truncate(size) }

// imagePath gives the path for an image of a test.
func imagePath(t testing.TB, name string) string { return filepath.Join(t.TempDir(), name) }

// openTarget opens an image for reading and writing until the test ends.
func openTarget(t testing.TB, path string) fileTarget {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return fileTarget{f}
}

// loadTarget reads an image into memory.
func loadTarget(t testing.TB, path string) *memTarget {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return &memTarget{data: data}
}

// saveTarget writes an image from memory to a file of its own.
func saveTarget(t testing.TB, m *memTarget) string {
	t.Helper()
	path := imagePath(t, "saved.qcow2")
	if err := os.WriteFile(path, m.data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// runTool runs a program and returns its output. An exit status that is not 0 is an error.
func runTool(t testing.TB, name string, args ...string) (string, error) {
	t.Helper()
	var errs bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil && cmd.ProcessState == nil {
		t.Fatalf("%s: %v", name, err)
	}
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, out, errs.Bytes())
	}
	return string(out), err
}

// mustRun runs a program that must succeed.
func mustRun(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := runTool(t, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// parseFile parses the header of an image file.
func parseFile(t testing.TB, path string) *Header {
	t.Helper()
	f := openTarget(t, path)
	h, err := ParseHeader(t.Context(), f, f.Size())
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return h
}

// newImage is an empty image in memory, of 1 MiB unless opts say else.
func newImage(t testing.TB, opts CreateOptions) *memTarget {
	t.Helper()
	if opts.Size == 0 {
		opts.Size = 1 << 20
	}
	m := &memTarget{}
	if err := Create(context.Background(), m, opts); err != nil {
		t.Fatal(err)
	}
	return m
}

func parse(m *memTarget) (*Header, error) { return ParseHeader(context.Background(), m, m.Size()) }

func mustParse(t testing.TB, m *memTarget) *Header {
	t.Helper()
	h, err := parse(m)
	if err != nil {
		t.Fatal(err)
	}
	return h
}
