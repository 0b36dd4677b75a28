package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// qemuImage makes an image file with qemu-img.
func qemuImage(t testing.TB, args ...string) string {
	t.Helper()
	path := imagePath(t, "image.qcow2")
	mustRun(t, "qemu-img", append([]string{"create", "-q", "-f", "qcow2"}, append(args[:len(args)-1], path, args[len(args)-1])...)...)
	return path
}

// readRaw is what qemu-img reads of an image.
func readRaw(t testing.TB, path string) []byte {
	t.Helper()
	out := imagePath(t, "raw")
	mustRun(t, "qemu-img", "convert", "-O", "raw", path, out)
	p, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// An image goes to and fro between the node and qemu's tools, none of which is told to
// ignore locks.
func TestG22ImageGoesToAndFro(t *testing.T) {
	const size = 2 << 20
	dir := t.TempDir()
	base := filepath.Join(dir, "base.raw")
	model := pattern(1, size/2)
	writeFile(t, base, model)
	model = append(model, make([]byte, size/2)...)
	path := filepath.Join(dir, "image.qcow2")
	mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", base, "-F", "raw", path, fmt.Sprint(size))
	d := openDisk(t, testGraph(t), imageNode(path))
	rng := rand.New(rand.NewPCG(1, 1))
	for round := range 8 {
		for i := range 20 {
			off := rng.Int64N(size - 20000)
			n := rng.Int64N(20000) + 1
			p := make([]byte, n)
			if i%3 == 0 {
				d.must(func(ctx context.Context) error { return d.root.WriteZeroes(ctx, off, n, block.MayUnmap) })
			} else {
				p = pattern(uint64(round<<8|i), n)
				d.write(p, off)
			}
			copy(model[off:], p)
		}
		d.setActive(false)
		checkFile(t, path)
		if got := readRaw(t, path); firstDifference(got, model) >= 0 {
			t.Fatalf("round %d: qemu-img reads something else at %#x", round, firstDifference(got, model))
		}
		at := round * 70000
		mustRun(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P %d %d 50000", round+1, at), "-c", fmt.Sprintf("discard %d 16k", at+100<<10), path)
		copy(model[at:], bytes.Repeat([]byte{byte(round + 1)}, 50000))
		clear(model[at+100<<10:][:16<<10])
		if want := readRaw(t, path); firstDifference(want, model) >= 0 {
			copy(model, want) // a discard that qemu rounds
		}
		d.setActive(true)
		d.compare(model)
	}
	if _, err := runTool(t, "qemu-io", "-f", "qcow2", "-c", "write 0 512", path); err == nil {
		t.Errorf("qemu-io could write to an image in use")
	}
}

func TestG22InactiveImageHoldsLittle(t *testing.T) {
	path := qemuImage(t, "64M")
	d := openDisk(t, testGraph(t), imageNode(path))
	d.write(pattern(1, 1<<20), 0)
	d.setActive(false)
	im := d.image()
	if im.l1.mem != nil || im.l2 != nil || im.refs != nil || im.decompressed != nil || im.fixed != nil || im.reaper.stop != nil {
		t.Errorf("caches or background work are left")
	}
	if got := im.Size(); got != 64<<20 {
		t.Errorf("size %d", got)
	}
	for _, m := range im.Measurements() {
		if m.Name == "l2_cache_bytes" && m.Value != 0 || m.Name == "metadata_dirty" && m.Value != 0 {
			t.Errorf("%s is %g", m.Name, m.Value)
		}
	}
	// Whoever asks the driver itself is refused, too.
	if err := im.ReadAt(context.Background(), make([]byte, 512), 0); !errors.Is(err, block.ErrInactive) {
		t.Errorf("read: %v", err)
	}
	d.setActive(true)
}

// While the node is inactive, others change all that it remembers of the image.
func TestG22ActivationReadsEverythingAnew(t *testing.T) {
	path := qemuImage(t, "-o", "cluster_size=64k", "1M")
	d := openDisk(t, testGraph(t), imageNode(path))
	d.write(pattern(1, 1000), 0)
	d.setActive(false)
	mustRun(t, "qemu-img", "resize", "-q", path, "3M")
	if n, err := d.root.PeekSize(context.Background()); err != nil || n != 3<<20 {
		t.Errorf("an inactive image has %d bytes (%v)", n, err)
	}
	d.setActive(true)
	d.compare(append(pattern(1, 1000), make([]byte, 3<<20-1000)...))

	// Another image takes its place, of another cluster size and version.
	d.setActive(false)
	mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512,compat=0.10", path, "128k")
	mustRun(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 4k 60k", path)
	d.setActive(true)
	want := make([]byte, 128<<10)
	copy(want[4<<10:], bytes.Repeat([]byte{7}, 60<<10))
	d.compare(want)
	if got := d.node.Limits().PreferredTransfer; got != 512 {
		t.Errorf("preferred transfer is %d", got)
	}
	d.write(pattern(2, 1000), 100)
	copy(want[100:], pattern(2, 1000))
	d.setActive(false)
	checkFile(t, path)
	if firstDifference(readRaw(t, path), want) >= 0 {
		t.Errorf("qemu-img reads something else")
	}
	d.setActive(true)
}

// edit changes an image in memory that no node uses now.
func edit(t *testing.T, s *blocktest.Store, f func(m *memTarget, h *Header)) {
	t.Helper()
	m := &memTarget{data: s.Bytes()}
	f(m, mustParse(t, m))
	s.Write(m.data, 0)
}

func TestG22DirtyImageIsRepairedWhenItBecomesWritable(t *testing.T) {
	for _, readOnly := range []bool{false, true} {
		s := emptyStore(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096})
		cfg := storeNode(s, nil)
		d := openDisk(t, testGraph(t), cfg)
		d.write(pattern(1, 100000), 0)
		d.close()
		cfg.ReadOnly = readOnly
		d.open()
		d.setActive(false)
		spoilRefcounts(t, s)
		before := s.Bytes()
		d.setActive(true)
		want := append(pattern(1, 100000), make([]byte, 1<<20-100000)...)
		d.compare(want)
		if readOnly {
			if !bytes.Equal(s.Bytes(), before) {
				t.Errorf("a read-only activation has written")
			}
			// Reopened, it becomes writable.
			if err := d.reopen(func(c *block.Config) { c.ReadOnly = false }); err != nil {
				t.Fatal(err)
			}
			d.compare(want)
		}
		checkStore(t, s, false)
	}
}

func TestG22CorruptImageIsRefused(t *testing.T) {
	s := emptyStore(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096})
	d := openDisk(t, testGraph(t), storeNode(s, nil))
	d.write(pattern(1, 1000), 0)
	d.setActive(false)
	mark := func(bits uint64) {
		edit(t, s, func(m *memTarget, h *Header) { binary.BigEndian.PutUint64(m.data[incompatibleOffset:], bits) })
	}
	mark(IncompatCorrupt)
	for range 2 {
		err := d.graph.SetActive(context.Background(), true, d.node)
		if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "Image is corrupt; cannot be opened read/write") || d.node.Active() {
			t.Fatalf("active %t, %v", d.node.Active(), err)
		}
	}
	mark(0)
	d.setActive(true)
	if got := d.read(0, 1000); !bytes.Equal(got, pattern(1, 1000)) {
		t.Errorf("read %x", got[:8])
	}
}

