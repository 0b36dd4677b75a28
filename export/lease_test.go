package export

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// A disk is what several processes could use, one at a time: nodes of the driver
// "disk" hold it while they are active.
type disk struct {
	store *blocktest.Store

	mu     sync.Mutex
	holder string
	fails  map[string][]error // what the next calls of "activate" and "inactivate" return
	events []string
	hang   chan struct{} // not nil: activation waits until it is closed
}

func newDisk() *disk {
	d := &disk{store: blocktest.NewStore(1 << 20), fails: make(map[string][]error)}
	d.store.Write(pattern(0, 1<<20), 0)
	return d
}

const (
	ours   = "this process"
	theirs = "process 4711 (other)"
)

func (d *disk) setHolder(who string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.holder = who
}

func (d *disk) heldBy(who string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.holder == who
}

// fail makes the next calls of op return the errors.
func (d *disk) fail(op string, errs ...error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fails[op] = errs
}

// took returns what was done since the last call.
func (d *disk) took() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := strings.Join(d.events, " ")
	d.events = nil
	return s
}

func (d *disk) step(op string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if errs := d.fails[op]; len(errs) > 0 {
		d.fails[op] = errs[1:]
		return errs[0]
	}
	d.events = append(d.events, op)
	return nil
}

func diskConfig(d *disk, inactive bool) *block.Config {
	return &block.Config{Driver: "disk", Unmap: true, Inactive: inactive, Options: &blocktest.MemoryOptions{Store: d.store, Limits: blocktest.AllFlags}}
}

// diskDriver opens nodes that hold their disk while they are active, and know its size of that moment.
func diskDriver(t blocktest.TB, disks ...*disk) *block.Driver {
	memory := blocktest.Memory(t)
	return &block.Driver{Name: "disk", Kind: block.Protocol, NewOptions: memory.NewOptions,
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			inst, err := memory.Open(ctx, o)
			if err != nil {
				return nil, err
			}
			for _, d := range disks {
				if d.store == o.Config.Options.(*blocktest.MemoryOptions).Store {
					n := &diskNode{Instance: inst, d: d}
					n.size.Store(d.store.Size())
					return n, nil
				}
			}
			return nil, fmt.Errorf("no such disk")
		}}
}

type diskNode struct {
	block.Instance
	d    *disk
	size atomic.Int64
}

func (n *diskNode) Size() int64 { return n.size.Load() }

func (n *diskNode) Inactivate(context.Context) error { return n.d.step("inactivate") }

func (n *diskNode) Deactivate() {
	if n.d.heldBy(ours) {
		n.d.setHolder("")
	}
}

func (n *diskNode) Activate(ctx context.Context) error {
	d := n.d
	d.mu.Lock()
	hang := d.hang
	d.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	d.mu.Lock()
	holder := d.holder
	d.mu.Unlock()
	if holder != "" {
		return fmt.Errorf(`Failed to get "write" lock: Is another process using the image [disk]? It is in use by %s.`, holder)
	}
	if err := d.step("activate"); err != nil {
		return err
	}
	d.setHolder(ours)
	n.size.Store(d.store.Size())
	return nil
}

func (n *diskNode) Peek(context.Context) (block.Peeked, error) {
	n.size.Store(n.d.store.Size()) // for its parents
	return block.Peeked{Size: n.Size()}, n.d.step("peek")
}

// leaseRig serves disks, "disk" first, each with activation on connect.
func leaseRig(t blocktest.TB, u setup, disks ...*disk) *rig {
	t.Helper()
	r := &rig{t: t, gate: blocktest.NewGate(), faults: new(blocktest.Faults), served: make(chan struct{}, 1000)}
	r.graph = blocktest.NewGraph(t, diskDriver(t, disks...))
	setDefault(&u.options.CloseTimeout, 50*time.Millisecond)
	r.s = NewServer(u.options)
	for i, d := range disks {
		cfg := blocktest.SlowConfig(r.gate, diskConfig(d, true))
		cfg.Inactive, cfg.Unmap = true, true
		n, err := r.graph.Open(context.Background(), cfg)
		must(t, err)
		c := u.config
		c.Name, c.Graph, c.Node, c.Activation = "disk", r.graph, n, ActivationOnConnect
		if i > 0 {
			c.Name = fmt.Sprintf("disk%d", i)
			t.Cleanup(func() { must(t, r.graph.Release(context.Background(), n)) })
		}
		e, err := r.s.AddExport(context.Background(), c)
		must(t, err)
		if i == 0 {
			r.node, r.e, r.store = n, e, d.store
		}
	}
	t.Cleanup(r.end)
	return r
}

