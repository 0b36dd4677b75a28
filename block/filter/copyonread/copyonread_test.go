package copyonread_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"github.com/nbdserve/nbdserve/block/filter/copyonread"
	"github.com/nbdserve/nbdserve/formats/qcow2"
)

var ctx = context.Background()

// TestMain has fewer random runs than usual, unless there is time or the command line says otherwise.
func TestMain(m *testing.M) {
	if os.Getenv("NBDSERVE_LONG") == "" {
		if err := flag.Set("rapid.checks", "10"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

const (
	size    = 196 * 512
	cluster = 4096
)

func must(t blocktest.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%v", err)
	}
}

func newGraph(t blocktest.TB) *block.Graph {
	return blocktest.NewGraph(t, copyonread.Driver(), qcow2.Driver(qcow2.Host{}))
}

// target is a store as an image is created in it.
type target struct{ *blocktest.Store }

func (t target) ReadAt(_ context.Context, p []byte, off int64) error {
	t.Store.Read(p, off)
	return nil
}

func (t target) WriteAt(_ context.Context, p []byte, off int64, _ block.ReqFlags) error {
	t.Store.Write(p, off)
	return nil
}

func (t target) Flush(context.Context) error { return nil }

func (t target) Truncate(_ context.Context, size int64) error {
	t.Store.Truncate(size)
	return nil
}

// overlay makes an empty image.
func overlay(t blocktest.TB, size int64) *blocktest.Store {
	t.Helper()
	s := blocktest.NewStore(0)
	must(t, qcow2.Create(ctx, target{s}, qcow2.CreateOptions{Size: size, ClusterSize: cluster}))
	return s
}

func image(name string, s *blocktest.Store, backing *block.Config) *block.Config {
	c := &block.Config{Driver: "qcow2", NodeName: name, Unmap: true, Children: map[string]*block.Config{"file": blocktest.MemoryConfig(s)}}
	if backing != nil {
		c.Children["backing"] = backing
	}
	return c
}

func memory(name string, s *blocktest.Store) *block.Config {
	c := blocktest.MemoryConfig(s)
	c.NodeName = name
	return c
}

func cor(o *copyonread.Options, file *block.Config) *block.Config {
	c := &block.Config{Driver: "copy-on-read", NodeName: "cor", Unmap: true, Children: map[string]*block.Config{"file": file}}
	if o != nil {
		c.Options = o
	}
	return c
}

// pattern has no zeroes.
func pattern(seed byte, n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i)*7 + byte(i>>8) + seed | 1
	}
	return p
}

// base is data with holes, the last of them at the end.
func base(n int64) *blocktest.Store {
	s := blocktest.NewStore(n)
	s.Write(pattern(1, n/2), 0)
	s.Zero(3*cluster, 2*cluster, true)
	return s
}

func TestCopyOnReadConforms(t *testing.T) {
	for name, backing := range map[string]int64{"NoBacking": 0, "Backing": size, "ShortBacking": size/2 + 100, "LongBacking": 2 * size} {
		for _, filtered := range []bool{false, true} {
			t.Run(fmt.Sprint(name, filtered), func(t *testing.T) {
				blocktest.Conformance(t, blocktest.Factory{
					New: func(t blocktest.TB) blocktest.Subject {
						contents := make([]byte, size)
						var below *block.Config
						if backing > 0 {
							b := base(backing)
							below = memory("", b)
							copy(contents, b.Bytes())
						}
						file := image("", overlay(t, size), below)
						if filtered {
							file = blocktest.SlowConfig(blocktest.NewGate(), file)
						}
						return blocktest.Subject{Graph: newGraph(t), Config: cor(nil, file), Contents: contents}
					},
					Writable: true, FastZero: true, Locates: !filtered, DiscardZeroes: true, Holes: true,
				})
			})
		}
	}
}

// A rig is a copy-on-read node over an image with backing images, with a root.
type rig struct {
	t     *testing.T
	graph *block.Graph
	top   *blocktest.Store
	root  *block.Root
}

func newRig(t *testing.T, o *copyonread.Options, wrap func(*block.Config) *block.Config, backing *block.Config) *rig {
	t.Helper()
	r := &rig{t: t, graph: newGraph(t), top: overlay(t, size)}
	c := image("top", r.top, backing)
	if wrap != nil {
		c = wrap(c)
	}
	n, err := r.graph.Open(ctx, cor(o, c))
	must(t, err)
	r.root, err = r.graph.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermConsistentRead | block.PermWrite})
	must(t, errors.Join(err, r.graph.Release(ctx, n)))
	t.Cleanup(r.close)
	return r
}

