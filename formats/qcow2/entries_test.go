package qcow2

import (
	"testing"

	"pgregory.net/rapid"
)

func TestRefcountsOfEveryWidthAreKept(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		order := rapid.Uint32Range(0, MaxRefcountOrder).Draw(t, "order")
		block := make([]byte, 64)
		n := int64(len(block)) * 8 >> order
		model := make([]uint64, n)
		for range rapid.IntRange(1, 50).Draw(t, "steps") {
			i := rapid.Int64Range(0, n-1).Draw(t, "i")
			model[i] = rapid.Uint64Range(0, RefcountMax(order)).Draw(t, "v")
			RefcountSet(block, order, i, model[i])
			for j, want := range model {
				if got := RefcountGet(block, order, int64(j)); got != want {
					t.Fatalf("order %d, refcount %d: %d, want %d", order, j, got, want)
				}
			}
		}
	})
}

func TestRefcountsLieWhereTheFormatSays(t *testing.T) {
	for _, c := range []struct {
		order uint32
		i     int64
		v     uint64
		want  [8]byte
	}{
		{0, 0, 1, [8]byte{0x01}},
		{0, 9, 1, [8]byte{0, 0x02}},
		{1, 1, 3, [8]byte{0x0c}},
		{2, 1, 0xa, [8]byte{0xa0}},
		{3, 1, 0xab, [8]byte{0, 0xab}},
		{4, 1, 0xabcd, [8]byte{0, 0, 0xab, 0xcd}},
		{5, 1, 0x12345678, [8]byte{0, 0, 0, 0, 0x12, 0x34, 0x56, 0x78}},
		{6, 0, 0x123456789abcdef0, [8]byte{0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0}},
	} {
		var block [8]byte
		RefcountSet(block[:], c.order, c.i, c.v)
		if block != c.want {
			t.Errorf("order %d, refcount %d = %#x: % x, want % x", c.order, c.i, c.v, block, c.want)
		}
	}
}

func TestRefcountMax(t *testing.T) {
	for order, want := range []uint64{1, 3, 15, 255, 65535, 1<<32 - 1, 1<<64 - 1} {
		if got := RefcountMax(uint32(order)); got != want {
			t.Errorf("order %d: %d, want %d", order, got, want)
		}
	}
}

func TestCompressedRangeFollowsTheClusterSize(t *testing.T) {
	for bits := uint32(MinClusterBits); bits <= MaxClusterBits; bits++ {
		x := 62 - (bits - 8)
		most := uint64(1)<<(62-x) - 1 // additional sectors that fit
		for _, c := range []struct{ off, sectors uint64 }{{0, 0}, {1, 0}, {511, 1}, {512, most}, {1<<min(x, 55) - 1, most}} {
			off, n := L2Entry(entryCompressed | c.sectors<<x | c.off).CompressedRange(bits)
			if off != int64(c.off) || n != int64(c.sectors+1)*512-int64(c.off%512) {
				t.Errorf("cluster bits %d, offset %d, sectors %d: %d bytes at %d", bits, c.off, c.sectors, n, off)
			}
			if n > 2<<bits {
				t.Errorf("cluster bits %d: %d bytes are more than two clusters", bits, n)
			}
		}
	}
}

func TestL2EntryKindAndCheck(t *testing.T) {
	v2, v3 := &Header{Version: 2, ClusterBits: 16}, &Header{Version: 3, ClusterBits: 16}
	for _, c := range []struct {
		entry uint64
		h     *Header
		kind  ClusterKind
		ok    bool
	}{
		{0, v3, ClusterUnallocated, true},
		{1, v3, ClusterZero, true},
		{1, v2, ClusterUnallocated, false},
		{0x50000, v3, ClusterData, true},
		{entryCopied | 0x50000, v3, ClusterData, true},
		{0x50001, v3, ClusterZeroAlloc, true},
		{0x50001, v2, ClusterData, false},
		{0x50002, v3, ClusterData, false},
		{0x50200, v3, ClusterData, false},
		{1 << 56, v3, ClusterUnallocated, false},
		{1<<61 | 0x50000, v3, ClusterData, false},
		{entryCompressed | 0x12345, v3, ClusterCompressed, true},
		{entryCopied | entryCompressed | 0x12345, v3, ClusterCompressed, false},
	} {
		e := L2Entry(c.entry)
		if got := e.Kind(c.h.Version); got != c.kind {
			t.Errorf("version %d, 0x%x is %v, want %v", c.h.Version, c.entry, got, c.kind)
		}
		if err := e.Check(c.h); (err == nil) != c.ok {
			t.Errorf("version %d, 0x%x: %v", c.h.Version, c.entry, err)
		}
	}
	if err := L2Entry(entryCompressed | 1<<56).Check(&Header{Version: 3, ClusterBits: 9}); err == nil {
		t.Error("compressed cluster past 2^56 is no error")
	}
}

func TestL1EntryCheck(t *testing.T) {
	h := &Header{Version: 3, ClusterBits: 16}
	for entry, ok := range map[uint64]bool{0: true, 0x50000: true, entryCopied | 0x50000: true, 0x50200: false, 0x50001: false, 1 << 56: false, 1 << 62: false} {
		if err := L1Entry(entry).Check(h); (err == nil) != ok {
			t.Errorf("0x%x: %v", entry, err)
		}
	}
	if e := MakeL1Entry(0x50000, true); e.Offset() != 0x50000 || !e.Copied() {
		t.Errorf("0x%x", uint64(e))
	}
	if e := MakeL2Entry(0x50000, false).Zero(); e.Offset() != 0x50000 || e.Copied() || e.Kind(3) != ClusterZeroAlloc {
		t.Errorf("0x%x", uint64(e))
	}
}

func TestCountMapKeepsCounts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m, model := newCountMap(), map[int64]uint64{}
		for range rapid.IntRange(1, 100).Draw(t, "steps") {
			cluster := rapid.OneOf(rapid.Int64Range(0, 2000), rapid.Int64Range(0, 1<<47)).Draw(t, "cluster")
			v := rapid.OneOf(rapid.Uint64Range(0, 3), rapid.Uint64Range(250, 260), rapid.Uint64()).Draw(t, "count")
			m.set(cluster, v)
			model[cluster] = v
			if v == 0 {
				delete(model, cluster)
			}
		}
		last, seen := int64(-1), 0
		eachCounted(func(cluster int64) bool {
			if cluster <= last || m.get(cluster) != model[cluster] {
				t.Fatalf("cluster %d after %d: %d, want %d", cluster, last, m.get(cluster), model[cluster])
			}
			last = cluster
			seen++
			return true
		}, m, newCountMap())
		if seen != len(model) {
			t.Fatalf("%d clusters, want %d", seen, len(model))
		}
	})
}