func TestG22BitmapsOfAnInactiveImage(t *testing.T) {
	path := qemuImage(t, "1M")
	d := openDisk(t, testGraph(t), imageNode(path))
	d.setActive(false)
	mustRun(t, "qemu-img", "bitmap", "--add", path, "b0")
	p, err := d.node.Peek(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if info, ok := p.Info.(*Info); !ok || len(info.Bitmaps) != 1 || info.Bitmaps[0].Name != "b0" {
		t.Errorf("info is %+v", p.Info)
	}
	err = d.graph.SetActive(context.Background(), true, d.node)
	if !errors.Is(err, block.ErrNotSupported) || !strings.Contains(err.Error(), "bitmaps") || d.node.Active() {
		t.Errorf("active %t, %v", d.node.Active(), err)
	}
	mustRun(t, "qemu-img", "bitmap", "--remove", path, "b0")
	d.setActive(true)
}

// Each request to the file fails in turn, while the node goes to rest or wakes up. It
// stays what it was then, with its contents, and can do so later.
func TestG22FailureAtEachRequest(t *testing.T) {
	const size = 256 << 10
	for _, c := range []struct {
		name string
		ops  []blocktest.Op
		turn func(d *disk, back bool) error
	}{
		{"inactive", []blocktest.Op{blocktest.OpWrite, blocktest.OpFlush, blocktest.OpZero, blocktest.OpRead}, func(d *disk, back bool) error {
			return d.graph.SetActive(context.Background(), back, d.node)
		}},
		{"read-only", []blocktest.Op{blocktest.OpWrite, blocktest.OpFlush, blocktest.OpZero, blocktest.OpRead}, func(d *disk, back bool) error {
			return d.reopen(func(c *block.Config) { c.ReadOnly = !back })
		}},
		{"caches", []blocktest.Op{blocktest.OpWrite, blocktest.OpFlush, blocktest.OpZero, blocktest.OpRead}, func(d *disk, back bool) error {
			return d.reopen(func(c *block.Config) {
				c.Options = &Options{L2CacheSize: map[bool]int64{false: 1 << 20, true: 1}[back], RefcountCacheSize: 1}
			})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := emptyStore(t, CreateOptions{Size: size, ClusterSize: 512, RefcountBits: 64})
			faults := new(blocktest.Faults)
			cfg := storeNode(s, nil)
			cfg.Options = &Options{L2CacheSize: 1, RefcountCacheSize: 1}
			cfg.Children["file"] = blocktest.FaultConfig(faults, cfg.Children["file"])
			d := openDisk(t, testGraph(t), cfg)
			model := make([]byte, size)
			i := uint64(0)
			change := func() {
				i++
				off := int64(i*7919%200) << 10
				p := pattern(i, 9000)
				d.write(p, off)
				copy(model[off:], p)
				d.must(func(ctx context.Context) error { return d.root.WriteZeroes(ctx, off+2048, 4096, block.MayUnmap) })
				clear(model[off+2048:][:4096])
			}
			for _, op := range c.ops {
				for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
					for _, back := range []bool{false, true} {
						for skip := 0; ; skip++ {
							if !back {
								change()
							}
							// The background work must not take the fault.
							if err := d.graph.DrainBegin(context.Background(), d.node); err != nil {
								t.Fatal(err)
							}
							faults.Add(blocktest.Fault{Op: op, Skip: skip, Times: 1, Err: errno})
							fired := faults.Fired()
							err := c.turn(d, back)
							met := faults.Fired() > fired
							faults.Clear()
							d.graph.DrainEnd(d.node)
							if met && (err == nil || !errors.Is(err, errno)) {
								t.Fatalf("%s %d failed with %v, and the turn with %v", op, skip, errno, err)
							}
							if !met {
								if err != nil {
									t.Fatalf("without a fault: %v", err)
								}
								break
							}
							if !back {
								d.compare(model)
								change()
							}
						}
						if !back {
							checkStore(t, s, true)
						}
					}
					d.compare(model)
				}
			}
			d.close()
			checkStore(t, s, true)
		})
	}
}

