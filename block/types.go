package block

import (
	"context"
	"time"
)

// ReqFlags modify a write-like request.
type ReqFlags uint8

const (
	// FUA asks that the data, and the metadata needed to find it, be on stable storage before the call returns.
	FUA ReqFlags = 1 << iota
	// MayUnmap lets WriteZeroes deallocate the range instead of writing it.
	MayUnmap
	// NoFallback makes WriteZeroes fail at once with [ErrNotSupported] where zeroing
	// is not faster than writing (NBD_CMD_FLAG_FAST_ZERO). Nothing is changed then.
	NoFallback
	// WriteUnchanged says that the data equals what the range reads as already
	// (copy-on-read), so that the permission of that name is enough.
	WriteUnchanged
)

// Limits are a node's abilities and constraints. They are computed from the
// children's when a node is opened, and again after a reopen; plain data.
//
// All sizes are bytes. Alignments are powers of two.
type Limits struct {
	// RequestAlignment: offsets and lengths that reach the Instance are multiples of
	// it; the seam pads and serialises what is not. 1 to 65536. If the node's size is
	// no multiple, requests may reach up to the next multiple: what is past the size
	// reads as zero and is dropped on write.
	RequestAlignment int64
	// MemAlignment is the alignment of buffers that the driver takes without a bounce buffer.
	MemAlignment int64
	// PreferredTransfer is the granularity of efficient I/O (cluster or physical block). 0: unknown.
	PreferredTransfer int64
	// MaxTransfer bounds one read or write; the seam splits. 0: no limit.
	MaxTransfer int64
	// MaxZero and MaxDiscard bound one such request; the seam splits. 0: no limit.
	MaxZero, MaxDiscard int64
	// DiscardAlignment is the granularity at which discards have an effect. Smaller parts are ignored. 0: 1.
	DiscardAlignment int64
	// ZeroAlignment is the granularity at which WriteZeroes is efficient. 0: 1.
	ZeroAlignment int64
	// WriteFlags and ZeroFlags are the flags that the Instance honours itself; the
	// seam emulates FUA by a flush, ignores MayUnmap, and answers NoFallback with
	// ErrNotSupported where they are missing.
	WriteFlags, ZeroFlags ReqFlags
	// LogicalBlockSize and PhysicalBlockSize describe the device below. 0: unknown (a plain file).
	LogicalBlockSize, PhysicalBlockSize int64
	// Rotational tells that the device below is a spinning disk.
	Rotational bool
}

// An Instance is an opened driver: what lies below a node's seam.
//
// All methods except Close may be called in parallel. Buffers belong to the
// caller again when the call returns; an Instance must not keep them. Transfers
// are all or nothing: a nil error means that every byte was transferred. The
// context is never cancelled under a request: a request that was admitted
// finishes.
type Instance interface {
	// ReadAt fills p from byte off on. The range is inside the size (rounded up to RequestAlignment).
	ReadAt(ctx context.Context, p []byte, off int64) error
	// WriteAt stores p at byte off. It must not modify p. Only flags in Limits.WriteFlags arrive.
	// A range past the size arrives only from parents with [PermResize], and grows the node.
	WriteAt(ctx context.Context, p []byte, off int64, flags ReqFlags) error
	// Flush makes every write that has returned before the call durable.
	Flush(ctx context.Context) error
	// Size is the length in bytes, exact. It must be cheap and not block.
	Size() int64
	// Limits must be cheap; the values change only during open and reopen.
	Limits() Limits
	// Close releases what the Instance holds. It is called once, with nothing in
	// flight, before the edges to the children are detached, so it may still write.
	Close(ctx context.Context) error
}

// A Zeroer can zero a range without being sent the zeroes.
type Zeroer interface {
	// WriteZeroes makes [off, off+n) read as zero. Only flags in Limits.ZeroFlags arrive.
	// It returns ErrNotSupported, having changed nothing, where it cannot; the seam
	// then writes zeroes, unless NoFallback was given. Without MayUnmap the range is
	// provisioned afterwards: later writes to it do not run out of space.
	WriteZeroes(ctx context.Context, off, n int64, flags ReqFlags) error
}

// A Discarder can drop the contents of a range. What the range reads as afterwards is up to the driver.
type Discarder interface {
	// Discard is a hint; ErrNotSupported is ignored by the seam. It never touches bytes outside the range.
	Discard(ctx context.Context, off, n int64) error
}

// StatusFlags describe an extent.
type StatusFlags uint8

const (
	// StatusData: space is taken up, so that writing does not run out of it. Without
	// it and without StatusZero the contents are unknown.
	StatusData StatusFlags = 1 << iota
	// StatusZero: the extent reads as zero.
	StatusZero
	// StatusAllocated: this layer decides the contents; without it a COW child does.
	StatusAllocated
	// StatusOffset: Extent.File and Extent.Offset say where the data is stored plainly.
	StatusOffset
	// StatusCompressed: the data is stored compressed.
	StatusCompressed
	// StatusEOF: the extent ends at the end of the node.
	StatusEOF
)

// An Extent is a range of equal status.
type Extent struct {
	Flags  StatusFlags
	Length int64 // bytes from the requested offset, 1 to the requested length
	Offset int64 // with StatusOffset: offset in File
	File   *Node // with StatusOffset: node that stores the data
	Depth  int   // layer that decides, 0 the node asked, 1 its backing node, ...
}

