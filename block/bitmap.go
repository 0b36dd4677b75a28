package block

import (
	"context"
	"iter"
	"math/bits"
	"slices"
	"sync/atomic"
)

const (
	maxBitmapName = 1023 // bytes

	minGranularity     = 512
	maxGranularity     = 1 << 31
	defaultGranularity = 64 << 10
)

// A Bitmap is a dirty bitmap of a node (rule G29): it holds which parts of the node
// were changed while it was recording. It belongs to the node, whatever becomes of the
// graph around that, and is gone when the node is closed.
//
// Requests set bits when they have ended, whether they succeeded or not, and before
// they are answered. All methods may be called in parallel with requests.
type Bitmap struct {
	node        *Node
	name        string
	granularity int64 // bytes that a bit stands for
	shift       uint8 // its log2
	persistent  bool
	bits        atomic.Pointer[bitSet] // replaced only while the node is drained

	// Guarded by Graph.mu.
	disabled     bool
	busy         bool
	readOnly     bool
	inconsistent bool
}

// bitmapSet is what requests know of a node's bitmaps. It is not changed.
type bitmapSet struct {
	all       []*Bitmap // in the order of their creation
	recording []*Bitmap
	readOnly  *Bitmap // forbids changes; nil: none does
}

// publishBitmaps makes requests see the node's bitmaps as they are. Graph.mu is held.
func (n *Node) publishBitmaps(all []*Bitmap) {
	if len(all) == 0 {
		n.bitmaps.Store(nil)
		return
	}
	s := &bitmapSet{all: all}
	for _, b := range all {
		switch {
		case b.readOnly:
			s.readOnly = b
		case !b.disabled && !b.inconsistent:
			s.recording = append(s.recording, b)
		}
	}
	n.bitmaps.Store(s)
}

// refusal says why the node must not be changed.
func (s *bitmapSet) refusal() error {
	return refuse(ErrReadOnly, "bitmap '%s' of the node is read-only", s.readOnly.name)
}

// mark notes that [off, off+length) was changed.
func (s *bitmapSet) mark(n *Node, off, length int64) {
	end := min(off+length, n.inst.Size())
	if off >= end {
		return
	}
	for _, b := range s.recording {
		b.bits.Load().set(off>>b.shift, (end-1)>>b.shift+1)
	}
}

// resized forgets what was dirty past the new end.
func (s *bitmapSet) resized(size int64) {
	for _, b := range s.all {
		b.bits.Load().cut(b.bitsOf(size))
	}
}

// bitsOf is the number of bits for size bytes.
func (b *Bitmap) bitsOf(size int64) int64 { return (size + b.granularity - 1) >> b.shift }

// Name is unique among the bitmaps of the node.
func (b *Bitmap) Name() string { return b.name }

// Node is the node that the bitmap belongs to.
func (b *Bitmap) Node() *Node { return b.node }

// Granularity is how many bytes are noted as one, a power of two of 512 or more.
func (b *Bitmap) Granularity() int64 { return b.granularity }

// Persistent tells whether the bitmap is to be stored in the image.
func (b *Bitmap) Persistent() bool { return b.persistent }

// Count is the number of dirty bytes, a multiple of the granularity.
func (b *Bitmap) Count() int64 { return b.bits.Load().count(b.bitsOf(b.node.Size())) << b.shift }

// Extent tells whether the bytes from off on are dirty, and for how many of length
// bytes that holds. The range lies inside the node and is not empty.
func (b *Bitmap) Extent(off, length int64) (dirty bool, n int64) {
	s := b.bits.Load()
	first, end := off>>b.shift, b.bitsOf(off+length)
	dirty = s.next(first, first+1, true) == first
	next := s.next(first+1, end, !dirty)
	return dirty, min(next<<b.shift-off, length)
}

// Dirty goes through the dirty ranges between off and end, offsets and lengths in
// bytes, neighbours joined. Ends that are no multiple of the granularity cut a range.
func (b *Bitmap) Dirty(off, end int64) iter.Seq2[int64, int64] {
	return func(yield func(off, length int64) bool) {
		s := b.bits.Load()
		end = min(end, b.node.Size())
		last := b.bitsOf(end)
		for first := off >> b.shift; ; {
			first = s.next(first, last, true)
			if first >= last {
				return
			}
			stop := s.next(first, last, false)
			from := max(off, first<<b.shift)
			if !yield(from, min(end, stop<<b.shift)-from) {
				return
			}
			first = stop
		}
	}
}

// BitmapInfo describes a bitmap, by the names of QEMU.
type BitmapInfo struct {
	Name         string `json:"name"`
	Count        int64  `json:"count"`       // dirty bytes
	Granularity  int64  `json:"granularity"` // bytes
	Recording    bool   `json:"recording"`
	Busy         bool   `json:"busy"`
	Persistent   bool   `json:"persistent"`
	Inconsistent bool   `json:"inconsistent,omitempty"`
}

// Info describes the bitmap as it is now.
func (b *Bitmap) Info() BitmapInfo {
	b.node.graph.mu.Lock()
	defer b.node.graph.mu.Unlock()
	return b.info()
}

