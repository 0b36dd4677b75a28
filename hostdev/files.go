package hostdev

import (
	"errors"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

// files are the descriptors of a node and what was found out about them.
type files struct {
	filename string
	kind     fileKind
	fd       int  // -1: the node is inactive
	tail     int  // with direct I/O on a file: buffered, for parts of blocks; else -1
	direct   bool // fd needs aligned requests
	limits   block.Limits
	nowait   nowaitMode
	queue    queue // of a device
}

func noFiles(filename string) files { return files{filename: filename, fd: -1, tail: -1} }

// cannotWrite tells whether a file can perhaps be opened read-only.
func cannotWrite(err error) bool {
	return errors.Is(err, unix.EACCES) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.EPERM)
}

// openFiles opens the file of that name by way of path, and tells its size. On an
// error nothing is open.
func openFiles(filename, path string, cfg *block.Config, kinds []fileKind) (_ files, size int64, err error) {
	f := noFiles(filename)
	if size, err = f.open(path, cfg, kinds); err != nil {
		return noFiles(filename), 0, errors.Join(err, f.closeFiles())
	}
	return f, size, nil
}

func (f *files) open(path string, cfg *block.Config, kinds []fileKind) (size int64, err error) {
	// Looking comes first: opening some devices has effects.
	var st unix.Stat_t
	if err := retry(func() error { return unix.Stat(path, &st) }); err != nil {
		return 0, f.failed(err)
	}
	if err := f.checkKind(&st, kinds); err != nil {
		return 0, err
	}
	flags := unix.O_CLOEXEC | unix.O_RDWR
	if cfg.ReadOnly {
		flags = unix.O_CLOEXEC | unix.O_RDONLY
	}
	f.direct = cfg.Cache.Direct
	if f.direct {
		f.fd, err = openFile(path, flags|unix.O_DIRECT)
		if err == unix.EINVAL {
			return 0, fmt.Errorf("Could not open '%s': the file system does not support O_DIRECT; use a cache mode other than none and directsync: %w", f.filename, err)
		}
	} else {
		f.fd, err = openFile(path, flags)
	}
	if err == nil {
		err = retry(func() error { return unix.Fstat(f.fd, &st) })
	}
	if err != nil {
		return 0, f.failed(err)
	}
	if err := f.checkKind(&st, kinds); err != nil {
		return 0, err
	}
	if f.kind == blockDevice && !cfg.ReadOnly && isReadOnly(f.fd) {
		return 0, fmt.Errorf("Could not open '%s' for writing: the device is read-only: %w", f.filename, unix.EROFS)
	}
	if size, err = f.kind.sizeOf(f.fd); err != nil {
		return 0, fmt.Errorf("Could not get the size of '%s': %w", f.filename, err)
	}
	if err := f.probeLimits(&st); err != nil {
		return 0, err
	}
	if f.direct && f.kind == regularFile {
		// The same file, whatever the path leads to by now.
		f.tail, err = openFile(procPath(f.fd), flags)
		if err != nil {
			return 0, fmt.Errorf("Could not open '%s' a second time, for its last block: %w", f.filename, err)
		}
	}
	return size, nil
}

func (f *files) failed(err error) error {
	return fmt.Errorf("Could not open '%s': %w", f.filename, err)
}

// procPath opens the file of a descriptor again.
func procPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

func (f *files) checkKind(st *unix.Stat_t, kinds []fileKind) error {
	f.kind = kindOf(st)
	for _, k := range kinds {
		if k == f.kind {
			return nil
		}
	}
	if kinds[0] == regularFile {
		return fmt.Errorf("'file' driver requires '%s' to be a regular file", f.filename)
	}
	return fmt.Errorf("'host_device' driver requires '%s' to be either a character or block device", f.filename)
}

func (f *files) closeFiles() error {
	var errs []error
	for _, fd := range []*int{&f.tail, &f.fd} {
		if *fd >= 0 {
			errs = append(errs, unix.Close(*fd))
			*fd = -1
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close of '%s': %w", f.filename, err)
	}
	return nil
}
