package hostdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

// Prealloc says what a new file has storage for.
type Prealloc uint8

const (
	PreallocOff    Prealloc = iota // nothing: it is sparse
	PreallocFalloc                 // its whole size, reserved
	PreallocFull                   // its whole size, written with zeroes
)

var preallocNames = [...]string{"off", "falloc", "full"}

func (p Prealloc) String() string { return preallocNames[p] }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (p *Prealloc) UnmarshalText(text []byte) error {
	i := slices.Index(preallocNames[:], string(text))
	if i < 0 {
		return fmt.Errorf("'%s' is not one of %s", text, strings.Join(preallocNames[:], ", "))
	}
	*p = Prealloc(i)
	return nil
}

// CreateOptions are those of new files.
type CreateOptions struct {
	Preallocation Prealloc `option:"preallocation"`
}

// creator makes files: the [block.Creator] of both drivers.
type creator struct{}

// NewCreateOptions implements [block.Creator].
func (creator) NewCreateOptions() any { return new(CreateOptions) }

// Create implements [block.Creator]. A file that another process uses, as far as its
// locks tell, is left alone and the error is a [LockError]. A device keeps what it
// holds; it must have the size at least.
func (creator) Create(_ context.Context, c *block.Creation) error {
	o, ok := c.Options.(*CreateOptions)
	if !ok {
		return fmt.Errorf("options of a new file are %T, not %T", c.Options, o)
	}
	isNew, err := makeFile(c.Filename, c.Size, o.Preallocation)
	if isNew && err == nil {
		c.Undo = func() error { return unix.Unlink(c.Filename) }
	}
	return err
}

// makeFile makes a regular file of size bytes that reads as zero, or makes an existing
// one so. If it fails, a file that was not there before is removed again.
func makeFile(path string, size int64, prealloc Prealloc) (isNew bool, err error) {
	if size < 0 {
		return false, fmt.Errorf("size of '%s' is %d: %w", path, size, block.ErrInvalid)
	}
	const flags = unix.O_RDWR | unix.O_CLOEXEC
	isNew = true
	fd, err := create(path, flags|unix.O_CREAT|unix.O_EXCL)
	if err == unix.EEXIST {
		isNew = false
		fd, err = create(path, flags)
	}
	if err != nil {
		return isNew, fmt.Errorf("Could not create '%s': %w", path, err)
	}
	defer func() {
		if err == nil {
			err = unix.Close(fd)
		} else {
			_ = unix.Close(fd)
		}
		if err != nil && isNew {
			err = errors.Join(err, unix.Unlink(path))
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return isNew, fmt.Errorf("Could not create '%s': %w", path, err)
	}
	switch kindOf(&st) {
	case regularFile:
		return isNew, fill(fd, path, size, prealloc)
	case blockDevice:
		have, err := deviceSize(fd)
		if err == nil && have < size {
			err = fmt.Errorf("the device has %d bytes, %d are needed: %w", have, size, block.ErrNoSpace)
		}
		if err != nil {
			return isNew, fmt.Errorf("Could not create '%s': %w", path, err)
		}
		return isNew, nil
	}
	return isNew, fmt.Errorf("Could not create '%s': it is neither a regular file nor a block device", path)
}

func create(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags, 0o644)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// fill empties the file and gives it its size, while nobody else uses it.
func fill(fd int, path string, size int64, prealloc Prealloc) (err error) {
	l, err := newLocks(fd, path, LockingAuto, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	if err := l.check(lockBits{perm: block.PermWrite | block.PermResize, unshared: block.PermAll}); err != nil {
		return err
	}
	steps := []func() error{
		func() error { return unix.Ftruncate(fd, 0) },
		func() error { return unix.Ftruncate(fd, size) },
	}
	switch {
	case size == 0:
	case prealloc == PreallocFalloc:
		steps = append(steps, func() error { return fallocate(fd, 0, 0, size) })
	case prealloc == PreallocFull:
		steps = append(steps, func() error { return writeFull(fd, size) }, func() error { return unix.Fsync(fd) })
	}
	for _, step := range steps {
		if err := retry(step); err != nil {
			return fmt.Errorf("Could not create '%s' with %d bytes (preallocation %s): %w", path, size, prealloc, err)
		}
	}
	return nil
}

func writeFull(fd int, size int64) error {
	for off := int64(0); off < size; {
		k, err := pwrite(fd, zeroes[:min(int64(len(zeroes)), size-off)], off)
		if err != nil {
			return err
		}
		off += int64(k)
	}
	return nil
}

// Identity is the same for all names of a file, as far as it can be told.
func Identity(path string) string {
	var st unix.Stat_t
	if err := retry(func() error { return unix.Stat(path, &st) }); err != nil {
		return filepath.Clean(path)
	}
	return fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

func sameFile(a, b string) bool { return Identity(a) == Identity(b) }
