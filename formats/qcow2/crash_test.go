package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// The crash test runs a random workload on an image over a disk with a volatile
// write cache, cuts the power at every moment, and looks at what the disk may hold
// then: the image must open, hold every byte acknowledged before a flush (or with
// FUA), and have leaks at most.

// long tells that the long versions of the tests are wanted.
func long() bool { return os.Getenv("NBDSERVE_LONG") != "" }

// unit is the granularity of guest requests and of the model, in bytes. It divides
// a sector, so that a torn write keeps units whole.
const unit = 64

// A guestEvent is a request that changed a unit, or may have.
type guestEvent struct {
	content    [unit]byte
	hint       bool // a discard: it becomes content, or stays what it was
	fua        bool
	start, end int64 // moments of the log
}

// A guestModel knows what each unit of a disk may hold after a cut at a moment.
// Requests on one unit must not overlap in time.
type guestModel struct {
	log     *blocktest.Log
	initial []byte

	mu      sync.Mutex
	history [][]*guestEvent // by unit
	flushes [][2]int64      // start and end of those that ended
}

func newGuestModel(l *blocktest.Log, initial []byte) *guestModel {
	return &guestModel{log: l, initial: initial, history: make([][]*guestEvent, len(initial)/unit)}
}

// change runs a request that gives the units of [off, off+n) the contents p, nil for zeroes.
func (g *guestModel) change(off, n int64, p []byte, hint, fua bool, request func() error) error {
	g.mu.Lock()
	start := g.log.Mark()
	var events []*guestEvent
	for u := off / unit; u < (off+n)/unit; u++ {
		e := &guestEvent{hint: hint, fua: fua, start: start}
		if p != nil {
			copy(e.content[:], p[u*unit-off:])
		}
		g.history[u] = append(g.history[u], e)
		events = append(events, e)
	}
	g.mu.Unlock()
	err := request()
	g.mu.Lock()
	defer g.mu.Unlock()
	end := g.log.Mark()
	for _, e := range events {
		e.end = end
	}
	return err
}

func (g *guestModel) flush(request func() error) error {
	start := g.log.Mark()
	err := request()
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.flushes = append(g.flushes, [2]int64{start, g.log.Mark()})
	return nil
}

// flushed is the start of the last flush that had ended at the cut.
func (g *guestModel) flushed(cut int64) int64 {
	last := int64(-1)
	for _, f := range g.flushes {
		if f[1] <= cut {
			last = max(last, f[0])
		}
	}
	return last
}

// check tells whether got is something that the disk may hold after a cut.
func (g *guestModel) check(got []byte, cut int64) error {
	flushed := g.flushed(cut)
	for u := range g.history {
		if err := g.checkUnit(u, got[u*unit:(u+1)*unit], cut, flushed); err != nil {
			return err
		}
	}
	return nil
}

func (g *guestModel) checkUnit(u int, got []byte, cut, flushed int64) error {
	h := g.history[u]
	for i := len(h) - 1; i >= 0; i-- {
		e := h[i]
		if e.start > cut {
			continue
		}
		if bytes.Equal(got, e.content[:]) {
			return nil
		}
		durable := e.end != 0 && e.end <= cut && (e.end <= flushed || e.fua)
		if durable && !e.hint {
			return fmt.Errorf("the unit at %#x holds %x, and not what was written at %d-%d (%x) or later", u*unit, got[:8], e.start, e.end, e.content[:8])
		}
	}
	if !bytes.Equal(got, g.initial[u*unit:(u+1)*unit]) {
		return fmt.Errorf("the unit at %#x holds %x, which is neither what it held at first (%x) nor any of %d requests since", u*unit, got[:8], g.initial[u*unit:u*unit+8], len(h))
	}
	return nil
}

// tagged returns contents of n bytes at off that no other request writes: each unit
// repeats a number made of the request and the place.
func tagged(request uint64, off, n int64) []byte {
	p := make([]byte, n)
	for at := int64(0); at < n; at += 8 {
		u := uint64(off+at) / unit
		binary.LittleEndian.PutUint64(p[at:], (request<<24|u)*0x9e3779b97f4a7c15|1)
	}
	return p
}

