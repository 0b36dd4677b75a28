package blocktest_test

import (
	"bytes"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// memorySubject makes a disk of size bytes, half of it holes.
func memorySubject(t blocktest.TB, size int64, change func(*blocktest.MemoryOptions), above func(*block.Config) *block.Config) blocktest.Subject {
	s := blocktest.NewStore(size)
	s.Write(bytes.Repeat([]byte{0x11, 0x22, 0x33}, int(size/7)), 1000)
	o := &blocktest.MemoryOptions{Store: s, Limits: blocktest.AllFlags}
	change(o)
	return blocktest.Subject{
		Graph:    blocktest.NewGraph(t),
		Config:   above(&block.Config{Driver: "memory", Unmap: true, Options: o}),
		Contents: s.Bytes(),
	}
}

func itself(c *block.Config) *block.Config { return c }

func TestMemoryConforms(t *testing.T) {
	for _, c := range []struct {
		name   string
		size   int64
		fast   bool
		change func(*blocktest.MemoryOptions)
	}{
		{"All", 100_001, true, func(*blocktest.MemoryOptions) {}},
		{"Bare", 100_001, false, func(o *blocktest.MemoryOptions) { o.Bare = true; o.Limits.ZeroFlags = 0; o.Limits.WriteFlags = 0 }},
		{"NoZero", 100_000, false, func(o *blocktest.MemoryOptions) { o.NoZero = true }},
		{"NoFlags", 100_000, false, func(o *blocktest.MemoryOptions) { o.Limits.ZeroFlags = 0; o.Limits.WriteFlags = 0 }},
		{"Align512", 100_001, true, func(o *blocktest.MemoryOptions) { o.Limits.RequestAlignment = 512 }},
		{"Align4096", 100_001, true, func(o *blocktest.MemoryOptions) { o.Limits.RequestAlignment = 4096 }},
		{"Align4096Bare", 100_001, false, func(o *blocktest.MemoryOptions) { o.Limits = block.Limits{RequestAlignment: 4096}; o.Bare = true }},
		{"Split", 100_001, true, func(o *blocktest.MemoryOptions) {
			o.Limits.MaxTransfer, o.Limits.MaxZero, o.Limits.MaxDiscard = 2048, 8192, 4096
		}},
		{"SplitAlign512", 100_001, true, func(o *blocktest.MemoryOptions) {
			o.Limits.RequestAlignment = 512
			o.Limits.MaxTransfer, o.Limits.MaxZero, o.Limits.MaxDiscard = 2048, 8192, 4096
		}},
		{"DiscardKeeps", 100_001, true, func(o *blocktest.MemoryOptions) { o.Discard = blocktest.DiscardKeeps }},
	} {
		t.Run(c.name, func(t *testing.T) {
			blocktest.Conformance(t, blocktest.Factory{
				New:           func(t blocktest.TB) blocktest.Subject { return memorySubject(t, c.size, c.change, itself) },
				FastZero:      c.fast,
				DiscardZeroes: false,
				Locates:       c.name != "Bare" && c.name != "Align4096Bare",
				Holes:         c.fast,
			})
		})
	}
}

func TestMemoryConformsResizable(t *testing.T) {
	blocktest.Conformance(t, blocktest.Factory{
		New: func(t blocktest.TB) blocktest.Subject {
			return memorySubject(t, 100_000, func(*blocktest.MemoryOptions) {}, itself)
		},
		FastZero: true, DiscardZeroes: true, Locates: true, Resizes: true, Holes: true,
	})
}

func TestFiltersConform(t *testing.T) {
	for name, above := range map[string]func(*block.Config) *block.Config{
		"Fault": func(c *block.Config) *block.Config { return blocktest.FaultConfig(new(blocktest.Faults), c) },
		"Slow":  func(c *block.Config) *block.Config { return blocktest.SlowConfig(blocktest.NewGate(), c) },
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.Conformance(t, blocktest.Factory{
				New: func(t blocktest.TB) blocktest.Subject {
					return memorySubject(t, 100_000, func(*blocktest.MemoryOptions) {}, above)
				},
				FastZero: true, DiscardZeroes: true, Holes: true,
			})
		})
	}
}

func TestCrashNodeConforms(t *testing.T) {
	blocktest.Conformance(t, blocktest.Factory{
		New: func(t blocktest.TB) blocktest.Subject {
			l := blocktest.NewLog(blocktest.StoreOf(make([]byte, 100_000)))
			return blocktest.Subject{Graph: blocktest.NewGraph(t), Config: blocktest.CrashConfig(l), Contents: l.Disk().Bytes()}
		},
		FastZero: true, DiscardZeroes: true, Locates: true,
	})
}

func TestReadOnlyNodeConforms(t *testing.T) {
	blocktest.Conformance(t, blocktest.Factory{
		New: func(t blocktest.TB) blocktest.Subject {
			return memorySubject(t, 100_001, func(*blocktest.MemoryOptions) {}, itself)
		},
		ReadOnly: true, Locates: true, Holes: true,
	})
}
