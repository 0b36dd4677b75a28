package qcow2

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"github.com/nbdserve/nbdserve/formats/raw"
	"github.com/nbdserve/nbdserve/hostdev"
)

// hostDriver is the driver with names of files resolved as the command does it.
func hostDriver() *block.Driver {
	return Driver(Host{
		Identity: func(name string) string {
			if real, err := filepath.EvalSymlinks(name); err == nil {
				return real
			}
			return name
		},
	})
}

func fileNode(name string) *block.Config {
	return &block.Config{Driver: "file", Options: &hostdev.Options{Filename: name}}
}

// imageNode describes the node of an image file.
func imageNode(path string) *block.Config {
	return &block.Config{Driver: "qcow2", Unmap: true, Children: map[string]*block.Config{"file": fileNode(path)}}
}

// storeNode describes the node of an image in memory. backing may be nil.
func storeNode(s *blocktest.Store, backing *block.Config) *block.Config {
	c := &block.Config{Driver: "qcow2", Unmap: true, Options: new(Options), Children: map[string]*block.Config{"file": blocktest.MemoryConfig(s)}}
	if backing != nil {
		c.Children["backing"] = backing
	}
	return c
}

func testGraph(t blocktest.TB) *block.Graph {
	return blocktest.NewGraph(t, hostDriver(), raw.Driver(nil), hostdev.FileDriver())
}

// A disk is an open node with a root on it.
type disk struct {
	t     blocktest.TB
	graph *block.Graph
	cfg   *block.Config
	node  *block.Node
	root  *block.Root
}

func openDisk(t blocktest.TB, g *block.Graph, cfg *block.Config) *disk {
	t.Helper()
	d := &disk{t: t, graph: g, cfg: cfg}
	d.open()
	t.Cleanup(d.close)
	return d
}

func allow() error { return nil }

func (d *disk) setActive(active bool) {
	d.t.Helper()
	if err := d.graph.SetActive(context.Background(), active, d.node); err != nil {
		d.t.Fatalf("set active %t: %v", active, err)
	}
}

// reopen gives the node other options; the backing node stays.
func (d *disk) reopen(change func(c *block.Config)) error {
	c := *d.node.ExplicitConfig()
	c.Children = map[string]*block.Config{}
	if e := d.node.Backing(); e != nil {
		c.Children["backing"] = &block.Config{Ref: e.Node().Name()}
	}
	change(&c)
	return d.graph.Reopen(context.Background(), block.ReopenRequest{Node: d.node, Config: &c, Force: true})
}

func (d *disk) open() {
	d.t.Helper()
	ctx := context.Background()
	n, err := d.graph.Open(ctx, d.cfg)
	if err != nil {
		d.t.Fatalf("open: %v", err)
	}
	perm := block.PermConsistentRead
	if !d.cfg.ReadOnly {
		perm |= block.PermWrite
	}
	r, err := d.graph.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: perm, Shared: block.PermConsistentRead, AllowInactive: allow})
	if err != nil {
		d.t.Fatalf("attach: %v", err)
	}
	d.node, d.root = n, r
}

// close closes the disk, if it is open.
func (d *disk) close() {
	d.t.Helper()
	if d.node == nil {
		return
	}
	ctx := context.Background()
	if err := d.root.Detach(ctx); err != nil {
		d.t.Errorf("detach: %v", err)
	}
	if err := d.graph.Release(ctx, d.node); err != nil {
		d.t.Errorf("release: %v", err)
	}
	d.node, d.root = nil, nil
}

func (d *disk) image() *image { return d.node.Instance().(*image) }

// do runs a request.
func (d *disk) do(f func(ctx context.Context) error) error {
	return d.root.Do(context.Background(), f)
}

func (d *disk) must(f func(ctx context.Context) error) {
	d.t.Helper()
	if err := d.do(f); err != nil {
		d.t.Fatalf("%v", err)
	}
}

func (d *disk) write(p []byte, off int64) {
	d.t.Helper()
	d.must(func(ctx context.Context) error { return d.root.WriteAt(ctx, p, off, 0) })
}

func (d *disk) flush() {
	d.t.Helper()
	d.must(d.root.Flush)
}

func (d *disk) read(off, n int64) []byte {
	d.t.Helper()
	p := bytes.Repeat([]byte{0xa5}, int(n))
	d.must(func(ctx context.Context) error { return d.root.ReadAt(ctx, p, off) })
	return p
}

// compare reads the whole disk.
func (d *disk) compare(want []byte) {
	d.t.Helper()
	if d.root.Size() != int64(len(want)) {
		d.t.Fatalf("the disk has %d bytes, want %d", d.root.Size(), len(want))
	}
	for off := 0; off < len(want); off += 1 << 20 {
		part := want[off:min(off+1<<20, len(want))]
		got := d.read(int64(off), int64(len(part)))
		if i := firstDifference(got, part); i >= 0 {
			d.t.Fatalf("byte %#x is %#x, want %#x", off+i, got[i], part[i])
		}
	}
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// pattern returns n bytes that tell where they are from, none of them zero.
func pattern(seed uint64, n int64) []byte {
	rng := rand.New(rand.NewPCG(seed, 7))
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(1 + rng.IntN(255))
	}
	return p
}

// emptyStore is a new image in memory.
func emptyStore(t testing.TB, opts CreateOptions) *blocktest.Store {
	t.Helper()
	return blocktest.StoreOf(newImage(t, opts).data)
}

// checkStore fails the test if an image in memory has errors, or leaks where none are allowed.
func checkStore(t blocktest.TB, s *blocktest.Store, leaks bool) {
	t.Helper()
	m := &memTarget{data: s.Bytes()}
	h, err := ParseHeader(context.Background(), m, m.Size())
	if err != nil {
		t.Fatalf("%v", err)
	}
	var lines []string
	r, err := Check(context.Background(), m, h, func(line string) { lines = append(lines, line) })
	if err != nil {
		t.Fatalf("check: %v", err)
	}
	if r.Corruptions != 0 || r.CheckErrors != 0 || r.Leaks != 0 && !leaks {
		t.Fatalf("check found %d corruptions, %d leaks, %d errors:\n%s", r.Corruptions, r.Leaks, r.CheckErrors, strings.Join(lines[:min(len(lines), 5)], "\n"))
	}
}

// checkFile lets qemu-img judge an image file, which must be clean.
func checkFile(t testing.TB, path string) {
	t.Helper()
	if r := qemuCheck(t, path); r.Corruptions != 0 || r.Leaks != 0 || r.CheckErrors != 0 {
		t.Fatalf("qemu-img check: %+v\n%s", r, mustRun(t, "qemu-img", "check", path))
	}
}

func writeFile(t testing.TB, path string, p []byte) {
	t.Helper()
	if err := os.WriteFile(path, p, 0o600); err != nil {
		t.Fatal(err)
	}
}
