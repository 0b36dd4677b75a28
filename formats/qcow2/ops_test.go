package qcow2

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// headers are images to change the header of: options of qemu-img create.
var headers = [][]string{
	nil,
	{"-o", "compat=0.10"},
	{"-o", "cluster_size=4k"},
	{"-b", "base.raw", "-F", "raw"},
	{"-b", strings.Repeat("x", 200) + ".raw", "-F", "raw"},
	{"-o", "cluster_size=4k", "-b", strings.Repeat("y", 1023), "-F", "raw"},
	{"-o", "compat=0.10", "-b", strings.Repeat("z", 600), "-F", "raw"},
}

// createdByQemu makes an image of 1 MiB by qemu-img, which does not look at backing files.
func createdByQemu(t testing.TB, opts []string) string {
	t.Helper()
	path := imagePath(t, "a.qcow2")
	mustRun(t, "qemu-img", append(append([]string{"create", "-q", "-u", "-f", "qcow2"}, opts...), path, "1M")...)
	return path
}

// openAlone opens an image without its backing file.
func openAlone(t testing.TB, file *block.Config) *disk {
	t.Helper()
	return openDisk(t, testGraph(t), &block.Config{Driver: "qcow2", Unmap: true, NoBacking: true, Children: map[string]*block.Config{"file": file}})
}

func TestG26BackingFileIsChanged(t *testing.T) {
	for _, opts := range headers {
		path := createdByQemu(t, opts)
		d := openAlone(t, fileNode(path))
		d.write(bytes.Repeat([]byte{7}, 1000), 5000)
		for _, name := range []string{"new.raw", strings.Repeat("n", 1023), "b", strings.Repeat("m", 700), "", strings.Repeat("o", 450)} {
			format := map[bool]string{true: "", false: "raw"}[name == ""]
			if err := d.graph.ChangeBackingFile(t.Context(), d.node, name, format); err != nil {
				t.Fatalf("%.60q: to a name of %d bytes: %v", opts, len(name), err)
			}
			info := decodeInfo(t, path)
			if got, _ := info["backing-filename"].(string); got != name {
				t.Errorf("%.60q: qemu-img says backing file %q, want %q", opts, got, name)
			}
			if got, _ := info["backing-filename-format"].(string); got != format {
				t.Errorf("%.60q: qemu-img says format %q", opts, got)
			}
			if n, f := d.image().BackingFile(); n != name || f != format {
				t.Errorf("%.60q: the node says %q, %q", opts, n, f)
			}
		}
		d.write(bytes.Repeat([]byte{8}, 1000), 600_000)
		if err := d.graph.ChangeBackingFile(t.Context(), d.node, "", ""); err != nil {
			t.Fatal(err)
		}
		d.close()
		checkFile(t, path)
		d = openAlone(t, fileNode(path))
		if got := d.read(5000, 1000); !bytes.Equal(got, bytes.Repeat([]byte{7}, 1000)) {
			t.Errorf("%.60q: the data has changed", opts)
		}
		d.close()
	}
}