func (r *rig) close() {
	if r.root != nil {
		if err := r.root.Detach(ctx); err != nil {
			r.t.Error(err)
		}
		r.root = nil
	}
}

func (r *rig) read(off, n int64) []byte {
	r.t.Helper()
	p := make([]byte, n)
	must(r.t, r.root.Do(ctx, func(ctx context.Context) error { return r.root.ReadAt(ctx, p, off) }))
	return p
}

// node is an open node.
func (r *rig) node(name string) *block.Node {
	r.t.Helper()
	n := r.graph.Lookup(name)
	if n == nil {
		r.t.Fatalf("no node '%s'", name)
	}
	return n
}

// held is what the image at the top holds itself: one character a cluster, d for data,
// 0 for zeroes, - for what is not allocated.
func (r *rig) held() string {
	r.t.Helper()
	var b strings.Builder
	inst := r.node("top").Instance().(block.StatusReporter)
	for off := int64(0); off < size; off += cluster {
		x, err := inst.BlockStatus(ctx, off, min(cluster, size-off), true)
		must(r.t, err)
		switch {
		case x.Flags&block.StatusAllocated == 0:
			b.WriteByte('-')
		case x.Flags&block.StatusZero != 0:
			b.WriteByte('0')
		default:
			b.WriteByte('d')
		}
	}
	return b.String()
}

func (r *rig) wantHeld(want string) {
	r.t.Helper()
	if got := r.held(); got != want {
		r.t.Errorf("the image holds %s, want %s", got, want)
	}
}

func (r *rig) copied() int64 {
	return int64(r.node("cor").Instance().(block.Measurer).Measurements()[0].Value)
}

func TestCopyOnReadCopiesWhatIsReadInWholeClusters(t *testing.T) {
	r := newRig(t, nil, nil, memory("base", base(size)))
	r.wantHeld("-------------------------")
	for _, c := range []struct {
		off, n int64
		held   string
		copied int64
	}{
		{10, 1, "d------------------------", 1},
		{10, 1, "d------------------------", 1}, // it is there
		{2*cluster - 1, 2, "ddd----------------------", 3},
		{3*cluster + 5, 1, "ddd0---------------------", 4},  // a hole stays one
		{0, 8 * cluster, "ddd00ddd-----------------", 8},    // what is missing between
		{size/2 - 100, 200, "ddd00ddd----d------------", 9}, // where the data ends inside a cluster
		{size - 1, 1, "ddd00ddd----d-----------0", 9},       // the last one is half a cluster
		{20 * cluster, 2 * cluster, "ddd00ddd----d-------00--0", 11},
	} {
		if got, want := r.read(c.off, c.n), base(size).Bytes()[c.off:c.off+c.n]; !bytes.Equal(got, want) {
			t.Errorf("read of %d bytes at %d is wrong", c.n, c.off)
		}
		r.wantHeld(c.held)
		if got := r.copied() / cluster; got != c.copied {
			t.Errorf("%d clusters were copied, want %d", got, c.copied)
		}
	}
	// Zeroes take up no space.
	if got := r.top.Size(); got > 16*cluster {
		t.Errorf("the file has %d bytes", got)
	}
}

func TestCopyOnReadPrefetchCopies(t *testing.T) {
	r := newRig(t, nil, nil, memory("base", base(size)))
	must(t, r.root.Do(ctx, func(ctx context.Context) error { return r.root.Prefetch(ctx, 0, 2*cluster) }))
	r.wantHeld("dd-----------------------")
}

func TestCopyOnReadLeavesAloneWhatNobodyHolds(t *testing.T) {
	mid := overlay(t, size)
	r := newRig(t, nil, nil, image("mid", mid, nil))
	if !block.IsZero(r.read(0, size)) {
		t.Errorf("not zero")
	}
	r.wantHeld("-------------------------")
}

func TestCopyOnReadCopiesTheZeroesPastAShortBackingFile(t *testing.T) {
	short := pattern(1, 2*cluster+100)
	r := newRig(t, nil, nil, memory("base", blocktest.StoreOf(short)))
	r.read(0, 5*cluster)
	r.wantHeld("ddd00--------------------")
	want := make([]byte, 5*cluster)
	copy(want, short)
	if !bytes.Equal(r.read(0, 5*cluster), want) {
		t.Errorf("wrong data")
	}
}