// A StatusReporter knows about holes or unallocated ranges.
type StatusReporter interface {
	// BlockStatus tells the status at off, and for how many bytes it holds, at most
	// n. Precise asks for zero detection even where it costs; without it "data" is a
	// good answer. A driver with a COW child answers for its own layer only: an
	// extent without StatusAllocated is looked up in that child by the seam.
	BlockStatus(ctx context.Context, off, n int64, precise bool) (Extent, error)
}

// LocationKind says what a [Location] is.
type LocationKind uint8

const (
	LocateAsk  LocationKind = iota // not known without waiting: use ReadAt
	LocateZero                     // reads as zero
	LocateData                     // at Offset in File
)

// A Location answers "where do these bytes lie?" for reading, so that an export
// can serve them without passing a buffer through the graph. It is valid until
// the request at whose root it was asked has ended.
type Location struct {
	Kind   LocationKind
	Stable bool  // LocateData: a guest offset has this host offset for ever (raw), so sendfile is safe
	Depth  int32 // layer that decides, as of [Extent]; at least 1 where it is not the node asked
	Length int64 // bytes from the asked offset that the answer holds for, 1 to the asked length
	Offset int64 // LocateData: byte offset in File
	File   HostFile
}

// A HostFile is the file or device behind located data.
type HostFile interface {
	// ReadNowait reads into p what can be read without waiting for a device, and
	// returns the number of bytes. Fewer than len(p) bytes, 0 included, mean: use
	// ReadAt of the root for the rest; it is no error. Errors met are left for ReadAt to report.
	ReadNowait(p []byte, off int64) int
	// Fd is the file descriptor for sendfile(2), or -1 where that must not be used.
	Fd() int
}

// A Locator can tell where data lies.
type Locator interface {
	// Locate answers for a range inside the size, from memory, without waiting. Shard
	// is for sharded counters.
	Locate(shard Shard, off, n int64) Location
}

// A Prefetcher can make a range resident in memory (NBD_CMD_CACHE). It is a hint.
type Prefetcher interface {
	Prefetch(ctx context.Context, off, n int64) error
}

// A Truncater can change its size.
type Truncater interface {
	// Truncate sets the size in bytes. Growth reads as zero. Only parents with PermResize ask.
	Truncate(ctx context.Context, size int64) error
}

// A Refresher can look whether what it stores in has changed its size by itself.
type Refresher interface {
	// Refresh reads the size again, for Size to tell. It is called with nothing in flight.
	Refresh(ctx context.Context) error
}

// A Permitter is told of the permissions that its parents hold in sum, and may
// refuse (file locks). A CheckPerm that agreed is followed by exactly one SetPerm or
// AbortPerm, with no other call between them. They are called without locks of the
// graph and may wait; they must not change the graph.
type Permitter interface {
	CheckPerm(perm, shared Perm) error // may take locks; an error vetoes the transaction
	SetPerm(perm, shared Perm)         // commits; must not fail; drops locks that are no longer needed
	AbortPerm()                        // back to what held before CheckPerm
}

// A Quiescer works on its own account (background tasks) and can pause. The calls
// alternate. A node is not closed between the two.
type Quiescer interface {
	DrainBegin() // stop starting background work, let go what waits here; return when no background work is running
	DrainEnd()
}

// An Inspector describes itself for people and tools ("image info").
type Inspector interface {
	// Inspect returns a plain struct with json tags, named as qemu-img info's format-specific data.
	Inspect() any
}

// A Measurer publishes figures for the metrics endpoint.
type Measurer interface {
	// Measurements is called at a scrape, in parallel with requests.
	Measurements() []Measurement
}

// A Measurement is one figure of a node.
type Measurement struct {
	Name    string // suffix of the metric, e.g. "l2_cache_hits_total"; a counter iff it ends in _total
	Help    string
	Value   float64
	Counter bool
}

// A Waiter tells what a node's slow requests wait for; it is used in logs of old requests.
type Waiter interface {
	// OldestWait names the oldest system call in flight of this node and its age; ok is false for none.
	OldestWait() (what string, age time.Duration, ok bool)
}

// A BackingChanger keeps the name of its backing file in its header.
type BackingChanger interface {
	// BackingFile is what the header says: a file name and the name of its format, "" for none.
	BackingFile() (name, format string)
	// ChangeBackingFile rewrites the header, durably. The graph stays as it is. It
	// fails with ErrNoSpace where the name does not fit, with ErrReadOnly on a node that
	// cannot be written, and changes nothing then. It is called with nothing in flight.
	ChangeBackingFile(ctx context.Context, name, format string) error
}

// A ChildAdder takes any number of children of one kind (quorum). Its methods are
// called with the graph's lock held and nothing in flight; they must not use the graph.
type ChildAdder interface {
	// NewChild says as what another child would be taken. It may be asked in vain.
	NewChild(child *Node) (name string, role Role, err error)
	// MayRemove returns an error that says why e must stay.
	MayRemove(e *Edge) error
	// ChildrenChanged is called after a child was added or removed. The list is the driver's.
	ChildrenChanged(children []*Edge)
}

// A Named protocol node has a file name that opens it again.
type Named interface {
	// Filename is a plain file name.
	Filename() string
}
