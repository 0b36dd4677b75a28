package hostdev

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// retry calls f until no signal interrupts it.
func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// inlineRead is the longest read that keeps its processor: copying it from memory takes some 10 µs.
const inlineRead = 64 << 10

// inlineWrite is the longest write to memory that keeps its processor.
const inlineWrite = 16 << 10

// readv2 is preadv2(2) with one buffer, which is not empty. It does not allocate.
func readv2(fd int, p []byte, off int64, flags int) (int, syscall.Errno) {
	iov := unix.Iovec{Base: &p[0]}
	iov.SetLen(len(p))
	call := syscall.RawSyscall6
	if len(p) > inlineRead {
		call = syscall.Syscall6
	}
	n, _, errno := call(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1,
		uintptr(off), uintptr(uint64(off)>>32), uintptr(flags))
	return int(n), errno
}

// writev2 is pwritev2(2) with one buffer, which is not empty. It does not allocate.
func writev2(fd int, p []byte, off int64, flags int) (int, error) {
	return writevBy(syscall.Syscall6, fd, p, off, flags)
}

// pwriteNowait is pwrite of p, which is not empty, to where no device is waited for:
// the scheduler is not told, which costs more than the write.
func pwriteNowait(fd int, p []byte, off int64) (int, error) {
	return writevBy(syscall.RawSyscall6, fd, p, off, 0)
}

func writevBy(call func(trap, a1, a2, a3, a4, a5, a6 uintptr) (r1, r2 uintptr, err syscall.Errno), fd int, p []byte, off int64, flags int) (int, error) {
	iov := unix.Iovec{Base: &p[0]}
	iov.SetLen(len(p))
	for {
		n, _, errno := call(unix.SYS_PWRITEV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1,
			uintptr(off), uintptr(uint64(off)>>32), uintptr(flags))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

func pread(fd int, p []byte, off int64) (int, error) {
	for {
		n, err := unix.Pread(fd, p, off)
		if err != unix.EINTR {
			return n, err
		}
	}
}

func pwrite(fd int, p []byte, off int64) (int, error) {
	for {
		n, err := unix.Pwrite(fd, p, off)
		if err != unix.EINTR {
			return n, err
		}
	}
}

func fallocate(fd int, mode uint32, off, n int64) error {
	for {
		if err := unix.Fallocate(fd, mode, off, n); err != unix.EINTR {
			return err
		}
	}
}

// ioctlRange passes a range of bytes to a device: BLKDISCARD, BLKZEROOUT.
func ioctlRange(fd int, req uint, off, n int64) error {
	r := [2]uint64{uint64(off), uint64(n)}
	for {
		_, _, errno := syscall.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(&r)))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

// deviceSize is BLKGETSIZE64.
func deviceSize(fd int) (int64, error) {
	var size uint64
	_, _, errno := syscall.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size)))
	if errno != 0 {
		return 0, errno
	}
	return int64(size), nil
}

// isReadOnly tells whether a device refuses writes; that it was opened for writing proves nothing.
func isReadOnly(fd int) bool {
	v, err := unix.IoctlGetUint32(fd, unix.BLKROGET)
	return err == nil && v != 0
}

// unsupported tells whether err says that a file system or device cannot do what was asked, now or ever.
func unsupported(err error) bool {
	switch err {
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.ENOTTY, unix.ENODEV:
		return true
	}
	return false
}
