package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdserve/nbdserve/block"
)

// qemuCheck is what qemu-img check finds.
func qemuCheck(t testing.TB, path string, secret ...string) CheckResult {
	t.Helper()
	args := append([]string{"check", "--output=json"}, secret...)
	if len(secret) == 0 {
		args = append(args, "-f", "qcow2", path)
	}
	out, err := runTool(t, "qemu-img", args...)
	var res CheckResult
	if jerr := json.Unmarshal([]byte(out), &res); jerr != nil {
		t.Fatalf("%v: %v", jerr, err)
	}
	return res
}

// check runs our check.
func check(t testing.TB, m *memTarget) (CheckResult, []string) {
	t.Helper()
	var lines []string
	res, err := Check(context.Background(), m, mustParse(t, m), func(line string) { lines = append(lines, line) })
	if err != nil {
		t.Fatal(err)
	}
	return *res, lines
}

// sameAsQemu checks an image with both and compares.
func sameAsQemu(t *testing.T, name string, m *memTarget) CheckResult {
	t.Helper()
	got, lines := check(t, m)
	if d := cmp.Diff(qemuCheck(t, saveTarget(t, m)), got); d != "" {
		t.Errorf("%s: -qemu-img +ours:\n%s%s", name, d, strings.Join(lines[:min(len(lines), 20)], "\n"))
	}
	return got
}

// written makes an image with qemu's tools: data, zeroes, and what steps add. A step is
// a qemu-io command, or one of the words below followed by a name.
func written(t testing.TB, opts string, steps ...string) *memTarget {
	t.Helper()
	path := imagePath(t, "a.qcow2")
	mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", opts, path, "8M")
	steps = append([]string{"write -P 1 0 1M", "write -P 2 3M 100k", "write -P 3 7M 64k", "write -P 4 2M 4k", "write -z 1M 128k"}, steps...)
	for _, step := range steps {
		word, name, _ := strings.Cut(step, " ")
		switch word {
		case "snapshot":
			mustRun(t, "qemu-img", "snapshot", "-c", name, path)
		case "delete":
			mustRun(t, "qemu-img", "snapshot", "-d", name, path)
		case "bitmap":
			mustRun(t, "qemu-img", "bitmap", "--add", path, name)
		default:
			mustRun(t, "qemu-io", "-f", "qcow2", "-c", step, path)
		}
	}
	return loadTarget(t, path)
}

