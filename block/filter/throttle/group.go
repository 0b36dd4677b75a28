package throttle

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A direction is what a request counts as. Zeroing and discarding are writing.
type direction uint8

const (
	reading direction = iota
	writing
	numDirections
)

// A group is limits and those who share them. In each direction its members take turns
// while they have to wait; within a member, and between the directions, it is the order
// of arrival.
type group struct {
	name    string // "": of one node alone, which is in no Groups
	epoch   time.Time
	members int // of a group with a name; guarded by Groups.mu

	// limited tells, without the lock, whether anything is to be counted.
	limited [numDirections]atomic.Bool

	mu       sync.Mutex // guards what follows
	limits   Limits
	iopsSize float64
	buckets  [numBuckets]bucket
	leaked   time.Duration            // the buckets have leaked until then, since epoch
	queue    [numDirections][]*member // members with waiting requests; the first has the turn
	turn     direction                // goes first when both could
	timer    *time.Timer              // runs dispatch; nil before it is needed
}

// A member is a node in a group. What it has is guarded by group.mu.
type member struct {
	group   *group
	node    *node
	waiting [numDirections][]*waiter // oldest first
	unbound bool                     // nothing has to wait
}

// A waiter is a request that waits.
type waiter struct {
	bytes int64
	since time.Duration // on the group's clock
	let   chan struct{} // closed when it may go
}

func newGroup(name string, l Limits) *group {
	g := &group{name: name, epoch: time.Now()}
	g.setLimits(l)
	return g
}

// setLimits takes over limits that are valid. The buckets start empty.
func (g *group) setLimits(l Limits) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.limits = l
	g.iopsSize = float64(l.IopsSize)
	for i, r := range l.rates() {
		g.buckets[i] = newBucket(r)
	}
	for d := range numDirections {
		limited := false
		for _, i := range bucketsOf[d] {
			limited = limited || g.buckets[i].avg > 0
		}
		g.limited[d].Store(limited)
	}
	g.dispatch()
}

func (g *group) currentLimits() Limits {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.limits
}

// bucketsOf tells which buckets a request has to pass; those of bytes come first.
var bucketsOf = [numDirections][4]int{
	reading: {bpsTotal, bpsRead, iopsTotal, iopsRead},
	writing: {bpsTotal, bpsWrite, iopsTotal, iopsWrite},
}

// leak lets the time pass. mu is held, here and below.
func (g *group) leak() {
	now := time.Since(g.epoch)
	seconds := (now - g.leaked).Seconds()
	g.leaked = now
	for i := range g.buckets {
		g.buckets[i].leak(seconds)
	}
}

// wait is for how many seconds no request may pass; not more than 0 for none.
func (g *group) wait(d direction) float64 {
	w := 0.
	for _, i := range bucketsOf[d] {
		w = max(w, g.buckets[i].wait())
	}
	return w
}

// charge counts n requests of bytes each. n is 1, or -1 to take one back.
func (g *group) charge(d direction, bytes int64, n float64) {
	requests := n
	if g.iopsSize > 0 {
		requests *= max(1, float64(bytes)/g.iopsSize)
	}
	b := bucketsOf[d]
	for _, i := range b[:2] {
		g.buckets[i].add(n * float64(bytes))
	}
	for _, i := range b[2:] {
		g.buckets[i].add(requests)
	}
}

// tryEnter lets a request of m pass, or tells that it has to wait.
func (g *group) tryEnter(m *member, d direction, bytes int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.pass(m, d, bytes)
}

// enter lets a request of m pass, or returns what it has to wait for.
func (g *group) enter(m *member, d direction, bytes int64) *waiter {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.pass(m, d, bytes) {
		return nil
	}
	w := &waiter{bytes: bytes, since: g.leaked, let: make(chan struct{})}
	if len(m.waiting[d]) == 0 {
		g.queue[d] = append(g.queue[d], m)
	}
	m.waiting[d] = append(m.waiting[d], w)
	g.arm()
	return w
}

// pass lets a request of m pass unless it has to wait.
func (g *group) pass(m *member, d direction, bytes int64) bool {
	if len(g.queue[reading])+len(g.queue[writing]) > 0 {
		g.dispatch() // who waits comes first
	} else {
		g.leak()
	}
	if !m.unbound && g.wait(d) > 0 {
		return false
	}
	g.charge(d, bytes, 1)
	return true
}

// refund takes back what was counted for a request that is not done.
func (g *group) refund(d direction, bytes int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.leak()
	g.charge(d, bytes, -1)
	g.dispatch()
}

// dispatch lets go what need not wait any more, and sees to the rest later.
func (g *group) dispatch() {
	g.leak()
	for idle := 0; idle < int(numDirections); {
		d := g.turn
		g.turn = numDirections - 1 - d
		if len(g.queue[d]) == 0 || g.wait(d) > 0 {
			idle++
			continue
		}
		idle = 0
		m := g.queue[d][0]
		g.queue[d] = g.queue[d][1:]
		g.letGo(m, d)
		if len(m.waiting[d]) > 0 {
			g.queue[d] = append(g.queue[d], m)
		}
	}
	g.arm()
}

// letGo lets the first waiting request of m go.
func (g *group) letGo(m *member, d direction) {
	w := m.waiting[d][0]
	m.waiting[d] = m.waiting[d][1:]
	g.charge(d, w.bytes, 1)
	m.node.waited.Add(int64(g.leaked - w.since))
	close(w.let)
}

// longestSleep bounds a timer: a byte a second makes waits that no Duration can hold.
const longestSleep = time.Hour

// arm sets the timer to when the first of those who wait may pass.
func (g *group) arm() {
	seconds, needed := longestSleep.Seconds(), false
	for d := range numDirections {
		if len(g.queue[d]) > 0 {
			seconds, needed = min(seconds, g.wait(d)), true
		}
	}
	sleep := time.Duration(seconds*float64(time.Second)) + 1
	switch {
	case needed && g.timer == nil:
		g.timer = time.AfterFunc(sleep, g.ring)
	case needed:
		g.timer.Reset(sleep)
	case g.timer != nil:
		g.timer.Stop()
	}
}

// ring is called by the timer.
func (g *group) ring() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.dispatch()
}

// unbind lets all that m has waiting go, and what comes until bind.
func (g *group) unbind(m *member) {
	g.mu.Lock()
	defer g.mu.Unlock()
	m.unbound = true
	g.leak()
	for d := range numDirections {
		for len(m.waiting[d]) > 0 {
			g.letGo(m, d)
		}
		g.queue[d] = slices.DeleteFunc(g.queue[d], func(o *member) bool { return o == m })
	}
	g.arm()
}

// bind subjects m to the limits again.
func (g *group) bind(m *member) {
	g.mu.Lock()
	defer g.mu.Unlock()
	m.unbound = false
}
