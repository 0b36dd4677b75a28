package block_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

const worldSize = 8192

// A world is a graph in use, and a model of it: which node is over which, and what each
// user reads. One goroutine changes the graph, the others read and write meanwhile.
type world struct {
	t    *testing.T
	g    *block.Graph
	rng  *rand.Rand
	ev   *events
	s    *steps
	next int

	things   []*thing
	users    []*user
	visitors []*block.Root   // that do nothing
	sections [][]*block.Node // drained sections that go on
	beat     func()

	run  sync.RWMutex // held for reading by each request of the users, for writing while they rest
	stop chan struct{}
	wg   sync.WaitGroup

	done, refused map[string]int // by operation
}

// A thing is a node. The world has a reference to it.
type thing struct {
	node  *block.Node
	below *thing // what a filter filters, or the backing node
	store *blocktest.Store
	cow   *cowOptions
}

func (x *thing) filter() bool { return x.store == nil && x.cow == nil }

// empty tells whether x is an image that holds nothing.
func (x *thing) empty() bool {
	if x.cow == nil {
		return false
	}
	x.cow.mu.RLock()
	defer x.cow.mu.RUnlock()
	return len(x.cow.data) == 0
}

// A user writes through one root and reads through another, both on the same node.
type user struct {
	w, r *block.Root
	on   *thing
	view []byte // what it reads; only its own goroutine uses it, and the world while users rest
}

func newWorld(t *testing.T, seed uint64, beat func(), done, refused map[string]int) *world {
	w := &world{t: t, g: newGraph(t), rng: rand.New(rand.NewPCG(seed, 7)), ev: new(events), s: new(steps), beat: beat,
		stop: make(chan struct{}), done: done, refused: refused}
	shared := w.disk()
	for _, x := range []*thing{w.mustCow(shared), w.mustCow(w.mustFilter(shared)), w.mustFilter(w.disk())} {
		u := &user{on: x}
		var err error
		if u.w, err = w.g.AttachRoot(ctx, block.RootConfig{User: fmt.Sprintf("writer%d", len(w.users)), Node: x.node, Perm: rd | wr, Shared: rd}); err != nil {
			t.Fatal(err)
		}
		u.r = attach(t, x.node, fmt.Sprintf("reader%d", len(w.users)), rd, all)
		w.users = append(w.users, u)
	}
	w.look()
	for i, u := range w.users {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		w.wg.Go(func() {
			for {
				select {
				case <-w.stop:
					return
				default:
				}
				w.run.RLock()
				u.step(t, rng)
				w.run.RUnlock()
			}
		})
	}
	return w
}

// step writes a block, or reads one and compares it.
func (u *user) step(t *testing.T, rng *rand.Rand) {
	off := rng.Int64N(worldSize/cowBlock) * cowBlock
	p := make([]byte, cowBlock)
	if rng.IntN(2) == 0 {
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		if err := u.w.Do(ctx, func(ctx context.Context) error { return u.w.WriteAt(ctx, p, off, 0) }); err != nil {
			t.Errorf("%s: %v", u.w.User(), err)
		}
		copy(u.view[off:], p)
		return
	}
	if err := u.r.Do(ctx, func(ctx context.Context) error { return u.r.ReadAt(ctx, p, off) }); err != nil {
		t.Errorf("%s: %v", u.r.User(), err)
	}
	if want := u.view[off : off+cowBlock]; !bytes.Equal(p, want) {
		t.Errorf("%s reads %x at %d, want %x", u.r.User(), p[:8], off, want[:8])
	}
}

func (w *world) add(x *thing, c *block.Config) (*thing, error) {
	w.next++
	c.NodeName = fmt.Sprintf("n%d", w.next)
	n, err := w.g.Open(ctx, c)
	if err != nil {
		return nil, err
	}
	x.node = n
	w.things = append(w.things, x)
	return x, nil
}

func (w *world) must(x *thing, err error) *thing {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
	return x
}

func (w *world) disk() *thing {
	p := make([]byte, worldSize)
	for i := range p {
		p[i] = byte(w.rng.Uint32())
	}
	s := blocktest.StoreOf(p)
	return w.must(w.add(&thing{store: s}, blocktest.MemoryConfig(s)))
}

func (w *world) cow(below *thing) (*thing, error) {
	o := &cowOptions{size: worldSize, file: fmt.Sprintf("/images/%d", w.next)}
	var backing *block.Config
	if below != nil {
		backing = ref(below.node.Name())
	}
	return w.add(&thing{cow: o, below: below}, cowConfig("", o, backing))
}

