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
	"reflect"
	"strings"
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
		Mutable:    mutable(),
		NewOptions: func() any { return &Options{Limits: None()} },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			return open(ctx, o, gs)
		},
	}
}

// mutable names all options.
func mutable() []string {
	names := []string{"throttle-group"}
	t := reflect.TypeFor[Limits]()
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("option"), ",")
		names = append(names, name)
	}
	return names
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
	n.member.Store(&member{group: g, node: n})
	return n, nil
}

// A node is a throttle node.
type node struct {
	filter.Pass
	groups *Groups
	member atomic.Pointer[member] // changes only while drained

	waits  atomic.Int64 // requests that had to wait, ever
	waited atomic.Int64 // for how long in all, ns

	files atomic.Pointer[[]*metered] // for Locate
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
	block.Reopener
	block.Measurer
	block.Waiter
} = (*node)(nil)

// throttle returns when a request of so many bytes may pass.
func (n *node) throttle(ctx context.Context, d direction, bytes int64) {
	m := n.member.Load()
	if !m.group.limited[d].Load() {
		return
	}
	if w := m.group.enter(m, d, bytes); w != nil {
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
	m := n.member.Load()
	if l.Kind == block.LocateAsk || !m.group.limited[reading].Load() {
		return l
	}
	if l.Length < length || !m.group.tryEnter(m, reading, length) {
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
		m.node.member.Load().group.refund(reading, int64(len(p)))
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
func (n *node) DrainBegin() {
	m := n.member.Load()
	m.group.unbind(m)
}

// DrainEnd implements [block.Quiescer].
func (n *node) DrainEnd() {
	m := n.member.Load()
	m.group.bind(m)
}

// PrepareReopen implements [block.Reopener]: the node gets limits of its own, or another group.
func (n *node) PrepareReopen(_ context.Context, r *block.Reopening) (block.Switch, error) {
	g, err := n.groups.join(r.Config.Options.(*Options))
	if err != nil {
		return nil, err
	}
	return &move{n, n.member.Load(), &member{group: g, node: n, unbound: true}}, nil
}

// A move is from one group to another. The node is drained meanwhile.
type move struct {
	node     *node
	from, to *member
}

// Apply implements [block.Switch].
func (m *move) Apply(context.Context) error {
	m.node.member.Store(m.to)
	return nil
}

// Commit implements [block.Switch].
func (m *move) Commit() { m.node.groups.leave(m.from.group) }

// Abort implements [block.Switch].
func (m *move) Abort() {
	m.node.member.Store(m.from)
	m.node.groups.leave(m.to.group)
}

// Close implements [block.Instance].
func (n *node) Close(ctx context.Context) error {
	n.groups.leave(n.member.Load().group)
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
	m := n.member.Load()
	m.group.mu.Lock()
	defer m.group.mu.Unlock()
	return len(m.waiting[reading]) + len(m.waiting[writing])
}

// OldestWait implements [block.Waiter].
func (n *node) OldestWait() (what string, age time.Duration, ok bool) {
	m := n.member.Load()
	g := m.group
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, list := range m.waiting {
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
