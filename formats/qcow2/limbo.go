package qcow2

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/nbdserve/nbdserve/block"
)

const (
	// limboDelay is how long freed clusters wait for a flush of a client before the image flushes by itself.
	limboDelay = time.Second
	// limboFlush is how many freed bytes make it flush at once.
	limboFlush = 512 << 20
	// maxLimbo bounds the extents in limbo, and so their memory. Beyond it discards keep their clusters.
	maxLimbo = 1 << 20
)

// A limbo holds references to host clusters that the tables have given up. A
// cluster with its last reference in limbo may still be read or written by a
// request that looked it up before, and the tables on disk may still lead to it.
// So its refcount falls, its space is given back and it may be allocated again
// only when
//
//   - a round that began after the reference was given up has made that durable, and
//   - every request in flight then has ended.
//
// The first takes an extent from open to a batch of ready, for the second the
// reaper waits. All fields are guarded by image.mu.
type limbo struct {
	open     []extent
	waiting  int64      // references in open
	ready    [][]extent // never empty batches
	clusters int64      // references in open and ready
	extents  int
}

func (l *limbo) add(e extent) {
	l.clusters += e.n
	l.waiting += e.n
	if last := len(l.open) - 1; last >= 0 && l.open[last].end() == e.first {
		l.open[last].n += e.n
		return
	}
	l.open = append(l.open, e)
	l.extents++
}

func (l *limbo) takeOpen() []extent {
	open := l.open
	l.open, l.waiting = nil, 0
	return open
}

// putBack undoes takeOpen.
func (l *limbo) putBack(list []extent) {
	for _, e := range list {
		l.waiting += e.n
	}
	l.open = append(list, l.open...)
}

// free gives up a reference to each cluster of e. im.mu is held.
func (im *image) free(e extent) {
	im.file.Debug(block.EventClusterFree)
	if im.broken&ruleRemoveFirst != 0 {
		im.dropNow(e)
		return
	}
	im.limbo.add(e)
	im.wakeReaper()
}

// dropNow breaks ruleRemoveFirst for a test. im.mu is held.
func (im *image) dropNow(e extent) {
	for c := e.first; c < e.end(); c++ {
		one := extent{c, 1}
		if n, err := im.refs.get(context.Background(), c); err == nil && n > 0 && im.refs.set(context.Background(), one, n-1) == nil && n == 1 {
			im.refs.release(one)
		}
	}
}

// mayFree tells whether limbo has room for what a large discard frees. im.mu is held.
func (im *image) mayFree() bool { return im.limbo.extents < maxLimbo }

// nextBatch returns the oldest batch, nil if there is none. [image.reclaim] takes it off the list.
func (im *image) nextBatch() []extent {
	im.mu.Lock()
	defer im.mu.Unlock()
	if len(im.limbo.ready) == 0 {
		return nil
	}
	return im.limbo.ready[0]
}

// isNext tells whether batch is still the oldest.
func (im *image) isNext(batch []extent) bool {
	next := im.nextBatch()
	return next != nil && &next[0] == &batch[0]
}

// reclaim lowers the refcounts of the oldest batch, whose grace has passed.
// Clusters that are free then are discarded first, in runs as long as they come,
// and cannot be allocated before the discard is done. If it fails the rest leaks.
func (im *image) reclaim(ctx context.Context, batch []extent) error {
	defer func() {
		im.mu.Lock()
		defer im.mu.Unlock()
		im.limbo.ready = im.limbo.ready[1:]
		for _, e := range batch {
			im.limbo.clusters -= e.n
		}
		im.limbo.extents -= len(batch)
	}()
	todo := slices.Clone(batch)
	slices.SortFunc(todo, func(a, b extent) int { return cmp.Compare(a.first, b.first) })
	var hole extent // of clusters with one reference
	for _, e := range todo {
		for e.n > 0 {
			if hole.n > 0 && hole.end() != e.first {
				// The next extent may be about the same clusters: these come first.
				if err := im.punch(ctx, hole); err != nil {
					return err
				}
				hole = extent{}
			}
			n, count, err := im.sameRefcount(ctx, e)
			if err != nil {
				return err
			}
			run := extent{e.first, n}
			switch {
			case count == 0:
				im.log.Warn("qcow2: a cluster was freed whose refcount is 0", "node", im.node.Name(), "offset", e.first<<im.clusterBits)
			case count == 1 && hole.n == 0:
				hole = run
			case count == 1:
				hole.n += n
			default:
				if err := im.lower(ctx, run, count-1); err != nil {
					return err
				}
			}
			e.first, e.n = e.first+n, e.n-n
		}
	}
	return im.punch(ctx, hole)
}

// sameRefcount tells the refcount of the first cluster of e, and for how many of
// its clusters, inside one slice, it is the same.
func (im *image) sameRefcount(ctx context.Context, e extent) (n int64, count uint64, err error) {
	err = im.update(ctx, func() error {
		count, err = im.refs.get(ctx, e.first)
		if err != nil {
			return err
		}
		for n = 1; n < im.refs.inSlice(e.first, e.n); n++ {
			if c, err := im.refs.get(ctx, e.first+n); err != nil || c != count {
				return err
			}
		}
		return nil
	})
	return n, count, err
}