// overlay makes an image over a backing file of the same folder.
func overlay(t *testing.T, dir, name, base string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path, "1M")
	return path
}

func TestG22ActivationFollowsTheBackingFileOfTheHeader(t *testing.T) {
	dir := t.TempDir()
	for i, name := range []string{"one", "two"} {
		mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(dir, name), "1M")
		mustRun(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P %d 0 64k", i+1), filepath.Join(dir, name))
	}
	path := overlay(t, dir, "top", "one")
	g := testGraph(t)
	d := openDisk(t, g, imageNode(path))
	first := func(want byte) {
		t.Helper()
		if got := d.read(0, 1)[0]; got != want {
			t.Errorf("read %d, want %d", got, want)
		}
	}
	first(1)
	d.setActive(false)
	rebase := func(base string) {
		t.Helper()
		mustRun(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
	}
	rebase("two")
	d.setActive(true)
	first(2)
	if got := d.node.Backing().Node(); !got.Active() || !got.ReadOnly() || got.Filename() != filepath.Join(dir, "two") || len(g.Nodes()) != 4 {
		t.Errorf("backing %s, active %t, %d nodes", got.Filename(), got.Active(), len(g.Nodes()))
	}
	// To none, and to one that is not there: then the node stays inactive, with the old one.
	d.setActive(false)
	mustRun(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", path)
	d.setActive(true)
	first(0)
	if d.node.Backing() != nil || len(g.Nodes()) != 2 {
		t.Errorf("%d nodes", len(g.Nodes()))
	}
	d.setActive(false)
	rebase("missing")
	for range 2 {
		err := g.SetActive(context.Background(), true, d.node)
		if !errors.Is(err, syscall.ENOENT) || d.node.Active() || len(g.Nodes()) != 2 {
			t.Errorf("active %t, %d nodes, %v", d.node.Active(), len(g.Nodes()), err)
		}
	}
	rebase("one")
	d.setActive(true)
	first(1)
	d.setActive(false)
	rebase("missing")
	if err := g.SetActive(context.Background(), true, d.node); !errors.Is(err, syscall.ENOENT) || d.node.Backing() == nil {
		t.Errorf("backing %v, %v", d.node.Backing(), err)
	}
	rebase("one")
	d.setActive(true)
	first(1)
}

// A backing node that the configuration names stays, whatever the header says.
func TestG22ConfiguredBackingNodeStays(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "mine"), bytes.Repeat([]byte{9}, 1<<20))
	mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(dir, "one"), "1M")
	path := overlay(t, dir, "top", "one")
	cfg := imageNode(path)
	cfg.Children["backing"] = &block.Config{Driver: "raw", Children: map[string]*block.Config{"file": fileNode(filepath.Join(dir, "mine"))}}
	d := openDisk(t, testGraph(t), cfg)
	d.setActive(false)
	mustRun(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", path)
	d.setActive(true)
	if got := d.read(0, 1)[0]; got != 9 {
		t.Errorf("read %d", got)
	}
}