// compressed makes an image of compressed clusters.
func compressed(t testing.TB, opts string) *memTarget {
	t.Helper()
	raw, path := imagePath(t, "a.raw"), imagePath(t, "a.qcow2")
	var text bytes.Buffer
	for i := range 100_000 {
		fmt.Fprintf(&text, "line %d of text\n", i*7919)
	}
	if err := os.WriteFile(raw, text.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", opts, raw, path)
	return loadTarget(t, path)
}

func TestSoundImagesCheckAsQemuImgSays(t *testing.T) {
	for _, opts := range variants() {
		res := sameAsQemu(t, opts, written(t, opts))
		if res.Corruptions != 0 || res.Leaks != 0 || res.AllocatedClusters == 0 {
			t.Errorf("%s: %+v", opts, res)
		}
	}
	for _, opts := range []string{"compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=2M", "compression_type=zstd"} {
		res := sameAsQemu(t, "compressed, "+opts, compressed(t, opts))
		if res.Corruptions != 0 || res.Leaks != 0 || res.CompressedClusters == 0 {
			t.Errorf("compressed, %s: %+v", opts, res)
		}
	}
}

func TestSnapshotsAreCounted(t *testing.T) {
	for _, opts := range []string{"compat=0.10", "compat=1.1", "cluster_size=512", "refcount_bits=2", "refcount_bits=64"} {
		m := written(t, opts, "snapshot one", "write -P 9 512k 1M", "snapshot two", "write -P 10 0 64k")
		if res := sameAsQemu(t, opts, m); res.Corruptions != 0 || res.Leaks != 0 {
			t.Errorf("%s: %+v", opts, res)
		}
	}
	m := written(t, "compat=1.1", "snapshot one", "write -P 9 512k 1M", "snapshot two", "write -P 10 0 64k", "delete one")
	if res := sameAsQemu(t, "one deleted", m); res.Corruptions != 0 || res.Leaks != 0 {
		t.Errorf("%+v", res)
	}
}

func TestManySnapshotsAreCounted(t *testing.T) {
	steps := []string{}
	for i := range 40 {
		steps = append(steps, fmt.Sprintf("snapshot s%d", i))
	}
	if res := sameAsQemu(t, "40 snapshots", written(t, "cluster_size=512,refcount_bits=8", steps...)); res.Corruptions != 0 || res.Leaks != 0 {
		t.Errorf("%+v", res)
	}
}

func TestBitmapsAreCounted(t *testing.T) {
	m := written(t, "compat=1.1", "bitmap one", "bitmap two", "write -P 9 512k 1M")
	if res := sameAsQemu(t, "bitmaps", m); res.Corruptions != 0 || res.Leaks != 0 {
		t.Errorf("%+v", res)
	}
	h := mustParse(t, m)
	info, err := Inspect(t.Context(), m, h)
	if err != nil {
		t.Fatal(err)
	}
	want := qemuInfo(t, saveTarget(t, m)).FormatSpecific.Data
	if d := cmp.Diff(want, viaJSON(t, info)); d != "" {
		t.Errorf("-qemu-img +ours:\n%s", d)
	}
}

func TestLUKSHeaderIsCounted(t *testing.T) {
	path := imagePath(t, "a.qcow2")
	secret := []string{"--object", "secret,id=s,data=geheim"}
	mustRun(t, "qemu-img", append([]string{"create", "-q", "-f", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"}, append(secret, path, "8M")...)...)
	image := "driver=qcow2,encrypt.key-secret=s,file.filename=" + path
	mustRun(t, "qemu-io", append(secret, "-c", "write -P 1 0 1M", "--image-opts", image)...)
	got, lines := check(t, loadTarget(t, path))
	if d := cmp.Diff(qemuCheck(t, path, append(secret, "--image-opts", image)...), got); d != "" {
		t.Errorf("-qemu-img +ours:\n%s%s", d, strings.Join(lines, "\n"))
	}
	if got.Leaks != 0 || got.Corruptions != 0 {
		t.Errorf("%+v", got)
	}
}

// word is a 64-bit number of an image.
func word(m *memTarget, off int64) uint64       { return binary.BigEndian.Uint64(m.data[off:]) }
func setWord(m *memTarget, off int64, v uint64) { binary.BigEndian.PutUint64(m.data[off:], v) }

// l2Slots are the offsets of the entries of the first L2 table that are not zero.
func l2Slots(m *memTarget, h *Header) (slots []int64) {
	l2 := L1Entry(word(m, h.L1Offset)).Offset()
	for off := l2; off < l2+h.ClusterSize(); off += 8 {
		if word(m, off) != 0 {
			slots = append(slots, off)
		}
	}
	return slots
}

// setRefcount changes the stored refcount of a cluster.
func setRefcount(m *memTarget, h *Header, cluster int64, v uint64) {
	per := h.RefcountBlockEntries()
	blockOff := int64(word(m, h.RefcountTableOffset+cluster/per*8))
	RefcountSet(m.data[blockOff:blockOff+h.ClusterSize()], h.RefcountOrder, cluster%per, v)
}

// A damage makes an image bad in one place.
type damage struct {
	name string
	do   func(m *memTarget, h *Header)
}

// refcountDamages leave nothing wrong but refcounts and COPIED flags.
var refcountDamages = []damage{
	{"refcount of data is 2", func(m *memTarget, h *Header) {
		setRefcount(m, h, L2Entry(word(m, l2Slots(m, h)[0])).Offset()>>h.ClusterBits, 2)
	}},
	{"refcount of data is 0", func(m *memTarget, h *Header) {
		setRefcount(m, h, L2Entry(word(m, l2Slots(m, h)[1])).Offset()>>h.ClusterBits, 0)
	}},
	{"refcount of the header is 0", func(m *memTarget, h *Header) { setRefcount(m, h, 0, 0) }},
	{"refcount of the L2 table is 3", func(m *memTarget, h *Header) {
		setRefcount(m, h, L1Entry(word(m, h.L1Offset)).Offset()>>h.ClusterBits, 3)
	}},
	{"data is not marked COPIED", func(m *memTarget, h *Header) {
		slot := l2Slots(m, h)[0]
		setWord(m, slot, word(m, slot)&^entryCopied)
	}},
	{"L2 table is not marked COPIED", func(m *memTarget, h *Header) { setWord(m, h.L1Offset, word(m, h.L1Offset)&^entryCopied) }},
	{"data is referred to twice", func(m *memTarget, h *Header) {
		slots := l2Slots(m, h)
		setWord(m, slots[0], word(m, slots[1]))
	}},
	{"data is dropped", func(m *memTarget, h *Header) { setWord(m, l2Slots(m, h)[0], 0) }},
	{"L2 table is dropped", func(m *memTarget, h *Header) { setWord(m, h.L1Offset, 0) }},
	{"all refcounts are 0", func(m *memTarget, h *Header) {
		blockOff := int64(word(m, h.RefcountTableOffset))
		clear(m.data[blockOff : blockOff+h.ClusterSize()])
	}},
	{"refcount block is missing", func(m *memTarget, h *Header) { setWord(m, h.RefcountTableOffset, 0) }},
}

// structuralDamages are those that a repair of refcounts must not touch.
var structuralDamages = []damage{
	{"L2 entry has reserved bits", func(m *memTarget, h *Header) {
		slot := l2Slots(m, h)[0]
		setWord(m, slot, word(m, slot)|1<<60|1<<3)
	}},
	{"L2 entry is not aligned", func(m *memTarget, h *Header) {
		slot := l2Slots(m, h)[0]
		setWord(m, slot, word(m, slot)+512)
	}},
	{"L2 entry is past the end", func(m *memTarget, h *Header) { setWord(m, l2Slots(m, h)[0], entryCopied|1<<40) }},
	{"compressed cluster is past the end", func(m *memTarget, h *Header) { setWord(m, l2Slots(m, h)[0], entryCompressed|1<<40) }},
	{"compressed cluster is marked COPIED", func(m *memTarget, h *Header) {
		slot := l2Slots(m, h)[0]
		setWord(m, slot, word(m, slot)|entryCompressed)
	}},
	{"L1 entry has reserved bits", func(m *memTarget, h *Header) { setWord(m, h.L1Offset, word(m, h.L1Offset)|1<<61) }},
	{"L2 table is past the end", func(m *memTarget, h *Header) { setWord(m, h.L1Offset, entryCopied|1<<40) }},
	{"refcount block has reserved bits", func(m *memTarget, h *Header) { setWord(m, h.RefcountTableOffset+8, 1) }},
	{"refcount block is past the end", func(m *memTarget, h *Header) { setWord(m, h.RefcountTableOffset+8, 1<<40) }},
	{"refcount block is there twice", func(m *memTarget, h *Header) {
		setWord(m, h.RefcountTableOffset+8, word(m, h.RefcountTableOffset))
	}},
	{"refcount block is the header", func(m *memTarget, h *Header) {
		slot := l2Slots(m, h)[0]
		setWord(m, slot, entryCopied|word(m, h.RefcountTableOffset))
	}},
}

func TestDamageIsCountedAsQemuImgCountsIt(t *testing.T) {
	for _, opts := range []string{"compat=0.10", "compat=1.1", "cluster_size=4096,refcount_bits=64", "refcount_bits=8,cluster_size=2M"} {
		image := written(t, opts)
		for _, d := range append(slices.Clone(refcountDamages), structuralDamages...) {
			m := &memTarget{data: bytes.Clone(image.data)}
			d.do(m, mustParse(t, m))
			res := sameAsQemu(t, opts+", "+d.name, m)
			if res.Corruptions+res.Leaks+res.CheckErrors == 0 {
				t.Errorf("%s, %s: not found", opts, d.name)
			}
		}
	}
}

func TestDamageOfSharedTablesIsCountedOncePerReference(t *testing.T) {
	image := written(t, "compat=1.1", "snapshot one", "snapshot two")
	for _, d := range structuralDamages[:3] {
		m := &memTarget{data: bytes.Clone(image.data)}
		d.do(m, mustParse(t, m))
		sameAsQemu(t, d.name, m)
	}
}

func TestClustersAtTheEndOfAShortFileAreCounted(t *testing.T) {
	m := written(t, "cluster_size=4096")
	h := mustParse(t, m)
	end := h.Clusters(m.Size())
	slots := l2Slots(m, h)
	setRefcount(m, h, end+3, 1) // never written
	sameAsQemu(t, "refcount past the end", m)
	setWord(m, slots[0], entryCopied|uint64(end-1)<<h.ClusterBits)
	m.data = m.data[:m.Size()-2048]
	sameAsQemu(t, "last cluster cut in half", m)
	setDirty(t, m)
	repaired(t, "last cluster cut in half", m)
}

func TestMisalignedL2TableIsCorrupt(t *testing.T) {
	m := written(t, "compat=1.1")
	h := mustParse(t, m)
	setWord(m, h.L1Offset, word(m, h.L1Offset)+512)
	if res, _ := check(t, m); res.Corruptions == 0 {
		t.Errorf("%+v", res)
	}
	if res := qemuCheck(t, saveTarget(t, m)); res.Corruptions == 0 {
		t.Errorf("qemu-img: %+v", res)
	}
}

func TestZeroFlagInVersion2IsCorrupt(t *testing.T) {
	m := written(t, "compat=0.10")
	slot := l2Slots(m, mustParse(t, m))[0]
	setWord(m, slot, word(m, slot)|entryZero)
	if res, _ := check(t, m); res.Corruptions != 1 {
		t.Errorf("%+v", res)
	}
}

func TestRefcountOverflowIsCorrupt(t *testing.T) {
	m := written(t, "refcount_bits=1")
	h := mustParse(t, m)
	slots := l2Slots(m, h)
	for _, slot := range slots[1:4] {
		setWord(m, slot, word(m, slots[0]))
	}
	if res := sameAsQemu(t, "three too many", m); res.Corruptions < 3 {
		t.Errorf("%+v", res)
	}
}

func TestSnapshotTablesAreListed(t *testing.T) {
	m := written(t, "compat=1.1", "snapshot one", "write -P 9 512k 1M", "snapshot two")
	h := mustParse(t, m)
	snapshots, err := ReadSnapshots(t.Context(), m, h)
	if err != nil {
		t.Fatal(err)
	}
	var got []SnapshotInfo
	for i := range snapshots {
		if err := snapshots[i].Validate(h, m.Size()); err != nil {
			t.Error(err)
		}
		if snapshots[i].DiskSize != 8<<20 {
			t.Errorf("disk size %d", snapshots[i].DiskSize)
		}
		got = append(got, snapshots[i].Info())
	}
	if d := cmp.Diff(qemuInfo(t, saveTarget(t, m)).Snapshots, got); d != "" {
		t.Errorf("-qemu-img +ours:\n%s", d)
	}
}

func TestBadSnapshotTablesAreErrors(t *testing.T) {
	image := written(t, "compat=1.1", "snapshot one")
	h := mustParse(t, image)
	at := h.SnapshotsOffset
	for _, c := range []struct {
		name string
		do   func(m *memTarget)
		want string
	}{
		{"L1 not aligned", func(m *memTarget) { setWord(m, at, word(m, at)+8) }, "is not a multiple of the cluster size"},
		{"L1 past the end", func(m *memTarget) { setWord(m, at, 1<<40) }, "is past the end of the file"},
		{"L1 past everything", func(m *memTarget) { setWord(m, at, 1<<63) }, "L1 table offset invalid"},
		{"L1 too large", func(m *memTarget) { binary.BigEndian.PutUint32(m.data[at+8:], 1<<32-1) }, "L1 table too large"},
		{"L1 too small", func(m *memTarget) { binary.BigEndian.PutUint32(m.data[at+8:], 0) }, "L1 table is too small"},
		{"extra data too large", func(m *memTarget) { binary.BigEndian.PutUint32(m.data[at+36:], 1025) }, "extra data of 1025 bytes"},
		{"extra data largest", func(m *memTarget) { binary.BigEndian.PutUint32(m.data[at+36:], 1<<32-1) }, "extra data of 4294967295 bytes"},
		{"name past the end", func(m *memTarget) {
			binary.BigEndian.PutUint16(m.data[at+14:], 65535)
			m.data = m.data[:at+1000]
		}, "past the end of the file"},
		{"disk size too big", func(m *memTarget) { setWord(m, at+48, 1<<63) }, "disk size"},
	} {
		m := &memTarget{data: bytes.Clone(image.data)}
		c.do(m)
		snapshots, err := ReadSnapshots(t.Context(), m, h)
		for i := range snapshots {
			err = errors.Join(err, snapshots[i].Validate(h, m.Size()))
		}
		if err == nil || !strings.Contains(err.Error(), c.want) || !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

// A brokenTarget cannot read one place.
type brokenTarget struct {
	*memTarget
	at int64
}

func (b brokenTarget) ReadAt(ctx context.Context, p []byte, off int64) error {
	if off <= b.at && b.at < off+int64(len(p)) {
		return errFailed
	}
	return b.memTarget.ReadAt(ctx, p, off)
}

func TestWhatCannotBeReadIsACheckError(t *testing.T) {
	m := written(t, "compat=1.1", "snapshot one")
	h := mustParse(t, m)
	for name, at := range map[string]int64{
		"L1 table": h.L1Offset, "L2 table": L1Entry(word(m, h.L1Offset)).Offset(), "snapshot table": h.SnapshotsOffset,
		"refcount table": h.RefcountTableOffset, "refcount block": int64(word(m, h.RefcountTableOffset)),
	} {
		res, err := Check(t.Context(), brokenTarget{m, at}, h, nil)
		if err != nil || res.CheckErrors == 0 {
			t.Errorf("%s: %+v, %v", name, res, err)
		}
		h.Incompatible |= IncompatDirty
		if _, err := RepairRefcounts(t.Context(), brokenTarget{m, at}, h); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("%s: repair: %v", name, err)
		}
	}
}

func TestCheckEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	m := newImage(t, CreateOptions{})
	if _, err := Check(ctx, m, mustParse(t, m), nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