// A crashCase is a kind of image and of work on it.
type crashCase struct {
	name       string
	opts       string // of qemu-img create
	size       int64  // of the disk
	backing    int64  // size of a raw backing file, 0: none
	compressed bool   // a third of the disk is there already, compressed
	snapshot   bool   // everything that is there belongs to a snapshot as well
	from       int64  // the work is from here on
	prepare    []string
	workers    int
	ops        int
	limits     block.Limits // of the file
	dirty      bool         // the image was not closed and its refcounts are wrong
	handover   bool         // the node rests between requests: inactive, or read-only
	perCut     int
	broken     orderingRule
	seed       uint64
}

var crashCases = []crashCase{
	{name: "small clusters over a backing file", opts: "cluster_size=512", size: 96 << 10, backing: 70 << 10},
	{name: "compressed clusters and a snapshot", opts: "cluster_size=1k", size: 128 << 10, compressed: true, snapshot: true},
	{name: "all of it", opts: "cluster_size=2k,refcount_bits=8", size: 192 << 10, backing: 100 << 10, compressed: true, snapshot: true},
	{name: "one-bit refcounts", opts: "cluster_size=1k,refcount_bits=1", size: 128 << 10},
	{name: "many refcount blocks", opts: "cluster_size=512,refcount_bits=64", size: 160 << 10},
	{name: "version 2 with a snapshot", opts: "cluster_size=2k,compat=0.10", size: 128 << 10, compressed: true, snapshot: true},
	{name: "version 2 over a backing file", opts: "cluster_size=512,compat=0.10", size: 96 << 10, backing: 200 << 10},
	{name: "large clusters, zstd", opts: "cluster_size=4k,compression_type=zstd", size: 256 << 10, backing: 256 << 10, compressed: true, snapshot: true},
	{name: "file without FUA and fast zeroes", opts: "cluster_size=1k", size: 96 << 10, limits: block.Limits{ZeroFlags: block.MayUnmap}},
	{name: "file of 512-byte sectors", opts: "cluster_size=1k", size: 96 << 10, backing: 50 << 10, limits: block.Limits{RequestAlignment: 512, WriteFlags: block.FUA, ZeroFlags: blocktest.AllFlags.ZeroFlags}},
	{name: "refcount table grows", opts: "cluster_size=512,refcount_bits=64", size: 1920 << 10, from: 1792 << 10, prepare: []string{"write -P 0x5a 0 1792k"}, ops: 50, perCut: 3},
	{name: "dirty image", opts: "cluster_size=1k,lazy_refcounts=on", size: 96 << 10, compressed: true, dirty: true},
	{name: "handed over", opts: "cluster_size=1k", size: 96 << 10, backing: 60 << 10, compressed: true, snapshot: true, handover: true},
	{name: "handed over, one-bit refcounts", opts: "cluster_size=512,refcount_bits=1", size: 64 << 10, handover: true},
	{name: "parallel", opts: "cluster_size=1k", size: 128 << 10, backing: 90 << 10, compressed: true, snapshot: true, workers: 3},
	{name: "parallel, small clusters", opts: "cluster_size=512,refcount_bits=64", size: 96 << 10, workers: 4},
}

// A crashRun is a workload that was run, with all that is needed to judge its cuts.
type crashRun struct {
	crashCase
	t        *testing.T
	dir      string // of the base image and its backing file
	base     *blocktest.Store
	backing  *block.Config // nil: none
	log      *blocktest.Log
	model    *guestModel
	snapshot []byte // what the snapshot holds, nil: there is none
	graph    *block.Graph
	states   int
	opened   int
}