// awaitFigures waits until an export tells that it is inactive, which it does after its disk is free.
func awaitFigures(t blocktest.TB, e *Export) {
	t.Helper()
	waitFor(t, "the figures of an inactive export", func() bool { return !e.Activity().Active })
}

// awaitInactive waits until d is free again.
func awaitInactive(t blocktest.TB, d *disk) {
	t.Helper()
	waitFor(t, "the end of the lease", func() bool { return d.heldBy("") })
}

func TestImageIsHeldWhileThereIsAClient(t *testing.T) {
	for _, polite := range []bool{true, false} {
		d := newDisk()
		r := leaseRig(t, setup{}, d)
		if !d.heldBy("") || r.e.Activity().Active {
			t.Fatal("held without a client")
		}
		a := r.connect().attach(true)
		if !d.heldBy(ours) || !r.e.Activity().Active {
			t.Fatal("GO was answered before the image was held")
		}
		b := r.connect().attach(false)
		wantErrno(t, "WRITE", a.do(cmdWrite, 0, 0, 4, 9, 9, 9, 9), 0)
		if res := b.do(cmdRead, 0, 0, 4); !bytes.Equal(res.data, []byte{9, 9, 9, 9}) {
			t.Fatalf("read %x", res.data)
		}
		leave := func(c *client) {
			if polite {
				c.send(requestBytes(cmdDisc, 0, 0, 0, 0))
				c.expectEnd()
			}
			c.nc.Close()
			r.waitServed(1)
		}
		leave(a)
		wantErrno(t, "READ", b.do(cmdRead, 0, 0, 4), 0)
		leave(b)
		awaitInactive(t, d)
		if s := d.took(); s != "activate inactivate" {
			t.Errorf("it did: %s", s)
		}
		awaitFigures(t, r.e)
		if a := r.e.Activity(); a.Active || a.Activations != 1 || a.Inactivations != 1 {
			t.Errorf("%+v", a)
		}
		r.connect().attach(true)
		if !d.heldBy(ours) {
			t.Error("not held for the next client")
		}
	}
}

// TestRefusalNamesTheHolder: by each option that activates, with one code, and the client may try again.
func TestRefusalNamesTheHolder(t *testing.T) {
	d := newDisk()
	var log bytes.Buffer
	r := leaseRig(t, setup{options: Options{Log: slog.New(slog.NewTextHandler(&log, nil))}}, d)
	d.setHolder(theirs)
	c := r.connect()
	c.greet(3)
	c.structured = true
	c.final(optStructuredReply, nil)
	for _, o := range []struct {
		opt  uint32
		data []byte
	}{{optGo, infoData("disk")}, {optSetMeta, metaData("disk", baseAllocation)}, {optGo, infoData("", infoBlockSize)}} {
		rs := c.option(o.opt, o.data)
		if len(rs) != 1 || rs[0].typ != repErrPolicy || !strings.Contains(string(rs[0].data), theirs) {
			t.Fatalf("option %d: %d replies, %#x %q", o.opt, len(rs), rs[0].typ, rs[0].data)
		}
	}
	old := r.connect()
	old.greet(3)
	old.send(optionBytes(optExportName, []byte("disk")))
	old.expectEnd()
	old.nc.Close()
	r.waitServed(1)
	if !d.heldBy(theirs) || r.e.Activity().Active || r.s.Stats().Clients != 0 {
		t.Fatal("something is left of those that were refused")
	}
	if a := r.e.Activity(); a.ActivationsFailed != 4 {
		t.Errorf("%+v", a)
	}
	if n := strings.Count(log.String(), "client refused"); n != 4 || strings.Count(log.String(), theirs) < n {
		t.Errorf("%d refusals in the log, or without the holder:\n%s", n, &log)
	}
	d.setHolder("")
	if typ := c.final(optSetMeta, metaData("disk", baseAllocation)); typ != repAck {
		t.Fatalf("SET_META when it is free: %#x", typ)
	}
	if typ := c.final(optGo, infoData("disk")); typ != repAck {
		t.Fatalf("GO when it is free: %#x", typ)
	}
	wantErrno(t, "BLOCK_STATUS", c.do(cmdBlockStatus, 0, 0, 4096), 0)
}

