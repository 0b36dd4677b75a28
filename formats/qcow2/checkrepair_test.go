package qcow2

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/nbdserve/nbdserve/block"
)

// setDirty marks an image as not closed.
func setDirty(t testing.TB, m *memTarget) {
	t.Helper()
	if h := mustParse(t, m); h.Version >= 3 {
		setField(t, m, "incompatible_features", h.Incompatible|IncompatDirty)
	}
}

// repaired repairs an image and checks that nothing is wrong with it afterwards.
func repaired(t testing.TB, name string, m *memTarget) *CheckResult {
	t.Helper()
	h := mustParse(t, m)
	res, err := RepairRefcounts(context.Background(), m, h)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if now := mustParse(t, m); h.Dirty() || now.Dirty() || now.RefcountTableOffset != h.RefcountTableOffset || now.RefcountTableClusters != h.RefcountTableClusters {
		t.Errorf("%s: the header in memory and that of the file differ, or are dirty: %+v, %+v", name, h, now)
	}
	if after, lines := check(t, m); after.Corruptions+after.Leaks+after.CheckErrors != 0 {
		t.Fatalf("%s: after the repair %+v\n%s", name, after, strings.Join(lines[:min(len(lines), 20)], "\n"))
	}
	return res
}

func TestRepairMakesRefcountsRight(t *testing.T) {
	for _, opts := range []string{"compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=4096,refcount_bits=64", "refcount_bits=8,cluster_size=2M"} {
		image := written(t, opts)
		for _, d := range refcountDamages {
			m := &memTarget{data: bytes.Clone(image.data)}
			d.do(m, mustParse(t, m))
			setDirty(t, m)
			before, _ := check(t, m)
			if before.Corruptions+before.Leaks == 0 {
				t.Fatalf("%s: nothing is wrong", d.name)
			}
			res := repaired(t, opts+", "+d.name, m)
			if res.CorruptionsFixed != before.Corruptions || res.LeaksFixed != before.Leaks || res.Corruptions != 0 || res.Leaks != 0 {
				t.Errorf("%s, %s: before %+v, result %+v", opts, d.name, before, *res)
			}
			mustRun(t, "qemu-img", "check", "-q", "-f", "qcow2", saveTarget(t, m))
		}
	}
}

func TestRepairRefusesWhatItCannotDoAndChangesNothing(t *testing.T) {
	image := written(t, "compat=1.1")
	for _, d := range structuralDamages {
		m := &memTarget{data: bytes.Clone(image.data)}
		d.do(m, mustParse(t, m))
		setDirty(t, m)
		before := bytes.Clone(m.data)
		if _, err := RepairRefcounts(t.Context(), m, mustParse(t, m)); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("%s: %v", d.name, err)
		}
		if !bytes.Equal(before, m.data) {
			t.Errorf("%s: the image was changed", d.name)
		}
	}
	m := written(t, "compat=1.1", "bitmap b")
	if _, err := RepairRefcounts(t.Context(), m, mustParse(t, m)); !errors.Is(err, block.ErrNotSupported) {
		t.Errorf("bitmaps: %v", err)
	}
}

func TestRepairOfASoundImageOnlyClearsTheDirtyBit(t *testing.T) {
	m := written(t, "lazy_refcounts=on")
	want := bytes.Clone(m.data)
	setDirty(t, m)
	repaired(t, "sound", m)
	if !bytes.Equal(want, m.data) {
		t.Error("more was changed")
	}
}

func TestImageThatQemuLeftDirtyIsRepaired(t *testing.T) {
	for _, opts := range []string{"lazy_refcounts=on", "lazy_refcounts=on,cluster_size=512", "lazy_refcounts=on,refcount_bits=2"} {
		path := imagePath(t, "a.qcow2")
		mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", opts, path, "64M")
		mustRun(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 8M", path)
		mustRun(t, "qemu-img", "snapshot", "-c", "s", path)
		if _, err := runTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 4M 8M", "-c", "discard 0 1M", "-c", "flush", "-c", "abort", path); err == nil {
			t.Fatal("qemu-io did not abort")
		}
		m := loadTarget(t, path)
		if !mustParse(t, m).Dirty() {
			t.Fatal("the image is not dirty")
		}
		if res := repaired(t, opts, m); res.CorruptionsFixed+res.LeaksFixed == 0 {
			t.Errorf("%s: %+v", opts, *res)
		}
		saved := saveTarget(t, m)
		mustRun(t, "qemu-img", "check", "-q", "-f", "qcow2", saved)
		mustRun(t, "qemu-io", "-f", "qcow2", "-c", "read -P 1 1M 3M", "-c", "read -P 2 4M 8M", "-c", "read -P 0 0 1M", saved)
	}
}

func TestRepairClearsCopiedOfWhatASnapshotShares(t *testing.T) {
	m := written(t, "compat=1.1", "snapshot s")
	h := mustParse(t, m)
	for _, slot := range l2Slots(m, h) {
		setWord(m, slot, word(m, slot)|entryCopied)
	}
	setWord(m, h.L1Offset, word(m, h.L1Offset)|entryCopied)
	setDirty(t, m)
	repaired(t, "shared", m)
	mustRun(t, "qemu-img", "check", "-q", "-f", "qcow2", saveTarget(t, m))
}

