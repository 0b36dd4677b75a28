package hostdev

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

// Locking says whether an image is locked against use by other processes, in the way of QEMU.
type Locking uint8

const (
	LockingAuto Locking = iota // where the file system can; else a warning
	LockingOn                  // or it is not opened
	LockingOff
)

func (l Locking) String() string { return [...]string{"auto", "on", "off"}[l] }

// Options are those of both drivers.
type Options struct {
	Filename string // path of the file or device
	Locking  Locking
}

// FileDriver returns the driver "file", for regular files.
func FileDriver() *block.Driver { return driver("file", regularFile) }

// DeviceDriver returns the driver "host_device", for block and character devices.
func DeviceDriver() *block.Driver { return driver("host_device", blockDevice, charDevice) }

func driver(name string, kinds ...fileKind) *block.Driver {
	return &block.Driver{
		Name:       name,
		Kind:       block.Protocol,
		NewOptions: func() any { return new(Options) },
		Open: func(_ context.Context, o *block.Opening) (block.Instance, error) {
			n, err := open(o, kinds)
			if err != nil {
				return nil, err
			}
			return n, nil
		},
	}
}

// A node is an open file or device.
type node struct {
	self     *block.Node
	filename string
	kind     fileKind
	fd       int
	tail     int  // with direct I/O on a file: buffered, for parts of blocks; else -1
	direct   bool // fd needs aligned requests
	noFlush  bool
	limits   block.Limits
	nowait   nowaitMode
	queue    queue // of a device

	size        atomic.Int64
	work        workers
	flush       flusher
	syncFunc    func() // n.sync, made once
	noDsync     atomic.Bool
	tailWritten atomic.Bool
	lacks       lacks
	allocates   atomic.Bool // fallocate has been seen to work
	seekless    atomic.Bool // SEEK_DATA is not supported
	status      statusCache
	locks       *locks // nil: none are taken
}

var (
	_ block.Instance       = (*node)(nil)
	_ block.Zeroer         = (*node)(nil)
	_ block.Discarder      = (*node)(nil)
	_ block.StatusReporter = (*node)(nil)
	_ block.Locator        = (*node)(nil)
	_ block.HostFile       = (*node)(nil)
	_ block.Prefetcher     = (*node)(nil)
	_ block.Truncater      = (*node)(nil)
	_ block.Permitter      = (*node)(nil)
	_ block.Measurer       = (*node)(nil)
	_ block.Waiter         = (*node)(nil)
	_ block.Named          = (*node)(nil)
	_ Refresher            = (*node)(nil)
)

func open(o *block.Opening, kinds []fileKind) (*node, error) {
	opts, ok := o.Config.Options.(*Options)
	if !ok {
		return nil, fmt.Errorf("the '%s' block driver takes options of type *hostdev.Options, not %T", o.Config.Driver, o.Config.Options)
	}
	if opts.Filename == "" {
		return nil, fmt.Errorf("The '%s' block driver requires a file name", o.Config.Driver)
	}
	n := &node{
		self:     o.Node(),
		filename: opts.Filename,
		fd:       -1, tail: -1,
		noFlush: o.Config.Cache.NoFlush,
		work:    workers{tokens: processTokens},
	}
	n.flush.ended.L = &n.flush.mu
	n.syncFunc = n.sync
	if err := n.openFiles(o.Config, kinds); err != nil {
		return nil, errors.Join(err, n.closeFiles())
	}
	if opts.Locking != LockingOff && !o.Config.NoIO && !o.Config.ForceShare {
		var err error
		n.locks, err = newLocks(n.fd, n.filename, opts.Locking, o.Node().Graph().Log())
		if err != nil {
			return nil, errors.Join(err, n.closeFiles())
		}
	}
	return n, nil
}

