package blocktest

import (
	"context"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
)

// DiscardEffect is what a discarded range of a memory node reads as.
type DiscardEffect uint8

const (
	DiscardZeroes  DiscardEffect = iota // zero, and a hole
	DiscardKeeps                        // what it held
	DiscardGarbage                      // bytes 0xdd
)

// MemoryOptions configure a memory node.
type MemoryOptions struct {
	// Store is the contents; tests may look at and change it at any time.
	Store *Store
	// Limits are the abilities. A zero RequestAlignment or MemAlignment is 1.
	Limits block.Limits
	// Discard says what a discarded range reads as.
	Discard DiscardEffect
	// Bare hides everything but the methods of block.Instance.
	Bare bool
	// NoZero and NoDiscard make these requests fail with ErrNotSupported.
	NoZero, NoDiscard bool
	// AskLocate makes Locate answer "ask me".
	AskLocate bool
}

// AllFlags are the limits of a memory node that does all itself.
var AllFlags = block.Limits{
	RequestAlignment: 1,
	MemAlignment:     1,
	WriteFlags:       block.FUA,
	ZeroFlags:        block.FUA | block.MayUnmap | block.NoFallback,
}

// MemoryConfig describes a writable memory node over s that can do everything.
func MemoryConfig(s *Store) *block.Config {
	return &block.Config{Driver: "memory", Unmap: true, Options: &MemoryOptions{Store: s, Limits: AllFlags}}
}

// Memory returns the driver "memory", a protocol. A request that breaks the
// contract of block.Instance fails the test.
func Memory(t TB) *block.Driver {
	return &block.Driver{
		Name:       "memory",
		Kind:       block.Protocol,
		NewOptions: func() any { return &MemoryOptions{Limits: AllFlags} },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			opts := o.Config.Options.(*MemoryOptions)
			if opts.Store == nil {
				return nil, fmt.Errorf("memory node '%s': no store given", o.NodeName)
			}
			return bare(newMemory(t, o, opts), opts.Bare), nil
		},
	}
}

func bare(i block.Instance, hide bool) block.Instance {
	if hide {
		return struct{ block.Instance }{i}
	}
	return i
}

// memory is the instance of a memory node, and the disk of a crash node.
type memory struct {
	t        TB
	node     *block.Node
	name     string
	store    *Store
	opts     MemoryOptions
	limits   block.Limits
	readOnly bool
}

func newMemory(t TB, o *block.Opening, opts *MemoryOptions) *memory {
	m := &memory{t: t, node: o.Node(), name: o.NodeName, store: opts.Store, opts: *opts, limits: opts.Limits, readOnly: o.Config.ReadOnly}
	m.limits.RequestAlignment = max(1, m.limits.RequestAlignment)
	m.limits.MemAlignment = max(1, m.limits.MemAlignment)
	return m
}

// end is the size rounded up to the request alignment.
func (m *memory) end() int64 {
	a := m.limits.RequestAlignment
	return (m.store.Size() + a - 1) / a * a
}

// broken reports a request that the seam must not have let through.
func (m *memory) broken(format string, args ...any) error {
	err := fmt.Errorf("node '%s': the seam broke the contract: %s", m.name, fmt.Sprintf(format, args...))
	m.t.Errorf("%v", err)
	return err
}

func (m *memory) check(op Op, off, n, most int64, grow bool) error {
	a := m.limits.RequestAlignment
	switch {
	case off < 0 || n <= 0:
		return m.broken("%s of %d bytes at %d", op, n, off)
	case (off%a != 0 || n%a != 0) && op != OpStatus && op != OpPrefetch:
		return m.broken("%s of %d bytes at %d is not aligned to %d", op, n, off, a)
	case most != 0 && n > most:
		return m.broken("%s of %d bytes, more than the limit of %d", op, n, most)
	case !grow && off+n > m.end():
		return m.broken("%s of %d bytes at %d is past the end at %d", op, n, off, m.end())
	case op == OpWrite || op == OpZero || op == OpDiscard:
		if m.readOnly {
			return m.broken("%s on a read-only node", op)
		}
	}
	return nil
}

func (m *memory) flags(op Op, got, can block.ReqFlags) error {
	if got&^can != 0 {
		return m.broken("%s with flags %#x, of which %#x are not supported", op, got, got&^can)
	}
	return nil
}

func (m *memory) ReadAt(_ context.Context, p []byte, off int64) error {
	if err := m.check(OpRead, off, int64(len(p)), m.limits.MaxTransfer, false); err != nil {
		return err
	}
	m.store.Read(p, off)
	return nil
}

// clip drops what an aligned request has past the exact size; whole requests past it grow the store.
func (m *memory) clip(off, n int64) int64 {
	if off+n <= m.end() {
		return min(n, m.store.Size()-off)
	}
	return n
}

