package block

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
)

// RootConfig describes a root.
type RootConfig struct {
	User string // who it is, for error texts: "export 'disk0'"
	// ID is a name by which the node below can be referred to, "" for none. Nodes and
	// roots have one space of names.
	ID     string
	Node   *Node
	Perm   Perm // what the user needs
	Shared Perm // what others may hold meanwhile
	// WriteThrough makes every write durable before it returns.
	WriteThrough bool
	// StayAtNode: when the node is replaced, the root stays, because it is about this
	// very node (a job).
	StayAtNode bool
	// AllowInactive is asked before the node becomes inactive; an error says why it
	// must not. nil: the root never allows it. It may be called in parallel and more
	// than once, must not block, and must not wait for a call of the graph. The root
	// loses its permissions while the node is inactive, and gets them back, or the node
	// stays inactive.
	AllowInactive func() error
	// OnResize, if not nil, is called when the size of the root has changed without
	// its user having done that: its node was replaced, or [Node.SizeChanged] was
	// called. Look at [Root.Size] for the size. No locks are held; calls may come in
	// parallel, and one may come late, after the root was detached.
	OnResize func()
	// Busy, if not nil, describes what is in flight, the oldest first: "read of 4096
	// bytes at offset 0 for 12s". It is for the text of a drain that did not finish in
	// time, may be called at any time before Detach has returned, and must not block.
	Busy func() []string
}

// A Root is an edge without a parent node: the point where requests enter the
// graph, are admitted and counted.
//
// Its request methods, which are those of [Edge], may be called in parallel, but
// only between [Lane.Begin] and [Lane.End] or inside [Root.Do].
//
// The size of a root is that of its node rounded up to the request alignment:
// the bytes past the node's end read as zero, and writing anything but zeroes
// there is refused with [ErrReadOnly].
type Root struct {
	edge         Edge
	user, id     string
	perm, shared Perm
	writeFlags   ReqFlags // added to each write
	graph        *Graph

	allowInactive func() error
	denied        *Node // was made read-only by force: the root may not write. Guarded by Graph.mu

	// state holds the gate in bit 0 and the epoch above it. The lanes count what they
	// admit by the epoch's lowest bit, see [Node.Grace].
	state    atomic.Uint64
	watchers atomic.Int32 // somebody waits on changed

	stays    bool
	onResize func()
	busy     func() []string

	quiesce int   // guarded by Graph.mu
	known   int64 // size in bytes that the user knows of; guarded by Graph.mu
	self    *Lane // of Do

	mu      sync.Mutex
	lanes   map[*Lane]struct{}
	changed chan struct{} // closed and replaced when something that a watcher waits for happened
}

const gateClosed = 1