func TestFailedSetMetaSelectsNothingEvenIfGoWorks(t *testing.T) {
	d := newDisk()
	r := leaseRig(t, setup{}, d)
	d.fail("activate", unix.EIO)
	c := r.connect()
	c.greet(3)
	c.structured = true
	c.final(optStructuredReply, nil)
	if typ := c.final(optSetMeta, metaData("disk", baseAllocation)); typ != repErrPolicy {
		t.Fatalf("SET_META: %#x", typ)
	}
	c.final(optGo, infoData("disk"))
	wantErrno(t, "BLOCK_STATUS", c.do(cmdBlockStatus, 0, 0, 4096), nbdEINVAL)
}

func TestExportNameActivates(t *testing.T) {
	d := newDisk()
	r := leaseRig(t, setup{}, d)
	d.store.Truncate(2 << 20)
	c := r.connect()
	c.greet(3)
	c.send(optionBytes(optExportName, []byte("disk")))
	if b := c.read(10); be.Uint64(b) != 2<<20 {
		t.Fatalf("reply %x", b)
	}
	if !d.heldBy(ours) {
		t.Fatal("not held")
	}
	c.nc.Close()
	awaitInactive(t, d)
}

// TestLeaseOfSetMeta: it is given back when the client selects something else, or leaves.
func TestLeaseOfSetMeta(t *testing.T) {
	for _, row := range []struct {
		name string
		then func(c *client)
		held [2]bool
		did  string // with the first disk
	}{
		{"nothing", func(*client) {}, [2]bool{true, false}, "activate"},
		{"the same again", func(c *client) { c.final(optSetMeta, metaData("disk", baseAllocation)) }, [2]bool{true, false}, "activate"},
		{"the same with no context", func(c *client) { c.final(optSetMeta, metaData("disk")) }, [2]bool{true, false}, "activate"},
		{"INFO and LIST_META of another", func(c *client) {
			c.final(optInfo, infoData("disk1"))
			c.final(optListMeta, metaData("disk1"))
		}, [2]bool{true, false}, "activate"},
		{"SET_META of another", func(c *client) { c.final(optSetMeta, metaData("disk1", baseAllocation)) }, [2]bool{false, true}, "activate inactivate"},
		{"SET_META of none", func(c *client) { c.final(optSetMeta, metaData("none", baseAllocation)) }, [2]bool{false, false}, "activate inactivate"},
		{"malformed SET_META", func(c *client) { c.final(optSetMeta, []byte{1}) }, [2]bool{false, false}, "activate inactivate"},
		{"SET_META that is too long", func(c *client) { c.final(optSetMeta, make([]byte, maxOption+1)) }, [2]bool{false, false}, "activate inactivate"},
		{"GO to the same", func(c *client) { c.final(optGo, infoData("disk")) }, [2]bool{true, false}, "activate"},
		{"GO to another", func(c *client) { c.final(optGo, infoData("disk1")) }, [2]bool{false, true}, "activate inactivate"},
		{"GO to none", func(c *client) { c.final(optGo, infoData("none")) }, [2]bool{true, false}, "activate"},
		{"ABORT", func(c *client) { c.final(optAbort, nil) }, [2]bool{false, false}, "activate inactivate"},
		{"cut", func(c *client) { c.nc.Close() }, [2]bool{false, false}, "activate inactivate"},
	} {
		t.Run(row.name, func(t *testing.T) {
			disks := [2]*disk{newDisk(), newDisk()}
			r := leaseRig(t, setup{}, disks[0], disks[1])
			c := r.connect()
			c.greet(3)
			c.final(optStructuredReply, nil)
			if typ := c.final(optSetMeta, metaData("disk", baseAllocation)); typ != repAck || !disks[0].heldBy(ours) {
				t.Fatalf("reply %#x", typ)
			}
			row.then(c)
			for i, d := range disks {
				if row.held[i] && !d.heldBy(ours) {
					t.Fatalf("disk %d is not held", i)
				} else if !row.held[i] {
					awaitInactive(t, d)
				}
			}
			if s := disks[0].took(); s != row.did {
				t.Errorf("it did: %s", s)
			}
			c.nc.Close()
			awaitInactive(t, disks[0])
			awaitInactive(t, disks[1])
		})
	}
}

