package quorum_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"github.com/nbdserve/nbdserve/block/filter/quorum"
)

var ctx = context.Background()

const (
	rd  = block.PermConsistentRead
	wr  = block.PermWrite
	all = block.PermAll
)

const size = 100_001

// A rig is a quorum over memory nodes, each behind a fault and a slow node.
type rig struct {
	t      *testing.T
	g      *block.Graph
	log    *lines
	stores []*blocktest.Store
	faults []*blocktest.Faults
	gates  []*blocktest.Gate
	node   *block.Node
	root   *block.Root
}

// lines is a log.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) has(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.text.String(), text)
}

func config(o quorum.Options, children ...*block.Config) *block.Config {
	c := &block.Config{Driver: "quorum", NodeName: "q", Unmap: true, Options: &o, Children: map[string]*block.Config{}}
	for i, k := range children {
		c.Children[fmt.Sprintf("children.%d", i)] = k
	}
	return c
}

func named(name string, c *block.Config) *block.Config {
	c.NodeName = name
	return c
}

func ref(name string) *block.Config { return &block.Config{Ref: name} }

// newRig opens a quorum of n children called child0, child1 and so on.
func newRig(t *testing.T, n int, o quorum.Options) *rig {
	t.Helper()
	r := &rig{t: t, log: new(lines)}
	r.g = block.NewGraph(slog.New(slog.NewTextHandler(r.log, nil)), quorum.Driver(), blocktest.Memory(t), blocktest.FaultDriver(), blocktest.SlowDriver())
	t.Cleanup(func() {
		if err := r.g.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	var refs []*block.Config
	for i := range n {
		r.child(i)
		refs = append(refs, ref(fmt.Sprintf("child%d", i)))
	}
	r.node = r.open(config(o, refs...))
	root, err := r.g.AttachRoot(ctx, block.RootConfig{User: "export", Node: r.node, Perm: rd | wr, Shared: rd})
	if err != nil {
		t.Fatal(err)
	}
	r.root = root
	t.Cleanup(func() {
		if err := r.root.Detach(ctx); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *rig) open(c *block.Config) *block.Node {
	r.t.Helper()
	n, err := r.g.Open(ctx, c)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := r.g.Release(ctx, n); err != nil {
			r.t.Error(err)
		}
	})
	return n
}

// child opens child number i.
func (r *rig) child(i int) *block.Node {
	r.stores = append(r.stores, blocktest.StoreOf(bytes.Repeat([]byte{'.'}, size)))
	r.faults = append(r.faults, new(blocktest.Faults))
	r.gates = append(r.gates, blocktest.NewGate())
	return r.open(named(fmt.Sprintf("child%d", i), blocktest.SlowConfig(r.gates[i], blocktest.FaultConfig(r.faults[i], blocktest.MemoryConfig(r.stores[i])))))
}

func (r *rig) write(p string, off int64) error {
	return r.root.Do(ctx, func(ctx context.Context) error { return r.root.WriteAt(ctx, []byte(p), off, 0) })
}

func (r *rig) read(off int64, n int) (string, error) {
	p := make([]byte, n)
	err := r.root.Do(ctx, func(ctx context.Context) error { return r.root.ReadAt(ctx, p, off) })
	return string(p), err
}

func (r *rig) wantRead(off int64, want string) {
	r.t.Helper()
	if got, err := r.read(off, len(want)); err != nil || got != want {
		r.t.Errorf("read %q, %v, want %q", got, err, want)
	}
}

func (r *rig) on(child int, off int64, n int) string {
	p := make([]byte, n)
	r.stores[child].Read(p, off)
	return string(p)
}

func (r *rig) figure(name string) float64 {
	for _, m := range r.node.Instance().(block.Measurer).Measurements() {
		if m.Name == name {
			return m.Value
		}
	}
	r.t.Fatalf("no figure %s", name)
	return 0
}

func wantError(t *testing.T, err error, is error, text string) {
	t.Helper()
	if err == nil || !errors.Is(err, is) || !strings.Contains(err.Error(), text) {
		t.Errorf("the error is %q, want %q that wraps %v", err, text, is)
	}
}

func TestQuorumConforms(t *testing.T) {
	type child struct {
		limits block.Limits
		dead   []blocktest.Op // requests that fail
	}
	everything := child{limits: blocktest.AllFlags}
	aligned := func(a int64) child {
		l := blocktest.AllFlags
		l.RequestAlignment = a
		return child{limits: l}
	}
	dead := child{blocktest.AllFlags, []blocktest.Op{blocktest.OpRead, blocktest.OpWrite, blocktest.OpZero, blocktest.OpStatus}}
	for name, c := range map[string]struct {
		options  quorum.Options
		children []child
		fast     bool
		holes    bool
	}{
		"Aligned":        {quorum.Options{VoteThreshold: 2}, []child{aligned(512), aligned(4096), everything}, true, true},
		"Bare":           {quorum.Options{VoteThreshold: 2}, []child{everything, {limits: block.Limits{RequestAlignment: 1}}, aligned(512)}, false, true},
		"TheFirstIsDead": {quorum.Options{VoteThreshold: 2, RewriteCorrupted: true}, []child{dead, everything, everything}, true, false},
		"FIFODead":       {quorum.Options{VoteThreshold: 1, ReadPattern: quorum.ReadFIFO}, []child{dead, everything}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.Conformance(t, blocktest.Factory{
				New: func(t blocktest.TB) blocktest.Subject {
					contents := make([]byte, size)
					copy(contents[1000:], bytes.Repeat([]byte{1, 2, 3}, 10_000))
					var kids []*block.Config
					for _, k := range c.children {
						s := blocktest.NewStore(size)
						s.Write(contents[1000:31_000], 1000)
						faults := new(blocktest.Faults)
						for _, op := range k.dead {
							faults.Add(blocktest.Fault{Op: op, Err: syscall.EIO})
						}
						kids = append(kids, blocktest.FaultConfig(faults,
							&block.Config{Driver: "memory", Unmap: true, Options: &blocktest.MemoryOptions{Store: s, Limits: k.limits, NoZero: k.limits.ZeroFlags == 0}}))
					}
					return blocktest.Subject{Graph: blocktest.NewGraph(t, quorum.Driver()), Config: config(c.options, kids...), Contents: contents}
				},
				FastZero: c.fast, DiscardZeroes: c.fast, Holes: c.holes,
			})
		})
	}
}

func TestMinorityIsOutvoted(t *testing.T) {
	r := newRig(t, 3, quorum.Options{VoteThreshold: 2})
	for liar := range 3 {
		off := int64(liar) * 5000
		r.stores[liar].Write([]byte("lie"), off+7)
		r.wantRead(off, "............")
		if got := r.on(liar, off+7, 3); got != "lie" {
			t.Errorf("child %d was changed to %q", liar, got)
		}
		if !r.log.has("child=children.0") || r.figure("quorum_outvoted_total") != float64(liar+1) {
			t.Errorf("outvoted %v times, log: %s", r.figure("quorum_outvoted_total"), r.log.text.String())
		}
	}
}

func TestCorruptedMinorityIsRewritten(t *testing.T) {
	r := newRig(t, 3, quorum.Options{VoteThreshold: 2, RewriteCorrupted: true})
	r.stores[0].Write([]byte("lie"), 7)
	r.stores[2].Write([]byte("lie"), 70_000)
	r.wantRead(0, "............")
	r.wantRead(69_995, "............")
	for i := range 3 {
		if got := r.on(i, 7, 3) + r.on(i, 70_000, 3); got != "......" {
			t.Errorf("child %d has %q", i, got)
		}
	}
	if o, w := r.figure("quorum_outvoted_total"), r.figure("quorum_rewrites_total"); o != 2 || w != 2 {
		t.Errorf("outvoted %v times, rewritten %v times", o, w)
	}
	// One that cannot be rewritten is left.
	r.stores[1].Write([]byte("lie"), 7)
	r.faults[1].Add(blocktest.Fault{Op: blocktest.OpWrite, Err: syscall.EIO, Times: 1})
	r.wantRead(0, "............")
	if got := r.on(1, 7, 3); got != "lie" {
		t.Errorf("the child has %q", got)
	}
}

func TestNoMajorityIsAnError(t *testing.T) {
	r := newRig(t, 3, quorum.Options{VoteThreshold: 2, RewriteCorrupted: true})
	r.stores[0].Write([]byte("one"), 0)
	r.stores[1].Write([]byte("two"), 0)
	_, err := r.read(0, 10)
	wantError(t, err, syscall.EIO, "quorum: 1 of 3 children agree on 10 bytes at offset 0, 2 must")
	if r.on(0, 0, 3) != "one" || r.on(1, 0, 3) != "two" || r.on(2, 0, 3) != "..." {
		t.Errorf("without a majority something was rewritten")
	}
	if r.figure("quorum_failures_total") != 1 {
		t.Errorf("%v failures", r.figure("quorum_failures_total"))
	}
}

func TestFailingChildrenAreCountedAgainstTheThreshold(t *testing.T) {
	requests := map[string]struct {
		op blocktest.Op
		do func(r *rig) error
	}{
		"read":  {blocktest.OpRead, func(r *rig) error { _, err := r.read(0, 10); return err }},
		"write": {blocktest.OpWrite, func(r *rig) error { return r.write("written", 0) }},
		"flush": {blocktest.OpFlush, func(r *rig) error { return r.root.Do(ctx, r.root.Flush) }},
		"zero": {blocktest.OpZero, func(r *rig) error {
			return r.root.Do(ctx, func(ctx context.Context) error { return r.root.WriteZeroes(ctx, 0, 10, 0) })
		}},
		"fast zero": {blocktest.OpZero, func(r *rig) error {
			return r.root.Do(ctx, func(ctx context.Context) error { return r.root.WriteZeroes(ctx, 0, 10, block.NoFallback) })
		}},
		"discard": {blocktest.OpZero, func(r *rig) error {
			return r.root.Do(ctx, func(ctx context.Context) error { return r.root.Discard(ctx, 0, 10) })
		}},
	}
	for name, req := range requests {
		for _, failing := range [][]int{{}, {0}, {2}, {0, 1}, {1, 2}, {0, 1, 2}} {
			r := newRig(t, 3, quorum.Options{VoteThreshold: 2})
			for i, c := range failing {
				err := error(syscall.ENOSPC)
				if i == 0 {
					err = syscall.EIO
				}
				if len(failing) == 3 && i == 1 {
					err = syscall.EIO // the most frequent
				}
				r.faults[c].Add(blocktest.Fault{Op: req.op, Err: err})
			}
			err := req.do(r)
			if len(failing) < 2 {
				if err != nil {
					t.Errorf("%s with %v failing: %v", name, failing, err)
				}
			} else {
				wantError(t, err, syscall.EIO, fmt.Sprintf("quorum: %d of 3 children succeed, 2 must: ", 3-len(failing)))
			}
			if got := r.figure("quorum_child_errors_total"); got != float64(len(failing)) {
				t.Errorf("%s with %v failing: %v errors counted", name, failing, got)
			}
			for _, f := range r.faults {
				f.Clear()
			}
		}
	}
}

func TestChangesGoToAllChildren(t *testing.T) {
	r := newRig(t, 3, quorum.Options{VoteThreshold: 3})
	err := errors.Join(r.write("written", 500), r.root.Do(ctx, func(ctx context.Context) error {
		return errors.Join(r.root.WriteZeroes(ctx, 10, 3, 0), r.root.WriteZeroes(ctx, 20, 3, block.NoFallback), r.root.Discard(ctx, 30, 3))
	}))
	if err != nil {
		t.Fatal(err)
	}
	for i := range r.stores {
		if got := r.on(i, 500, 7) + r.on(i, 9, 5) + r.on(i, 19, 5) + r.on(i, 29, 5); got != "written.\x00\x00\x00..\x00\x00\x00..\x00\x00\x00." {
			t.Errorf("child %d has %q", i, got)
		}
	}
}

// Zeroing that one child refuses must not leave the children different.
func TestFastZeroIsAllOrNothing(t *testing.T) {
	for refusing, want := range map[int]error{0: block.ErrNotSupported, 1: nil, 2: nil} {
		r := newRig(t, 3, quorum.Options{VoteThreshold: 3})
		r.faults[refusing].Add(blocktest.Fault{Op: blocktest.OpZero, Err: block.ErrNotSupported})
		err := r.root.Do(ctx, func(ctx context.Context) error { return r.root.WriteZeroes(ctx, 0, 4, block.NoFallback) })
		if !errors.Is(err, want) {
			t.Errorf("child %d refuses: %v, want %v", refusing, err, want)
		}
		r.wantRead(0, map[bool]string{true: "....", false: "\x00\x00\x00\x00"}[want != nil])
	}
}

func TestFIFOReadsTheFirstThatDoesNotFail(t *testing.T) {
	r := newRig(t, 3, quorum.Options{VoteThreshold: 1, ReadPattern: quorum.ReadFIFO})
	for i, s := range r.stores {
		s.Write([]byte{byte('0' + i)}, 0)
	}
	r.wantRead(0, "0")
	r.faults[0].Add(blocktest.Fault{Op: blocktest.OpRead, Err: syscall.EIO})
	r.wantRead(0, "1")
	r.faults[1].Add(blocktest.Fault{Op: blocktest.OpRead, Err: syscall.EIO})
	r.wantRead(0, "2")
	r.faults[2].Add(blocktest.Fault{Op: blocktest.OpRead, Err: syscall.ENOMEM})
	_, err := r.read(0, 1)
	wantError(t, err, syscall.ENOMEM, "injected fault on read")
}

func TestVerifySaysWhere(t *testing.T) {
	r := newRig(t, 2, quorum.Options{VoteThreshold: 2, Verify: true})
	r.wantRead(0, "....")
	r.stores[1].Write([]byte("x"), 4321)
	_, err := r.read(4000, 1000)
	wantError(t, err, syscall.EIO, "quorum: 1 of 2 children agree")
	if !r.log.has("blkverify: contents mismatch") || !r.log.has("offset=4321") || !r.log.has("has=120") {
		t.Errorf("log: %s", r.log.text.String())
	}
}

func TestOptionsAreChecked(t *testing.T) {
	g := blocktest.NewGraph(t, quorum.Driver())
	disk := func(n int64) *block.Config { return blocktest.MemoryConfig(blocktest.NewStore(n)) }
	for text, c := range map[string]*block.Config{
		"Number of provided children must be 1 or more":                                                 config(quorum.Options{VoteThreshold: 1}),
		"Parameter 'vote-threshold' expects a value >= 1":                                               config(quorum.Options{}, disk(512)),
		"threshold may not exceed children count":                                                       config(quorum.Options{VoteThreshold: 3}, disk(512), disk(512)),
		"blkverify=on can only be set if there are exactly two files and vote-threshold is 2":           config(quorum.Options{VoteThreshold: 1, Verify: true}, disk(512), disk(512)),
		"rewrite-corrupted=on cannot be used with blkverify=on":                                         config(quorum.Options{VoteThreshold: 2, Verify: true, RewriteCorrupted: true}, disk(512), disk(512)),
		"has 1024 bytes, and the children of a quorum must have the same size: 'small' has 512":         config(quorum.Options{VoteThreshold: 1}, named("small", disk(512)), disk(1024)),
		"the 'quorum' block driver takes options of type *quorum.Options, not *blocktest.MemoryOptions": {Driver: "quorum", Options: &blocktest.MemoryOptions{}},
		"A block device must be specified for \"children.0\"":                                           {Driver: "quorum", NodeName: "q", Options: &quorum.Options{VoteThreshold: 1}, Children: map[string]*block.Config{"children.7": disk(512)}},
	} {
		n, err := g.Open(ctx, c)
		if err == nil {
			t.Errorf("opened %s, want %q", n.Name(), text)
		} else if !strings.Contains(err.Error(), text) {
			t.Errorf("error %q, want %q", err, text)
		}
	}
	if len(g.Nodes()) != 0 {
		t.Errorf("%d nodes are left", len(g.Nodes()))
	}
	for _, p := range []quorum.ReadPattern{quorum.ReadQuorum, quorum.ReadFIFO} {
		var q quorum.ReadPattern
		if err := q.UnmarshalText([]byte(p.String())); err != nil || q != p {
			t.Errorf("%s: %s, %v", p, q, err)
		}
	}
	var p quorum.ReadPattern
	wantError(t, p.UnmarshalText([]byte("lifo")), block.ErrInvalid, "Please set read-pattern as fifo or quorum")
}

func TestG28ChildrenComeAndGoWhileInUse(t *testing.T) {
	r := newRig(t, 2, quorum.Options{VoteThreshold: 2, RewriteCorrupted: true})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			text := fmt.Sprintf("%08d", i)
			if err := r.write(text, 1000); err != nil {
				t.Error(err)
			}
			r.wantRead(1000, text)
		}
	})
	third := r.child(2)
	r.stores[2].Write([]byte("lie"), 0)
	for range 20 {
		e, err := r.g.AddChild(ctx, r.node, third)
		if err != nil {
			t.Fatal(err)
		}
		if e.Name() != "children.2" || e.Node() != third || e.Perm()&wr == 0 || e.Shared()&(wr|block.PermResize) != 0 {
			t.Errorf("the new child is %s, '%s' with %s / %s", e.Name(), e.Node().Name(), e.Perm(), e.Shared())
		}
		r.wantRead(0, "....") // it is outvoted, and put right
		if err := r.g.RemoveChild(ctx, r.node, "children.2"); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	if got := r.on(2, 0, 3); got != "..." {
		t.Errorf("the added child has %q", got)
	}

	// In the middle, too.
	if _, err := r.g.AddChild(ctx, r.node, third); err != nil {
		t.Fatal(err)
	}
	if err := r.g.RemoveChild(ctx, r.node, "children.0"); err != nil {
		t.Fatal(err)
	}
	if err := r.write("both", 0); err != nil {
		t.Fatal(err)
	}
	if r.on(0, 0, 4) != "...." || r.on(1, 0, 4) != "both" || r.on(2, 0, 4) != "both" {
		t.Errorf("children have %q, %q and %q", r.on(0, 0, 4), r.on(1, 0, 4), r.on(2, 0, 4))
	}
	e, err := r.g.AddChild(ctx, r.node, r.g.Lookup("child0"))
	if err != nil || e.Name() != "children.3" {
		t.Fatalf("%v, %v", e, err)
	}
}

