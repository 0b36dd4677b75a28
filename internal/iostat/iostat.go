// Package iostat counts the requests of exports: how many are in flight, how many
// ended and how, their bytes and durations. Each connection has its own [Conn] in
// its own cache lines, so that connections share nothing on the hot path;
// [Export.Snapshot] sums them up.
package iostat

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"time"
)

// Op is the kind of a request.
type Op uint8

const (
	Read Op = iota
	Write
	Flush
	Trim
	Cache
	WriteZeroes
	BlockStatus
	NumOps
)

var opNames = [NumOps]string{"read", "write", "flush", "trim", "cache", "write_zeroes", "block_status"}

func (o Op) String() string { return opNames[o] }

// NumBuckets is the number of buckets of a duration histogram. Bucket i counts
// durations of at most [BucketBound](i); the last one counts all.
const NumBuckets = 24

// BucketBound is the inclusive upper bound of bucket i: 1 µs doubled i times. The last bucket has none.
func BucketBound(i int) time.Duration { return time.Microsecond << i }

func bucket(d time.Duration) int {
	if d <= time.Microsecond {
		return 0
	}
	b := bits.Len64(uint64((d - 1) / time.Microsecond))
	return min(b, NumBuckets-1)
}

// opCell holds the figures of one op on one connection.
type opCell struct {
	started, ok, failed, bytes, nanos atomic.Int64
	buckets                           [NumBuckets]atomic.Int64
}

// NumPlaces is how many running requests of a connection are tracked with their start.
const NumPlaces = 64

type place struct {
	start  atomic.Int64 // ns since 1970; 0: free
	detail atomic.Uint64
	length atomic.Int64
}

// A Conn counts for one connection. Its methods may be called in parallel and do not allocate.
type Conn struct {
	_      [64]byte
	ops    [NumOps]opCell
	places [NumPlaces]place
	_      [64]byte
}

// Start counts n requests of op as in flight.
func (c *Conn) Start(op Op, n int64) { c.ops[op].started.Add(n) }

// Finish counts one request that was started as ended after d, having moved n bytes.
func (c *Conn) Finish(op Op, ok bool, n int64, d time.Duration) {
	o := &c.ops[op]
	o.bytes.Add(n)
	o.nanos.Add(int64(d))
	o.buckets[bucket(d)].Add(1)
	if ok {
		o.ok.Add(1)
	} else {
		o.failed.Add(1)
	}
}

// FinishInline counts k successful requests of op that were begun and ended in
// one go, each after d, having moved n bytes in all; Start is not called for them.
func (c *Conn) FinishInline(op Op, k, n int64, d time.Duration) {
	o := &c.ops[op]
	o.started.Add(k)
	o.bytes.Add(n)
	o.nanos.Add(k * int64(d))
	o.buckets[bucket(d)].Add(k)
	o.ok.Add(k)
}

// Track notes that a request of op on n bytes at off runs since start, in ns since
// 1970, for the age of the oldest one and for logs. Each of the places 0 to NumPlaces-1
// belongs to one caller at a time and holds one request.
func (c *Conn) Track(i int, op Op, off, n, start int64) {
	p := &c.places[i]
	p.length.Store(n)
	p.detail.Store(uint64(off)<<4 | uint64(op))
	p.start.Store(start)
}

// Untrack frees a place.
func (c *Conn) Untrack(i int) { c.places[i].start.Store(0) }

// slow appends the tracked requests to list.
func (c *Conn) slow(list []Slow) []Slow {
	for i := range c.places {
		p := &c.places[i]
		ns := p.start.Load()
		d, n := p.detail.Load(), p.length.Load()
		// The place may have been given to another request between the two.
		if ns != 0 && p.start.Load() == ns {
			list = append(list, Slow{Op: Op(d & 15), Off: int64(d >> 4), Length: n, Since: time.Unix(0, ns)})
		}
	}
	return list
}

// A Slow request is one that has been in flight for a while.
type Slow struct {
	Op     Op
	Off    int64 // bytes
	Length int64 // bytes
	Since  time.Time
}

// OpFigures are the sums of one op.
type OpFigures struct {
	InFlight, OK, Failed, Bytes int64
	Duration                    time.Duration // sum
	Buckets                     [NumBuckets]int64
}

func (f *OpFigures) add(o *opCell) {
	// What started and what ended must be of one moment: requests that end between
	// the two loads would count as in flight, or as ended before they began.
	var started, ok, failed int64
	for range 8 { // requests that end all the time leave it at a good guess
		before := o.ok.Load() + o.failed.Load()
		started = o.started.Load()
		ok, failed = o.ok.Load(), o.failed.Load()
		if ok+failed == before {
			break
		}
	}
	f.InFlight += max(0, started-ok-failed)
	f.OK += ok
	f.Failed += failed
	f.Bytes += o.bytes.Load()
	f.Duration += time.Duration(o.nanos.Load())
	for i := range o.buckets {
		f.Buckets[i] += o.buckets[i].Load()
	}
}

// A Snapshot is the state of an export at one moment.
type Snapshot struct {
	Connections int
	Ops         [NumOps]OpFigures
	Slow        []Slow // requests tracked now, in no order
}

// Oldest tells the age of the oldest tracked request at now, 0 for none.
func (s *Snapshot) Oldest(now time.Time) time.Duration {
	var d time.Duration
	for _, r := range s.Slow {
		d = max(d, now.Sub(r.Since))
	}
	return d
}

// An Export sums up its connections. The zero value is ready.
type Export struct {
	mu    sync.Mutex
	conns map[*Conn]struct{}
	past  [NumOps]OpFigures // of connections that are gone
}

// NewConn adds a connection.
func (e *Export) NewConn() *Conn {
	c := new(Conn)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.conns == nil {
		e.conns = make(map[*Conn]struct{})
	}
	e.conns[c] = struct{}{}
	return c
}

// Remove takes a connection out once its requests have ended; its figures stay in the sums.
func (e *Export) Remove(c *Conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.conns, c)
	for op := range e.past {
		e.past[op].add(&c.ops[op])
	}
}

// Snapshot sums up. It may be called in parallel with requests.
func (e *Export) Snapshot() Snapshot {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := Snapshot{Connections: len(e.conns), Ops: e.past}
	for c := range e.conns {
		for op := range s.Ops {
			s.Ops[op].add(&c.ops[op])
		}
		s.Slow = c.slow(s.Slow)
	}
	return s
}

// Slow lists the tracked requests of all connections. It may be called in parallel with requests.
func (e *Export) Slow() []Slow {
	e.mu.Lock()
	defer e.mu.Unlock()
	var list []Slow
	for c := range e.conns {
		list = c.slow(list)
	}
	return list
}