// midChain is an image that holds clusters 1 (data) and 2 (zeroes) of its own, over base.
func midChain(t *testing.T) *block.Config {
	t.Helper()
	mid := overlay(t, size)
	mem := memory("base", base(size))
	g := newGraph(t)
	n, err := g.Open(ctx, image("", mid, mem))
	must(t, err)
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermWrite})
	must(t, errors.Join(err, g.Release(ctx, n)))
	must(t, r.WriteAt(ctx, pattern(9, cluster), cluster, 0))
	must(t, r.WriteZeroes(ctx, 2*cluster, cluster, block.MayUnmap))
	must(t, r.Detach(ctx))
	return image("mid", mid, mem)
}

func TestCopyOnReadBottom(t *testing.T) {
	want := base(size).Bytes()
	copy(want[cluster:], pattern(9, cluster))
	clear(want[2*cluster : 3*cluster])
	for bottom, held := range map[string]string{
		"top": "-------------------------", "mid": "-d0----------------------", "base": "dd000dddddddd000000000000", "": "dd000dddddddd000000000000",
	} {
		t.Run(bottom, func(t *testing.T) {
			r := newRig(t, &copyonread.Options{Bottom: bottom}, nil, midChain(t))
			if !bytes.Equal(r.read(0, size), want) {
				t.Errorf("wrong data")
			}
			r.wantHeld(held)
			// The chain cannot be pulled from under it.
			err := r.graph.SetBacking(ctx, r.node("top"), nil)
			if frozen := bottom == "mid" || bottom == "base"; frozen != errors.Is(err, block.ErrBusy) || !frozen && err != nil {
				t.Errorf("take away the backing node: %v", err)
			} else if frozen && err.Error() != "Cannot change frozen 'backing' link from 'top' to 'mid'" {
				t.Errorf("take away the backing node: %v", err)
			}
		})
	}
}

func TestCopyOnReadRefusals(t *testing.T) {
	chain := func() *block.Config { return image("top", overlay(t, size), memory("base", base(size))) }
	open := func(c *block.Config, text string, is error) {
		t.Helper()
		g := newGraph(t)
		other, err := g.Open(ctx, memory("other", blocktest.NewStore(512)))
		must(t, err)
		defer g.Release(ctx, other)
		if n, err := g.Open(ctx, c); err == nil || err.Error() != text || !errors.Is(err, is) {
			t.Errorf("%v, want %s", err, text)
			if err == nil {
				g.Release(ctx, n)
			}
		}
	}
	readOnly := cor(nil, chain())
	readOnly.ReadOnly = true
	open(readOnly, "Can't use copy-on-read on read-only device", block.ErrReadOnly)
	c := chain()
	c.ReadOnly = true
	open(cor(nil, c), "Block node 'top' is read-only", block.ErrReadOnly)
	auto := cor(nil, c)
	auto.AutoReadOnly = true
	open(auto, "Block node 'top' is read-only", block.ErrReadOnly)
	auto.Inactive = true // without permissions that could be refused
	open(auto, "Can't use copy-on-read on read-only device", block.ErrReadOnly)
	open(cor(&copyonread.Options{Bottom: "x"}, chain()), "Bottom node 'x' not found", block.ErrInvalid)
	open(cor(&copyonread.Options{Bottom: "other"}, chain()), "Node 'other' is not in the backing chain of 'top'", block.ErrInvalid)
	slow := blocktest.SlowConfig(blocktest.NewGate(), chain())
	slow.NodeName = "slow"
	open(cor(&copyonread.Options{Bottom: "slow"}, slow), "Bottom node 'slow' is a filter", block.ErrInvalid)
}

func TestG21CopyOnReadStaysWritable(t *testing.T) {
	g := newGraph(t)
	top, err := g.Open(ctx, image("top", overlay(t, size), memory("base", base(size))))
	must(t, err)
	n, err := g.Open(ctx, cor(nil, &block.Config{Ref: "top"}))
	must(t, err)
	err = g.Reopen(ctx, block.ReopenRequest{Node: n, Config: &block.Config{ReadOnly: true}})
	if err == nil || !errors.Is(err, block.ErrReadOnly) || !strings.HasSuffix(err.Error(), "Can't set node 'cor' to r/o with copy-on-read enabled") {
		t.Errorf("%v", err)
	}
	must(t, g.Reopen(ctx, block.ReopenRequest{Node: n, Config: &block.Config{DetectZeroes: block.DetectZeroesOn}}))
	if err := g.Reopen(ctx, block.ReopenRequest{Node: n, Config: &block.Config{Options: &copyonread.Options{Bottom: "base"}}}); err == nil || err.Error() != "Cannot change the option 'bottom'" {
		t.Errorf("%v", err)
	}
	must(t, errors.Join(g.Release(ctx, n), g.Release(ctx, top)))
}