func TestG28ChildrenThatCannotComeOrGo(t *testing.T) {
	r := newRig(t, 2, quorum.Options{VoteThreshold: 2})
	small := r.open(named("small", blocktest.MemoryConfig(blocktest.NewStore(512))))
	spare := r.child(2)
	used, err := r.g.AttachRoot(ctx, block.RootConfig{User: "somebody", Node: spare, Perm: rd, Shared: all})
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.g.AddChild(ctx, r.node, spare)
	wantError(t, err, block.ErrBusy, "The node child2 already has a parent")
	if err := used.Detach(ctx); err != nil {
		t.Fatal(err)
	}
	_, err = r.g.AddChild(ctx, r.node, r.g.Lookup("child0"))
	wantError(t, err, block.ErrBusy, "The node child0 already has a parent")
	_, err = r.g.AddChild(ctx, r.node, small)
	wantError(t, err, block.ErrInvalid, "Node 'small' has 512 bytes")
	_, err = r.g.AddChild(ctx, r.node, r.node)
	wantError(t, err, block.ErrBusy, "The node q already has a parent")
	_, err = r.g.AddChild(ctx, spare, small)
	wantError(t, err, block.ErrNotSupported, "The node child2 does not support adding a child")
	wantError(t, r.g.RemoveChild(ctx, spare, "file"), block.ErrNotSupported, "The node child2 does not support removing a child")
	wantError(t, r.g.RemoveChild(ctx, r.node, "children.7"), block.ErrInvalid, "The node q does not have a child named children.7")
	wantError(t, r.g.RemoveChild(ctx, r.node, "children.0"), block.ErrInvalid, "The number of children cannot be lower than the vote threshold 2")
	if got := len(r.node.Children()); got != 2 {
		t.Errorf("%d children are left", got)
	}
	if err := r.write("goes on", 0); err != nil {
		t.Error(err)
	}
	// A read-only node cannot be written by the quorum.
	c := blocktest.MemoryConfig(blocktest.NewStore(size))
	c.ReadOnly = true
	_, err = r.g.AddChild(ctx, r.node, r.open(named("ro", c)))
	wantError(t, err, block.ErrReadOnly, "'ro' is read-only")
	if got := len(r.node.Children()); got != 2 {
		t.Errorf("%d children are left", got)
	}
	r.wantRead(0, "goes on")
}

