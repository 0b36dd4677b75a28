package blkverify_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"github.com/nbdserve/nbdserve/block/filter/blkverify"
)

var ctx = context.Background()

func config(raw, test *block.Config) *block.Config {
	return &block.Config{Driver: "blkverify", Unmap: true, Children: map[string]*block.Config{"raw": raw, "test": test}}
}

// store holds a pattern with holes.
func store() *blocktest.Store {
	s := blocktest.NewStore(100_001)
	s.Write(bytes.Repeat([]byte{1, 2, 3}, 14_000), 1000)
	return s
}

func aligned(s *blocktest.Store, a int64) *block.Config {
	c := blocktest.MemoryConfig(s)
	c.Options.(*blocktest.MemoryOptions).Limits.RequestAlignment = a
	return c
}

func TestBlkverifyConforms(t *testing.T) {
	for name, align := range map[string][2]int64{"Same": {1, 1}, "RawAligned": {512, 1}, "TestAligned": {1, 512}} {
		t.Run(name, func(t *testing.T) {
			blocktest.Conformance(t, blocktest.Factory{
				New: func(t blocktest.TB) blocktest.Subject {
					raw, test := store(), store()
					return blocktest.Subject{
						Graph: blocktest.NewGraph(t, blkverify.Driver()), Config: config(aligned(raw, align[0]), aligned(test, align[1])), Contents: test.Bytes(),
						Verify: func(t blocktest.TB, contents []byte) {
							if !bytes.Equal(raw.Bytes(), contents) || !bytes.Equal(test.Bytes(), contents) {
								t.Errorf("a child has not all that was written")
							}
						},
					}
				},
				Holes: true,
			})
		})
	}
}

func opened(t *testing.T, raw, test *block.Config) *block.Root {
	t.Helper()
	g := blocktest.NewGraph(t, blkverify.Driver())
	n, err := g.Open(ctx, config(raw, test))
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "test", Node: n, Perm: block.PermConsistentRead | block.PermWrite})
	if err := errors.Join(err, g.Release(ctx, n)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Detach(ctx); err != nil {
			t.Error(err)
		}
	})
	return r
}

func TestBlkverifySaysWhereTheChildrenDiffer(t *testing.T) {
	raw, test := store(), store()
	r := opened(t, blocktest.MemoryConfig(raw), blocktest.MemoryConfig(test))
	p := make([]byte, 4096)
	if err := r.ReadAt(ctx, p, 8192); err != nil {
		t.Fatal(err)
	}
	test.Write([]byte{0xee}, 10_000)
	test.Write([]byte{0xee}, 10_005)
	err := r.ReadAt(ctx, p, 8192)
	if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "contents mismatch at offset 10000: 'raw' has 0x01, 'test' has 0xee") {
		t.Errorf("read: %v", err)
	}
	if err := r.ReadAt(ctx, p, 0); err != nil {
		t.Errorf("read elsewhere: %v", err)
	}
	// What is written to both is the same again.
	if err := r.WriteAt(ctx, make([]byte, 10), 10_000, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.ReadAt(ctx, p, 8192); err != nil {
		t.Errorf("read after a write: %v", err)
	}
}

func TestBlkverifyComparesErrors(t *testing.T) {
	requests := map[blocktest.Op]func(r *block.Root) error{
		blocktest.OpRead:  func(r *block.Root) error { return r.ReadAt(ctx, make([]byte, 512), 0) },
		blocktest.OpWrite: func(r *block.Root) error { return r.WriteAt(ctx, []byte{1}, 0, 0) },
		blocktest.OpZero:  func(r *block.Root) error { return r.WriteZeroes(ctx, 0, 512, 0) },
	}
	for op, request := range requests {
		t.Run(op.String(), func(t *testing.T) {
			rawFaults, testFaults := new(blocktest.Faults), new(blocktest.Faults)
			r := opened(t, blocktest.FaultConfig(rawFaults, blocktest.MemoryConfig(store())), blocktest.FaultConfig(testFaults, blocktest.MemoryConfig(store())))
			fault := blocktest.Fault{Op: op, Times: 1, Err: syscall.ENOSPC}
			rawFaults.Add(fault)
			if err := request(r); !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "at offset 0: 'raw' fails: ") || !strings.Contains(err.Error(), ", 'test' succeeds") {
				t.Errorf("only raw fails: %v", err)
			}
			testFaults.Add(fault)
			if err := request(r); !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "at offset 0: 'raw' succeeds, 'test' fails: ") {
				t.Errorf("only test fails: %v", err)
			}
			rawFaults.Add(fault)
			testFaults.Add(fault)
			if err := request(r); !errors.Is(err, syscall.ENOSPC) || strings.Contains(err.Error(), "blkverify") {
				t.Errorf("both fail: %v", err)
			}
		})
	}
}

func TestBlkverifyNeedsTwoOfTheSameSize(t *testing.T) {
	g := blocktest.NewGraph(t, blkverify.Driver())
	_, err := g.Open(ctx, config(blocktest.MemoryConfig(store()), blocktest.MemoryConfig(blocktest.NewStore(5))))
	if !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "'raw' has 100001 bytes, 'test' has 5") {
		t.Errorf("%v", err)
	}
	for _, missing := range []string{"raw", "test"} {
		c := config(blocktest.MemoryConfig(store()), blocktest.MemoryConfig(store()))
		delete(c.Children, missing)
		if _, err := g.Open(ctx, c); err == nil || err.Error() != `A block device must be specified for "`+missing+`"` {
			t.Errorf("without %s: %v", missing, err)
		}
	}
}

func TestBlkverifyLimitsAreWhatBothCan(t *testing.T) {
	limits := func(transfer, zero int64) *block.Config {
		c := blocktest.MemoryConfig(store())
		l := &c.Options.(*blocktest.MemoryOptions).Limits
		l.MaxTransfer, l.MaxZero = transfer, zero
		return c
	}
	r := opened(t, limits(4096, 0), limits(8192, 65536))
	if l := r.Limits(); l.MaxTransfer != 4096 || l.MaxZero != 65536 {
		t.Errorf("%+v", l)
	}
	r = opened(t, limits(0, 0), limits(0, 0))
	if l := r.Limits(); l.MaxTransfer != 16<<20 || l.MaxZero != 0 {
		t.Errorf("%+v", l)
	}
}
