package blocktest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/nbdserve/nbdserve/block"
)

const (
	pageSize = 4096
	// SectorSize is what a power cut leaves whole: a write is torn at its multiples only.
	SectorSize = 512
	// maxExtent bounds the search of one Extent call.
	maxExtent = 64 << 20
)

// A page is 4 KiB of a store. A shared page belongs to several stores and is copied before a change.
type page struct {
	data   [pageSize]byte
	alloc  uint8 // bit i: sector i is allocated
	shared bool
}

// A Store is the contents of a disk: sparse bytes in memory that know which
// sectors are allocated. All methods may be called in parallel.
type Store struct {
	mu    sync.RWMutex
	pages map[int64]*page // by offset / pageSize
	size  int64
}

// NewStore returns a store of size bytes, all of them holes.
func NewStore(size int64) *Store { return &Store{pages: map[int64]*page{}, size: size} }

// StoreOf returns a store that holds a copy of p.
func StoreOf(p []byte) *Store {
	s := NewStore(int64(len(p)))
	s.write(p, 0)
	return s
}

// LoadStore returns a store that holds the contents of a file; pages of zeroes are holes.
func LoadStore(path string) (*Store, error) {
	p, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	s := NewStore(int64(len(p)))
	for off := 0; off < len(p); off += pageSize {
		part := p[off:min(off+pageSize, len(p))]
		if !block.IsZero(part) {
			s.write(part, int64(off))
		}
	}
	return s, nil
}

// Save writes the store to a new sparse file.
func (s *Store) Save(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for i, pg := range s.pages {
		off := i * pageSize
		if n := min(pageSize, s.size-off); n > 0 && pg.alloc != 0 {
			if _, err := f.WriteAt(pg.data[:n], off); err != nil {
				return errors.Join(err, f.Close())
			}
		}
	}
	return errors.Join(f.Truncate(s.size), f.Close())
}

// Clone returns a copy. It shares the pages until one side changes them.
func (s *Store) Clone() *Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &Store{pages: make(map[int64]*page, len(s.pages)), size: s.size}
	for i, pg := range s.pages {
		if !pg.shared { // else other stores may be reading it
			pg.shared = true
		}
		c.pages[i] = pg
	}
	return c
}

// Size is the length in bytes.
func (s *Store) Size() int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.size
}

// Allocated counts the bytes in allocated sectors.
func (s *Store) Allocated() int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var n int64
	for _, pg := range s.pages {
		for bits := pg.alloc; bits != 0; bits &= bits - 1 {
			n += SectorSize
		}
	}
	return n
}

// Bytes returns a copy of the contents.
func (s *Store) Bytes() []byte {
	p := make([]byte, s.Size())
	s.Read(p, 0)
	return p
}

// ReadAt is io.ReaderAt.
func (s *Store) ReadAt(p []byte, off int64) (int, error) {
	size := s.Size()
	if off < 0 {
		return 0, fmt.Errorf("negative offset %d", off)
	}
	if off >= size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), size-off))
	s.Read(p[:n], off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Read fills p from off on; what is past the end reads as zero.
func (s *Store) Read(p []byte, off int64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	s.each(off, int64(len(p)), func(i, in, at, n int64) {
		part := p[at : at+n]
		if pg := s.pages[i]; pg != nil {
			copy(part, pg.data[in:in+n])
		} else {
			clear(part)
		}
	})
}

// Write stores p at off, growing the store where it reaches past the end.
func (s *Store) Write(p []byte, off int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.write(p, off)
}

// WriteAt is io.WriterAt.
func (s *Store) WriteAt(p []byte, off int64) (int, error) {
	s.Write(p, off)
	return len(p), nil
}

// Zero makes [off, off+n) read as zero, growing the store like Write. With unmap
// the whole sectors in it become holes, else all become allocated.
func (s *Store) Zero(off, n int64, unmap bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.zero(off, n, unmap)
}

// Truncate sets the size. What it cuts off is gone; what it adds is a hole.
func (s *Store) Truncate(size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if size < s.size {
		s.zero(size, s.size-size, true)
	}
	s.size = size
}

// Extent tells whether the sector at off is allocated, and for how many bytes, at most n, that holds.
func (s *Store) Extent(off, n int64) (allocated bool, length int64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	n = min(n, s.size-off, maxExtent)
	allocated = s.allocated(off)
	length = SectorSize - off%SectorSize
	for length < n {
		if pg := s.pages[(off+length)/pageSize]; pg == nil && !allocated {
			length += pageSize - (off+length)%pageSize
			continue
		}
		if s.allocated(off+length) != allocated {
			break
		}
		length += SectorSize
	}
	return allocated, min(length, n)
}

// each calls f for the part of [off, off+n) in each page: page i from byte in on, byte at of the range, n bytes.
func (s *Store) each(off, n int64, f func(i, in, at, n int64)) {
	for at := int64(0); at < n; {
		in := (off + at) % pageSize
		part := min(pageSize-in, n-at)
		f((off+at)/pageSize, in, at, part)
		at += part
	}
}

func (s *Store) allocated(off int64) bool {
	pg := s.pages[off/pageSize]
	return pg != nil && pg.alloc&(1<<(off%pageSize/SectorSize)) != 0
}

// own returns page i for a change, made if it is missing. s.mu is held.
func (s *Store) own(i int64) *page {
	pg := s.pages[i]
	switch {
	case pg == nil:
		pg = &page{}
	case pg.shared:
		pg = &page{data: pg.data, alloc: pg.alloc}
	default:
		return pg
	}
	s.pages[i] = pg
	return pg
}

func (s *Store) write(p []byte, off int64) {
	s.each(off, int64(len(p)), func(i, in, at, n int64) {
		pg := s.own(i)
		copy(pg.data[in:in+n], p[at:at+n])
		pg.alloc |= sectors(in, in+n-1)
	})
	s.size = max(s.size, off+int64(len(p)))
}

func (s *Store) zero(off, n int64, unmap bool) {
	s.size = max(s.size, off+n)
	if unmap && n/pageSize > int64(len(s.pages)) {
		for i := range s.pages {
			from, to := max(off, i*pageSize), min(off+n, (i+1)*pageSize)
			if from < to {
				s.zeroPages(from, to-from, true)
			}
		}
		return
	}
	s.zeroPages(off, n, unmap)
}

func (s *Store) zeroPages(off, n int64, unmap bool) {
	s.each(off, n, func(i, in, at, n int64) {
		if unmap && s.pages[i] == nil {
			return
		}
		if unmap && n == pageSize {
			delete(s.pages, i)
			return
		}
		pg := s.own(i)
		clear(pg.data[in : in+n])
		if !unmap {
			pg.alloc |= sectors(in, in+n-1)
			return
		}
		first, end := (in+SectorSize-1)/SectorSize, (in+n)/SectorSize
		if first < end {
			pg.alloc &^= sectors(first*SectorSize, end*SectorSize-1)
		}
	})
}

// sectors has the bits of the sectors of the bytes first to last of a page.
func sectors(first, last int64) uint8 {
	a, b := first/SectorSize, last/SectorSize
	return uint8(1<<(b+1) - 1<<a)
}