func tool(t *testing.T, dir, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// prepareCrash makes the base image with qemu's tools.
func prepareCrash(t *testing.T, c crashCase) *crashRun {
	t.Helper()
	r := &crashRun{crashCase: c, t: t, dir: t.TempDir()}
	at := func(name string) string { return filepath.Join(r.dir, name) }
	contents := make([]byte, c.size)
	create := []string{"create", "-q", "-f", "qcow2", "-o", c.opts}
	if c.backing > 0 {
		raw := make([]byte, c.backing)
		copy(raw, tagged(1<<30, 0, c.backing/2))
		copy(raw[c.backing*3/4:], tagged(1<<30+1, c.backing*3/4, c.backing-c.backing*3/4))
		writeFile(t, at("base.raw"), raw)
		copy(contents, raw)
		create = append(create, "-b", "base.raw", "-F", "raw")
		r.backing = blocktest.MemoryConfig(blocktest.StoreOf(raw))
	}
	tool(t, r.dir, "qemu-img", append(create, "image.qcow2", fmt.Sprint(c.size))...)
	if c.compressed {
		// Clusters of the middle third, one compressed by one.
		for off := c.size / 3 &^ 0xffff; off < c.size*2/3; off += 8192 {
			n := min(8192, c.size-off)
			tool(t, r.dir, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -c -P %d %d %d", 1+off>>13, off, n), "image.qcow2")
			copy(contents[off:], bytes.Repeat([]byte{byte(1 + off>>13)}, int(n)))
		}
		n := min(int64(10<<10), c.size/8)
		tool(t, r.dir, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P 0xee 1024 %d", n), "image.qcow2")
		copy(contents[1024:], bytes.Repeat([]byte{0xee}, int(n)))
	}
	for _, cmd := range c.prepare {
		tool(t, r.dir, "qemu-io", "-f", "qcow2", "-c", cmd, "image.qcow2")
	}
	if c.prepare != nil {
		copy(contents, bytes.Repeat([]byte{0x5a}, int(c.from)))
	}
	if c.snapshot {
		tool(t, r.dir, "qemu-img", "snapshot", "-c", "s1", "image.qcow2")
		r.snapshot = contents
	}
	var err error
	if r.base, err = blocktest.LoadStore(at("image.qcow2")); err != nil {
		t.Fatal(err)
	}
	if c.dirty {
		spoilRefcounts(t, r.base)
	}
	r.log = blocktest.NewLog(r.base)
	r.model = newGuestModel(r.log, contents)
	r.graph = testGraph(t)
	return r
}

// spoilRefcounts makes an image one that was killed with lazy refcounts: the dirty
// bit is set, and clusters in use have no refcount.
func spoilRefcounts(t *testing.T, s *blocktest.Store) {
	t.Helper()
	m := &memTarget{data: s.Bytes()}
	h := mustParse(t, m)
	clusters := h.Clusters(m.Size())
	for c := clusters / 2; c < clusters; c++ {
		setRefcount(m, h, c, 0)
	}
	binary.BigEndian.PutUint64(m.data[incompatibleOffset:], h.Incompatible|IncompatDirty)
	s.Write(m.data, 0)
}

// crashNode describes the image over the disk that keeps the log.
func (r *crashRun) crashNode() *block.Config {
	c := storeNode(nil, r.backing)
	c.Options.(*Options).broken = r.broken
	file := blocktest.CrashConfig(r.log)
	if r.limits != (block.Limits{}) {
		file.Options.(*blocktest.CrashOptions).Limits = r.limits
	}
	c.Children["file"] = file
	return c
}

// work runs the workload. Each worker has a root of its own and owns stripes of
// the disk that are smaller than a cluster, so workers share clusters, not units.
func (r *crashRun) work() {
	r.t.Helper()
	ctx := context.Background()
	n, err := r.graph.Open(ctx, r.crashNode())
	if err != nil {
		r.t.Fatalf("open: %v", err)
	}
	workers := max(1, r.workers)
	errs := make([]error, workers)
	var roots []*block.Root
	share := block.PermConsistentRead | block.PermWrite
	for w := range workers {
		root, err := r.graph.AttachRoot(ctx, block.RootConfig{User: fmt.Sprintf("worker %d", w), Node: n, Perm: share, Shared: share, AllowInactive: allow})
		if err != nil {
			r.t.Fatal(err)
		}
		roots = append(roots, root)
	}
	var wg sync.WaitGroup
	for w, root := range roots {
		wg.Go(func() { errs[w] = r.worker(w, workers, root) })
	}
	wg.Wait()
	for _, root := range roots {
		errs = append(errs, root.Detach(ctx))
	}
	if err := errors.Join(append(errs, r.graph.Release(ctx, n))...); err != nil {
		r.t.Fatalf("workload: %v", err)
	}
}

func (r *crashRun) worker(w, workers int, root *block.Root) error {
	rng := rand.New(rand.NewPCG(r.seed, uint64(w)))
	ops := r.ops
	if ops == 0 {
		ops = 60 / workers
	}
	if long() {
		ops *= 3
	}
	lane := root.NewLane(block.Shard(w), nil)
	defer lane.Close()
	ctx := lane.Context(context.Background())
	for i := range ops {
		if err := r.request(ctx, rng, root, lane, w, workers, uint64(w)<<16|uint64(i)); err != nil {
			return err
		}
		if r.handover && i%8 == 7 {
			if err := r.rest(ctx, root.Node(), i%16 == 7); err != nil {
				return err
			}
		}
	}
	return nil
}

// rest makes the node inactive, or read-only, and again what it was. Meanwhile the image
// must be whole, and what was written durable.
func (r *crashRun) rest(ctx context.Context, n *block.Node, inactive bool) error {
	turn := func(rest bool) error {
		if inactive {
			return r.graph.SetActive(ctx, !rest, n)
		}
		c := *n.ExplicitConfig()
		c.ReadOnly = rest
		c.Children = nil
		if r.backing != nil {
			c.Children = map[string]*block.Config{"backing": {Ref: n.Backing().Node().Name()}}
		}
		return r.graph.Reopen(ctx, block.ReopenRequest{Node: n, Config: &c, Force: true})
	}
	if err := r.model.flush(func() error { return turn(true) }); err != nil {
		return err
	}
	checkStore(r.t, r.log.Disk(), false)
	return turn(false)
}

// place chooses where a request goes: near places chosen before, so that clusters
// are written more than once, and often whole clusters.
func (r *crashRun) place(rng *rand.Rand, w, workers int) (off, n int64) {
	if workers > 1 {
		const stripe = 4 * unit
		off = r.from + (rng.Int64N((r.size-r.from)/stripe/int64(workers))*int64(workers)+int64(w))*stripe
		from := rng.Int64N(4)
		return off + from*unit, (rng.Int64N(4-from) + 1) * unit
	}
	span := (r.size - r.from) / unit
	u := rng.Int64N(span)
	if rng.IntN(3) > 0 {
		u = u % (span / 4) * 2 // the first half is busier
	}
	n = rng.Int64N(24) + 1
	switch rng.IntN(4) {
	case 0:
		u, n = u&^63, 64*(rng.Int64N(3)+1) // 4 KiB
	case 1:
		u, n = u&^7, 8*(rng.Int64N(10)+1) // sectors
	}
	n = min(n, span-u)
	return r.from + u*unit, n * unit
}

// request makes one random request.
func (r *crashRun) request(ctx context.Context, rng *rand.Rand, root *block.Root, lane *block.Lane, w, workers int, id uint64) error {
	a, ok := lane.Begin()
	if !ok {
		return errors.New("drained")
	}
	defer lane.End(a)
	off, n := r.place(rng, w, workers)
	switch k := rng.IntN(100); {
	case k < 55:
		var flags block.ReqFlags
		if k < 8 {
			flags = block.FUA
		}
		p := tagged(id, off, n)
		return r.model.change(off, n, p, false, flags != 0, func() error { return root.WriteAt(ctx, p, off, flags) })
	case k < 70:
		flags := []block.ReqFlags{0, block.MayUnmap, block.MayUnmap, block.MayUnmap | block.FUA}[rng.IntN(4)]
		return r.model.change(off, n, nil, false, flags&block.FUA != 0, func() error { return root.WriteZeroes(ctx, off, n, flags) })
	case k < 85:
		return r.model.change(off, n, nil, true, false, func() error { return root.Discard(ctx, off, n) })
	case k < 87:
		p := make([]byte, n)
		return root.ReadAt(ctx, p, off)
	default:
		return r.model.flush(func() error { return root.Flush(ctx) })
	}
}

// judge looks at all states that the plan gives, and returns the first fault.
func (r *crashRun) judge() error {
	plan := blocktest.Plan{PerCut: r.perCut, Torn: true, Seed: r.seed}
	if plan.PerCut == 0 {
		plan.PerCut = 4
	}
	if long() {
		plan.PerCut *= 2
	}
	for s := range r.log.States(plan) {
		if err := r.look(s); err != nil {
			return fmt.Errorf("case %q, seed %d, cut %d (%s): %w\n%s", r.name, r.seed, s.Cut, s.Name, err, r.around(s.Cut))
		}
		r.states++
	}
	return nil
}

// around lists what reached the disk before a cut.
func (r *crashRun) around(cut int64) string {
	var b strings.Builder
	for _, e := range r.log.Entries() {
		if e.Start <= cut && e.Start > cut-60 {
			fmt.Fprintln(&b, e)
		}
	}
	return b.String()
}

// look judges one state.
func (r *crashRun) look(s blocktest.State) error {
	m := &memTarget{data: s.Disk.Bytes()}
	h, err := ParseHeader(context.Background(), m, m.Size())
	if err != nil {
		return err
	}
	if !h.Dirty() {
		if err := checkLeaks(m, h); err != nil {
			return err
		}
	}
	got, err := r.contents(s.Disk, true)
	if err != nil {
		return err
	}
	if err := r.model.check(got, s.Cut); err != nil {
		return err
	}
	if r.snapshot != nil && r.states%4 == 0 {
		if err := r.lookAtSnapshot(s.Disk, m, h); err != nil {
			return err
		}
	}
	if r.states%50 == 0 {
		if err := r.askQEMU(s.Disk, h.Dirty(), got); err != nil {
			return err
		}
	}
	if h.Dirty() || r.states%7 == 0 {
		return r.goOn(s, got)
	}
	return nil
}

// checkLeaks checks an image, which may have leaks only.
func checkLeaks(m *memTarget, h *Header) error {
	var lines []string
	res, err := Check(context.Background(), m, h, func(line string) { lines = append(lines, line) })
	if err == nil && (res.Corruptions != 0 || res.CheckErrors != 0) {
		err = fmt.Errorf("check found %d corruptions and %d errors:\n%s", res.Corruptions, res.CheckErrors, strings.Join(lines[:min(len(lines), 8)], "\n"))
	}
	return err
}

// use opens an image and calls f with a root on it.
func (r *crashRun) use(s *blocktest.Store, readOnly bool, f func(ctx context.Context, root *block.Root) error) (err error) {
	ctx := context.Background()
	c := storeNode(s, r.backing)
	c.ReadOnly = readOnly
	n, err := r.graph.Open(ctx, c)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer func() { err = errors.Join(err, r.graph.Release(ctx, n)) }()
	perm := block.PermConsistentRead
	if !readOnly {
		perm |= block.PermWrite
	}
	root, err := r.graph.AttachRoot(ctx, block.RootConfig{User: "crash test", Node: n, Perm: perm, Shared: block.PermConsistentRead})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Detach(ctx)) }()
	return root.Do(ctx, func(ctx context.Context) error { return f(ctx, root) })
}

// contents reads the whole disk of an image.
func (r *crashRun) contents(s *blocktest.Store, readOnly bool) ([]byte, error) {
	p := make([]byte, r.size)
	err := r.use(s, readOnly, func(ctx context.Context, root *block.Root) error { return root.ReadAt(ctx, p, 0) })
	return p, err
}

// lookAtSnapshot reads the snapshot by making its L1 table the active one.
func (r *crashRun) lookAtSnapshot(disk *blocktest.Store, m *memTarget, h *Header) error {
	snaps, err := ReadSnapshots(context.Background(), m, h)
	if err != nil || len(snaps) != 1 {
		return fmt.Errorf("%d snapshots: %w", len(snaps), err)
	}
	s := disk.Clone()
	field := binary.BigEndian.AppendUint32(nil, snaps[0].L1Size)
	s.Write(binary.BigEndian.AppendUint64(field, uint64(snaps[0].L1Offset)), 36)
	got, err := r.contents(s, true)
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	if i := firstDifference(got, r.snapshot); i >= 0 {
		return fmt.Errorf("byte %#x of the snapshot is %#x, want %#x", i, got[i], r.snapshot[i])
	}
	return nil
}

// askQEMU lets qemu-img check and read the image.
func (r *crashRun) askQEMU(disk *blocktest.Store, dirty bool, got []byte) error {
	path := filepath.Join(r.dir, "cut.qcow2")
	if err := disk.Save(path); err != nil {
		return err
	}
	run := func(args ...string) (string, int, error) {
		cmd := exec.Command("qemu-img", args...)
		cmd.Dir = r.dir
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return string(out), exit.ExitCode(), nil
		}
		return string(out), 0, err
	}
	if !dirty {
		out, code, err := run("check", "-f", "qcow2", "cut.qcow2")
		if err != nil || code != 0 && code != 3 {
			return fmt.Errorf("qemu-img check exits with %d: %w\n%s", code, err, out)
		}
	}
	out, code, err := run("convert", "-f", "qcow2", "-O", "raw", "cut.qcow2", "cut.raw")
	if err != nil || code != 0 {
		return fmt.Errorf("qemu-img convert exits with %d: %w\n%s", code, err, out)
	}
	theirs, err := os.ReadFile(filepath.Join(r.dir, "cut.raw"))
	if err != nil {
		return err
	}
	if i := firstDifference(got, theirs); i >= 0 {
		return fmt.Errorf("byte %#x reads as %#x here and as %#x in QEMU", i, got[i], theirs[i])
	}
	return nil
}