// AttachRoot puts a root on top of cfg.Node. It takes its own reference to the node.
// It fails if the permissions conflict with those of other users, naming both. On an
// inactive node it holds none yet; one that needs to write must have AllowInactive.
func (g *Graph) AttachRoot(ctx context.Context, cfg RootConfig) (*Root, error) {
	r := &Root{user: cfg.User, id: cfg.ID, perm: cfg.Perm, shared: cfg.Shared, graph: g,
		stays: cfg.StayAtNode, allowInactive: cfg.AllowInactive, onResize: cfg.OnResize, busy: cfg.Busy,
		lanes: make(map[*Lane]struct{}), changed: make(chan struct{})}
	if cfg.WriteThrough {
		r.writeFlags = FUA
	}
	r.edge.root, r.edge.name, r.edge.role = r, "root", RoleFiltered|RolePrimary
	r.edge.child.Store(cfg.Node)
	r.known = r.Size()
	r.self = r.NewLane(0, nil)
	err := g.change(ctx, func(t *tx) error {
		if err := t.claim(r); err != nil {
			return err
		}
		return t.link(&r.edge)
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// Detach waits until nothing is in flight, flushes if the root could write, and
// takes the root away. ctx bounds the waits only; if it ends, the root stays and the
// error wraps ctx's. Inside a drained section there is no flush: that is left to those
// who stay, or to the node's end. The error of a second call wraps [ErrClosed].
func (r *Root) Detach(ctx context.Context) error {
	if err := r.waitIdle(ctx); err != nil {
		return err
	}
	return errors.Join(r.lastFlush(ctx), r.graph.detach(ctx, &r.edge))
}

// lastFlush is a request, so that no activity or drain begins meanwhile.
func (r *Root) lastFlush(ctx context.Context) error {
	if r.perm&(PermWrite|PermWriteUnchanged) == 0 {
		return nil
	}
	a, ok := r.self.Begin()
	if !ok {
		return nil
	}
	defer r.self.End(a)
	if !r.Node().Active() {
		return nil // it was flushed then
	}
	return r.edge.Flush(ctx)
}

// mayUse tells why the root cannot be on top of n as far as activity goes.
func (r *Root) mayUse(n *Node) error {
	if more := r.perm &^ PermConsistentRead; more != 0 && !n.Active() && r.allowInactive == nil {
		return refuse(ErrInactive, "Permission '%s' unavailable on inactive node", more)
	}
	return nil
}

// claim enters r's id, if it has one.
func (t *tx) claim(r *Root) error {
	switch ids := t.g.ids; {
	case r.id == "":
	case len(r.id) > maxNodeName || !nodeName.MatchString(r.id):
		return refuse(ErrInvalid, "Invalid device name '%s'", r.id)
	case ids[r.id] != nil:
		return refuse(ErrBusy, "Device with id '%s' already exists", r.id)
	case t.g.nodes[r.id] != nil:
		return refuse(ErrBusy, "Device name '%s' conflicts with an existing node name", r.id)
	default:
		ids[r.id] = r
		t.onAbort(func() { delete(ids, r.id) })
	}
	return nil
}

// Node is the node below the root.
func (r *Root) Node() *Node { return r.edge.Node() }

// MayWrite tells whether the root asked for permission to write and was not denied it
// since, see ReopenRequest.Force.
func (r *Root) MayWrite() bool {
	r.graph.mu.Lock()
	defer r.graph.mu.Unlock()
	return r.perm&PermWrite != 0 && r.denied == nil
}

// User says who the root belongs to.
func (r *Root) User() string { return r.user }

// Limits are the node's abilities and constraints.
func (r *Root) Limits() Limits { return *r.edge.Node().lim() }

// Size is the node's size rounded up to the request alignment, in bytes.
func (r *Root) Size() int64 {
	a := r.edge.Node().lim().RequestAlignment
	return (r.edge.Size() + a - 1) &^ (a - 1)
}

// Drained tells whether the gate is closed.
func (r *Root) Drained() bool { return r.state.Load()&gateClosed != 0 }

// InFlight is the number of requests admitted and not ended.
func (r *Root) InFlight() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	var n int64
	for l := range r.lanes {
		n += l.InFlight()
	}
	return n
}

// An Admission is one admitted request.
type Admission uint8

// A Lane admits the requests of one connection. Begin and End may be called in parallel.
type Lane struct {
	_        [64]byte
	inflight [2]atomic.Int64 // by the lowest bit of the epoch of admission
	refused  atomic.Bool
	root     *Root
	shard    Shard
	resume   func()
	_        [64]byte
}

// NewLane adds a lane. resume, which may be nil, is called without locks when the
// gate has opened and a Begin had been refused since the last call; it must not block.
func (r *Root) NewLane(shard Shard, resume func()) *Lane {
	l := &Lane{root: r, shard: shard, resume: resume}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lanes[l] = struct{}{}
	return l
}

// Close takes the lane away, after its last End.
func (l *Lane) Close() {
	l.root.mu.Lock()
	defer l.root.mu.Unlock()
	delete(l.root.lanes, l)
}

// Context returns a context for the requests of the lane. Make it once.
func (l *Lane) Context(ctx context.Context) context.Context { return WithShard(ctx, l.shard) }

// Shard is the lane's shard of sharded counters.
func (l *Lane) Shard() Shard { return l.shard }

// InFlight is the number of requests of this lane admitted and not ended.
func (l *Lane) InFlight() int64 { return l.inflight[0].Load() + l.inflight[1].Load() }

// Begin admits a request. false means that the root is drained: the request must
// wait, in order, until resume is called.
func (l *Lane) Begin() (Admission, bool) {
	r := l.root
	for {
		s := r.state.Load()
		if s&gateClosed != 0 {
			l.refused.Store(true)
			if r.state.Load()&gateClosed != 0 {
				return 0, false
			}
			continue // it opened meanwhile; a resume too many does no harm
		}
		a := Admission(s >> 1 & 1)
		l.inflight[a].Add(1)
		// Whoever changes the state looks at the counts afterwards, so either it sees
		// this request or the request sees the change.
		if r.state.Load() == s {
			return a, true
		}
		l.End(a)
	}
}

// End says that an admitted request has ended.
func (l *Lane) End(a Admission) {
	if l.inflight[a].Add(-1) == 0 && l.root.watchers.Load() != 0 {
		l.root.notify()
	}
}

// Do runs f as one admitted request, for tools and jobs. It waits while the root is
// drained; ctx ends that wait only.
func (r *Root) Do(ctx context.Context, f func(ctx context.Context) error) error {
	var a Admission
	err := r.watch(ctx, func() bool {
		var ok bool
		a, ok = r.self.Begin()
		return ok
	})
	if err != nil {
		return err
	}
	defer r.self.End(a)
	return f(ctx)
}

// notify wakes all watchers.
func (r *Root) notify() {
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.changed)
	r.changed = make(chan struct{})
}

// watch waits until done says true; it is asked again whenever a lane becomes idle
// or the gate moves.
func (r *Root) watch(ctx context.Context, done func() bool) error {
	if done() {
		return nil
	}
	r.watchers.Add(1)
	defer r.watchers.Add(-1)
	for {
		r.mu.Lock()
		changed := r.changed
		r.mu.Unlock()
		if done() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (r *Root) waitIdle(ctx context.Context) error {
	err := r.watch(ctx, func() bool { return r.InFlight() == 0 })
	if err != nil {
		return fmt.Errorf("%s still has %d requests in flight%s: %w", r.user, r.InFlight(), r.list(), err)
	}
	return nil
}

// most is how many requests in flight an error names.
const most = 8

// list names what is in flight, for the end of a sentence.
func (r *Root) list() string {
	if r.busy == nil {
		return ""
	}
	all := r.busy()
	if len(all) == 0 {
		return ""
	}
	text := strings.Join(all[:min(len(all), most)], ", ")
	if len(all) > most {
		text += fmt.Sprintf(" and %d more", len(all)-most)
	}
	return " (" + text + ")"
}

// inflightOf counts what was admitted in epochs of the parity of epoch.
func (r *Root) inflightOf(epoch uint64) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	var n int64
	for l := range r.lanes {
		n += l.inflight[epoch&1].Load()
	}
	return n
}

// passed tells whether all requests that were admitted in epoch or before have
// ended, moving the epoch on as far as that needs. It may be called in parallel.
func (r *Root) passed(epoch uint64) bool {
	for {
		s := r.state.Load()
		now := s >> 1
		if now >= epoch+2 {
			return true
		}
		// Requests of the epoch before now share the other count.
		if now == epoch {
			if r.inflightOf(now-1) != 0 {
				return false
			}
			r.state.CompareAndSwap(s, s+2)
			continue
		}
		return r.inflightOf(epoch) == 0
	}
}

// A Grace is a moment whose requests may still be in flight.
type Grace struct {
	roots  []*Root
	epochs []uint64
}

// Grace notes which requests are in flight at the roots above n now. A driver
// that took a host offset away from its tables reuses it only when they have
// ended: until then one of them may still read or write there.
func (n *Node) Grace() *Grace {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	g := new(Grace)
	n.eachRoot(func(r *Root) {
		g.roots = append(g.roots, r)
		g.epochs = append(g.epochs, r.state.Load()>>1)
	})
	return g
}

// Passed tells whether all those requests have ended. It does not wait.
func (g *Grace) Passed() bool {
	for i, r := range g.roots {
		if !r.passed(g.epochs[i]) {
			return false
		}
	}
	return true
}

// Wait waits until all those requests have ended.
func (g *Grace) Wait(ctx context.Context) error {
	for i, r := range g.roots {
		if err := r.watch(ctx, func() bool { return r.passed(g.epochs[i]) }); err != nil {
			return err
		}
	}
	return nil
}