func TestG22ChainOpenedInactive(t *testing.T) {
	dir := t.TempDir()
	mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(dir, "base"), "1M")
	path := overlay(t, dir, "top", "base")
	g := testGraph(t)
	user := openDisk(t, g, imageNode(path)) // has all the locks
	cfg := imageNode(path)
	cfg.Inactive = true
	d := openDisk(t, testGraph(t), cfg)
	if d.node.Active() || d.node.Backing() == nil || d.root.Size() != 1<<20 {
		t.Errorf("active %t, backing %v, %d bytes", d.node.Active(), d.node.Backing(), d.root.Size())
	}
	for _, n := range d.graph.Nodes() {
		if n.Active() {
			t.Errorf("node %s is active", n.Name())
		}
	}
	err := d.graph.SetActive(context.Background(), true, d.node)
	if !errors.Is(err, block.ErrBusy) || !strings.Contains(err.Error(), fmt.Sprintf("this process (%d)", os.Getpid())) {
		t.Errorf("activation of an image in use: %v", err)
	}
	user.write(pattern(1, 5000), 1000)
	user.setActive(false)
	d.setActive(true)
	if got := d.read(1000, 5000); !bytes.Equal(got, pattern(1, 5000)) {
		t.Errorf("read %x", got[:8])
	}
	d.setActive(false)
	user.setActive(true)

	// Over a file that was opened inactive by itself.
	file := fileNode(path)
	file.NodeName, file.Inactive = "f", true
	f, err := d.graph.Open(context.Background(), file)
	if err != nil {
		t.Fatal(err)
	}
	defer d.graph.Release(context.Background(), f)
	over := openDisk(t, d.graph, &block.Config{Driver: "qcow2", Inactive: true, Children: map[string]*block.Config{"file": {Ref: "f"}}})
	if over.root.Size() != 1<<20 || over.node.Backing() == nil {
		t.Errorf("%d bytes, backing %v", over.root.Size(), over.node.Backing())
	}
}

func TestG21ImageBecomesReadOnlyAndBack(t *testing.T) {
	const size = 1 << 20
	path := qemuImage(t, "-o", "cluster_size=512", fmt.Sprint(size))
	d := openDisk(t, testGraph(t), imageNode(path))
	model := make([]byte, size)
	for round := range 4 {
		off := int64(round * 100000)
		d.write(pattern(uint64(round), 90000), off)
		copy(model[off:], pattern(uint64(round), 90000))
		if err := d.reopen(func(c *block.Config) { c.ReadOnly = true }); err != nil {
			t.Fatal(err)
		}
		if !d.node.ReadOnly() || !d.node.Child("file").Node().ReadOnly() || d.image().writable {
			t.Errorf("not read-only")
		}
		if err := d.do(func(ctx context.Context) error { return d.root.WriteAt(ctx, model[:512], 0, 0) }); !errors.Is(err, syscall.EPERM) {
			t.Errorf("write: %v", err)
		}
		d.compare(model)
		checkFile(t, path)
		if got := readRaw(t, path); firstDifference(got, model) >= 0 {
			t.Errorf("qemu-img reads something else at %#x", firstDifference(got, model))
		}
		if err := d.reopen(func(c *block.Config) { c.ReadOnly = false }); err != nil {
			t.Fatal(err)
		}
		d.compare(model)
	}
}

