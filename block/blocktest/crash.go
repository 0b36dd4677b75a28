package blocktest

import (
	"context"
	"fmt"
	"iter"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"

	"github.com/nbdserve/nbdserve/block"
)

// A Log is a disk with a volatile write cache, and the record of what reached it.
// Each request has two moments, its start and its end, counted from 1 over all
// requests; [Log.Now] reads the count, so that a test can tell what came before
// what. All methods may be called in parallel.
type Log struct {
	disk *Store // as one sees it without a power cut

	mu      sync.Mutex
	base    *Store // at the beginning
	now     int64
	entries []Entry
}

// An Entry is a request that reached the disk.
type Entry struct {
	Op    Op // OpWrite, OpZero, OpDiscard, OpTruncate or OpFlush
	Off   int64
	Len   int64
	Data  []byte // of OpWrite
	FUA   bool
	Start int64
	End   int64 // 0: not ended yet
}

func (e Entry) String() string {
	fua := ""
	if e.FUA {
		fua = " fua"
	}
	return fmt.Sprintf("%d-%d %s%s [%#x+%#x]", e.Start, e.End, e.Op, fua, e.Off, e.Len)
}

// NewLog returns a log whose disk holds what base holds, all of it durable.
func NewLog(base *Store) *Log { return &Log{base: base.Clone(), disk: base.Clone()} }

// Now is the moment of the last start or end.
func (l *Log) Now() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now
}

// Mark makes a moment of its own, e.g. for the start or end of a request of the
// test, and returns it.
func (l *Log) Mark() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now++
	return l.now
}

// Entries returns the record so far, in the order of the starts.
func (l *Log) Entries() []Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]Entry(nil), l.entries...)
}

// Disk is the disk as it is without a power cut.
func (l *Log) Disk() *Store { return l.disk }

// do records a request and applies it. Its end is later than its start, so that a
// flush that begins between the two does not cover it.
func (l *Log) do(e Entry, apply func(*Store)) {
	l.mu.Lock()
	l.now++
	e.Start = l.now
	i := len(l.entries)
	l.entries = append(l.entries, e)
	apply(l.disk)
	l.mu.Unlock()
	runtime.Gosched()
	l.mu.Lock()
	l.now++
	l.entries[i].End = l.now
	l.mu.Unlock()
}

// apply puts the entry into s.
func (e *Entry) apply(s *Store) {
	switch e.Op {
	case OpWrite:
		s.Write(e.Data, e.Off)
	case OpZero:
		s.Zero(e.Off, e.Len, false)
	case OpDiscard:
		s.Zero(e.Off, e.Len, true)
	case OpTruncate:
		s.Truncate(e.Off)
	}
}

// tear puts some of the sectors of the entry into s.
func (e *Entry) tear(s *Store, rng *rand.Rand) {
	if e.Op == OpTruncate {
		e.apply(s)
		return
	}
	for at := e.Off; at < e.Off+e.Len; {
		end := min(at/SectorSize*SectorSize+SectorSize, e.Off+e.Len)
		if rng.IntN(2) == 0 {
			part := Entry{Op: e.Op, Off: at, Len: end - at}
			if e.Op == OpWrite {
				part.Data = e.Data[at-e.Off : end-e.Off]
			}
			part.apply(s)
		}
		at = end
	}
}

// A Plan says which states after a power cut are looked at.
type Plan struct {
	// From and To are the first and last moment of a cut; To 0: the last one there is.
	From, To int64
	// PerCut is how many states a cut gives at most: all that there are, if they are
	// fewer, else nothing pending lost, all lost, one lost, one kept, and random ones.
	PerCut int
	// Torn makes some of the states with writes torn at SectorSize.
	Torn bool
	Seed uint64
}

// A State is what a disk may hold after a power cut at a moment.
type State struct {
	Cut  int64
	Name string // which of the pending requests made it
	Disk *Store // for the caller to keep and change
}

// States goes through states in which a power cut may leave the disk, one cut
// after another. What a completed flush covers is there (it had ended before the
// flush started), and so are completed requests with FUA; of the rest that had
// started any part may be. The log must not grow meanwhile.
func (l *Log) States(p Plan) iter.Seq[State] {
	return func(yield func(State) bool) {
		w := newWindow(l.base.Clone(), l.Entries(), p.Seed)
		last := p.To
		if last == 0 {
			last = l.Now()
		}
		seen := -1
		for cut := max(p.From, 0); cut <= last; cut++ {
			w.advance(cut)
			if w.version == seen {
				continue // the same states as at the cut before
			}
			seen = w.version
			for s := range w.states(p) {
				if !yield(s) {
					return
				}
			}
		}
	}
}

// window is the part of a log that is not settled at a cut.
type window struct {
	settled *Store // with all entries before the pending ones
	entries []Entry
	next    int // first entry that has not started
	pending []pending
	flushes []*Entry // started and not ended
	flushed int64    // start of the last flush that has ended
	cut     int64
	version int // changes with the set of states
	rng     *rand.Rand
}

type pending struct {
	*Entry
	durable bool // but an earlier one is not
}

func newWindow(base *Store, entries []Entry, seed uint64) *window {
	return &window{settled: base, entries: entries, rng: rand.New(rand.NewPCG(seed, 1))}
}

func (e *Entry) ended(cut int64) bool { return e.End != 0 && e.End <= cut }