// goOn opens the image for writing, as after the power is back, and uses it: what
// was there must stay, and the image must be sound afterwards.
func (r *crashRun) goOn(s blocktest.State, got []byte) error {
	r.opened++
	rng := rand.New(rand.NewPCG(r.seed, uint64(s.Cut)))
	want := bytes.Clone(got)
	err := r.use(s.Disk, false, func(ctx context.Context, root *block.Root) error {
		for i := range 6 {
			off, n := r.place(rng, 0, 1)
			p := tagged(1<<34+uint64(i), off, n)
			if i == 3 {
				clear(p)
				if err := root.WriteZeroes(ctx, off, n, block.MayUnmap); err != nil {
					return err
				}
			} else if err := root.WriteAt(ctx, p, off, 0); err != nil {
				return err
			}
			copy(want[off:], p)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("go on: %w", err)
	}
	m := &memTarget{data: s.Disk.Bytes()}
	h, err := ParseHeader(context.Background(), m, m.Size())
	if err != nil {
		return fmt.Errorf("go on: %w", err)
	}
	if h.Dirty() {
		return errors.New("go on: the image is still dirty after a close")
	}
	if err := checkLeaks(m, h); err != nil {
		return fmt.Errorf("go on: %w", err)
	}
	again, err := r.contents(s.Disk, true)
	if err != nil {
		return fmt.Errorf("go on: %w", err)
	}
	if i := firstDifference(again, want); i >= 0 {
		return fmt.Errorf("go on: byte %#x is %#x, want %#x", i, again[i], want[i])
	}
	return nil
}

func TestImageSurvivesEveryCut(t *testing.T) {
	seeds := uint64(1)
	if long() {
		seeds = 3
	}
	for _, c := range crashCases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			for seed := range seeds {
				c.seed = seed
				r := prepareCrash(t, c)
				r.work()
				if err := r.judge(); err != nil {
					t.Fatal(err)
				}
				end, err := r.contents(r.log.Disk().Clone(), true)
				if err == nil {
					err = r.model.check(end, r.log.Now())
				}
				if err != nil {
					t.Fatalf("after the close: %v", err)
				}
				checkStore(t, r.log.Disk(), c.dirty)
				if r.states < 100 {
					t.Errorf("only %d states were looked at", r.states)
				}
				t.Logf("seed %d: %d requests reached the disk, %d states, %d of them used further", seed, len(r.log.Entries()), r.states, r.opened)
			}
		})
	}
}

// Breaking one rule of the order must be noticed, or the test above proves nothing.
func TestCrashTestNoticesEachBrokenRule(t *testing.T) {
	rules := map[string]orderingRule{
		"R1 data before L2":                  ruleDataFirst,
		"R1 refcount before L2":              ruleRefcountFirst,
		"R1 L2 removal before refcount":      ruleRemoveFirst,
		"R2 flush between data and L2":       ruleFlushData,
		"R3 L2 table before L1":              ruleTableFirst,
		"R4 refcount block before its entry": ruleBlockFirst,
		"R5 refcounts before the dirty bit":  ruleDirtyLast,
	}
	for name, rule := range rules {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(10) {
				for _, c := range crashCases {
					if c.dirty != (rule == ruleDirtyLast) || c.workers > 1 || c.prepare != nil {
						continue
					}
					c.broken, c.seed = rule, seed
					r := prepareCrash(t, c)
					r.work()
					if err := r.judge(); err != nil {
						t.Logf("noticed after %d states: %.300v", r.states, err)
						return
					}
				}
			}
			t.Errorf("breaking the rule was not noticed")
		})
	}
}
