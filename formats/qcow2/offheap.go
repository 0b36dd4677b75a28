package qcow2

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// wordArray is an array of atomic words outside of the Go heap, so that it does not
// count in the garbage collector's pace and is resident only where it was touched.
type wordArray struct {
	mem []byte
	w   []atomic.Uint64
}

func newWordArray(n int) (wordArray, error) {
	if n == 0 {
		return wordArray{}, nil
	}
	mem, err := unix.Mmap(-1, 0, n*8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return wordArray{}, fmt.Errorf("allocate %d bytes for tables: %w", n*8, err)
	}
	return wordArray{mem, unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&mem[0])), n)}, nil
}

func (w *wordArray) free() error {
	if w.mem == nil {
		return nil
	}
	mem := w.mem
	w.mem, w.w = nil, nil
	return unix.Munmap(mem)
}
