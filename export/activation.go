package export

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/internal/iostat"
)

// Activation says when the nodes of an export are active: locked, and with their caches.
type Activation uint8

const (
	// ActivationAlways: from AddExport to Shutdown.
	ActivationAlways Activation = iota
	// ActivationOnConnect: from the option by which a client selects the export until
	// the last client has left. Meanwhile other processes may use the image.
	ActivationOnConnect
)

func (a Activation) String() string { return [...]string{"always", "on-connect"}[a] }

// A tree is the nodes that are activated and inactivated together.
type tree interface {
	active() bool
	activate(ctx context.Context) error // what fails leaves it inactive
	// inactivate waits for what is in flight. What fails leaves it active.
	inactivate(ctx context.Context) error
}

// phase is the state of a life.
type phase uint8

const (
	inactive phase = iota
	activating
	active
	inactivating
)

// A life is that of a tree: its nodes are active while somebody holds a lease. One
// goroutine, the owner, changes the phase:
//
//	           somebody wants a lease
//	inactive ─────────────────────────> activating ──────> active
//	    ^ ^                                 │ failed        │ ^ failed; later again
//	    │ └─────────────────────────────────┘               v │
//	    └──────────────────────────────────────────── inactivating
//	                                             no lease for the linger time
//
// All exports of a node share its life. One that is always active holds a lease itself,
// and the tree is not inactivated before there is one that is not.
type life struct {
	tree tree
	log  *slog.Logger
	ctx  context.Context // of activations and inactivations; ends when Shutdown can wait no longer

	wake  chan struct{} // capacity 1: the owner shall look at what has changed
	ended chan struct{} // closed when the owner has ended

	mu      sync.Mutex // guards what follows
	phase   phase
	leases  int
	rests   bool          // without leases it is inactivated
	waiting []chan error  // want a lease; each has room for the answer
	due     time.Time     // without leases: when to inactivate
	backoff time.Duration // after the last failure to do so; 0: it did not fail since there was a lease
	ending  bool
	stat    iostat.Activity
}

const (
	// firstBackoff is the time after which inactivation is tried again, doubled each time up to lastBackoff.
	firstBackoff = time.Second
	lastBackoff  = time.Minute
)

// newLife starts the owner. It ends after stop.
func newLife(ctx context.Context, t tree, log *slog.Logger) *life {
	l := &life{tree: t, log: log, ctx: ctx, wake: make(chan struct{}, 1), ended: make(chan struct{})}
	if t.active() {
		l.phase = active
	}
	go l.run()
	return l
}

// acquire returns when the tree is active, and keeps it so until release. It fails
// with the reason why the tree cannot be activated, with ErrStopped, or with that of
// ctx; then there is no lease.
func (l *life) acquire(ctx context.Context) error {
	l.mu.Lock()
	if l.ending {
		l.mu.Unlock()
		return ErrStopped
	}
	if l.phase == active {
		l.leases++
		l.backoff = 0
		l.mu.Unlock()
		return nil
	}
	answer := make(chan error, 1)
	l.waiting = append(l.waiting, answer)
	l.mu.Unlock()
	l.rouse()
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
	}
	l.mu.Lock()
	if i := slices.Index(l.waiting, answer); i >= 0 {
		l.waiting = slices.Delete(l.waiting, i, i+1)
		l.mu.Unlock()
		return ctx.Err()
	}
	l.mu.Unlock()
	if err := <-answer; err != nil {
		return err
	}
	l.release(0)
	return ctx.Err()
}

// rest lets the tree be inactive when nobody has a lease.
func (l *life) rest() {
	l.mu.Lock()
	l.rests = true
	l.mu.Unlock()
	l.rouse()
}

// release gives a lease back. Without another one the tree is inactivated after linger.
func (l *life) release(linger time.Duration) {
	l.mu.Lock()
	l.leases--
	last := l.leases == 0
	if last {
		l.due = time.Now().Add(linger)
	}
	l.mu.Unlock()
	if last {
		l.rouse()
	}
}

// stop makes the owner end after what it is doing. Who waits for a lease gets ErrStopped.
func (l *life) stop() {
	l.mu.Lock()
	l.ending = true
	l.answer(ErrStopped)
	l.mu.Unlock()
	l.rouse()
}