func (n *node) openFiles(cfg *block.Config, kinds []fileKind) error {
	// Looking comes first: opening some devices has effects.
	var st unix.Stat_t
	if err := retry(func() error { return unix.Stat(n.filename, &st) }); err != nil {
		return fmt.Errorf("Could not open '%s': %w", n.filename, err)
	}
	if err := n.checkKind(&st, kinds); err != nil {
		return err
	}
	flags := unix.O_CLOEXEC | unix.O_RDWR
	if cfg.ReadOnly {
		flags = unix.O_CLOEXEC | unix.O_RDONLY
	}
	var err error
	if cfg.Cache.Direct {
		n.fd, err = openFile(n.filename, flags|unix.O_DIRECT)
		if err == unix.EINVAL {
			return fmt.Errorf("Could not open '%s': the file system does not support O_DIRECT; use a cache mode other than none and directsync: %w", n.filename, err)
		}
	} else {
		n.fd, err = openFile(n.filename, flags)
	}
	if err != nil {
		return fmt.Errorf("Could not open '%s': %w", n.filename, err)
	}
	if err := retry(func() error { return unix.Fstat(n.fd, &st) }); err != nil {
		return fmt.Errorf("Could not open '%s': %w", n.filename, err)
	}
	if err := n.checkKind(&st, kinds); err != nil {
		return err
	}
	if n.kind == blockDevice && !cfg.ReadOnly && isReadOnly(n.fd) {
		return fmt.Errorf("Could not open '%s' for writing: the device is read-only: %w", n.filename, unix.EROFS)
	}
	size, err := n.kind.sizeOf(n.fd)
	if err != nil {
		return fmt.Errorf("Could not get the size of '%s': %w", n.filename, err)
	}
	n.size.Store(size)
	n.direct = cfg.Cache.Direct
	if err := n.probeLimits(&st); err != nil {
		return err
	}
	if n.direct && n.kind == regularFile {
		// The same file, whatever the path leads to by now.
		n.tail, err = openFile(fmt.Sprintf("/proc/self/fd/%d", n.fd), flags)
		if err != nil {
			return fmt.Errorf("Could not open '%s' a second time, for its last block: %w", n.filename, err)
		}
	}
	return nil
}

func (n *node) checkKind(st *unix.Stat_t, kinds []fileKind) error {
	n.kind = kindOf(st)
	for _, k := range kinds {
		if k == n.kind {
			return nil
		}
	}
	if kinds[0] == regularFile {
		return fmt.Errorf("'file' driver requires '%s' to be a regular file", n.filename)
	}
	return fmt.Errorf("'host_device' driver requires '%s' to be either a character or block device", n.filename)
}

func openFile(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags, 0)
		if err == nil {
			return fd, nil
		}
		if err != unix.EINTR {
			return -1, err
		}
	}
}

// Filename implements [block.Named].
func (n *node) Filename() string { return n.filename }

// Close implements [block.Instance].
func (n *node) Close(context.Context) error {
	var err error
	if n.locks != nil {
		err = n.locks.close()
	}
	return errors.Join(err, n.closeFiles())
}

func (n *node) closeFiles() error {
	var errs []error
	for _, fd := range []*int{&n.tail, &n.fd} {
		if *fd >= 0 {
			errs = append(errs, unix.Close(*fd))
			*fd = -1
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close of '%s': %w", n.filename, err)
	}
	return nil
}

// Limits implements [block.Instance].
func (n *node) Limits() block.Limits { return n.limits }

// OldestWait implements [block.Waiter].
func (n *node) OldestWait() (what string, age time.Duration, ok bool) {
	what, age, ok = n.work.oldest()
	if ok {
		what += " of '" + n.filename + "'"
	}
	return what, age, ok
}

// Measurements implements [block.Measurer].
func (n *node) Measurements() []block.Measurement {
	running, waiting := n.work.inFlight()
	latched := 0.0
	if n.flush.failed() != nil {
		latched = 1
	}
	gauge := func(name, help string, v float64) block.Measurement {
		return block.Measurement{Name: name, Help: help, Value: v}
	}
	counter := func(name, help string, v int64) block.Measurement {
		return block.Measurement{Name: name, Help: help, Value: float64(v), Counter: true}
	}
	return []block.Measurement{
		gauge("syscalls_in_flight", "System calls on the file or device that run now.", float64(running)),
		gauge("syscalls_waiting", "Requests that wait for a free system call slot.", float64(waiting)),
		gauge("flush_error_latched", "1 after a flush failed: flushes fail until the node is opened anew.", latched),
		counter("flush_requests_total", "Flushes asked for.", n.flush.asked.Load()),
		counter("fdatasyncs_total", "Flushes done; fewer than asked for where they are shared.", n.flush.rounds.Load()),
		counter("status_cache_hits_total", "Block status answered from memory.", n.status.hits.Load()),
		counter("status_cache_misses_total", "Block status asked of the file system.", n.status.misses.Load()),
	}
}
