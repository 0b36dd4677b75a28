package qcow2

import (
	"bytes"
	"context"
	"runtime"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// A gatedDisk is an image over a file whose requests can be held.
type gatedDisk struct {
	*disk
	gate      *blocktest.Gate
	store     *blocktest.Store
	allocated int64 // bytes of the file, when readAcrossReuse let its read go
}

const gatedCluster = 4096

func openGated(t *testing.T, broken orderingRule) *gatedDisk {
	t.Helper()
	s := emptyStore(t, CreateOptions{Size: 1 << 20, ClusterSize: gatedCluster})
	gate := blocktest.NewGate()
	c := storeNode(s, nil)
	c.Options.(*Options).broken = broken
	c.Children["file"] = blocktest.SlowConfig(gate, blocktest.MemoryConfig(s))
	return &gatedDisk{disk: openDisk(t, testGraph(t), c), gate: gate, store: s}
}

// background runs a request of a lane of its own.
func (d *gatedDisk) background(f func(ctx context.Context) error) <-chan error {
	lane := d.root.NewLane(1, nil)
	done := make(chan error, 1)
	a, _ := lane.Begin()
	go func() {
		err := f(lane.Context(context.Background()))
		lane.End(a)
		lane.Close()
		done <- err
	}()
	return done
}

func (d *gatedDisk) waitHeld(n int) {
	d.t.Helper()
	if err := d.gate.WaitHeld(context.Background(), n); err != nil {
		d.t.Fatalf("%v", err)
	}
}

func (d *gatedDisk) limbo() float64 {
	for _, m := range d.image().Measurements() {
		if m.Name == "limbo_bytes" {
			return m.Value
		}
	}
	d.t.Fatalf("%v", "limbo is not measured")
	return 0
}

func (d *gatedDisk) waitReclaimed() {
	for d.limbo() > 0 {
		runtime.Gosched()
	}
}

// readAcrossReuse reads a cluster that is discarded meanwhile, with other data
// written after the discard was flushed, and returns what the read saw.
func (d *gatedDisk) readAcrossReuse(afterDiscard func()) []byte {
	d.t.Helper()
	d.write(bytes.Repeat([]byte{'a'}, gatedCluster), 0)
	d.flush()
	d.gate.Hold(blocktest.OpRead)
	got := make([]byte, gatedCluster)
	read := d.background(func(ctx context.Context) error { return d.root.ReadAt(ctx, got, 0) })
	d.waitHeld(1) // it knows the cluster
	d.must(func(ctx context.Context) error { return d.root.Discard(ctx, 0, gatedCluster) })
	d.flush()
	afterDiscard()
	d.write(bytes.Repeat([]byte{'b'}, 4*gatedCluster), 8*gatedCluster)
	d.allocated = d.store.Allocated()
	d.gate.ReleaseAll()
	if err := <-read; err != nil {
		d.t.Fatalf("%v", err)
	}
	return got
}

func TestFreedClusterIsNotReusedWhileARequestKnowsIt(t *testing.T) {
	d := openGated(t, 0)
	got := d.readAcrossReuse(func() {
		if d.limbo() != gatedCluster {
			t.Errorf("%v bytes are in limbo while a read of them is in flight", d.limbo())
		}
	})
	if !block.IsZero(got) && !bytes.Equal(got, bytes.Repeat([]byte{'a'}, gatedCluster)) {
		t.Errorf("a read returned data of another cluster: %q...", got[:8])
	}
	d.waitReclaimed()
	if after := d.store.Allocated(); after >= d.allocated {
		t.Errorf("%d bytes of the file are allocated after the reclaim, %d before", after, d.allocated)
	}
	d.close()
	checkStore(t, d.store, false)
}

func TestReuseWithoutLimboWouldBeNoticed(t *testing.T) {
	d := openGated(t, ruleLimbo)
	got := d.readAcrossReuse(d.waitReclaimed)
	if !bytes.Equal(got, bytes.Repeat([]byte{'b'}, gatedCluster)) {
		t.Errorf("with the rule broken the read should see other data, and sees %q...", got[:8])
	}
	d.close()
}

// writeHalves writes both halves of an unallocated cluster at the same time.
func (d *gatedDisk) writeHalves(held int) {
	d.t.Helper()
	half := int64(gatedCluster / 2)
	d.gate.Hold(blocktest.OpWrite)
	first := d.background(func(ctx context.Context) error {
		return d.root.WriteAt(ctx, bytes.Repeat([]byte{'a'}, int(half)), 0, 0)
	})
	d.waitHeld(1)
	second := d.background(func(ctx context.Context) error {
		return d.root.WriteAt(ctx, bytes.Repeat([]byte{'b'}, int(half)), half, 0)
	})
	d.waitHeld(held)
	d.gate.ReleaseAll()
	for _, done := range []<-chan error{first, second} {
		if err := <-done; err != nil {
			d.t.Fatalf("%v", err)
		}
	}
}

func TestSecondWriteToAClusterWaitsForItsAllocation(t *testing.T) {
	want := append(bytes.Repeat([]byte{'a'}, gatedCluster/2), bytes.Repeat([]byte{'b'}, gatedCluster/2)...)
	d := openGated(t, 0)
	d.writeHalves(1)
	if got := d.read(0, gatedCluster); !bytes.Equal(got, want) {
		t.Errorf("a half was lost")
	}
	d.close()
	checkStore(t, d.store, false)

	d = openGated(t, ruleWaitAllocation)
	d.writeHalves(2)
	if got := d.read(0, gatedCluster); bytes.Equal(got, want) {
		t.Errorf("with the rule broken a half should be lost")
	}
	d.close()
}

// A discard and a zero request that meet an allocation in flight come after it.
func TestDiscardAndZeroWaitForAnAllocation(t *testing.T) {
	for name, request := range map[string]func(d *gatedDisk) func(ctx context.Context) error{
		"discard": func(d *gatedDisk) func(ctx context.Context) error {
			return func(ctx context.Context) error { return d.root.Discard(ctx, 0, gatedCluster) }
		},
		"zero": func(d *gatedDisk) func(ctx context.Context) error {
			return func(ctx context.Context) error { return d.root.WriteZeroes(ctx, 0, gatedCluster, block.MayUnmap) }
		},
		"zero, provisioned": func(d *gatedDisk) func(ctx context.Context) error {
			return func(ctx context.Context) error { return d.root.WriteZeroes(ctx, 0, gatedCluster, 0) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := openGated(t, 0)
			d.gate.Hold(blocktest.OpWrite)
			write := d.background(func(ctx context.Context) error {
				return d.root.WriteAt(ctx, bytes.Repeat([]byte{'a'}, gatedCluster), 0, 0)
			})
			d.waitHeld(1)
			other := d.background(request(d))
			d.gate.ReleaseAll()
			for _, done := range []<-chan error{write, other} {
				if err := <-done; err != nil {
					t.Fatal(err)
				}
			}
			// Which of the two came last is open, but it is one of them.
			if got := d.read(0, gatedCluster); !block.IsZero(got) && !bytes.Equal(got, bytes.Repeat([]byte{'a'}, gatedCluster)) {
				t.Errorf("the cluster holds %q...", got[:8])
			}
			d.close()
			checkStore(t, d.store, false)
		})
	}
}

// Each write is acknowledged on one root and flushed through another; then the power is cut.
func TestFlushOnOneRootCoversWritesOnAnother(t *testing.T) {
	s := emptyStore(t, CreateOptions{Size: 1 << 20, ClusterSize: gatedCluster})
	log := blocktest.NewLog(s)
	c := storeNode(nil, nil)
	c.Children["file"] = blocktest.CrashConfig(log)
	g := testGraph(t)
	ctx := context.Background()
	n, err := g.Open(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	share := block.PermConsistentRead | block.PermWrite
	var roots [2]*block.Root
	for i := range roots {
		if roots[i], err = g.AttachRoot(ctx, block.RootConfig{User: "connection", Node: n, Perm: share, Shared: share}); err != nil {
			t.Fatal(err)
		}
	}
	want := make([]byte, 1<<20)
	cuts := map[int64][]byte{}
	for i := range int64(20) {
		p := tagged(uint64(i), i*5000&^63, 3008)
		off := i * 5000 &^ 63
		if err := roots[i%2].Do(ctx, func(ctx context.Context) error { return roots[i%2].WriteAt(ctx, p, off, 0) }); err != nil {
			t.Fatal(err)
		}
		copy(want[off:], p)
		if err := roots[1-i%2].Do(ctx, roots[1-i%2].Flush); err != nil {
			t.Fatal(err)
		}
		cuts[log.Now()] = bytes.Clone(want)
	}
	for at, want := range cuts {
		for state := range log.States(blocktest.Plan{From: at, To: at, PerCut: 1}) {
			d := openDisk(t, g, &block.Config{Driver: "qcow2", ReadOnly: true, Children: map[string]*block.Config{"file": blocktest.MemoryConfig(state.Disk)}})
			d.compare(want)
			d.close()
		}
	}
	for _, r := range roots {
		if err := r.Detach(ctx); err != nil {
			t.Error(err)
		}
	}
	if err := g.Release(ctx, n); err != nil {
		t.Error(err)
	}
}