func decodeInfo(t testing.TB, path string) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal([]byte(mustRun(t, "qemu-img", "info", "-U", "--output=json", path)), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// Whatever sectors a crash leaves written, the file has the old header or the new one.
func TestG26HeaderChangesAsAWhole(t *testing.T) {
	names := []string{"new.raw", strings.Repeat("n", 1000), strings.Repeat("m", 700), "", strings.Repeat("k", 460)}
	for _, opts := range headers {
		data, err := os.ReadFile(createdByQemu(t, opts))
		if err != nil {
			t.Fatal(err)
		}
		was := mustParse(t, &memTarget{data: data})
		l := blocktest.NewLog(blocktest.StoreOf(data))
		d := openAlone(t, blocktest.CrashConfig(l))
		steps := []string{was.BackingFile}
		var ends []int64 // when a step had returned
		for _, name := range names {
			format := map[bool]string{true: "", false: "raw"}[name == ""]
			if err := d.graph.ChangeBackingFile(t.Context(), d.node, name, format); err != nil {
				t.Fatalf("%.60q: %v", opts, err)
			}
			steps, ends = append(steps, name), append(ends, l.Mark())
		}
		d.close()
		states := 0
		for s := range l.States(blocktest.Plan{PerCut: 16, Torn: true, Seed: 1}) {
			states++
			h, err := parse(&memTarget{data: s.Disk.Bytes()})
			if err != nil {
				t.Fatalf("%.60q, cut at %d, %s: %v", opts, s.Cut, s.Name, err)
			}
			done := 0 // steps that were durable at the cut
			for done < len(ends) && ends[done] <= s.Cut {
				done++
			}
			ok := h.BackingFile == steps[done] || done+1 < len(steps) && h.BackingFile == steps[done+1]
			if !ok || (h.BackingFile == "") != (h.BackingFormat == "") || h.Size != was.Size || h.L1Offset != was.L1Offset {
				t.Fatalf("%.60q, cut at %d, %s: backing file %.30q of format %q after step %d", opts, s.Cut, s.Name, h.BackingFile, h.BackingFormat, done)
			}
		}
		if states < len(names) {
			t.Errorf("%.60q: %d states", opts, states)
		}
	}
}

func TestG26BackingFileThatDoesNotFitChangesNothing(t *testing.T) {
	for _, cluster := range []int64{512, 1024} {
		s := emptyStore(t, CreateOptions{ClusterSize: cluster, BackingFile: strings.Repeat("b", 300), BackingFormat: "raw"})
		d := openAlone(t, blocktest.MemoryConfig(s))
		before := bytes.Clone(s.Bytes())
		err := d.graph.ChangeBackingFile(t.Context(), d.node, strings.Repeat("n", 1000), "raw")
		if !errors.Is(err, block.ErrNoSpace) || !strings.Contains(err.Error(), "no room for a backing file name of 1000 bytes") {
			t.Errorf("clusters of %d: %v", cluster, err)
		}
		for _, c := range []struct{ name, format string }{{"", "raw"}, {"a", ""}, {strings.Repeat("n", 1024), "raw"}, {"a\x00b", "raw"}} {
			if err := d.image().ChangeBackingFile(t.Context(), c.name, c.format); !errors.Is(err, block.ErrInvalid) {
				t.Errorf("backing file %.20q of format %q: %v", c.name, c.format, err)
			}
		}
		if !bytes.Equal(before, s.Bytes()) {
			t.Errorf("clusters of %d: the image has changed", cluster)
		}
		d.close()
	}
}

func amend(d *disk, text string) error {
	o, err := block.ParseOptions(text, "")
	if err != nil {
		return err
	}
	return d.graph.Amend(context.Background(), d.node, o)
}

func TestG26Amend(t *testing.T) {
	path := createdByQemu(t, []string{"-o", "compat=0.10", "-b", "base.raw", "-F", "raw"})
	d := openAlone(t, fileNode(path))
	d.write(bytes.Repeat([]byte{7}, 1000), 5000)
	for _, c := range []struct{ options, text string }{
		{"lazy_refcounts=on", "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"},
		{"refcount_bits=8", "Changing refcount_bits from 16 to 8 is not supported"},
		{"size=2M", "Changing the size from 1048576 to 2097152 bytes is not an amendment; resize the image"},
		{"cluster_size=4k", "Invalid parameter 'cluster_size'"},
		{"compat=3", "Parameter 'compat' does not accept value '3'"},
	} {
		if err := amend(d, c.options); err == nil || err.Error() != c.text {
			t.Errorf("%s: %v, want %q", c.options, err, c.text)
		}
	}
	if err := amend(d, "compat=0.10,refcount_bits=16,size=1M"); err != nil {
		t.Errorf("to what it is: %v", err)
	}
	specific := func() map[string]any {
		return decodeInfo(t, path)["format-specific"].(map[string]any)["data"].(map[string]any)
	}
	if err := amend(d, "compat=1.1,lazy_refcounts=on"); err != nil {
		t.Fatal(err)
	}
	if got := specific(); got["compat"] != "1.1" || got["lazy-refcounts"] != true {
		t.Errorf("qemu-img says %v", got)
	}
	// What only version 3 has can be used at once: zeroes over the backing file.
	d.must(func(ctx context.Context) error { return d.root.WriteZeroes(ctx, 0, 1<<20, block.NoFallback) })
	if err := amend(d, "lazy_refcounts=off,backing_file=other.qcow2,backing_fmt=qcow2"); err != nil {
		t.Fatal(err)
	}
	if got := specific(); got["lazy-refcounts"] != false || decodeInfo(t, path)["backing-filename"] != "other.qcow2" {
		t.Errorf("qemu-img says %v", decodeInfo(t, path))
	}
	if err := amend(d, "compat=0.10"); err == nil || err.Error() != "Downgrading an image to compat=0.10 is not supported" {
		t.Errorf("downgrade: %v", err)
	}
	if i := d.node.Instance().(block.Inspector).Inspect().(*Info); i.Compat != "1.1" || *i.LazyRefcounts {
		t.Errorf("the node says %+v", i)
	}
	if err := amend(d, "backing_file=,backing_fmt="); err != nil {
		t.Fatal(err)
	}
	d.close()
	checkFile(t, path)
}

func TestG26ImageWithSnapshotsIsNotUpgraded(t *testing.T) {
	path := createdByQemu(t, []string{"-o", "compat=0.10"})
	mustRun(t, "qemu-img", "snapshot", "-c", "one", path)
	d := openAlone(t, fileNode(path))
	if err := amend(d, "compat=1.1"); !errors.Is(err, block.ErrNotSupported) || !strings.Contains(err.Error(), "has snapshots") {
		t.Errorf("upgrade: %v", err)
	}
	d.close()
}

func TestG26OpenImageIsCheckedAndRepaired(t *testing.T) {
	leak := func(m *memTarget, h *Header) { setRefcount(m, h, h.Clusters(m.Size())-1, 2) }
	for _, c := range []struct {
		name        string
		damage      func(m *memTarget, h *Header)
		fix         block.CheckFix
		refused     bool
		leaks, errs int64 // found, and repaired unless refused
	}{
		{"sound", func(*memTarget, *Header) {}, block.FixAll, false, 0, 0},
		{"leak, all", leak, block.FixAll, false, 1, 1}, // its COPIED flag is wrong then
		{"nothing but a leak", func(m *memTarget, h *Header) {
			m.data = append(m.data, make([]byte, h.ClusterSize())...)
			setRefcount(m, h, h.Clusters(m.Size())-1, 1)
		}, block.FixLeaks, false, 1, 0},
		{"leak and an error, leaks alone", leak, block.FixLeaks, true, 1, 1},
	} {
		m := newImage(t, CreateOptions{})
		s := blocktest.StoreOf(m.data)
		d := openAlone(t, blocktest.MemoryConfig(s))
		d.write(pattern(1, 300_000), 0)
		d.close()
		m = &memTarget{data: s.Bytes()}
		c.damage(m, mustParse(t, m))
		s = blocktest.StoreOf(m.data)
		d = openAlone(t, blocktest.MemoryConfig(s))
		lines := 0
		res, err := d.graph.Check(t.Context(), d.node, block.FixNothing, func(string) { lines++ })
		if err != nil || res.Leaks != c.leaks || res.Corruptions != c.errs || int64(lines) != c.leaks+c.errs {
			t.Errorf("%s: found %+v in %d lines, %v", c.name, res, lines, err)
		}
		res, err = d.graph.Check(t.Context(), d.node, c.fix, nil)
		if c.refused {
			if !errors.Is(err, block.ErrCorrupt) || res.Leaks != c.leaks || res.LeaksFixed != 0 {
				t.Errorf("%s: %+v, %v", c.name, res, err)
			}
		} else if err != nil || res.LeaksFixed != c.leaks || res.CorruptionsFixed != c.errs || res.Leaks+res.Corruptions != 0 {
			t.Errorf("%s: repaired %+v, %v", c.name, res, err)
		}
		// The image goes on with what was repaired.
		d.write(pattern(2, 300_000), 400_000)
		if got := d.read(0, 300_000); !bytes.Equal(got, pattern(1, 300_000)) {
			t.Errorf("%s: the data has changed", c.name)
		}
		d.close()
		if !c.refused {
			checkStore(t, s, false)
		}
	}
}

// What is in the caches, and what a discard has freed, is no finding.
func TestG26CheckOfAnImageInUseFindsNothing(t *testing.T) {
	s := emptyStore(t, CreateOptions{Size: 8 << 20})
	d := openAlone(t, blocktest.MemoryConfig(s))
	d.write(pattern(1, 4<<20), 0)
	d.must(func(ctx context.Context) error { return d.root.Discard(ctx, 1<<20, 2<<20) })
	for _, fix := range []block.CheckFix{block.FixNothing, block.FixAll} {
		res, err := d.graph.Check(t.Context(), d.node, fix, func(line string) { t.Error(line) })
		if err != nil || res.Leaks+res.Corruptions+res.CheckErrors+res.LeaksFixed+res.CorruptionsFixed != 0 {
			t.Errorf("%+v, %v", res, err)
		}
	}
	d.close()
	checkStore(t, s, false)
}

func TestG26RepairMarksACorruptImageAsGood(t *testing.T) {
	m := written(t, "compat=1.1")
	h := mustParse(t, m)
	setField(t, m, "incompatible_features", h.Incompatible|IncompatCorrupt)
	setRefcount(m, h, h.Clusters(m.Size())-1, 5)
	if _, err := Repair(t.Context(), m, mustParse(t, m), block.FixAll, nil); err != nil {
		t.Fatal(err)
	}
	if h := mustParse(t, m); h.Corrupt() {
		t.Errorf("it is still marked")
	}
	mustRun(t, "qemu-img", "check", "-q", saveTarget(t, m))
}

// measureByQemu is what qemu-img measure says.
func measureByQemu(t testing.TB, args ...string) (s block.ImageSizes) {
	t.Helper()
	out := mustRun(t, "qemu-img", append([]string{"measure", "--output=json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestG26MeasureIsThatOfQemuImg(t *testing.T) {
	g := testGraph(t)
	for _, opts := range []string{"", "cluster_size=512", "cluster_size=4k,refcount_bits=64", "cluster_size=2M", "refcount_bits=1", "compat=0.10", "backing_file=x"} {
		for _, size := range []int64{0, 1, 512, 65536, 1 << 20, 10<<30 + 513, 128 << 30} {
			args := []string{"-O", "qcow2", "--size", fmt.Sprint(size)}
			text := fmt.Sprintf("size=%d", size)
			if opts != "" {
				args = append(args, "-o", opts)
				text += "," + opts
			}
			o, err := block.ParseOptions(text, "")
			if err != nil {
				t.Fatal(err)
			}
			got, err := g.Measure(t.Context(), "qcow2", o, nil)
			if want := measureByQemu(t, args...); err != nil || got != want {
				t.Errorf("%s: %+v, %v, want %+v", text, got, err, want)
			}
		}
	}
	// Of images with data in places.
	dir := t.TempDir()
	path, base := filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "base.raw")
	mustRun(t, "qemu-img", "create", "-q", "-f", "raw", base, "5000k")
	mustRun(t, "qemu-io", "-f", "raw", "-c", "write 2M 100k", "-c", "write 4000k 1k", base)
	mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path, "6000k")
	mustRun(t, "qemu-io", "-f", "qcow2", "-c", "write 100k 300k", "-c", "write -z 2M 64k", "-c", "write 5500k 1k", path)
	for _, image := range []struct{ path, format string }{{path, "qcow2"}, {base, "raw"}} {
		d := openDisk(t, g, &block.Config{Driver: image.format, ReadOnly: true, Filename: image.path})
		for _, opts := range []string{"", "cluster_size=512", "cluster_size=2M", "backing_file=x"} {
			for _, to := range []string{"qcow2", "raw"} {
				args := []string{"-f", image.format, "-O", to}
				if to == "raw" {
					opts = ""
				} else if opts != "" {
					args = append(args, "-o", opts)
				}
				o, err := block.ParseOptions(opts, "")
				if err != nil {
					t.Fatal(err)
				}
				got, err := g.Measure(t.Context(), to, o, d.root)
				if want := measureByQemu(t, append(args, image.path)...); err != nil || got != want {
					t.Errorf("%s to %s, %q: %+v, %v, want %+v", image.format, to, opts, got, err, want)
				}
			}
		}
		d.close()
	}
	o, err := block.ParseOptions("size=4E,cluster_size=512", "")
	if err != nil {
		t.Fatal(err)
	}
	want := "The image size is too large for file format 'qcow2' (try using a larger cluster size)"
	if _, err := g.Measure(t.Context(), "qcow2", o, nil); err == nil || err.Error() != want {
		t.Errorf("%v, want %q", err, want)
	}
}

func TestG24InfoOfAnImage(t *testing.T) {
	g := testGraph(t)
	path := createdByQemu(t, []string{"-o", "cluster_size=4k"})
	d := openDisk(t, g, imageNode(path))
	want := block.ImageInfo{ClusterSize: 4096, SubclusterSize: 4096, VMStateOffset: 2 << 20}
	if got := d.node.Info(); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	above, err := g.Open(t.Context(), blocktest.SlowConfig(blocktest.NewGate(), &block.Config{Ref: d.node.Name()}))
	if err != nil {
		t.Fatal(err)
	}
	if got := above.Info(); got != want {
		t.Errorf("through a filter: %+v", got)
	}
	if !above.HasZeroInit() {
		t.Errorf("through a filter a new image does not read as zero")
	}
	if err := g.Release(t.Context(), above); err != nil {
		t.Fatal(err)
	}
	if !d.node.HasZeroInit() {
		t.Errorf("a new image does not read as zero")
	}
	d.close()
	overlay := imagePath(t, "b.qcow2")
	mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", overlay)
	d = openDisk(t, g, imageNode(overlay))
	if d.node.HasZeroInit() {
		t.Errorf("an overlay reads as zero")
	}
	own, err := d.node.AllocatedSize()
	if err != nil {
		t.Fatal(err)
	}
	if file, err := d.node.Child("file").Node().AllocatedSize(); err != nil || own != file || own != int64(decodeInfo(t, overlay)["actual-size"].(float64)) {
		t.Errorf("%d bytes, its file %d, %v", own, file, err)
	}
	d.close()
}

func TestG29BitmapsAreNotStored(t *testing.T) {
	for _, c := range []struct {
		version uint32
		text    string
	}{
		{2, "Can't make bitmap 'b' persistent in '%s': Cannot store dirty bitmaps in qcow2 v2 files"},
		{3, "Can't make bitmap 'b' persistent in '%s': images that have persistent bitmaps cannot be written"},
	} {
		d := openAlone(t, blocktest.MemoryConfig(emptyStore(t, CreateOptions{Version: c.version})))
		err := d.graph.ChangeBitmaps(t.Context(), block.AddBitmap(d.node, block.BitmapOptions{Name: "b", Persistent: true}))
		if want := fmt.Sprintf(c.text, d.node.Name()); !errors.Is(err, block.ErrNotSupported) || err.Error() != want {
			t.Errorf("version %d: %v, want %q", c.version, err, want)
		}
		d.close()
	}
}
