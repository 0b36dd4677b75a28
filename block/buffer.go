package block

import (
	"math/bits"
	"sync"
	"unsafe"
)

// PageSize is the alignment of pooled buffers, enough for direct I/O everywhere.
const PageSize = 4096

const (
	minClass = 12 // 4 KiB
	maxClass = 26 // 64 MiB
)

var bufferPools [maxClass + 1]sync.Pool

// GetBuffer returns a page-aligned buffer of n bytes, 0 to 64 MiB, with undefined
// contents. The caller owns it until PutBuffer.
func GetBuffer(n int) []byte {
	class := max(minClass, bits.Len(uint(n-1)))
	if n == 0 {
		class = minClass
	}
	if p, ok := bufferPools[class].Get().(unsafe.Pointer); ok {
		return unsafe.Slice((*byte)(p), 1<<class)[:n]
	}
	raw := make([]byte, 1<<class+PageSize)
	skip := -int(uintptr(unsafe.Pointer(&raw[0]))) & (PageSize - 1)
	return raw[skip : skip+1<<class : skip+1<<class][:n]
}

// PutBuffer gives a buffer of GetBuffer back.
func PutBuffer(b []byte) {
	class := bits.Len(uint(cap(b) - 1))
	bufferPools[class].Put(unsafe.Pointer(unsafe.SliceData(b)))
}

// zeroes is what zero requests write where nothing better is there. It is never changed.
var zeroes = make([]byte, 64<<10)

// IsZero tells whether p holds zeroes only.
func IsZero(p []byte) bool {
	for len(p) > len(zeroes) {
		if !equal(p[:len(zeroes)], zeroes) {
			return false
		}
		p = p[len(zeroes):]
	}
	return equal(p, zeroes[:len(p)])
}

func equal(a, b []byte) bool { return string(a) == string(b) }
