package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/export"
)

// changes is how many times the graph is changed under load.
func changes() int {
	if os.Getenv("NBDSERVE_LONG") != "" {
		return 1000
	}
	return 60
}

// A workshop changes a graph that clients use.
type workshop struct {
	t       *testing.T
	dir     string
	g       *block.Graph
	root    *block.Root
	r       *rand.Rand
	owned   []*block.Node // references of ours, besides those of edges
	filters []*block.Node // of owned: filters inserted
	files   int
}

func (w *workshop) must(what string, err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
}

func (w *workshop) open(options string) *block.Node {
	w.t.Helper()
	o, err := block.ParseOptions(options, "")
	w.must(options, err)
	cfg, err := w.g.Configure("", o)
	w.must(options, err)
	n, err := w.g.Open(context.Background(), cfg)
	w.must(options, err)
	w.owned = append(w.owned, n)
	return n
}

func (w *workshop) image(format string, args ...string) string {
	w.t.Helper()
	w.files++
	path := filepath.Join(w.dir, fmt.Sprintf("%d.%s", w.files, format))
	tool(w.t, append(append([]string{"qemu-img", "create", "-q", "-f", format}, args[:len(args)-1]...), path, args[len(args)-1])...)
	return path
}

// imageFile is the file of an image, whatever lies below it in the graph.
func imageFile(n *block.Node) string { return n.Child("file").Node().Filename() }

// images lists the qcow2 nodes from the root down.
func (w *workshop) images() []*block.Node { return w.root.Node().Images() }

func (w *workshop) pick(list []*block.Node) *block.Node { return list[w.r.IntN(len(list))] }

func (w *workshop) release(n *block.Node) {
	w.t.Helper()
	w.owned = slices.DeleteFunc(w.owned, func(o *block.Node) bool { return o == n })
	w.must("release of "+n.Name(), w.g.Release(context.Background(), n))
}

// insert puts a filter somewhere into the chain.
func (w *workshop) insert(ctx context.Context) {
	n := w.pick(w.root.Node().Chain())
	kind := []string{"driver=throttle,iops-total=1000000", "driver=blkdebug", "driver=delay"}[w.r.IntN(3)]
	readOnly := ""
	if n.ReadOnly() {
		readOnly = ",read-only=on"
	}
	o, err := block.ParseOptions(kind+map[bool]string{true: ",image=", false: ",file="}[strings.HasSuffix(kind, "blkdebug")]+n.Name()+readOnly, "")
	w.must(kind, err)
	cfg, err := w.g.Configure("", o)
	w.must(kind, err)
	f, err := w.g.InsertFilter(ctx, cfg, n)
	w.must("insert "+kind+" above "+n.Name(), err)
	w.owned, w.filters = append(w.owned, f), append(w.filters, f)
}

func (w *workshop) remove(ctx context.Context) {
	if len(w.filters) == 0 {
		return
	}
	i := w.r.IntN(len(w.filters))
	f := w.filters[i]
	w.filters = slices.Delete(w.filters, i, i+1)
	w.must("remove of "+f.Name(), w.g.RemoveFilter(ctx, f))
	w.release(f)
}

// overlay makes and opens an image that is to go on top of everything.
func (w *workshop) overlay() *block.Node {
	path := w.image("qcow2", "-b", imageFile(w.images()[0]), "-F", "qcow2", fmt.Sprint(w.root.Size()))
	return w.open(fmt.Sprintf(`{"driver": "qcow2", "discard": "unmap", "backing": null, "file": {"driver": "file", "filename": %q}}`, path))
}

// snapshot puts an overlay on top, for good while the chain is short, and else one
// that is taken out of the chain again from under a second, before anything is written to it.
func (w *workshop) snapshot(ctx context.Context) {
	top := w.root.Node()
	first := w.overlay()
	if len(w.images()) < 6 {
		w.must("overlay", w.g.AppendOverlay(ctx, first, top))
		return
	}
	second, name := w.overlay(), imageFile(w.images()[0])
	w.must("drain", w.g.DrainBegin(ctx, top))
	w.must("overlay", w.g.AppendOverlay(ctx, first, top))
	w.must("second overlay", w.g.AppendOverlay(ctx, second, first))
	w.must("drop of the first overlay", w.g.DropIntermediate(ctx, first, top, name, "qcow2"))
	w.must("drop of the second overlay", w.g.Replace(ctx, second, top))
	w.g.DrainEnd(top)
	w.release(second)
	w.release(first)
}

// reopen gives an image other options.
func (w *workshop) reopen(ctx context.Context) {
	n := w.pick(w.images())
	cfg := *n.ExplicitConfig()
	cfg.DetectZeroes = block.DetectZeroes(w.r.IntN(3))
	cfg.Unmap = cfg.Unmap || cfg.DetectZeroes == block.DetectZeroesUnmap
	cfg.Given |= block.GivenDiscard
	if e := n.Backing(); e != nil { // left out or null it would be taken away
		cfg.NoBacking, cfg.Children = false, maps.Clone(cfg.Children)
		cfg.Children["backing"] = &block.Config{Ref: e.Node().Name()}
	}
	w.must("reopen of "+n.Name(), w.g.Reopen(ctx, block.ReopenRequest{Node: n, Config: &cfg}))
}

// relink takes an image's backing node away and gives it back, in one drained section.
func (w *workshop) relink(ctx context.Context) {
	n := w.images()[0]
	if n.Backing() == nil {
		return
	}
	backing := n.Backing().Node()
	w.must("drain", w.g.DrainBegin(ctx, n, backing))
	w.must("backing off", w.g.SetBacking(ctx, n, nil))
	w.must("backing on", w.g.SetBacking(ctx, n, backing))
	w.g.DrainEnd(n, backing)
}

