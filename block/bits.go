package block

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

const (
	wordBits = 64
	pageBits = 4096 * 8 // 4 KiB of memory

	// maxBitmapMemory bounds the bits of one bitmap, in bytes.
	maxBitmapMemory = 512 << 20
	maxBits         = maxBitmapMemory * 8
)

type bitPage [pageBits / wordBits]atomic.Uint64

// A bitSet is a set of bit numbers. It takes memory only for pages that hold some.
// All methods may be called in parallel; setting bits takes no lock where their page
// is there already, and writes nothing where they are set already.
type bitSet struct {
	pages atomic.Pointer[[]atomic.Pointer[bitPage]]
	full  atomic.Bool // a bit beyond maxBits was to be set, and is not

	mu sync.Mutex // held to add pages and to take them away
}

// page returns a page, nil if it holds no bits.
func (s *bitSet) page(i int64) *bitPage {
	if pages := s.pages.Load(); pages != nil && i < int64(len(*pages)) {
		return (*pages)[i].Load()
	}
	return nil
}

// numPages is a bound of the pages that hold bits.
func (s *bitSet) numPages() int64 {
	if pages := s.pages.Load(); pages != nil {
		return int64(len(*pages))
	}
	return 0
}

// makePage returns a page that may be written.
func (s *bitSet) makePage(i int64) *bitPage {
	if p := s.page(i); p != nil {
		return p
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.numPages(); i >= n {
		// Twice as many, so that a node that grows by little costs little.
		grown := make([]atomic.Pointer[bitPage], min(max(i+1, 2*n), maxBits/pageBits))
		for k := range n {
			grown[k].Store((*s.pages.Load())[k].Load())
		}
		s.pages.Store(&grown)
	}
	at := &(*s.pages.Load())[i]
	if at.Load() == nil {
		at.Store(new(bitPage))
	}
	return at.Load()
}

// set adds the bits from first up to end, not included.
func (s *bitSet) set(first, end int64) {
	if end > maxBits {
		s.full.Store(true)
		end = maxBits
	}
	for first < end {
		page := s.makePage(first / pageBits)
		stop := min(end, (first/pageBits+1)*pageBits)
		for first < stop {
			mask, next := wordMask(first, stop)
			if w := &page[first%pageBits/wordBits]; w.Load()&mask != mask {
				w.Or(mask)
			}
			first = next
		}
	}
}

// wordMask has the bits from first up to end that are in the word of first, and tells
// where the next word begins.
func wordMask(first, end int64) (mask uint64, next int64) {
	next = min(end, first&^(wordBits-1)+wordBits)
	return ^uint64(0) >> (wordBits - (next - first)) << (first % wordBits), next
}

// cut takes away the bits from first on.
func (s *bitSet) cut(first int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := first / pageBits; i < s.numPages(); i++ {
		at := &(*s.pages.Load())[i]
		if i*pageBits >= first {
			at.Store(nil)
			continue
		}
		if page := at.Load(); page != nil {
			for first := first; first < (i+1)*pageBits; {
				mask, next := wordMask(first, (i+1)*pageBits)
				page[first%pageBits/wordBits].And(^mask)
				first = next
			}
		}
	}
}

// next returns the first number from first on, before end, that is in the set, or, with
// in false, that is not; end if there is none.
func (s *bitSet) next(first, end int64, in bool) int64 {
	for first < end {
		page := s.page(first / pageBits)
		stop := min(end, (first/pageBits+1)*pageBits)
		if page == nil {
			if !in {
				return first
			}
			first = stop
			continue
		}
		for first < stop {
			mask, next := wordMask(first, stop)
			w := page[first%pageBits/wordBits].Load()
			if !in {
				w = ^w
			}
			if w &= mask; w != 0 {
				return first&^(wordBits-1) + int64(bits.TrailingZeros64(w))
			}
			first = next
		}
	}
	return end
}

// count counts the bits before end.
func (s *bitSet) count(end int64) int64 {
	sum := 0
	for i := range s.numPages() {
		page := s.page(i)
		if page == nil {
			continue
		}
		stop := min(end, (i+1)*pageBits)
		for first := i * pageBits; first < stop; {
			mask, next := wordMask(first, stop)
			sum += bits.OnesCount64(page[first%pageBits/wordBits].Load() & mask)
			first = next
		}
	}
	return int64(sum)
}

// add adds the bits of o.
func (s *bitSet) add(o *bitSet) {
	for i := range o.numPages() {
		from := o.page(i)
		if from == nil {
			continue
		}
		to := s.makePage(i)
		for k := range from {
			if w := from[k].Load(); w&^to[k].Load() != 0 {
				to[k].Or(w)
			}
		}
	}
}