// shortTable makes the refcount table of an image a cluster long, which is too
// short. Free clusters of the file hold garbage.
func shortTable(t testing.TB) *memTarget {
	t.Helper()
	m := written(t, "cluster_size=512,refcount_bits=64", "write -P 5 4M 1500k")
	if mustParse(t, m).RefcountTableClusters < 2 {
		t.Fatal("the table has only one cluster")
	}
	setField(t, m, "refcount_table_clusters", 1)
	m.data = append(m.data, make([]byte, 64<<10)...)
	c := newChecker(context.Background(), m, mustParse(t, m), nil)
	if err := c.run(); err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < m.Size(); off += 512 {
		if c.truth.get(off/512) == 0 {
			copy(m.data[off:], bytes.Repeat([]byte{0xff}, 512))
		}
	}
	setDirty(t, m)
	return m
}

func TestRepairMovesARefcountTableThatIsTooShort(t *testing.T) {
	m := shortTable(t)
	old := mustParse(t, m).RefcountTableOffset
	repaired(t, "short table", m)
	if h := mustParse(t, m); h.RefcountTableOffset == old || h.RefcountTableClusters < 2 {
		t.Errorf("table at 0x%x, %d clusters", h.RefcountTableOffset, h.RefcountTableClusters)
	}
	mustRun(t, "qemu-img", "check", "-q", "-f", "qcow2", saveTarget(t, m))
}

func TestRepairOfRandomRefcounts(t *testing.T) {
	images := map[string]*memTarget{}
	for _, opts := range []string{"cluster_size=512", "cluster_size=512,refcount_bits=64", "cluster_size=1024,refcount_bits=1", "cluster_size=4096,refcount_bits=4", "compat=0.10,cluster_size=512"} {
		images[opts] = written(t, opts)
	}
	names := make([]string, 0, len(images))
	for name := range images {
		names = append(names, name)
	}
	slices.Sort(names)
	rapid.Check(t, func(rt *rapid.T) {
		name := rapid.SampledFrom(names).Draw(rt, "image")
		m := &memTarget{data: bytes.Clone(images[name].data)}
		h := mustParse(t, m)
		blocks := h.RefcountTableEntries()
		for range rapid.IntRange(0, 20).Draw(rt, "refcounts") {
			cluster := rapid.Int64Range(0, h.Clusters(m.Size())-1).Draw(rt, "cluster")
			setRefcount(m, h, cluster, rapid.Uint64Range(0, RefcountMax(h.RefcountOrder)).Draw(rt, "refcount"))
		}
		for range rapid.IntRange(0, 5).Draw(rt, "missing blocks") {
			setWord(m, h.RefcountTableOffset+8*rapid.Int64Range(0, blocks-1).Draw(rt, "block"), 0)
		}
		if h.RefcountTableClusters > 1 && rapid.Bool().Draw(rt, "short table") {
			setField(t, m, "refcount_table_clusters", uint64(rapid.Uint32Range(1, h.RefcountTableClusters-1).Draw(rt, "table")))
		}
		setDirty(t, m)
		repaired(t, name, m)
	})
}

// change is a write or a flush.
type change struct {
	flush bool
	off   int64
	data  []byte
}

// cuts calls f with states that a file may be left in when the machine stops
// during changes: what was flushed is there, of the rest any part, sector by sector.
func cuts(before []byte, changes []change, f func(m *memTarget, at int)) {
	random := rand.New(rand.NewPCG(1, 2))
	for at := range len(changes) + 1 {
		flushed := 0
		for i := range at {
			if changes[i].flush {
				flushed = i
			}
		}
		for range 3 {
			m := &memTarget{data: bytes.Clone(before)}
			for i, c := range changes[:at] {
				for lo := 0; lo < len(c.data); {
					hi := min(len(c.data), int((c.off+int64(lo))/512+1)*512-int(c.off))
					if i < flushed || random.IntN(2) == 0 {
						_ = m.WriteAt(context.Background(), c.data[lo:hi], c.off+int64(lo), 0)
					}
					lo = hi
				}
			}
			f(m, at)
		}
	}
}

func TestRepairCutAnywhereCanBeRepeated(t *testing.T) {
	images := map[string]*memTarget{"short table": shortTable(t)}
	for _, d := range refcountDamages {
		m := written(t, "cluster_size=4096", "snapshot s", "write -P 8 0 64k")
		d.do(m, mustParse(t, m))
		setDirty(t, m)
		images[d.name] = m
	}
	for name, image := range images {
		before := bytes.Clone(image.data)
		var changes []change
		image.log = func(op string, off int64, p []byte) {
			changes = append(changes, change{op == "flush", off, bytes.Clone(p)})
		}
		repaired(t, name, image)
		if len(changes) == 0 {
			t.Errorf("%s: nothing was changed", name)
		}
		cuts(before, changes, func(m *memTarget, at int) {
			if h := mustParse(t, m); h.Dirty() {
				repaired(t, name, m)
			} else if res, _ := check(t, m); res.Corruptions+res.Leaks+res.CheckErrors != 0 {
				t.Errorf("%s: cut after change %d of %d: no longer dirty, but %+v", name, at, len(changes), res)
			}
		})
	}
}

func TestRepairThatCannotWriteLeavesTheImageDirty(t *testing.T) {
	for _, op := range []string{"write", "flush"} {
		m := shortTable(t)
		h := mustParse(t, m)
		if _, err := RepairRefcounts(t.Context(), failingTarget{m, op}, h); !errors.Is(err, errFailed) {
			t.Errorf("%s: %v", op, err)
		}
		if !h.Dirty() || !mustParse(t, m).Dirty() {
			t.Errorf("%s: the dirty bit is cleared", op)
		}
	}
}