func TestInfoOfAnInactiveExportReadsAfreshAndHoldsNothing(t *testing.T) {
	d := newDisk()
	r := leaseRig(t, setup{}, d)
	d.setHolder(theirs) // who uses it meanwhile, and makes it longer
	c := r.connect()
	c.greet(3)
	size := func(opt uint32) uint64 { return be.Uint64(infoOf(c.option(opt, infoData("disk")), infoExport)) }
	for _, n := range []int64{1 << 20, 3 << 20, 2 << 20} {
		d.store.Truncate(n)
		if got := size(optInfo); got != uint64(n) {
			t.Fatalf("INFO says %d, want %d", got, n)
		}
		if typ := c.final(optListMeta, metaData("disk")); typ != repAck {
			t.Fatalf("LIST_META: %#x", typ)
		}
		if !d.heldBy(theirs) {
			t.Fatal("INFO took the image")
		}
	}
	if s := d.took(); s != "peek peek peek" {
		t.Errorf("it did: %s", s)
	}
	d.fail("peek", unix.EIO)
	rs := c.option(optInfo, infoData("disk"))
	if len(rs) != 1 || rs[0].typ != repErrPolicy || !strings.Contains(string(rs[0].data), "input/output error") {
		t.Fatalf("%#x %q", rs[0].typ, rs[0].data)
	}
	d.setHolder("")
	if got := size(optGo); got != 2<<20 {
		t.Fatalf("GO says %d", got)
	}
	wantErrno(t, "READ at the end", c.do(cmdRead, 0, 2<<20-512, 512), 0)
}

func TestRequestsOfAClientThatIsCutFinishBeforeItsLeaseEnds(t *testing.T) {
	d := newDisk()
	r := leaseRig(t, setup{}, d)
	c := r.connect().attach(true)
	r.gate.Hold(blocktest.OpWrite)
	for i := range int64(20) { // more than there are workers
		c.send(requestBytes(cmdWrite, 0, 1, i*1000, 4, 9, 9, 9, 9))
	}
	must(t, r.gate.WaitHeld(soon(t), 16))
	waitFor(t, "admission", func() bool { return r.inFlight() == 20 })
	c.nc.Close()
	waitFor(t, "free place", func() bool { return r.s.Stats().Clients == 0 })
	if !d.heldBy(ours) {
		t.Fatal("the image was let go with writes in the disk")
	}
	r.gate.ReleaseAll()
	awaitInactive(t, d)
	for i := range 20 {
		if !bytes.Equal(d.store.Bytes()[i*1000:][:4], []byte{9, 9, 9, 9}) {
			t.Fatalf("write %d is not there", i)
		}
	}
}

func TestClientWithoutAPlaceActivatesNothing(t *testing.T) {
	disks := [2]*disk{newDisk(), newDisk()}
	r := leaseRig(t, setup{options: Options{MaxClients: 1}}, disks[0], disks[1])
	r.connect().attach(true)
	c := r.connect()
	c.greet(3)
	if typ := c.final(optGo, infoData("disk1")); typ != repErrPolicy {
		t.Fatalf("reply %#x", typ)
	}
	if s := disks[1].took(); s != "" {
		t.Errorf("it did: %s", s)
	}
}

