package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// TestAFailedRequestOfTheFileHurtsNothingElse fails each request to the file in
// turn, once. The guest's request may fail; what others wrote stays, the image goes
// on and is sound at the end.
func TestAFailedRequestOfTheFileHurtsNothingElse(t *testing.T) {
	for _, op := range []blocktest.Op{blocktest.OpRead, blocktest.OpWrite, blocktest.OpZero, blocktest.OpDiscard, blocktest.OpStatus, blocktest.OpFlush} {
		t.Run(op.String(), func(t *testing.T) {
			for skip := 0; ; skip++ {
				if !runWithFault(t, op, skip) {
					t.Logf("%d requests failed in turn", skip)
					return
				}
			}
		})
	}
}

// runWithFault tells whether the fault was met.
func runWithFault(t *testing.T, op blocktest.Op, skip int) bool {
	t.Helper()
	const size = 40 << 10
	s := emptyStore(t, CreateOptions{Size: size, ClusterSize: 512, RefcountBits: 64})
	model := make([]byte, size)
	copy(model, pattern(4, 24000))
	faults := new(blocktest.Faults)
	cfg := storeNode(s, blocktest.MemoryConfig(blocktest.StoreOf(model[:24000])))
	cfg.Options = &Options{L2CacheSize: 1, RefcountCacheSize: 1}
	cfg.Children["file"] = blocktest.FaultConfig(faults, cfg.Children["file"])
	d := openDisk(t, testGraph(t), cfg)
	faults.Add(blocktest.Fault{Op: op, Skip: skip, Times: 1, Err: syscall.EIO})
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 60 {
		off := rng.Int64N(size)
		n := min(rng.Int64N(5000)+1, size-off)
		p := make([]byte, n)
		var err error
		switch k := rng.IntN(8); {
		case k < 4:
			p = pattern(uint64(i), n)
			err = d.do(func(ctx context.Context) error { return d.root.WriteAt(ctx, p, off, 0) })
		case k == 4:
			err = d.do(func(ctx context.Context) error { return d.root.WriteZeroes(ctx, off, n, 0) })
		case k == 5:
			err = d.do(func(ctx context.Context) error { return d.root.WriteZeroes(ctx, off, n, block.MayUnmap) })
		case k == 6:
			err = d.do(func(ctx context.Context) error { return d.root.ReadAt(ctx, p, off) })
			copy(p, model[off:])
		default:
			err = d.do(d.root.Flush)
			copy(p, model[off:])
		}
		if err != nil && !errors.Is(err, syscall.EIO) {
			t.Fatalf("skip %d: %v", skip, err)
		}
		old := append([]byte(nil), model[off:off+n]...)
		copy(model[off:], p)
		if err == nil {
			continue
		}
		copy(model[off:], d.read(off, n)) // the fault is used up
		for j, b := range model[off : off+n] {
			if b != old[j] && b != p[j] {
				t.Fatalf("skip %d: byte %d is %#x after a failed request, was %#x, should have become %#x", skip, off+int64(j), b, old[j], p[j])
			}
		}
	}
	if op == blocktest.OpRead && faults.Fired() == 0 {
		faults.Clear()
	}
	d.compare(model)
	err := closeWithFault(d)
	if err != nil && !errors.Is(err, syscall.EIO) {
		t.Fatalf("skip %d: close: %v", skip, err)
	}
	failedClose := err != nil
	met := faults.Fired() > 0
	faults.Clear()
	// What the fault kept from being freed leaks.
	checkStore(t, s, met)
	d.open()
	if !failedClose {
		d.compare(model)
	}
	d.close()
	return met
}

func closeWithFault(d *disk) error {
	ctx := context.Background()
	err := errors.Join(d.root.Detach(ctx), d.graph.Release(ctx, d.node))
	d.node, d.root = nil, nil
	if err != nil {
		return fmt.Errorf("close: %w", err)
	}
	return nil
}