func TestG21ImageGetsAnotherFile(t *testing.T) {
	one, two := emptyStore(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096}), emptyStore(t, CreateOptions{Size: 2 << 20, ClusterSize: 512})
	g := testGraph(t)
	d := openDisk(t, g, storeNode(one, nil))
	file := blocktest.MemoryConfig(two)
	file.NodeName = "two"
	n, err := g.Open(context.Background(), file)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Release(context.Background(), n)
	d.write(pattern(1, 5000), 0)
	to := func(name string) error {
		return d.reopen(func(c *block.Config) { c.Children["file"] = &block.Config{Ref: name} })
	}
	if err := to("two"); err != nil {
		t.Fatal(err)
	}
	checkStore(t, one, false)
	d.compare(make([]byte, 2<<20))
	d.write(pattern(2, 5000), 0)
	// One that is no image: the old file stays.
	junk := blocktest.MemoryConfig(blocktest.StoreOf(pattern(3, 1<<20)))
	junk.NodeName = "junk"
	j, err := g.Open(context.Background(), junk)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Release(context.Background(), j)
	if err := to("junk"); !errors.Is(err, block.ErrInvalid) || d.node.Child("file").Node() != n {
		t.Errorf("file %s, %v", d.node.Child("file").Node().Name(), err)
	}
	d.compare(append(pattern(2, 5000), make([]byte, 2<<20-5000)...))
	d.close()
	checkStore(t, two, false)
}

// Random requests, activations and reopens against a model of bytes. The image is whole
// whenever the node rests.
func TestRandomLivesOfAnImage(t *testing.T) {
	const size = 128 << 10
	rapid.Check(t, func(rt *rapid.T) {
		cluster := rapid.SampledFrom([]int64{512, 4096, 65536}).Draw(rt, "cluster")
		s := blocktest.StoreOf(newImage(t, CreateOptions{Size: size, ClusterSize: cluster}).data)
		under := pattern(99, size/2)
		model := append(append([]byte{}, under...), make([]byte, size/2)...)
		d := &disk{t: rt, graph: testGraph(rt), cfg: storeNode(s, blocktest.MemoryConfig(blocktest.StoreOf(under)))}
		d.open()
		rest := ""
		check := func(err error) {
			if err != nil {
				rt.Fatalf("%v", err)
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				off := rapid.Int64Range(0, size-1).Draw(rt, "off")
				p := pattern(rapid.Uint64Range(0, 1000).Draw(rt, "seed"), min(size-off, rapid.Int64Range(1, 20000).Draw(rt, "n")))
				zero := rapid.IntRange(0, 3).Draw(rt, "kind") == 0
				err := d.do(func(ctx context.Context) error {
					if zero {
						clear(p)
						return d.root.WriteZeroes(ctx, off, int64(len(p)), block.MayUnmap)
					}
					return d.root.WriteAt(ctx, p, off, 0)
				})
				if rest != "" {
					if !errors.Is(err, syscall.EPERM) {
						rt.Fatalf("write while %s: %v", rest, err)
					}
					return
				}
				check(err)
				copy(model[off:], p)
			},
			"inactive": func(rt *rapid.T) {
				if rest == "inactive" {
					d.setActive(true)
					rest = ""
					if d.node.ReadOnly() {
						rest = "read-only"
					}
					return
				}
				d.setActive(false)
				checkStore(rt, s, false)
				rest = "inactive"
			},
			"read-only": func(rt *rapid.T) {
				check(d.reopen(func(c *block.Config) { c.ReadOnly = !c.ReadOnly }))
				switch {
				case rest == "inactive":
				case d.node.ReadOnly():
					checkStore(rt, s, false)
					rest = "read-only"
				default:
					rest = ""
				}
			},
			"caches": func(rt *rapid.T) {
				check(d.reopen(func(c *block.Config) {
					c.Options = &Options{L2CacheSize: rapid.Int64Range(0, 1<<16).Draw(rt, "l2"), RefcountCacheSize: rapid.Int64Range(0, 1<<14).Draw(rt, "refcounts")}
				}))
			},
			"": func(rt *rapid.T) {
				if rest != "inactive" {
					d.compare(model)
				}
			},
		})
		d.close()
		checkStore(rt, s, false)
	})
}