func (w *workshop) pause(ctx context.Context) {
	n := w.pick(w.g.Nodes())
	w.must("drain", w.g.DrainBegin(ctx, n))
	w.must("nested drain", w.g.DrainBegin(ctx, w.root.Node()))
	w.g.DrainEnd(w.root.Node())
	w.g.DrainEnd(n)
}

func (w *workshop) change(ctx context.Context) {
	ops := []func(context.Context){w.insert, w.insert, w.remove, w.remove, w.snapshot, w.reopen, w.relink, w.pause}
	if len(w.filters) > 6 {
		ops = ops[2:]
	}
	ops[w.r.IntN(len(ops))](ctx)
}

// latencies are those of a probe that reads through a root again and again and notes how long that takes.
type latencies struct {
	mu    sync.Mutex
	times []time.Duration
}

func (p *latencies) run(t *testing.T, root *block.Root, stop <-chan struct{}) {
	b := make([]byte, 4096)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for off := int64(0); ; off = (off + 4096) % (1 << 20) {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		began := time.Now()
		err := root.Do(context.Background(), func(ctx context.Context) error { return root.ReadAt(ctx, b, off) })
		if err != nil {
			t.Errorf("probe of %s: %v", root.User(), err)
			return
		}
		p.mu.Lock()
		p.times = append(p.times, time.Since(began))
		p.mu.Unlock()
	}
}

// take returns the median, the 99th percentile and the longest time since the last call.
func (p *latencies) take() (p50, p99, longest time.Duration) {
	p.mu.Lock()
	times := p.times
	p.times = nil
	p.mu.Unlock()
	if len(times) == 0 {
		return 0, 0, 0
	}
	slices.Sort(times)
	return times[len(times)/2], times[len(times)*99/100], times[len(times)-1]
}

// With fio verifying what it writes over 4 connections, random changes of the graph
// lose nothing, and another export of the process does not notice them.
func TestGraphChangesUnderLoadLoseNothing(t *testing.T) {
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	w := &workshop{t: t, dir: t.TempDir(), g: newGraph(log), r: rand.New(rand.NewPCG(1, uint64(changes())))}
	ctx := context.Background()
	const size = 32 << 20
	base := w.image("qcow2", fmt.Sprint(size))
	other := w.image("raw", fmt.Sprint(1<<20))
	s := export.NewServer(export.Options{Log: log})
	add := func(name string, n *block.Node) *block.Root {
		e, err := s.AddExport(ctx, export.Config{Name: name, Graph: w.g, Node: n})
		w.must("export "+name, err)
		return e.Root()
	}
	w.root = add("disk", w.open("driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename="+base))
	apart := add("other", w.open("driver=raw,node-name=other,file.driver=file,file.filename="+other))
	sock := filepath.Join(w.dir, "s")
	l, err := net.Listen("unix", sock)
	w.must("listen", err)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()

	stop := make(chan struct{})
	var probes sync.WaitGroup
	var mine, others latencies
	probes.Go(func() { mine.run(t, w.root, stop) })
	probes.Go(func() { others.run(t, apart, stop) })

	uri := "nbd+unix:///disk?socket=" + sock
	round := func() *exec.Cmd {
		return exec.Command("fio", "--name=v", "--ioengine=nbd", "--uri="+uri, "--rw=randwrite", "--bsrange=4k-32k", "--iodepth=8", "--numjobs=4",
			fmt.Sprintf("--size=%d", size/4), fmt.Sprintf("--offset_increment=%d", size/4), "--verify=crc32c", "--verify_backlog=128",
			"--verify_fatal=1", "--verify_state_save=0", "--allrandrepeat=1", "--output-format=terse")
	}
	fio := func() {
		if out, err := round().CombinedOutput(); err != nil {
			t.Errorf("fio: %v\n%s", err, out)
		}
	}
	fio()
	_, quiet99, quietMost := others.take()
	_, _, slowest := mine.take()

	var done atomic.Bool
	var load sync.WaitGroup
	load.Go(func() {
		for !done.Load() && !t.Failed() {
			fio()
		}
	})
	changing, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	for range changes() {
		w.change(changing)
		if t.Failed() {
			break
		}
	}
	done.Store(true)
	load.Wait()
	_, load99, loadMost := others.take()
	p50, p99, pause := mine.take()
	t.Logf("%d changes; this export: median %v, 99 %% %v, longest %v (before: longest %v); the other: 99 %% %v, longest %v (before: 99 %% %v, longest %v)",
		changes(), p50, p99, pause, slowest, load99, loadMost, quiet99, quietMost)
	close(stop)
	probes.Wait()

	chain := w.images()
	var files []string
	for _, n := range chain {
		files = append(files, imageFile(n))
	}
	w.must("shutdown", s.Shutdown(ctx))
	w.must("serve", <-served)
	for len(w.owned) > 0 {
		w.release(w.owned[len(w.owned)-1])
	}
	w.must("nodes left", w.g.Close(ctx))
	for _, f := range files {
		tool(t, "qemu-img", "check", "-q", "-f", "qcow2", f)
	}
	var there []struct{ Filename string }
	w.must("info", json.Unmarshal([]byte(tool(t, "qemu-img", "info", "--backing-chain", "--output=json", "-f", "qcow2", files[0])), &there))
	var names []string
	for _, image := range there {
		names = append(names, image.Filename)
	}
	if !slices.Equal(names, files) {
		t.Errorf("the chain on disk is %q, that of the graph %q", names, files)
	}
	if errors.Is(changing.Err(), context.DeadlineExceeded) {
		t.Error("the changes did not end in time")
	}
}
