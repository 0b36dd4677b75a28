package hostdev

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

// A statusCache remembers the last extents of data that lseek found, because
// finding the end of data is what costs. Holes are not kept: another process may
// fill one at any time, and "zero" must never be told of data, while "data" is
// always a good answer. For the same reason writes need not touch the cache;
// what makes holes does.
type statusCache struct {
	gen          atomic.Uint64 // moves on when data may have become a hole
	hits, misses atomic.Int64

	mu      sync.Mutex
	at      uint64 // generation of extents
	extents [8]dataExtent
	next    int
}

type dataExtent struct{ off, end int64 }

// invalidate drops what was known, also what is being found out just now.
func (c *statusCache) invalidate() { c.gen.Add(1) }

// lookup returns the end of the data known at off.
func (c *statusCache) lookup(off int64) (end int64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.at != c.gen.Load() {
		return 0, false
	}
	for _, x := range c.extents {
		if x.off <= off && off < x.end {
			return x.end, true
		}
	}
	return 0, false
}

// store keeps an extent that was found in generation gen.
func (c *statusCache) store(gen uint64, off, end int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if gen != c.gen.Load() {
		return
	}
	if c.at != gen {
		c.at = gen
		c.extents = [len(c.extents)]dataExtent{}
	}
	c.extents[c.next] = dataExtent{off, end}
	c.next = (c.next + 1) % len(c.extents)
}

// BlockStatus implements [block.StatusReporter]. Holes read as zero, preallocated
// ranges are zeroes that take up space, where the file system says so; devices are data.
func (n *node) BlockStatus(_ context.Context, off, length int64, precise bool) (block.Extent, error) {
	size := n.size.Load()
	if off >= size {
		return block.Extent{Flags: block.StatusZero | block.StatusAllocated, Length: length}, nil
	}
	length = min(length, size-off)
	x := block.Extent{
		Flags:  block.StatusData | block.StatusAllocated | block.StatusOffset,
		Length: length, Offset: off, File: n.self,
	}
	if precise && n.kind == regularFile && !n.seekless.Load() {
		end, hole, err := n.extent(off)
		if err != nil {
			return block.Extent{}, fmt.Errorf("block status of '%s': %w", n.filename, err)
		}
		x.Length = min(length, end-off)
		if hole {
			x.Flags |= block.StatusZero
			if x.Length, hole = n.unallocated(off, x.Length); hole {
				x.Flags &^= block.StatusData
			}
		}
	}
	return x, nil
}

const unbounded = 1<<63 - 1

// extent tells whether there is a hole at off, and where what is there ends, which is past off.
func (n *node) extent(off int64) (end int64, hole bool, err error) {
	if end, ok := n.status.lookup(off); ok {
		n.status.hits.Add(1)
		return end, false, nil
	}
	n.status.misses.Add(1)
	gen := n.status.gen.Load()
	slot := n.work.begin(opSeek)
	defer n.work.end(slot)
	data, err := n.seek(off, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO:
		return n.noMoreData(off)
	case err == unix.EINVAL || unsupported(err):
		n.seekless.Store(true)
		return unbounded, false, nil
	case err != nil:
		return 0, false, err
	case data > off:
		return data, true, nil
	}
	end, err = n.seek(off, unix.SEEK_HOLE)
	if err != nil || end <= off {
		// It changed between the two calls.
		return unbounded, false, nil
	}
	n.status.store(gen, off, end)
	return end, false, nil
}

// noMoreData answers where only a hole follows. If the file was truncated under
// us there is nothing at all, and reading will say so.
func (n *node) noMoreData(off int64) (end int64, hole bool, err error) {
	var st unix.Stat_t
	if err := retry(func() error { return unix.Fstat(n.fd, &st) }); err != nil {
		return 0, false, err
	}
	return unbounded, off < st.Size, nil
}

// fiemap is the argument of FS_IOC_FIEMAP (linux/fiemap.h).
type fiemap struct {
	start, length                 uint64
	flags, mapped, count, padding uint32
	extents                       [16]fiemapExtent
}

type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

const fsIocFiemap = 0xc020660b

// unallocated tells whether no space is allocated at off, where lseek sees a hole
// of length bytes, and for how many of them the answer holds.
func (n *node) unallocated(off, length int64) (int64, bool) {
	if n.lacks.fiemap.Load() {
		return length, true
	}
	slot := n.work.begin(opSeek)
	defer n.work.end(slot)
	m := fiemap{start: uint64(off), length: uint64(length)}
	m.count = uint32(len(m.extents))
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(n.fd), fsIocFiemap, uintptr(unsafe.Pointer(&m)))
	if errno != 0 {
		if unsupported(errno) || errno == unix.ENOTTY {
			n.lacks.fiemap.Store(true)
		}
		return length, true
	}
	if m.mapped == 0 {
		return length, true
	}
	if first := int64(m.extents[0].logical); first > off {
		return min(length, first-off), true
	}
	end := off
	for _, x := range m.extents[:min(m.mapped, m.count)] {
		if int64(x.logical) > end {
			break
		}
		end = int64(x.logical + x.length)
	}
	if end <= off {
		return length, true
	}
	return min(length, end-off), false
}

func (n *node) seek(off int64, whence int) (int64, error) {
	for {
		at, err := unix.Seek(n.fd, off, whence)
		if err != unix.EINTR {
			return at, err
		}
	}
}