func TestG28NoChildComesToVerify(t *testing.T) {
	r := newRig(t, 2, quorum.Options{VoteThreshold: 2, Verify: true})
	_, err := r.g.AddChild(ctx, r.node, r.child(2))
	wantError(t, err, block.ErrInvalid, "Cannot add a child to a quorum in blkverify mode")
}

func TestG13NobodyElseWritesToTheChildren(t *testing.T) {
	for _, rewrite := range []bool{false, true} {
		r := newRig(t, 2, quorum.Options{VoteThreshold: 1, RewriteCorrupted: rewrite})
		if err := r.root.Detach(ctx); err != nil {
			t.Fatal(err)
		}
		e := r.node.Child("children.0")
		wantPerm := block.Perm(0)
		if rewrite {
			wantPerm = wr | block.PermResize // without resize, the last block could not be written
		}
		if e.Perm() != wantPerm || e.Shared() != rd|block.PermWriteUnchanged {
			t.Errorf("rewrite %t, without users: %s / %s", rewrite, e.Perm(), e.Shared())
		}
		_, err := r.g.AttachRoot(ctx, block.RootConfig{User: "writer", Node: r.g.Lookup("child0"), Perm: wr, Shared: all})
		wantError(t, err, block.ErrBusy, "Permission conflict on node 'child0'")
		root, err := r.g.AttachRoot(ctx, block.RootConfig{User: "export", Node: r.node, Perm: rd | wr, Shared: all})
		if err != nil {
			t.Fatal(err)
		}
		r.root = root // detached by the rig
	}
}