// info is Info. Graph.mu is held.
func (b *Bitmap) info() BitmapInfo {
	return BitmapInfo{
		Name: b.name, Count: b.Count(), Granularity: b.granularity, Recording: !b.disabled && !b.broken(),
		Busy: b.busy, Persistent: b.persistent, Inconsistent: b.broken(),
	}
}

// broken tells that the bitmap lacks changes. Graph.mu is held.
func (b *Bitmap) broken() bool { return b.inconsistent || b.bits.Load().full.Load() }

// usable returns an error if the bitmap is in use or inconsistent. Graph.mu is held.
func (b *Bitmap) usable() error {
	if b.busy {
		return refuse(ErrBusy, "Bitmap '%s' is currently in use by another operation and cannot be used", b.name)
	}
	if b.broken() {
		return refuse(ErrInvalid, "Bitmap '%s' is inconsistent and cannot be used; try removing it", b.name)
	}
	return nil
}

// changeable returns an error if the bits must not be changed. Graph.mu is held.
func (b *Bitmap) changeable() error {
	if b.busy {
		return b.usable()
	}
	if b.readOnly {
		return refuse(ErrReadOnly, "Bitmap '%s' is readonly and cannot be modified", b.name)
	}
	return b.usable()
}

// Use keeps the bitmap from being changed or removed, but by requests, until done is
// called, once: for an export or a job that reads it. There can be one such user.
func (b *Bitmap) Use() (done func(), err error) {
	g := b.node.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := b.usable(); err != nil {
		return nil, err
	}
	b.busy = true
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		b.busy = false
	}, nil
}

// Bitmaps lists the bitmaps of the node in the order of their creation.
func (n *Node) Bitmaps() []*Bitmap {
	if s := n.bitmaps.Load(); s != nil {
		return slices.Clone(s.all)
	}
	return nil
}

// Bitmap finds a bitmap of the node by name.
func (n *Node) Bitmap(name string) (*Bitmap, error) {
	if b := n.findBitmap(name); b != nil {
		return b, nil
	}
	return nil, refuse(ErrInvalid, "Dirty bitmap '%s' not found", name)
}

func (n *Node) findBitmap(name string) *Bitmap {
	for _, b := range n.Bitmaps() {
		if b.name == name {
			return b
		}
	}
	return nil
}

// FindBitmap finds the bitmap of that name that is nearest down n's backing chain,
// filters included.
func (n *Node) FindBitmap(name string) (*Bitmap, error) {
	for _, l := range n.Chain() {
		if b := l.findBitmap(name); b != nil {
			return b, nil
		}
	}
	return nil, refuse(ErrInvalid, "Bitmap '%s' is not found", name)
}

// BitmapOptions describe a new bitmap. The zero value of each field but Name is the default.
type BitmapOptions struct {
	Name        string // 1 to 1023 bytes
	Granularity int64  // bytes, a power of two from 512 to 2 GiB; default: the cluster size, but 4 KiB to 64 KiB, or else 64 KiB
	Disabled    bool   // not recording
	Persistent  bool   // stored in the image; see [BitmapStorer]
	// ReadOnly and Inconsistent are for bitmaps that were read from an image: one that
	// cannot be changed there, which forbids all changes of the node, and one that lacks changes.
	ReadOnly, Inconsistent bool
}

// A BitmapChange is a step of [Graph.ChangeBitmaps].
type BitmapChange struct {
	nodes []*Node
	// edit leaves bits for t's commit, so that there is nothing to undo with them.
	edit func(t *tx) error
}

// ChangeBitmaps does the steps at one moment, while their nodes are drained: no
// request is in flight, and each falls before all the steps or after them. They are a
// transaction: if one fails, none is done. ctx bounds the wait for the drain.
func (g *Graph) ChangeBitmaps(ctx context.Context, steps ...BitmapChange) error {
	var nodes []*Node
	for _, s := range steps {
		for _, n := range s.nodes {
			if !slices.Contains(nodes, n) {
				nodes = append(nodes, n)
			}
		}
	}
	return g.reshape(ctx, func(t *tx) error {
		t.touch(nodes...)
		for _, s := range steps {
			if err := s.edit(t); err != nil {
				return err
			}
		}
		return nil
	}, nodes...)
}

// AddBitmap makes a clean bitmap of n.
func AddBitmap(n *Node, o BitmapOptions) BitmapChange {
	return BitmapChange{[]*Node{n}, func(t *tx) error {
		b, err := n.newBitmap(o)
		if err != nil {
			return err
		}
		t.setBitmaps(n, append(n.Bitmaps(), b))
		return nil
	}}
}