// hanging makes activation wait until the returned function is called.
func (d *disk) hanging() (release func()) {
	hang := make(chan struct{})
	d.mu.Lock()
	d.hang = hang
	d.mu.Unlock()
	return func() {
		d.mu.Lock()
		d.hang = nil
		d.mu.Unlock()
		close(hang)
	}
}

// TestClientsGiveUpAnActivationThatHangs: one that leaves, one that is evicted, and one at the end of the server.
func TestClientsGiveUpAnActivationThatHangs(t *testing.T) {
	d := newDisk()
	r := leaseRig(t, setup{options: Options{SlowAfter: 4 * time.Millisecond, MaxHandshakes: 2}}, d)
	release := d.hanging()
	waits := func() *client {
		c := r.connect()
		c.greet(3)
		c.send(optionBytes(optGo, infoData("disk")))
		return c
	}
	waiting := func(n int) {
		t.Helper()
		waitFor(t, "clients that wait", func() bool {
			r.e.life.mu.Lock()
			defer r.e.life.mu.Unlock()
			return r.e.life.phase == activating && len(r.e.life.waiting) == n
		})
	}
	waits().nc.Close()
	r.waitServed(1) // the monitor has seen it
	waiting(0)
	oldest, second := waits(), waits()
	waiting(2)
	third := r.connect() // of three one must go
	third.greet(3)
	oldest.expectEnd()
	r.waitServed(1)
	waiting(1)
	if r.e.Drained() {
		t.Error("an export that is being activated is not ready")
	}
	third.nc.Close()
	r.waitServed(1)
	release()
	if rs := second.optReplies(optGo); rs[len(rs)-1].typ != repAck {
		t.Fatalf("the client that stayed: %#x", rs[len(rs)-1].typ)
	}
}

func TestShutdownDuringAnActivationThatHangs(t *testing.T) {
	d := newDisk()
	r := leaseRig(t, setup{}, d)
	defer d.hanging()()
	c := r.connect()
	c.greet(3)
	c.send(optionBytes(optGo, infoData("disk")))
	waitFor(t, "activation", func() bool { _, p := r.e.life.activity(); return p == activating })
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.s.Shutdown(ctx) }()
	if rs := c.optReplies(optGo); rs[0].typ != repErrShutdown {
		t.Fatalf("reply %#x", rs[0].typ)
	}
	select {
	case err := <-ended:
		t.Fatalf("ended with an activation under way: %v", err)
	case <-time.After(10 * time.Millisecond):
	}
	cancel()
	must(t, <-ended)
	if !d.heldBy("") || r.node.Active() {
		t.Error("the image is held after the end")
	}
}

// TestShutdownLeavesNothingBehind: from each phase; an active tree is closed as it is.
func TestShutdownLeavesNothingBehind(t *testing.T) {
	for _, row := range []struct {
		name string
		to   func(r *rig, d *disk)
	}{
		{"inactive", func(*rig, *disk) {}},
		{"with a client", func(r *rig, d *disk) { r.connect().attach(true) }},
		{"lingering", func(r *rig, d *disk) {
			r.connect().attach(true).nc.Close()
			r.waitServed(1)
		}},
		{"after a failed inactivation", func(r *rig, d *disk) {
			d.fail("inactivate", unix.ENOSPC)
			r.e.linger = 0
			r.connect().attach(true).nc.Close()
			waitFor(r.t, "failure", func() bool { return r.e.Activity().InactivationsFailed == 1 })
			if !d.heldBy(ours) {
				r.t.Errorf("the image was let go though it is not stored")
			}
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			d := newDisk()
			r := leaseRig(t, setup{config: Config{Linger: time.Hour}}, d)
			row.to(r, d)
			began := time.Now()
			must(t, r.s.Shutdown(soon(t)))
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// inBubble runs a test in a bubble of time, over pipes.
func inBubble(t *testing.T, f func(t *testing.T)) { synctest.Test(t, f) }

func (r *rig) pipe() *client {
	a, b := net.Pipe()
	return r.connectOver(a, b)
}

func TestActivationIsNotTheClientsTime(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		d := newDisk()
		r := leaseRig(t, setup{options: Options{HandshakeTimeout: 10 * time.Second}}, d)
		c := r.pipe()
		c.greet(3)
		must(t, c.nc.SetDeadline(time.Now().Add(time.Hour)))
		c.structured = true
		c.final(optStructuredReply, nil)
		release := d.hanging()
		time.AfterFunc(15*time.Minute, release) // as when the refcounts of a large image are rebuilt
		if typ := c.final(optSetMeta, metaData("disk", baseAllocation)); typ != repAck {
			t.Fatalf("SET_META: %#x", typ)
		}
		time.Sleep(9 * time.Second)
		if typ := c.final(optGo, infoData("disk")); typ != repAck {
			t.Fatalf("GO: %#x", typ)
		}
		wantErrno(t, "READ", c.do(cmdRead, 0, 0, 512), 0)
		c.nc.Close()
	})
}

func TestSilentClientDoesNotKeepTheImage(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		d := newDisk()
		r := leaseRig(t, setup{options: Options{HandshakeTimeout: 10 * time.Second}}, d)
		c := r.pipe()
		c.greet(3)
		c.final(optStructuredReply, nil)
		c.final(optSetMeta, metaData("disk", baseAllocation))
		time.Sleep(11 * time.Second)
		if !d.heldBy("") {
			t.Error("the image is held for a client that went no further")
		}
	})
}

