package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

func TestImageCreateMakesWhatQemuReads(t *testing.T) {
	t.Parallel()
	for _, options := range [][]string{
		nil, {"-o", "cluster_size=4k"}, {"-o", "cluster_size=2M"}, {"-o", "compat=0.10"}, {"-o", "refcount_bits=1"}, {"-o", "refcount_bits=64"},
		{"-o", "cluster_size=512", "-o", "compression_type=zstd"},
	} {
		disk := filepath.Join(tempDir(t), "disk")
		run(t, raceBinary, append(append([]string{"image", "create", "-f", "qcow2"}, options...), disk, "16M")...)
		clean(t, disk)
		twin := patchyFile(t, filepath.Join(tempDir(t), "twin"), 41, 16*mib)
		run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", twin, disk)
		edit(t, "qcow2", disk, twin)
	}
	raw := filepath.Join(tempDir(t), "raw")
	run(t, raceBinary, "image", "create", "-f", "raw", raw, "1000001")
	if st, err := os.Stat(raw); err != nil || st.Size() != 1000001 {
		t.Errorf("image create -f raw: %v %v", st, err)
	}
}

func TestImageCreateWithBacking(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	twin := patchyFile(t, filepath.Join(dir, "twin"), 42, 16*mib)
	convert(t, twin, "qcow2", filepath.Join(dir, "base"))
	top := filepath.Join(dir, "top")
	run(t, raceBinary, "image", "create", "-f", "qcow2", "-b", "base", "-F", "qcow2", top) // relative to top, size of base
	identical(t, "raw", twin, "qcow2", top)
	edit(t, "qcow2", top, twin)
	refused(t, []string{"image", "create", "-f", "qcow2", "-b", "base", top + "2"}, "-F")
	refused(t, []string{"image", "create", "-f", "qcow2", top + "2"}, "size")
	refused(t, []string{"image", "create", "-f", "qcow2", "-o", "cluster_size=3k", top + "2", "1M"}, "luster size")
	refused(t, []string{"image", "create", "-f", "qcow2", "-o", "colour=red", top + "2", "1M"}, "colour")
	if _, err := os.Stat(top + "2"); err == nil {
		t.Error("a refused image create left a file")
	}
}

// imageInfo is what qemu-img and nbdserve agree on about an image.
type imageInfo struct {
	VirtualSize   int64  `json:"virtual-size"`
	Filename      string `json:"filename"`
	ClusterSize   int64  `json:"cluster-size"`
	Format        string `json:"format"`
	Backing       string `json:"backing-filename"`
	BackingFormat string `json:"backing-filename-format"`
	Dirty         bool   `json:"dirty-flag"`
	Specific      struct {
		Type string `json:"type"`
		Data struct {
			Compat        string `json:"compat"`
			Compression   string `json:"compression-type"`
			LazyRefcounts bool   `json:"lazy-refcounts"`
			RefcountBits  int    `json:"refcount-bits"`
			Corrupt       bool   `json:"corrupt"`
			ExtendedL2    bool   `json:"extended-l2"`
		} `json:"data"`
	} `json:"format-specific"`
	Snapshots []struct {
		Name string `json:"name"`
		ID   string `json:"id"`
	} `json:"snapshots"`
}

func TestImageInfoAgreesWithQemu(t *testing.T) {
	t.Parallel()
	base := newImage(t)
	snapshots := newImage(t)
	run(t, "qemu-img", "snapshot", "-c", "one", snapshots)
	run(t, "qemu-img", "snapshot", "-c", "two", snapshots)
	for _, disk := range []string{
		base, newImage(t, "-b", base, "-F", "qcow2"), newImage(t, "-o", "compat=0.10"), snapshots,
		newImage(t, "-o", "cluster_size=4k,refcount_bits=64,lazy_refcounts=on,compression_type=zstd"), newImage(t, "-o", "extended_l2=on"),
	} {
		want := decode[imageInfo](t, run(t, "qemu-img", "info", "--output=json", disk))
		got := decode[imageInfo](t, run(t, raceBinary, "image", "info", "--output", "json", disk))
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("image info shows\n%+v, qemu-img\n%+v", got, want)
		}
	}
}

func TestImageCheckAgreesWithQemu(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		damage func(disk string)
		code   int
	}{
		"clean": {func(string) {}, 0},
		"leak": {func(disk string) { // one cluster more, which nothing refers to
			if err := os.Truncate(disk, 241*64*kib); err != nil {
				t.Fatal(err)
			}
			patch(t, disk, 131072+2*240, func(p []byte) { p[1] = 1 }, 2)
		}, 3},
		"corruption": {func(disk string) { // the L1 table's cluster has refcount 0
			patch(t, disk, 131072+2*3, func(p []byte) { p[1] = 0 }, 2)
		}, 2},
	} {
		disk := newImage(t)
		run(t, "qemu-io", "-f", "qcow2", "-c", "write 0 14M", disk)
		c.damage(disk)
		theirs := try(t, "qemu-img", "check", "-f", "qcow2", disk)
		ours := try(t, raceBinary, "image", "check", "--format", "qcow2", disk)
		if ours.code != theirs.code || ours.code != c.code {
			t.Errorf("%s: image check exits with %d, qemu-img check with %d, expected %d\n%s%s%s", name, ours.code, theirs.code, c.code, ours.stdout, ours.stderr, theirs.stdout)
		}
		type figures struct {
			Leaks       int `json:"leaks"`
			Corruptions int `json:"corruptions"`
		}
		t1 := decode[figures](t, try(t, "qemu-img", "check", "-f", "qcow2", "--output=json", disk).stdout)
		t2 := decode[figures](t, try(t, raceBinary, "image", "check", "--format", "qcow2", "--output", "json", disk).stdout)
		if t1 != t2 {
			t.Errorf("%s: image check finds %+v, qemu-img check %+v", name, t2, t1)
		}
	}
	raw := patchyFile(t, filepath.Join(tempDir(t), "raw"), 1, mib)
	theirs, ours := try(t, "qemu-img", "check", "-f", "raw", raw), try(t, raceBinary, "image", "check", "--format", "raw", raw)
	if theirs.code != 63 || ours.code != 63 {
		t.Errorf("a format without a check: image check exits with %d, qemu-img check with %d\n%s", ours.code, theirs.code, ours.stderr)
	}
}