func (w *world) filter(below *thing) (*thing, error) {
	return w.add(&thing{below: below}, w.filterConfig(below))
}

func (w *world) filterConfig(below *thing) *block.Config {
	c := filtering("", w.ev, ref(below.node.Name()))
	c.Options.(*nodeOptions).veto = w.s.veto
	return c
}

func (w *world) mustCow(below *thing) *thing    { return w.must(w.cow(below)) }
func (w *world) mustFilter(below *thing) *thing { return w.must(w.filter(below)) }

func (w *world) any() *thing { return w.things[w.rng.IntN(len(w.things))] }

// some is a thing that f likes, or nil.
func (w *world) some(f func(*thing) bool) *thing {
	list := slices.DeleteFunc(slices.Clone(w.things), func(x *thing) bool { return !f(x) })
	if len(list) == 0 {
		return nil
	}
	return list[w.rng.IntN(len(list))]
}

// contents is what x reads as, from what is stored.
func (x *thing) contents() []byte {
	switch {
	case x == nil:
		return make([]byte, worldSize)
	case x.store != nil:
		return x.store.Bytes()
	case x.filter():
		return x.below.contents()
	}
	p := x.below.contents()
	x.cow.mu.RLock()
	defer x.cow.mu.RUnlock()
	for at, d := range x.cow.data {
		clear(p[at*cowBlock : (at+1)*cowBlock])
		copy(p[at*cowBlock:], d)
	}
	return p
}

// written tells whether a user may be writing to x itself.
func (w *world) written(x *thing) bool {
	return slices.ContainsFunc(w.users, func(u *user) bool {
		on := u.on
		for on != x && on.filter() {
			on = on.below
		}
		return on == x
	})
}

// used tells whether x has a user.
func (w *world) used(x *thing) bool {
	return slices.ContainsFunc(w.things, func(o *thing) bool { return o.below == x }) ||
		slices.ContainsFunc(w.users, func(u *user) bool { return u.on == x }) ||
		slices.ContainsFunc(w.visitors, func(r *block.Root) bool { return r.Node() == x.node })
}

// moveUsers has the users of from use to, but for to and what is below it.
func (w *world) moveUsers(from, to *thing) {
	inside := func(x *thing) bool {
		for o := to; o != nil; o = o.below {
			if o == x {
				return true
			}
		}
		return false
	}
	for _, x := range w.things {
		if x.below == from && !inside(x) {
			x.below = to
		}
	}
	for _, u := range w.users {
		if u.on == from {
			u.on = to
		}
	}
}

// forget strikes x off. The node is closed, or will be when its section ends.
func (w *world) forget(x *thing) {
	w.things = slices.DeleteFunc(w.things, func(o *thing) bool { return o == x })
	release(w.t, w.g, x.node)
}

// rest has f run while no user does anything and nothing is drained.
func (w *world) rest(f func()) {
	w.undrain(0)
	w.run.Lock()
	defer w.run.Unlock()
	f()
}

func (w *world) undrain(keep int) {
	for len(w.sections) > keep {
		last := w.sections[len(w.sections)-1]
		w.sections = w.sections[:len(w.sections)-1]
		w.g.DrainEnd(last...)
	}
}

// look takes over what the users read now.
func (w *world) look() {
	for _, u := range w.users {
		u.view = u.on.contents()
	}
}

// check compares everything. The users rest.
func (w *world) check() {
	w.t.Helper()
	verify(w.t, w.g)
	for _, x := range w.things {
		var below *block.Node
		if kids := x.node.Children(); len(kids) > 0 {
			below = kids[0].Node()
		}
		if (below == nil) != (x.below == nil) || below != nil && below != x.below.node {
			w.t.Fatalf("'%s' is over another node than the model says:\n%s", x.node.Name(), dump(w.g))
		}
	}
	for _, u := range w.users {
		p := make([]byte, worldSize)
		if err := u.r.Do(ctx, func(ctx context.Context) error { return u.r.ReadAt(ctx, p, 0) }); err != nil {
			w.t.Fatal(err)
		}
		if u.w.Node() != u.on.node || u.r.Node() != u.on.node || !bytes.Equal(p, u.view) || !bytes.Equal(u.on.contents(), u.view) {
			w.t.Fatalf("%s and %s are on '%s' and '%s', want '%s'; reads agree: %t, what is stored: %t\n%s", u.w.User(), u.r.User(),
				u.w.Node().Name(), u.r.Node().Name(), u.on.node.Name(), bytes.Equal(p, u.view), bytes.Equal(u.on.contents(), u.view), dump(w.g))
		}
	}
}