func (n *Node) newBitmap(o BitmapOptions) (*Bitmap, error) {
	if o.Granularity == 0 {
		o.Granularity = n.defaultGranularity()
	}
	switch g := o.Granularity; {
	case o.Name == "":
		return nil, refuse(ErrInvalid, "Bitmap name cannot be empty")
	case g < minGranularity || g&(g-1) != 0:
		return nil, refuse(ErrInvalid, "Granularity must be power of 2 and at least %d", minGranularity)
	case g > maxGranularity:
		return nil, refuse(ErrInvalid, "Granularity must be at most %d", int64(maxGranularity))
	case n.findBitmap(o.Name) != nil:
		return nil, refuse(ErrInvalid, "Bitmap already exists: %s", o.Name)
	case len(o.Name) > maxBitmapName:
		return nil, refuse(ErrInvalid, "Bitmap name too long: %s", o.Name)
	}
	if o.Persistent {
		s, ok := n.inst.(BitmapStorer)
		if !ok {
			return nil, refuse(ErrNotSupported, "Can't store persistent bitmaps to %s", n.name)
		}
		if err := s.CanStoreBitmap(o.Name, o.Granularity); err != nil {
			return nil, refuse(err, "Can't make bitmap '%s' persistent in '%s': %v", o.Name, n.name, err)
		}
	}
	b := &Bitmap{node: n, name: o.Name, granularity: o.Granularity, shift: uint8(bits.TrailingZeros64(uint64(o.Granularity))),
		persistent: o.Persistent, disabled: o.Disabled, readOnly: o.ReadOnly, inconsistent: o.Inconsistent}
	if need := (b.bitsOf(n.Size()) + 7) / 8; need > maxBitmapMemory {
		return nil, refuse(ErrNoSpace, "Bitmap '%s' would take up to %d bytes of memory, at most %d are allowed; choose a larger granularity than %d",
			b.name, need, maxBitmapMemory, b.granularity)
	}
	b.bits.Store(new(bitSet))
	return b, nil
}

func (n *Node) defaultGranularity() int64 {
	if c := n.info().ClusterSize; c > 0 {
		return min(max(c, 4096), defaultGranularity)
	}
	return defaultGranularity
}

// setBitmaps makes all the bitmaps of n.
func (t *tx) setBitmaps(n *Node, all []*Bitmap) {
	before := n.bitmaps.Load()
	t.onAbort(func() { n.bitmaps.Store(before) })
	n.publishBitmaps(all)
}

// bitmapStep makes a step that concerns the bitmap of n called name.
func bitmapStep(n *Node, name string, edit func(t *tx, b *Bitmap) error) BitmapChange {
	return BitmapChange{[]*Node{n}, func(t *tx) error {
		b, err := n.Bitmap(name)
		if err != nil {
			return err
		}
		return edit(t, b)
	}}
}

// RemoveBitmap takes a bitmap away. One that is inconsistent can be removed.
func RemoveBitmap(n *Node, name string) BitmapChange {
	return bitmapStep(n, name, func(t *tx, b *Bitmap) error {
		if err := b.changeable(); err != nil && (b.busy || b.readOnly) {
			return err
		}
		t.setBitmaps(n, slices.DeleteFunc(n.Bitmaps(), func(o *Bitmap) bool { return o == b }))
		return nil
	})
}

// ClearBitmap makes a bitmap clean.
func ClearBitmap(n *Node, name string) BitmapChange {
	return bitmapStep(n, name, func(t *tx, b *Bitmap) error {
		t.onCommit(func() { b.bits.Store(new(bitSet)) })
		return b.changeable()
	})
}

// EnableBitmap makes a bitmap record.
func EnableBitmap(n *Node, name string) BitmapChange { return enable(n, name, true) }

// DisableBitmap freezes a bitmap.
func DisableBitmap(n *Node, name string) BitmapChange { return enable(n, name, false) }

func enable(n *Node, name string, on bool) BitmapChange {
	return bitmapStep(n, name, func(t *tx, b *Bitmap) error {
		if err := b.usable(); err != nil {
			return err
		}
		disabled := b.disabled
		t.onAbort(func() { b.disabled = disabled })
		b.disabled = !on
		t.setBitmaps(n, n.Bitmaps())
		return nil
	})
}

// A BitmapSource names a bitmap.
type BitmapSource struct {
	Node *Node
	Name string
}

// MergeBitmaps adds to the target, a bitmap of n, what is dirty in the sources, which
// may have other granularities and be of other nodes of the same size.
func MergeBitmaps(n *Node, target string, sources ...BitmapSource) BitmapChange {
	step := bitmapStep(n, target, func(t *tx, b *Bitmap) error {
		if err := b.changeable(); err != nil {
			return err
		}
		for _, s := range sources {
			src, err := s.Node.Bitmap(s.Name)
			if err != nil {
				return err
			}
			if err := src.usable(); err != nil {
				return err
			}
			if have, want := src.node.Size(), n.Size(); have != want {
				return refuse(ErrInvalid, "Bitmaps are of different sizes (destination size is %d, source size is %d) and can't be merged", want, have)
			}
			t.onCommit(func() { b.merge(src) })
		}
		return nil
	})
	for _, s := range sources {
		step.nodes = append(step.nodes, s.Node)
	}
	return step
}

// merge adds what is dirty in src, of a node of the same size.
func (b *Bitmap) merge(src *Bitmap) {
	to := b.bits.Load()
	if b.shift == src.shift {
		to.add(src.bits.Load())
		return
	}
	for off, length := range src.Dirty(0, src.node.Size()) {
		to.set(off>>b.shift, b.bitsOf(off+length))
	}
}
