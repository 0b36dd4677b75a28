package qcow2

import (
	"context"
	"encoding/binary"
	"maps"
	"slices"
	"testing"

	"github.com/nbdserve/nbdserve/block"
)

// A sparseTarget is a file of any length of which few pages hold data. It counts what is read.
type sparseTarget struct {
	size  int64
	pages map[int64][]byte // 64 KiB each
	read  int64            // bytes
}

const sparsePage = 64 << 10

func (s *sparseTarget) Size() int64 { return s.size }

func (s *sparseTarget) ReadAt(_ context.Context, p []byte, off int64) error {
	s.read += int64(len(p))
	for len(p) > 0 {
		n := min(int64(len(p)), sparsePage-off%sparsePage)
		clear(p[:n])
		if page := s.pages[off/sparsePage]; page != nil {
			copy(p[:n], page[off%sparsePage:])
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (s *sparseTarget) write(p []byte, off int64) {
	for len(p) > 0 {
		page := s.pages[off/sparsePage]
		if page == nil {
			page = make([]byte, sparsePage)
			s.pages[off/sparsePage] = page
		}
		n := copy(page[off%sparsePage:], p)
		p, off = p[n:], off+int64(n)
	}
}

func (s *sparseTarget) BlockStatus(_ context.Context, off, n int64, _ bool) (block.Extent, error) {
	_, data := s.pages[off/sparsePage]
	next := s.size
	for _, page := range slices.Sorted(maps.Keys(s.pages)) {
		if page*sparsePage > off && !data {
			next = page * sparsePage
			break
		}
	}
	if data {
		next = (off/sparsePage + 1) * sparsePage
		return block.Extent{Flags: block.StatusData, Length: min(n, next-off)}, nil
	}
	return block.Extent{Flags: block.StatusZero, Length: min(n, next-off)}, nil
}

// crafted is an image in a file of size bytes whose tables lie behind the header in
// this order: refcount table, L1 table, and what data adds by cluster.
func crafted(t testing.TB, size int64, h *Header, l1 []uint64, data map[int64][]byte) *sparseTarget {
	t.Helper()
	s := &sparseTarget{size: size, pages: map[int64][]byte{}}
	h.Version, h.HeaderLength, h.RefcountOrder = 3, headerLenV3, 4
	h.RefcountTableOffset, h.RefcountTableClusters = h.ClusterSize(), 1
	h.L1Offset, h.L1Size = 2*h.ClusterSize(), uint32(len(l1))
	head, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	s.write(head, 0)
	s.write(words(l1), h.L1Offset)
	for cluster, p := range data {
		s.write(p, cluster<<h.ClusterBits)
	}
	return s
}

func words(v []uint64) []byte {
	b := make([]byte, 0, len(v)*8)
	for _, w := range v {
		b = binary.BigEndian.AppendUint64(b, w)
	}
	return b
}

// checkReads checks an image and tells what was found, and how many bytes were read.
func checkReads(t *testing.T, s *sparseTarget) (*CheckResult, int64) {
	t.Helper()
	h, err := ParseHeader(t.Context(), s, s.size)
	if err != nil {
		t.Fatal(err)
	}
	s.read = 0
	res, err := Check(t.Context(), s, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	return res, s.read
}

func TestManyEntriesForOneL2TableAreReadOnce(t *testing.T) {
	const n = 1 << 15
	table := words(slices.Repeat([]uint64{entryCopied | 4<<18}, n))
	s := crafted(t, 16<<18, &Header{ClusterBits: 18, Size: 1 << 30}, slices.Repeat([]uint64{entryCopied | 5<<18}, n), map[int64][]byte{5: table})
	res, read := checkReads(t, s)
	if read > s.size {
		t.Errorf("%d bytes read of a file of %d", read, s.size)
	}
	if res.Corruptions == 0 || res.AllocatedClusters != n*n {
		t.Errorf("%+v", *res)
	}
}

func TestManySnapshotsWithOneL1TableAreNotReadOverAndOver(t *testing.T) {
	entry := make([]byte, 56)
	binary.BigEndian.PutUint64(entry, 2<<16)
	binary.BigEndian.PutUint32(entry[8:], 4<<20)
	binary.BigEndian.PutUint32(entry[36:], 16)
	h := &Header{ClusterBits: 16, NbSnapshots: 65536, SnapshotsOffset: 1000 << 16}
	s := crafted(t, 100<<20, h, []uint64{0}, map[int64][]byte{1000: slices.Concat(slices.Repeat([][]byte{entry}, 65536)...)})
	res, read := checkReads(t, s)
	if read > 3*s.size {
		t.Errorf("%d bytes read of a file of %d", read, s.size)
	}
	if res.Corruptions < 65000 {
		t.Errorf("%+v", *res)
	}
}

func TestHugeSparseImageCostsWhatItHolds(t *testing.T) {
	const n = 1 << 12
	l1 := make([]uint64, n)
	for i := range l1 {
		l1[i] = entryCopied | uint64(i+1)<<40
	}
	s := crafted(t, 1<<55, &Header{ClusterBits: 21, Size: 1 << 50}, l1, map[int64][]byte{})
	res, read := checkReads(t, s)
	if held := int64(len(s.pages)) * sparsePage; read > 100*held {
		t.Errorf("%d bytes read of %d", read, held)
	}
	if res.Corruptions < n || res.ImageEndOffset != n<<40+2<<20 {
		t.Errorf("%+v", *res)
	}
}