func TestFailedInactivationKeepsTheImageUntilItWorks(t *testing.T) {
	for _, errno := range []error{unix.ENOSPC, unix.EIO} {
		inBubble(t, func(t *testing.T) {
			d := newDisk()
			r := leaseRig(t, setup{config: Config{Linger: 5 * time.Second}}, d)
			d.fail("inactivate", errno, errno)
			r.pipe().attach(true).nc.Close()
			time.Sleep(5*time.Second + 500*time.Millisecond) // the first try has failed
			if a := r.e.Activity(); !d.heldBy(ours) || !a.Active || a.InactivationsFailed != 1 {
				t.Fatalf("after the first try: %+v", a)
			}
			// A client in between is served, from what is there.
			c := r.pipe().attach(true)
			wantErrno(t, "WRITE", c.do(cmdWrite, 0, 0, 4, 9, 9, 9, 9), 0)
			time.Sleep(time.Hour)
			if a := r.e.Activity(); a.InactivationsFailed != 1 || a.Activations != 1 {
				t.Fatalf("with a client: %+v", a)
			}
			c.nc.Close()
			time.Sleep(5*time.Second + 500*time.Millisecond)
			if a := r.e.Activity(); !d.heldBy(ours) || a.InactivationsFailed != 2 {
				t.Fatalf("after the second try: %+v", a)
			}
			time.Sleep(time.Second)
			if a := r.e.Activity(); !d.heldBy("") || a.Active || a.Inactivations != 1 {
				t.Fatalf("after the third try: %+v", a)
			}
		})
	}
}

func TestLingerKeepsTheImageForClientsThatComeBack(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		d := newDisk()
		r := leaseRig(t, setup{config: Config{Linger: time.Minute}}, d)
		for range 3 {
			r.pipe().attach(true).nc.Close()
			time.Sleep(59 * time.Second)
			if !d.heldBy(ours) {
				t.Fatal("let go in the linger time")
			}
		}
		time.Sleep(2 * time.Second)
		if s := d.took(); s != "activate inactivate" || !d.heldBy("") {
			t.Errorf("it did: %s", s)
		}
	})
}