// punch gives clusters with one reference back to the file and lowers their refcounts.
func (im *image) punch(ctx context.Context, e extent) error {
	for _, g := range []*guard{im.fixed, im.tables} {
		if c := g.overlaps(e.first, e.n); c >= 0 {
			return im.corrupted(corrupt("Preventing invalid discard of metadata: host offset 0x%x was mapped to a guest cluster too", c<<im.clusterBits))
		}
	}
	off := e.first << im.clusterBits
	n := min(e.n<<im.clusterBits, im.file.Size()-off)
	if n > 0 {
		// A hint: what could not be given back is free nevertheless.
		if err := im.file.Discard(ctx, off, n); err != nil {
			im.log.Warn("qcow2: space could not be given back", "node", im.node.Name(), "error", err)
		}
	}
	for e.n > 0 {
		run := extent{e.first, im.refs.inSlice(e.first, e.n)}
		if err := im.lower(ctx, run, 0); err != nil {
			return err
		}
		e.first, e.n = run.end(), e.n-run.n
	}
	return nil
}

// lower sets the refcounts of clusters that lie in one slice.
func (im *image) lower(ctx context.Context, e extent, count uint64) error {
	return im.update(ctx, func() error {
		err := im.refs.set(ctx, e, count)
		if err == nil && count == 0 {
			im.refs.release(e)
		}
		return err
	})
}

// A reaper is the background work of a writable image: it empties limbo and writes
// metadata before the caches are full of changes.
type reaper struct {
	wake chan struct{}      // has room for one
	stop context.CancelFunc // ends waits
	done chan struct{}

	pauseMu sync.Mutex // guards paused and running
	changed sync.Cond
	paused  int
	running bool
	stopped bool
}

func (im *image) wakeReaper() {
	select {
	case im.reaper.wake <- struct{}{}:
	default:
	}
}

// startReaper starts the background work of a writable image.
func (im *image) startReaper() {
	if !im.writable {
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &im.reaper
	r.stop = stop
	r.pauseMu.Lock()
	r.stopped = false
	r.pauseMu.Unlock()
	r.done = make(chan struct{})
	go im.reap(ctx)
}

// stopReaper returns when the background work has ended for good.
func (im *image) stopReaper() {
	r := &im.reaper
	if r.stop == nil {
		return
	}
	r.stop()
	r.pauseMu.Lock()
	r.stopped = true
	r.changed.Broadcast()
	r.pauseMu.Unlock()
	<-r.done
	r.stop = nil
}

// DrainBegin implements [block.Quiescer].
func (im *image) DrainBegin() {
	r := &im.reaper
	r.pauseMu.Lock()
	defer r.pauseMu.Unlock()
	r.paused++
	for r.running {
		r.changed.Wait()
	}
}

// DrainEnd implements [block.Quiescer].
func (im *image) DrainEnd() {
	r := &im.reaper
	r.pauseMu.Lock()
	defer r.pauseMu.Unlock()
	r.paused--
	r.changed.Broadcast()
}

// work runs f, waiting while the reaper is paused. It does not if the reaper is stopped.
func (r *reaper) work(f func()) {
	r.pauseMu.Lock()
	for r.paused > 0 && !r.stopped {
		r.changed.Wait()
	}
	if r.stopped {
		r.pauseMu.Unlock()
		return
	}
	r.running = true
	r.pauseMu.Unlock()
	f()
	r.pauseMu.Lock()
	r.running = false
	r.changed.Broadcast()
	r.pauseMu.Unlock()
}

func (im *image) reap(ctx context.Context) {
	defer close(im.reaper.done)
	due := time.NewTimer(0)
	due.Stop()
	armed := false
	for {
		now := false
		select {
		case <-ctx.Done():
			return
		case <-im.reaper.wake:
		case <-due.C:
			armed, now = false, true
		}
		im.reaper.work(func() { armed = im.tidy(now, armed, due) })
		for b := im.nextBatch(); b != nil; b = im.nextBatch() {
			if im.broken&ruleLimbo == 0 && im.node.Grace().Wait(ctx) != nil || ctx.Err() != nil {
				return
			}
			im.reaper.work(func() {
				if !im.isNext(b) {
					return // it was reclaimed while this was paused
				}
				if err := im.reclaim(context.Background(), b); err != nil {
					im.log.Warn("qcow2: freed clusters leak", "node", im.node.Name(), "error", err)
				}
			})
		}
	}
}

// tidy writes metadata where it is time to, else arms the timer. It tells whether the timer is armed.
func (im *image) tidy(now, armed bool, due *time.Timer) bool {
	im.mu.Lock()
	open := im.limbo.waiting
	im.mu.Unlock()
	if open > 0 && (now || open<<im.clusterBits >= limboFlush) || im.dirty.Load() >= im.maxDirty/2 {
		if err := im.flushMetadata(context.Background()); err != nil {
			im.log.Warn("qcow2: metadata could not be written", "node", im.node.Name(), "error", err)
		}
		open = 0
	}
	if open > 0 && !armed {
		due.Reset(limboDelay)
		return true
	}
	return armed
}