// advance moves the cut on.
func (w *window) advance(cut int64) {
	w.cut = cut
	for ; w.next < len(w.entries) && w.entries[w.next].Start <= cut; w.next++ {
		e := &w.entries[w.next]
		if e.Op == OpFlush {
			w.flushes = append(w.flushes, e)
			continue
		}
		w.pending = append(w.pending, pending{Entry: e})
		w.version++
	}
	w.flushes = slices.DeleteFunc(w.flushes, func(e *Entry) bool {
		if !e.ended(cut) {
			return false
		}
		w.flushed = max(w.flushed, e.Start)
		return true
	})
	for i := range w.pending {
		p := &w.pending[i]
		if !p.durable && p.ended(cut) && (p.FUA || p.End <= w.flushed) {
			p.durable = true
			w.version++
		}
	}
	for len(w.pending) > 0 && w.pending[0].durable {
		w.pending[0].apply(w.settled)
		w.pending = w.pending[1:]
	}
}

func (w *window) states(p Plan) iter.Seq[State] {
	return func(yield func(State) bool) {
		n := 0 // entries that may be lost
		for _, p := range w.pending {
			if !p.durable {
				n++
			}
		}
		emit := func(name string, keep func(i int) bool, torn bool) bool {
			return yield(State{Cut: w.cut, Name: fmt.Sprintf("%d pending, %s", n, name), Disk: w.build(keep, torn)})
		}
		all := func(int) bool { return true }
		if n < 16 && 1<<n <= p.PerCut || n == 0 {
			for set := range 1 << n {
				if !emit(fmt.Sprintf("kept %0*b", max(n, 1), set), func(i int) bool { return set&(1<<i) != 0 }, false) {
					return
				}
			}
			if p.Torn && n > 0 {
				emit("torn", all, true)
			}
			return
		}
		one := w.rng.IntN(n)
		fixed := []struct {
			name string
			keep func(i int) bool
		}{
			{"all kept", all},
			{"all lost", func(int) bool { return false }},
			{"last kept alone", func(i int) bool { return i == n-1 }},
			{fmt.Sprintf("#%d lost alone", one), func(i int) bool { return i != one }},
			{fmt.Sprintf("#%d kept alone", one), func(i int) bool { return i == one }},
		}
		for k := range max(1, p.PerCut) {
			ok := false
			if k < len(fixed) {
				ok = emit(fixed[k].name, fixed[k].keep, false)
			} else {
				torn := p.Torn && k%2 == 0
				ok = emit(fmt.Sprintf("random %d, torn %t", k, torn), func(int) bool { return w.rng.IntN(2) == 0 }, torn)
			}
			if !ok {
				return
			}
		}
	}
}

// build makes the disk with the entries, counted among those that may be lost, that keep chooses.
func (w *window) build(keep func(i int) bool, torn bool) *Store {
	s := w.settled.Clone()
	i := 0
	for _, p := range w.pending {
		switch {
		case p.durable:
			p.apply(s)
			continue
		case !keep(i):
		case torn:
			p.tear(s, w.rng)
		default:
			p.apply(s)
		}
		i++
	}
	return s
}

// CrashOptions configure a crash node.
type CrashOptions struct {
	Log    *Log
	Limits block.Limits
}

// CrashConfig describes a writable crash node that records in l.
func CrashConfig(l *Log) *block.Config {
	return &block.Config{Driver: "crash", Unmap: true, Options: &CrashOptions{Log: l, Limits: AllFlags}}
}

// CrashDriver returns the driver "crash", a protocol: a memory node whose writes,
// zeroes, discards, truncates and flushes are recorded in a [Log].
func CrashDriver(t TB) *block.Driver {
	return &block.Driver{
		Name:       "crash",
		Kind:       block.Protocol,
		NewOptions: func() any { return &CrashOptions{Limits: AllFlags} },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			opts := o.Config.Options.(*CrashOptions)
			if opts.Log == nil {
				return nil, fmt.Errorf("crash node '%s': no log given", o.NodeName)
			}
			m := newMemory(t, o, &MemoryOptions{Store: opts.Log.disk, Limits: opts.Limits})
			return &crash{m, opts.Log}, nil
		},
	}
}

type crash struct {
	*memory
	log *Log
}

func (c *crash) record(e Entry) { c.log.do(e, e.apply) }

func (c *crash) WriteAt(_ context.Context, p []byte, off int64, flags block.ReqFlags) error {
	if err := c.checkWrite(p, off, flags); err != nil {
		return err
	}
	data := append([]byte(nil), p[:c.clip(off, int64(len(p)))]...)
	c.record(Entry{Op: OpWrite, Off: off, Len: int64(len(data)), Data: data, FUA: flags&block.FUA != 0})
	return nil
}

func (c *crash) WriteZeroes(_ context.Context, off, n int64, flags block.ReqFlags) error {
	if err := c.checkZero(off, n, flags); err != nil {
		return err
	}
	op := OpZero
	if flags&block.MayUnmap != 0 {
		op = OpDiscard
	}
	c.record(Entry{Op: op, Off: off, Len: c.clip(off, n), FUA: flags&block.FUA != 0})
	return nil
}

func (c *crash) Discard(_ context.Context, off, n int64) error {
	if err := c.checkDiscard(off, n); err != nil {
		return err
	}
	c.record(Entry{Op: OpDiscard, Off: off, Len: c.clip(off, n)})
	return nil
}

func (c *crash) Truncate(_ context.Context, size int64) error {
	if size < 0 || c.readOnly {
		return c.broken("truncate to %d", size)
	}
	c.record(Entry{Op: OpTruncate, Off: size})
	return nil
}

func (c *crash) Flush(context.Context) error {
	c.record(Entry{Op: OpFlush})
	return nil
}