// attempt tries a change, perhaps with a failure on its way. A change that fails must
// leave the graph as it was.
func (w *world) attempt(name string, f func(ctx context.Context) error) bool {
	w.t.Helper()
	before := dump(w.g)
	c, cancel := context.WithCancel(ctx)
	defer cancel()
	*w.s = steps{}
	switch w.rng.IntN(4) {
	case 0:
		w.s.armed, w.s.failAt = true, w.rng.IntN(5)
	case 1:
		cancel()
	}
	err := f(c)
	*w.s = steps{}
	if err == nil {
		w.done[name]++
		return true
	}
	w.refused[name]++
	if !errors.Is(err, syscall.EACCES) && !errors.Is(err, context.Canceled) && !errors.Is(err, block.ErrBusy) &&
		!errors.Is(err, block.ErrInvalid) && !errors.Is(err, block.ErrNoSpace) {
		w.t.Fatalf("%s: %v", name, err)
	}
	if after := dump(w.g); after != before {
		w.t.Fatalf("%s failed (%v), and the graph is\n%s\nbefore:\n%s", name, err, after, before)
	}
	return false
}

// Changes that no user notices, but for the pause.
var quietChanges = []func(w *world){
	func(w *world) { // InsertFilter
		w.undrain(0) // or a filter that could not be inserted stays open until the end of the section
		x := w.any()
		f := &thing{below: x}
		if w.attempt("insert filter", func(ctx context.Context) (err error) {
			c := w.filterConfig(x)
			w.next++
			c.NodeName = fmt.Sprintf("n%d", w.next)
			f.node, err = w.g.InsertFilter(ctx, c, x.node)
			return err
		}) {
			w.things = append(w.things, f)
			w.moveUsers(x, f)
		}
	},
	func(w *world) { // RemoveFilter
		if f := w.some((*thing).filter); f != nil && w.attempt("remove filter", func(ctx context.Context) error { return w.g.RemoveFilter(ctx, f.node) }) {
			w.moveUsers(f, f.below)
		}
	},
	func(w *world) { // AppendOverlay
		x, o := w.any(), w.mustCow(nil)
		if w.attempt("append overlay", func(ctx context.Context) error { return w.g.AppendOverlay(ctx, o.node, x.node) }) {
			w.moveUsers(x, o)
			o.below = x
		} else {
			w.forget(o)
		}
	},
	func(w *world) { // SetBacking to a filter of what it is already
		x := w.some(func(x *thing) bool { return x.cow != nil && x.below != nil })
		if x == nil {
			return
		}
		f := w.mustFilter(x.below)
		if w.attempt("set backing", func(ctx context.Context) error { return w.g.SetBacking(ctx, x.node, f.node) }) {
			x.below = f
		}
	},
	func(w *world) { // SetChild
		x := w.some((*thing).filter)
		if x == nil {
			return
		}
		f := w.mustFilter(x.below)
		if w.attempt("set child", func(ctx context.Context) error { return w.g.SetChild(ctx, x.node, "file", f.node) }) {
			x.below = f
		}
	},
	func(w *world) { // DropIntermediate of what holds nothing
		x := w.some(func(x *thing) bool { return x.empty() && x.below != nil && !w.written(x) })
		if x == nil {
			return
		}
		var failing *cowOptions
		if over := w.some(func(o *thing) bool { return o.cow != nil && o.below == x }); over != nil && w.rng.IntN(3) == 0 {
			failing = over.cow
			failing.failWith(block.ErrNoSpace)
		}
		if w.attempt("drop intermediate", func(ctx context.Context) error {
			return w.g.DropIntermediate(ctx, x.node, x.below.node, "/images/base", "raw")
		}) {
			w.moveUsers(x, x.below)
		}
		if failing != nil {
			failing.failWith(nil)
		}
	},
	func(w *world) { // a drained section, that may outlast other changes
		nodes := []*block.Node{w.any().node, w.any().node}
		if w.attempt("drain", func(ctx context.Context) error { return w.g.DrainBegin(ctx, nodes...) }) {
			w.sections = append(w.sections, nodes)
		}
		w.undrain(w.rng.IntN(2))
	},
	func(w *world) { // everything at once
		var end func()
		if w.attempt("drain all", func(ctx context.Context) (err error) { end, err = w.g.DrainAll(ctx); return err }) {
			for _, u := range w.users {
				if u.w.InFlight()+u.r.InFlight() != 0 || !u.w.Drained() || !u.r.Drained() {
					w.t.Errorf("%s goes on while everything is drained", u.w.User())
				}
			}
			end()
		}
	},
	func(w *world) { // attach
		x := w.any()
		w.attempt("attach", func(ctx context.Context) error {
			r, err := w.g.AttachRoot(ctx, block.RootConfig{User: "visitor", Node: x.node, Perm: []block.Perm{0, rd, rd | wr}[w.rng.IntN(3)], Shared: all, StayAtNode: true})
			if err == nil {
				w.visitors = append(w.visitors, r)
			}
			return err
		})
	},
	func(w *world) { // detach
		if len(w.visitors) > 0 {
			detach(w.t, w.visitors[0])
			w.visitors = w.visitors[1:]
		}
	},
	func(w *world) { // open
		x, open := w.any(), w.cow
		if w.rng.IntN(2) == 0 {
			open = w.filter
		}
		w.attempt("open", func(context.Context) error {
			_, err := open(x)
			return err
		})
	},
	func(w *world) { // release
		if x := w.some(func(x *thing) bool { return !w.used(x) && x.store == nil }); x != nil {
			w.forget(x)
		}
	},
}

