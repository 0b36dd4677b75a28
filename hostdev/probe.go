package hostdev

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

// A fileKind says what a path leads to.
type fileKind uint8

const (
	otherFile fileKind = iota
	regularFile
	blockDevice
	charDevice
)

func kindOf(st *unix.Stat_t) fileKind {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return regularFile
	case unix.S_IFBLK:
		return blockDevice
	case unix.S_IFCHR:
		return charDevice
	}
	return otherFile
}

// isDevice scores path by what it leads to (rule G7).
func isDevice(path string) int {
	var st unix.Stat_t
	if err := retry(func() error { return unix.Stat(path, &st) }); err == nil {
		if k := kindOf(&st); k == blockDevice || k == charDevice {
			return 100
		}
	}
	return 0
}

func (k fileKind) sizeOf(fd int) (int64, error) {
	switch k {
	case blockDevice:
		return deviceSize(fd)
	case charDevice:
		return 0, nil
	}
	var st unix.Stat_t
	err := retry(func() error { return unix.Fstat(fd, &st) })
	return st.Size, err
}

// queue is the directory of sysfs that describes the request queue of a device, or "".
type queue string

func queueOf(dev uint64) queue {
	dir := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev))
	// A partition has the queue of its disk.
	for _, q := range []string{filepath.Join(dir, "queue"), dir + "/../queue"} {
		if _, err := os.Stat(q); err == nil {
			return queue(q)
		}
	}
	return ""
}

// number reads an attribute, 0 where it is missing.
func (q queue) number(attribute string) int64 {
	if q == "" {
		return 0
	}
	b, err := os.ReadFile(string(q) + "/" + attribute)
	if err != nil {
		return 0
	}
	v, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil || v < 0 {
		return 0
	}
	return v
}

// powerOfTwo returns v if that is a power of two from low to high, and else otherwise.
func powerOfTwo(v, low, high, otherwise int64) int64 {
	if v < low || v > high || v&(v-1) != 0 {
		return otherwise
	}
	return v
}

const maxTransferHint = 32 << 20

// probeLimits fills in f.limits, f.nowait and f.queue. st is of f.fd.
func (f *files) probeLimits(st *unix.Stat_t) error {
	l := &f.limits
	*l = block.Limits{
		RequestAlignment:  1,
		MemAlignment:      1,
		PreferredTransfer: powerOfTwo(int64(st.Blksize), 512, maxTransferHint, 4096),
		WriteFlags:        block.FUA,
		ZeroFlags:         block.MayUnmap | block.NoFallback,
	}
	switch f.kind {
	case blockDevice:
		f.queue = queueOf(st.Rdev)
		f.probeDevice()
		l.Rotational = f.queue.number("rotational") == 1
	case regularFile:
		// Some file systems have a device of their own only in name; then nothing is known.
		q := queueOf(st.Dev)
		l.LogicalBlockSize = powerOfTwo(q.number("logical_block_size"), 512, 64<<10, 0)
		l.PhysicalBlockSize = powerOfTwo(q.number("physical_block_size"), 512, 1<<20, 0)
		l.Rotational = q.number("rotational") == 1
		l.DiscardAlignment = l.PreferredTransfer
	}
	if f.direct {
		if err := f.probeDirect(); err != nil {
			return err
		}
	}
	f.probeNowait()
	return nil
}

func (f *files) probeDevice() {
	get := func(req uint) int64 {
		v, err := unix.IoctlGetUint32(f.fd, req)
		if err != nil {
			return 0
		}
		return int64(v)
	}
	l := &f.limits
	l.LogicalBlockSize = powerOfTwo(get(unix.BLKSSZGET), 512, 64<<10, 512)
	l.PhysicalBlockSize = powerOfTwo(get(unix.BLKPBSZGET), l.LogicalBlockSize, 1<<20, l.LogicalBlockSize)
	least := max(4096, l.PhysicalBlockSize, powerOfTwo(get(unix.BLKIOMIN), 512, maxTransferHint, 0))
	l.PreferredTransfer = powerOfTwo(get(unix.BLKIOOPT), least, maxTransferHint, least)
	l.DiscardAlignment = powerOfTwo(f.queue.number("discard_granularity"), l.LogicalBlockSize, 1<<30, l.LogicalBlockSize)
}

// probeDirect finds the alignment that direct I/O needs: what the kernel says, or
// else the least that a read succeeds with.
func (f *files) probeDirect() error {
	l := &f.limits
	offset, mem, ok := directAlignment(f.fd)
	if !ok {
		if offset, ok = tryDirect(f.fd); !ok {
			return fmt.Errorf("'%s' cannot be read with direct I/O; use a cache mode other than none and directsync: %w", f.filename, unix.EINVAL)
		}
		mem = offset
	}
	if f.kind == blockDevice {
		offset = max(offset, l.LogicalBlockSize)
	}
	if offset > 64<<10 || offset&(offset-1) != 0 || mem > block.PageSize || mem&(mem-1) != 0 {
		return fmt.Errorf("'%s' needs an alignment of %d bytes, and %d in memory, for direct I/O; at most 65536 and %d are supported",
			f.filename, offset, mem, block.PageSize)
	}
	l.RequestAlignment, l.MemAlignment = offset, mem
	l.DiscardAlignment = max(l.DiscardAlignment, offset)
	l.PreferredTransfer = max(l.PreferredTransfer, offset)
	return nil
}

// directAlignment asks statx, which knows since Linux 6.1.
func directAlignment(fd int) (offset, mem int64, ok bool) {
	var st unix.Statx_t
	err := retry(func() error { return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st) })
	if err != nil || st.Mask&unix.STATX_DIOALIGN == 0 || st.Dio_offset_align == 0 || st.Dio_mem_align == 0 {
		return 0, 0, false
	}
	return int64(st.Dio_offset_align), int64(st.Dio_mem_align), true
}

// tryDirect reads pieces of growing size. It finds 4096 for an empty file, which refuses nothing.
func tryDirect(fd int) (int64, bool) {
	b := block.GetBuffer(2 * block.PageSize)
	defer block.PutBuffer(b)
	for align := 512; align <= block.PageSize; align *= 2 {
		k, err := pread(fd, b[:align], int64(align))
		if k > 0 || err == nil && align == block.PageSize {
			return int64(align), true
		}
		if err != nil && err != unix.EINVAL {
			return 0, false
		}
	}
	return 0, false
}

// probeNowait finds out how data is read without waiting.
func (f *files) probeNowait() {
	f.nowait = nowaitNever
	if f.direct || f.kind == charDevice {
		return
	}
	var b [1]byte
	switch _, errno := readv2(f.fd, b[:], 0, unix.RWF_NOWAIT); errno {
	case 0, unix.EAGAIN:
		f.nowait = nowaitFlag
	case unix.EOPNOTSUPP:
		var fs unix.Statfs_t
		err := retry(func() error { return unix.Fstatfs(f.fd, &fs) })
		if err == nil && f.kind == regularFile && (fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC) {
			f.nowait = nowaitPlain
		}
	}
}