func TestG11CopyOnReadHoldsWriteUnchanged(t *testing.T) {
	g := newGraph(t)
	n, err := g.Open(ctx, cor(nil, image("top", overlay(t, size), memory("base", base(size)))))
	must(t, err)
	// Its users need not write.
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermConsistentRead})
	must(t, errors.Join(err, g.Release(ctx, n)))
	if p := n.Child("file").Perm(); p != block.PermConsistentRead|block.PermWriteUnchanged {
		t.Errorf("it holds %v", p)
	}
	p := make([]byte, 512)
	must(t, r.Do(ctx, func(ctx context.Context) error { return r.ReadAt(ctx, p, 0) }))
	x, err := g.Lookup("top").Instance().(block.StatusReporter).BlockStatus(ctx, 0, 512, true)
	if err != nil || x.Flags&block.StatusAllocated == 0 {
		t.Errorf("nothing was copied: %v", err)
	}
	must(t, r.Detach(ctx))
}

func TestCopyOnReadFailsWhenTheCopyCannotBeWritten(t *testing.T) {
	faults := new(blocktest.Faults)
	top := overlay(t, size)
	g := newGraph(t)
	c := image("top", top, memory("base", base(size)))
	c.Children["file"] = blocktest.FaultConfig(faults, c.Children["file"])
	n, err := g.Open(ctx, cor(nil, c))
	must(t, err)
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermConsistentRead})
	must(t, errors.Join(err, g.Release(ctx, n)))
	p := make([]byte, 512)
	read := func() error {
		return r.Do(ctx, func(ctx context.Context) error { return r.ReadAt(ctx, p, 0) })
	}
	faults.Add(blocktest.Fault{Op: blocktest.OpWrite, Err: syscall.ENOSPC})
	if err := read(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v, want ENOSPC", err)
	}
	faults.Clear()
	must(t, read())
	if !bytes.Equal(p, pattern(1, 512)) {
		t.Errorf("wrong data")
	}
	must(t, r.Detach(ctx))
}

func TestCopyOnReadLocatesWhatIsThere(t *testing.T) {
	r := newRig(t, &copyonread.Options{Bottom: "mid"}, nil, midChain(t))
	locate := func(off int64, want block.LocationKind) {
		t.Helper()
		must(t, r.root.Do(ctx, func(context.Context) error {
			if l := r.root.Locate(0, off, cluster); l.Kind != want || l.Length != cluster {
				t.Errorf("at %d: %+v, want %d", off, l, want)
			}
			return nil
		}))
	}
	r.read(0, cluster)          // comes from below the bottom
	locate(0, block.LocateData) // so there is nothing to copy
	locate(cluster, block.LocateAsk)
	locate(2*cluster, block.LocateAsk)
	r.read(cluster, 2*cluster)
	locate(cluster, block.LocateData)
	locate(2*cluster, block.LocateZero)
}

// TestG35CopyWaitsForWritesAndWritesForIt: neither a write during a copy nor one before
// it is lost.
func TestG35CopyWaitsForWritesAndWritesForIt(t *testing.T) {
	for _, held := range []blocktest.Op{blocktest.OpRead, blocktest.OpWrite} {
		t.Run(held.String(), func(t *testing.T) {
			// Either the read of the copy is held, below, or the write of the guest, above the image.
			gate := blocktest.NewGate()
			slow := func(c *block.Config) *block.Config { return blocktest.SlowConfig(gate, c) }
			var r *rig
			if held == blocktest.OpRead {
				r = newRig(t, nil, nil, slow(memory("base", base(size))))
			} else {
				r = newRig(t, nil, slow, memory("base", base(size)))
			}
			const at, n = 100, 300
			requests := map[blocktest.Op]func(context.Context) error{
				blocktest.OpRead:  func(ctx context.Context) error { return r.root.ReadAt(ctx, make([]byte, 512), 0) },
				blocktest.OpWrite: func(ctx context.Context) error { return r.root.WriteAt(ctx, pattern(5, n), at, 0) },
			}
			gate.Hold(held)
			first, second := make(chan error, 1), make(chan error, 1)
			go func() { first <- r.root.Do(ctx, requests[held]) }()
			must(t, gate.WaitHeld(ctx, 1))
			go func() { second <- r.root.Do(ctx, requests[blocktest.OpRead+blocktest.OpWrite-held]) }()
			select {
			case err := <-second:
				t.Fatalf("it did not wait: %v", err)
			case <-time.After(20 * time.Millisecond):
			}
			gate.ReleaseAll()
			must(t, errors.Join(<-first, <-second))
			want := pattern(1, cluster)
			copy(want[at:], pattern(5, n))
			if !bytes.Equal(r.read(0, cluster), want) {
				t.Errorf("the write was lost")
			}
			r.wantHeld("d------------------------")
		})
	}
}