// Changes that users notice: they rest meanwhile.
var loudChanges = []func(w *world){
	func(w *world) { // Replace
		x, to := w.any(), w.any()
		if w.attempt("replace", func(ctx context.Context) error { return w.g.Replace(ctx, x.node, to.node) }) {
			w.moveUsers(x, to)
		}
	},
	func(w *world) { // SetBacking
		x, to := w.some(func(x *thing) bool { return x.cow != nil }), w.any()
		if x == nil {
			return
		}
		if w.attempt("set another backing", func(ctx context.Context) error { return w.g.SetBacking(ctx, x.node, to.node) }) {
			x.below = to
		}
	},
	func(w *world) { // SetBacking to none
		x := w.some(func(x *thing) bool { return x.cow != nil })
		if x != nil && w.rng.IntN(3) == 0 && w.attempt("set no backing", func(ctx context.Context) error { return w.g.SetBacking(ctx, x.node, nil) }) {
			x.below = nil
		}
	},
	func(w *world) { // an overlay that stays empty, because a second one comes over it at once
		x := w.any()
		for range 2 {
			o := w.mustCow(nil)
			if !w.attempt("append overlay", func(ctx context.Context) error { return w.g.AppendOverlay(ctx, o.node, x.node) }) {
				w.forget(o)
				return
			}
			w.moveUsers(x, o)
			o.below = x
			x = o
		}
	},
}

func (w *world) end() {
	w.undrain(0)
	close(w.stop)
	w.wg.Wait()
	w.check()
	for _, r := range w.visitors {
		detach(w.t, r)
	}
	for _, u := range w.users {
		detach(w.t, u.w)
		detach(w.t, u.r)
	}
	for len(w.things) > 0 {
		w.forget(w.things[len(w.things)-1])
	}
	if nodes := w.g.Nodes(); len(nodes) > 0 {
		w.t.Fatalf("nodes are left:\n%s", dump(w.g))
	}
	balancedDrains(w.t, w.ev)
}

func TestG17GraphInUseAgreesWithAModel(t *testing.T) {
	worlds, changes := uint64(15), 60
	if os.Getenv("NBDSERVE_LONG") != "" {
		worlds, changes = 300, 300
	}
	beat := blocktest.Watchdog(t, time.Minute)
	done, refused := map[string]int{}, map[string]int{}
	for seed := range worlds {
		w := newWorld(t, seed, beat, done, refused)
		for i := range changes {
			if w.rng.IntN(4) == 0 {
				w.rest(func() {
					loudChanges[w.rng.IntN(len(loudChanges))](w)
					w.look()
					w.check()
				})
			} else {
				quietChanges[w.rng.IntN(len(quietChanges))](w)
			}
			if t.Failed() {
				t.Logf("world %d, step %d", seed, i)
				break
			}
			beat()
		}
		w.end()
		if t.Failed() {
			return
		}
	}
	for _, name := range []string{"insert filter", "remove filter", "append overlay", "set backing", "set child", "drop intermediate",
		"drain", "attach", "open", "replace", "set another backing", "set no backing"} {
		never := name == "open" || name == "set no backing" // they ask for nothing that could be refused
		if done[name] == 0 || refused[name] == 0 && !never {
			t.Errorf("'%s' was done %d times and refused %d times: the test has too little to say about it", name, done[name], refused[name])
		}
	}
	t.Logf("done %v, refused %v", done, refused)
}