// TestNodeOfTwoExportsIsActiveWhileOneNeedsIt: by a client, or always.
func TestNodeOfTwoExportsIsActiveWhileOneNeedsIt(t *testing.T) {
	d := newDisk()
	r := leaseRig(t, setup{config: Config{ShareRW: true}}, d)
	add := func(name string, a Activation) (*Export, error) {
		return r.s.AddExport(soon(t), Config{Name: name, Graph: r.graph, Node: r.node, ShareRW: true, Activation: a})
	}
	other, err := add("other", ActivationOnConnect)
	must(t, err)
	enter := func(name string) *client {
		c := r.connect()
		c.greet(3)
		if typ := c.final(optGo, infoData(name)); typ != repAck {
			t.Fatalf("GO %s: %#x", name, typ)
		}
		return c
	}
	a, b := enter("disk"), enter("other")
	a.nc.Close()
	r.waitServed(1)
	wantErrno(t, "READ", b.do(cmdRead, 0, 0, 512), 0)
	b.nc.Close()
	awaitInactive(t, d)
	awaitFigures(t, r.e)
	if s := d.took(); s != "activate inactivate" || other.Activity() != r.e.Activity() {
		t.Errorf("it did: %s; %+v and %+v", s, other.Activity(), r.e.Activity())
	}
	d.setHolder(theirs)
	if _, err := add("always", ActivationAlways); err == nil || !strings.Contains(err.Error(), theirs) {
		t.Fatalf("an export that needs the image always: %v", err)
	}
	d.setHolder("")
	_, err = add("always", ActivationAlways)
	must(t, err)
	if !d.heldBy(ours) {
		t.Fatal("an export that is always active is not")
	}
	enter("disk").nc.Close()
	r.waitServed(1)
	waitFor(t, "the end of the client's lease", func() bool {
		r.e.life.mu.Lock()
		defer r.e.life.mu.Unlock()
		return r.e.life.leases == 1
	})
	if s := d.took(); s != "activate" || !d.heldBy(ours) {
		t.Errorf("it did: %s", s)
	}
}

// TestNobodyElseInactivatesWhatClientsUse: nor what a client may come back to.
func TestNobodyElseInactivatesWhatClientsUse(t *testing.T) {
	d := newDisk()
	r := leaseRig(t, setup{config: Config{Linger: time.Hour}}, d)
	refused := func() {
		t.Helper()
		err := r.graph.SetActive(soon(t), false, r.node)
		if err == nil || !strings.Contains(err.Error(), "export 'disk'") || !d.heldBy(ours) {
			t.Fatalf("inactivated: %v", err)
		}
	}
	c := r.connect().attach(true)
	refused()
	c.nc.Close()
	r.waitServed(1)
	refused()
}

func TestExportThatIsAlwaysActiveLeavesItsNodeAlone(t *testing.T) {
	for range 50 { // the owner has little time to do wrong
		d := newDisk()
		g := blocktest.NewGraph(t, diskDriver(t, d))
		n, err := g.Open(soon(t), diskConfig(d, false))
		must(t, err)
		s := NewServer(Options{})
		_, err = s.AddExport(soon(t), Config{Name: "x", Graph: g, Node: n})
		must(t, err)
		must(t, s.Shutdown(soon(t)))
		must(t, g.Release(context.Background(), n))
		if s := d.took(); s != "" {
			t.Fatalf("it did: %s", s)
		}
	}
}

// TestActiveNodeBecomesInactiveWithoutAClient: the node need not be inactive when it is exported.
func TestActiveNodeBecomesInactiveWithoutAClient(t *testing.T) {
	d := newDisk()
	g := blocktest.NewGraph(t, diskDriver(t, d))
	n, err := g.Open(soon(t), diskConfig(d, false))
	must(t, err)
	defer func() { must(t, g.Release(context.Background(), n)) }()
	s := NewServer(Options{})
	_, err = s.AddExport(soon(t), Config{Name: "x", Graph: g, Node: n, Activation: ActivationOnConnect})
	must(t, err)
	waitFor(t, "inactivation", func() bool { return !n.Active() })
	must(t, s.Shutdown(soon(t)))
}

func TestRefusalKeepsTheEndOfALongText(t *testing.T) {
	d := newDisk()
	r := leaseRig(t, setup{}, d)
	d.setHolder(strings.Repeat("/ä", 2000) + theirs)
	c := r.connect()
	c.greet(3)
	text := string(c.option(optGo, infoData("disk"))[0].data)
	if len(text) > maxErrorText || !strings.HasSuffix(text, theirs+".") || !strings.HasPrefix(text, `export "disk" cannot be used now`) {
		t.Errorf("%d bytes: %s", len(text), text)
	}
}