// TestCopyOnReadWaitsForRequestsFromBefore: what is in flight when copy-on-read is
// inserted does not keep out of its way.
func TestCopyOnReadWaitsForRequestsFromBefore(t *testing.T) {
	g := newGraph(t)
	gate := blocktest.NewGate()
	slow := blocktest.SlowConfig(gate, image("top", overlay(t, size), memory("base", base(size))))
	slow.NodeName = "slow"
	n, err := g.Open(ctx, slow)
	must(t, err)
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermConsistentRead | block.PermWrite, Shared: block.PermAll})
	must(t, err)
	gate.Hold(blocktest.OpWrite)
	written, opened := make(chan error, 1), make(chan error, 1)
	go func() {
		written <- r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, pattern(5, 512), 0, 0) })
	}()
	must(t, gate.WaitHeld(ctx, 1))
	var c *block.Node
	go func() {
		var err error
		c, err = g.Open(ctx, cor(nil, &block.Config{Ref: "slow"}))
		opened <- err
	}()
	select {
	case err := <-opened:
		t.Fatalf("it did not wait: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	gate.ReleaseAll()
	must(t, errors.Join(<-written, <-opened))
	must(t, errors.Join(g.Release(ctx, c), r.Detach(ctx), g.Release(ctx, n)))
}

// TestCopyOnReadInserted is put under a load, and taken away again.
func TestCopyOnReadInsertedUnderLoad(t *testing.T) {
	g := newGraph(t)
	n, err := g.Open(ctx, image("top", overlay(t, size), memory("base", base(size))))
	must(t, err)
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermConsistentRead | block.PermWrite, Shared: block.PermConsistentRead | block.PermWriteUnchanged})
	must(t, err)
	const workers = 3
	stop := make(chan struct{})
	done := make(chan error, workers)
	for w := range int64(workers) {
		go func() {
			rng := rand.New(rand.NewPCG(1, uint64(w)))
			model := base(size).Bytes()
			for {
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
				// Each has sectors of its own; a cluster belongs to all.
				off := (rng.Int64N(size/512/workers)*workers + w) * 512
				if rng.IntN(3) == 0 {
					p := pattern(byte(rng.Uint32()), 512)
					copy(model[off:], p)
					if err := r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, p, off, 0) }); err != nil {
						done <- err
						return
					}
					continue
				}
				p := make([]byte, 512)
				if err := r.Do(ctx, func(ctx context.Context) error { return r.ReadAt(ctx, p, off) }); err != nil {
					done <- err
					return
				}
				if !bytes.Equal(p, model[off:off+512]) {
					done <- fmt.Errorf("sector at %d is wrong", off)
					return
				}
			}
		}()
	}
	for range 20 {
		c, err := g.InsertFilter(ctx, cor(nil, &block.Config{Ref: "top"}), n)
		must(t, err)
		must(t, g.RemoveFilter(ctx, c))
		must(t, g.Release(ctx, c))
	}
	close(stop)
	for range workers {
		must(t, <-done)
	}
	must(t, errors.Join(r.Detach(ctx), g.Release(ctx, n)))
}

// TestCopyOnReadMakesTheImageIndependent: once everything was read the image is
// complete without its backing file. qemu-img is the judge.
func TestCopyOnReadMakesTheImageIndependent(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	qemuImg := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("qemu-img", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("qemu-img %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	r := newRig(t, nil, nil, midChain(t))
	want := r.read(0, size)
	r.close()
	must(t, os.WriteFile(file("want.raw"), want, 0o600))
	must(t, r.top.Save(file("top.qcow2")))
	qemuImg("check", file("top.qcow2"))
	qemuImg("compare", "-f", "raw", "-F", "qcow2", file("want.raw"), file("top.qcow2"))
	var extents []struct {
		Start, Length int64
		Depth         int
		Present       *bool
		Zero, Data    bool
	}
	must(t, json.Unmarshal([]byte(qemuImg("map", "-f", "qcow2", "--output", "json", file("top.qcow2"))), &extents))
	end := int64(0)
	for _, x := range extents {
		if x.Start != end || x.Depth != 0 || x.Present != nil && !*x.Present || x.Zero == x.Data {
			t.Errorf("extent %+v", x)
		}
		end = x.Start + x.Length
	}
	if end != size {
		t.Errorf("the map ends at %d", end)
	}
}