func (m *memory) WriteAt(_ context.Context, p []byte, off int64, flags block.ReqFlags) error {
	if err := m.checkWrite(p, off, flags); err != nil {
		return err
	}
	m.store.Write(p[:m.clip(off, int64(len(p)))], off)
	return nil
}

func (m *memory) checkWrite(p []byte, off int64, flags block.ReqFlags) error {
	if err := m.check(OpWrite, off, int64(len(p)), m.limits.MaxTransfer, true); err != nil {
		return err
	}
	return m.flags(OpWrite, flags, m.limits.WriteFlags)
}

func (m *memory) WriteZeroes(_ context.Context, off, n int64, flags block.ReqFlags) error {
	if err := m.checkZero(off, n, flags); err != nil {
		return err
	}
	m.store.Zero(off, m.clip(off, n), flags&block.MayUnmap != 0)
	return nil
}

func (m *memory) checkZero(off, n int64, flags block.ReqFlags) error {
	if err := m.check(OpZero, off, n, m.limits.MaxZero, true); err != nil {
		return err
	}
	if err := m.flags(OpZero, flags, m.limits.ZeroFlags); err != nil {
		return err
	}
	if m.opts.NoZero {
		return block.ErrNotSupported
	}
	return nil
}

func (m *memory) Discard(_ context.Context, off, n int64) error {
	if err := m.checkDiscard(off, n); err != nil {
		return err
	}
	m.discard(m.store, off, m.clip(off, n))
	return nil
}

func (m *memory) checkDiscard(off, n int64) error {
	if err := m.check(OpDiscard, off, n, m.limits.MaxDiscard, false); err != nil {
		return err
	}
	if m.opts.NoDiscard {
		return block.ErrNotSupported
	}
	return nil
}

func (m *memory) discard(s *Store, off, n int64) {
	switch m.opts.Discard {
	case DiscardZeroes:
		s.Zero(off, n, true)
	case DiscardGarbage:
		p := make([]byte, n)
		for i := range p {
			p[i] = 0xdd
		}
		s.Write(p, off)
	}
}

func (m *memory) BlockStatus(_ context.Context, off, n int64, _ bool) (block.Extent, error) {
	if err := m.check(OpStatus, off, n, 0, false); err != nil {
		return block.Extent{}, err
	}
	size := m.store.Size()
	if off >= size { // the padded tail
		return block.Extent{Flags: block.StatusZero | block.StatusAllocated | block.StatusEOF, Length: n}, nil
	}
	allocated, length := m.store.Extent(off, n)
	e := block.Extent{Flags: block.StatusAllocated | block.StatusOffset, Length: length, Offset: off, File: m.node}
	if allocated {
		e.Flags |= block.StatusData
	} else {
		e.Flags |= block.StatusZero
	}
	if off+length == size {
		e.Flags |= block.StatusEOF
	}
	return e, nil
}

func (m *memory) Locate(_ block.Shard, off, n int64) block.Location {
	size := m.store.Size()
	if m.opts.AskLocate || off >= size {
		return block.Location{Kind: block.LocateAsk, Length: n}
	}
	n = min(n, size-off)
	allocated, length := m.store.Extent(off, n)
	if !allocated {
		return block.Location{Kind: block.LocateZero, Length: length}
	}
	return block.Location{Kind: block.LocateData, Stable: true, Length: length, Offset: off, File: storeFile{m.store}}
}

func (m *memory) Prefetch(_ context.Context, off, n int64) error {
	return m.check(OpPrefetch, off, n, 0, false)
}

func (m *memory) Truncate(_ context.Context, size int64) error {
	if size < 0 || m.readOnly {
		return m.broken("truncate to %d", size)
	}
	m.store.Truncate(size)
	return nil
}

func (m *memory) Flush(context.Context) error { return nil }
func (m *memory) Size() int64                 { return m.store.Size() }
func (m *memory) Limits() block.Limits        { return m.limits }
func (m *memory) Close(context.Context) error { return nil }

// PrepareReopen implements [block.Reopener].
func (m *memory) PrepareReopen(_ context.Context, r *block.Reopening) (block.Switch, error) {
	return &memorySwitch{m, m.readOnly, r.Config.ReadOnly}, nil
}

type memorySwitch struct {
	m        *memory
	old, new bool // read-only
}

func (s *memorySwitch) Apply(context.Context) error { s.m.readOnly = s.new; return nil }
func (s *memorySwitch) Commit()                     {}
func (s *memorySwitch) Abort()                      { s.m.readOnly = s.old }

// storeFile is a store as the file behind located data.
type storeFile struct{ s *Store }

func (f storeFile) ReadNowait(p []byte, off int64) int {
	n, _ := f.s.ReadAt(p, off)
	return n
}

func (f storeFile) Fd() int { return -1 }
