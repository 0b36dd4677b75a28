package hostdev

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
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

var lockingNames = [...]string{"auto", "on", "off"}

func (l Locking) String() string { return lockingNames[l] }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (l *Locking) UnmarshalText(text []byte) error {
	i := slices.Index(lockingNames[:], string(text))
	if i < 0 {
		return fmt.Errorf("'%s' is not one of %s", text, strings.Join(lockingNames[:], ", "))
	}
	*l = Locking(i)
	return nil
}

// Options are those of both drivers.
type Options struct {
	Filename string  `option:"filename,strong"` // path of the file or device
	Locking  Locking `option:"locking"`
}

// FileDriver returns the driver "file", for regular files.
func FileDriver() *block.Driver { return driver("file", regularFile) }

// DeviceDriver returns the driver "host_device", for block and character devices.
func DeviceDriver() *block.Driver {
	d := driver("host_device", blockDevice, charDevice)
	d.ProbeName = isDevice
	return d
}

func driver(name string, kinds ...fileKind) *block.Driver {
	return &block.Driver{
		Name:       name,
		Kind:       block.Protocol,
		NewOptions: func() any { return new(Options) },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			n, err := open(ctx, o, kinds)
			if err != nil {
				return nil, err
			}
			return n, nil
		},
	}
}

// A node is an open file or device.
type node struct {
	self  *block.Node
	kinds []fileKind // that the driver opens
	opts  *Options
	files // changes only while nothing is in flight, see use
	told  atomic.Pointer[block.Limits]

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

	lockMu sync.Mutex
	locks  *locks // nil: none are taken; guarded by lockMu
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
	_ block.Refresher      = (*node)(nil)
	_ block.PreActivator   = (*node)(nil)
	_ block.Peeker         = (*node)(nil)
	_ block.Reopener       = (*node)(nil)
)

func open(ctx context.Context, o *block.Opening, kinds []fileKind) (*node, error) {
	opts, ok := o.Config.Options.(*Options)
	if !ok {
		return nil, fmt.Errorf("the '%s' block driver takes options of type *hostdev.Options, not %T", o.Config.Driver, o.Config.Options)
	}
	if opts.Filename == "" {
		return nil, fmt.Errorf("The '%s' block driver requires a file name", o.Config.Driver)
	}
	n := &node{
		self:  o.Node(),
		kinds: kinds,
		opts:  opts,
		files: noFiles(opts.Filename),
		work:  workers{tokens: processTokens},
	}
	n.flush.ended.L = &n.flush.mu
	n.syncFunc = n.sync
	f, size, err := openFiles(n.filename, n.filename, o.Config, kinds)
	if !o.Config.ReadOnly && cannotWrite(err) {
		if err = o.AutoReadOnly(ctx, err); err == nil {
			f, size, err = openFiles(n.filename, n.filename, o.Config, kinds)
		}
	}
	if err != nil {
		return nil, err
	}
	n.use(f)
	n.size.Store(size)
	if o.Config.Inactive {
		return n, n.closeFiles()
	}
	if err := n.makeLocks(o.Config); err != nil {
		return nil, errors.Join(err, n.closeFiles())
	}
	return n, nil
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
	return errors.Join(n.dropLocks(), n.closeFiles())
}

// use makes f the node's files.
func (n *node) use(f files) {
	n.files = f
	n.told.Store(&f.limits)
}

// Limits implements [block.Instance].
func (n *node) Limits() block.Limits { return *n.told.Load() }

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
