// Package throttle is the filter driver "throttle": it limits how many bytes and
// requests pass per second. Nodes may share limits by being members of one group.
//
// The limits are QEMU's: leaky buckets, bursts of a rate and a length, requests that
// count by their size, members that take turns, live changes. golang.org/x/time/rate
// knows one bucket that starts full and one kind of token; bursts that last, several
// buckets that a request must pass at once, turns and taking back a request that was
// counted in vain would all have to be built around it, and nothing would be left for
// it to do but the one subtraction. So the buckets are our own.
//
// A request that must wait holds no worker of its connection, see [block.Yield].
// While a node is drained, its requests pass without waiting; they count nevertheless.
package throttle

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/filter"
)

// Options of a throttle node: the name of a group, or limits for this node alone.
type Options struct {
	Group string `option:"throttle-group,strong"`
	Limits
}

// Driver returns the driver "throttle". It has one child, "file". Its nodes can be
// members of the groups of gs.
func Driver(gs *Groups) *block.Driver {
	return &block.Driver{
		Name:       "throttle",
		Kind:       block.Filter,
		NewOptions: func() any { return &Options{Limits: None()} },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			return open(ctx, o, gs)
		},
	}
}

func open(ctx context.Context, o *block.Opening, gs *Groups) (block.Instance, error) {
	opts, ok := o.Config.Options.(*Options)
	if !ok {
		return nil, fmt.Errorf("the 'throttle' block driver takes options of type *throttle.Options, not %T", o.Config.Options)
	}
	p, err := filter.Open(ctx, o, "file")
	if err != nil {
		return nil, err
	}
	g, err := gs.join(opts)
	if err != nil {
		return nil, err
	}
	n := &node{Pass: p, groups: gs}
	n.group.Store(g)
	return n, nil
}

// A node is a throttle node: a member of a group.
type node struct {
	filter.Pass
	groups *Groups
	group  atomic.Pointer[group] // changes only while drained

	// Guarded by group.mu.
	waiting [numDirections][]*waiter // oldest first
	unbound bool                     // nothing has to wait

	waits  atomic.Int64 // requests that had to wait, ever
	waited atomic.Int64 // for how long in all, ns

	files atomic.Pointer[[]*metered] // for Locate
}

// A waiter is a request that waits.
type waiter struct {
	bytes int64
	since time.Duration // on the group's clock
	let   chan struct{} // closed when it may go
}

var _ interface {
	block.Instance
	block.Zeroer
	block.Discarder
	block.StatusReporter
	block.Locator
	block.Prefetcher
	block.Truncater
	block.Quiescer
	block.Measurer
	block.Waiter
} = (*node)(nil)

// throttle returns when a request of so many bytes may pass.
func (n *node) throttle(ctx context.Context, d direction, bytes int64) {
	g := n.group.Load()
	if !g.limited[d].Load() {
		return
	}
	if w := g.enter(n, d, bytes); w != nil {
		n.waits.Add(1)
		block.Yield(ctx, func() { <-w.let })
	}
}

// ReadAt implements [block.Instance].
func (n *node) ReadAt(ctx context.Context, p []byte, off int64) error {
	n.throttle(ctx, reading, int64(len(p)))
	return n.Pass.ReadAt(ctx, p, off)
}

// WriteAt implements [block.Instance].
func (n *node) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	n.throttle(ctx, writing, int64(len(p)))
	return n.Pass.WriteAt(ctx, p, off, flags)
}

// WriteZeroes implements [block.Zeroer].
func (n *node) WriteZeroes(ctx context.Context, off, length int64, flags block.ReqFlags) error {
	n.throttle(ctx, writing, length)
	return n.Pass.WriteZeroes(ctx, off, length, flags)
}

// Discard implements [block.Discarder].
func (n *node) Discard(ctx context.Context, off, length int64) error {
	n.throttle(ctx, writing, length)
	return n.Pass.Discard(ctx, off, length)
}

// Prefetch implements [block.Prefetcher].
func (n *node) Prefetch(ctx context.Context, off, length int64) error {
	n.throttle(ctx, reading, length)
	return n.Pass.Prefetch(ctx, off, length)
}

// Locate implements [block.Locator]. What it answers has passed the limits; where it
// would have to wait, or the answer would count as several requests, it does not know.
func (n *node) Locate(shard block.Shard, off, length int64) block.Location {
	l := n.Pass.Locate(shard, off, length)
	g := n.group.Load()
	if l.Kind == block.LocateAsk || !g.limited[reading].Load() {
		return l
	}
	if l.Length < length || !g.tryEnter(n, reading, length) {
		return block.Location{Kind: block.LocateAsk, Length: length}
	}
	if l.Kind == block.LocateData {
		l.File = n.metered(l.File)
	}
	return l
}

// A metered file takes back the charge for what it cannot read at once: that is read,
// and charged, by ReadAt.
type metered struct {
	block.HostFile
	node *node
}

// ReadNowait implements [block.HostFile].
func (m *metered) ReadNowait(p []byte, off int64) int {
	k := m.HostFile.ReadNowait(p, off)
	if k < len(p) {
		m.node.group.Load().refund(reading, int64(len(p)))
	}
	return k
}

// maxMetered bounds the files that are remembered; there are as many as images in the backing chain.
const maxMetered = 8

// metered wraps a file, without an allocation if it was met before.
func (n *node) metered(f block.HostFile) block.HostFile {
	var known []*metered
	if list := n.files.Load(); list != nil {
		known = *list
	}
	for _, m := range known {
		if m.HostFile == f {
			return m
		}
	}
	m := &metered{f, n}
	if len(known) == maxMetered {
		known = nil
	}
	list := append(known[:len(known):len(known)], m)
	n.files.Store(&list)
	return m
}

// DrainBegin implements [block.Quiescer]: what waits is let go.
func (n *node) DrainBegin() { n.group.Load().unbind(n) }

// DrainEnd implements [block.Quiescer].
func (n *node) DrainEnd() { n.group.Load().bind(n) }

// Close implements [block.Instance].
func (n *node) Close(ctx context.Context) error {
	n.groups.leave(n.group.Load())
	return n.Pass.Close(ctx)
}

// Measurements implements [block.Measurer].
func (n *node) Measurements() []block.Measurement {
	return []block.Measurement{
		{Name: "throttled_requests_total", Help: "Requests that had to wait for a limit.", Value: float64(n.waits.Load()), Counter: true},
		{Name: "throttled_seconds_total", Help: "How long requests have waited for a limit, in all.", Value: time.Duration(n.waited.Load()).Seconds(), Counter: true},
		{Name: "throttled_requests", Help: "Requests that wait for a limit now.", Value: float64(n.nowWaiting())},
	}
}

func (n *node) nowWaiting() int {
	g := n.group.Load()
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(n.waiting[reading]) + len(n.waiting[writing])
}

// OldestWait implements [block.Waiter].
func (n *node) OldestWait() (what string, age time.Duration, ok bool) {
	g := n.group.Load()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, list := range n.waiting {
		if len(list) > 0 {
			ok = true
			age = max(age, time.Since(g.epoch)-list[0].since)
		}
	}
	what = "the limits of the throttle node"
	if g.name != "" {
		what = "the limits of throttle group '" + g.name + "'"
	}
	return what, age, ok
}