// Overlapping writes reach all children in one order, and a vote never sees half of one.
func TestVotesDoNotSeeHalfAWrite(t *testing.T) {
	blocktest.Watchdog(t, 30*time.Second)
	r := newRig(t, 3, quorum.Options{VoteThreshold: 3})
	write := func(p string, off int64) chan error {
		done := make(chan error, 1)
		go func() { done <- r.write(p, off) }()
		return done
	}
	held := func(i, n int) {
		t.Helper()
		if err := r.gates[i].WaitHeld(ctx, n); err != nil {
			t.Fatal(err)
		}
	}
	r.gates[0].Hold(blocktest.OpWrite)
	r.gates[2].Hold(blocktest.OpRead)
	first := write("first", 0)
	held(0, 1)
	second := write("second", 3) // waits for the first
	elsewhere := write("elsewhere", 100)
	held(0, 2)
	read := make(chan error, 1)
	go func() {
		got, err := r.read(0, 10)
		if err == nil && got != "firsecond." && got != "first....." {
			err = fmt.Errorf("read %q", got)
		}
		read <- err
	}()
	r.gates[0].Release(2)
	if err := errors.Join(<-first, <-elsewhere); err != nil {
		t.Error(err)
	}
	r.gates[0].ReleaseAll()
	held(2, 1) // the read is at child 2: a write must not overtake it
	r.gates[2].ReleaseAll()
	if err := errors.Join(<-second, <-read); err != nil {
		t.Error(err)
	}
	r.wantRead(0, "firsecond.")
	if got := r.figure("quorum_outvoted_total"); got != 0 {
		t.Errorf("%v children were outvoted", got)
	}
}

func TestParallelWritersAgreeOnAllChildren(t *testing.T) {
	r := newRig(t, 3, quorum.Options{VoteThreshold: 3})
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 200 {
				p := strings.Repeat(string(rune('a'+w)), 700)
				if err := r.write(p, int64(i%5*300)); err != nil {
					t.Error(err)
				}
				if got, err := r.read(int64(i%7*200), 500); err != nil {
					t.Errorf("%v, %q", err, got)
				}
			}
		})
	}
	wg.Wait()
	if r.figure("quorum_outvoted_total") != 0 || !bytes.Equal(r.stores[0].Bytes(), r.stores[1].Bytes()) || !bytes.Equal(r.stores[0].Bytes(), r.stores[2].Bytes()) {
		t.Errorf("the children differ; %v were outvoted", r.figure("quorum_outvoted_total"))
	}
}