func (l *life) rouse() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// run is the owner.
func (l *life) run() {
	defer close(l.ended)
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.ending {
		switch {
		case l.phase == inactive && len(l.waiting) > 0:
			l.activate()
		case l.idle() && !time.Now().Before(l.due):
			l.inactivate()
		default:
			l.sleep()
		}
	}
}

// idle tells that the tree is active for nobody. mu is held.
func (l *life) idle() bool { return l.phase == active && l.leases == 0 && l.rests }

// sleep waits until something has changed or is due. mu is held, but not meanwhile.
func (l *life) sleep() {
	var due <-chan time.Time
	if l.idle() {
		t := time.NewTimer(time.Until(l.due))
		defer t.Stop()
		due = t.C
	}
	l.mu.Unlock()
	defer l.mu.Lock()
	select {
	case <-l.wake:
	case <-due:
	}
}

// during runs f in a passing phase. mu is held, but not meanwhile.
func (l *life) during(p phase, f func(context.Context) error) (took time.Duration, err error) {
	l.phase = p
	l.mu.Unlock()
	defer l.mu.Lock()
	began := time.Now()
	err = f(l.ctx)
	return time.Since(began), err
}

// tell logs what the figures show already. mu is held, but not meanwhile.
func (l *life) tell(done string, took time.Duration) {
	l.mu.Unlock()
	defer l.mu.Lock()
	l.log.Info(done, "took", took.Round(time.Microsecond))
}

func (l *life) activate() {
	took, err := l.during(activating, l.tree.activate)
	if err != nil {
		l.phase = inactive
		l.stat.ActivationsFailed++
		l.answer(err)
		return
	}
	l.phase = active
	l.stat.Activations++
	l.due = time.Now() // if all who waited have gone
	l.backoff = 0
	l.answer(nil)
	l.tell("activated", took)
}

func (l *life) inactivate() {
	took, err := l.during(inactivating, l.tree.inactivate)
	if err == nil {
		l.phase = inactive
		l.stat.Inactivations++
		l.tell("inactivated", took)
		return
	}
	// The image keeps its locks: what is not stored yet must not get lost.
	l.phase = active
	l.stat.InactivationsFailed++
	wait := min(max(firstBackoff, 2*l.backoff), lastBackoff)
	l.backoff = wait
	l.due = time.Now().Add(wait)
	l.answer(nil)
	l.mu.Unlock()
	defer l.mu.Lock()
	l.log.Error("cannot inactivate: the image stays locked", "err", err, "again_in", wait)
}

// answer gives those who wait a lease, or the reason why not. mu is held.
func (l *life) answer(err error) {
	for _, w := range l.waiting {
		if err == nil {
			l.leases++
			l.backoff = 0
		}
		w <- err
	}
	l.waiting = nil
}

// activity are the figures, and what the tree is doing now.
func (l *life) activity() (iostat.Activity, phase) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.stat
	s.Active = l.phase == active || l.phase == inactivating
	return s, l.phase
}

// allowInactive tells the graph whether the tree may become inactive: only the owner
// decides that, so that a lease is worth something.
func (l *life) allowInactive() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.phase == inactivating:
		return nil
	case l.leases == 0:
		return errors.New("it is kept for clients that come back")
	}
	return fmt.Errorf("it is in use by %d clients", l.leases)
}

// A nodeLife is the life of the nodes below an export.
type nodeLife struct {
	*life
	nodes *nodeTree
	users int // exports; guarded by Server.mu
}

// A nodeTree is the nodes from the one that exports have as their root down.
type nodeTree struct {
	graph *block.Graph
	node  *block.Node // until there is a root

	mu    sync.Mutex
	roots []*block.Root // all lead to the same node
}

func (t *nodeTree) add(r *block.Root) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.roots = append(t.roots, r)
}

// top is the uppermost node now: a change of the graph may have put another one there.
func (t *nodeTree) top() *block.Node {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.roots) > 0 {
		return t.roots[0].Node()
	}
	return t.node
}

func (t *nodeTree) active() bool { return t.top().Active() }

func (t *nodeTree) activate(ctx context.Context) error {
	return t.graph.SetActive(ctx, true, t.top())
}

func (t *nodeTree) inactivate(ctx context.Context) error {
	return t.graph.SetActive(ctx, false, t.top())
}
