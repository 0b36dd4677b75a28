package block_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// A steps makes one of the questions to the drivers of a graph fail.
type steps struct {
	armed  bool
	asked  int
	failAt int
}

func (s *steps) veto(block.Perm, block.Perm) error {
	if !s.armed {
		return nil
	}
	s.asked++
	if s.asked-1 == s.failAt {
		return syscall.EACCES
	}
	return nil
}

// A yard is a graph to be changed, in use by a writing export on its top and a reader
// of a second image over the same backing file. All that is called p... is a filter
// whose driver is asked for permissions.
//
//	export -> ptop -> top ─┐
//	                       ├─> pmid -> mid -> pbase -> base
//	reader ---------> side ┘
//	                           other -> otherdisk
type yard struct {
	t            blocktest.TB
	g            *block.Graph
	ev           *events
	s            *steps
	faults       *blocktest.Faults
	gate         *blocktest.Gate
	export       *block.Root
	reader       *block.Root
	lane         *block.Lane
	base         *blocktest.Store
	top, side    *cowOptions
	contents     []byte // that the export reads
	readContents []byte
	nodes        map[string]*block.Node
}

const yardSize = 4096

func newYard(t blocktest.TB) *yard {
	t.Helper()
	y := &yard{t: t, g: newGraph(t), ev: new(events), s: new(steps), faults: new(blocktest.Faults), gate: blocktest.NewGate(), nodes: map[string]*block.Node{}}
	y.base = blocktest.StoreOf(bytes.Repeat([]byte("base"), yardSize/4))
	y.top = &cowOptions{size: yardSize, file: "/images/top", header: "mid"}
	y.side = &cowOptions{size: yardSize, file: "/images/side", header: "mid"}
	base := blocktest.MemoryConfig(y.base)
	base.NodeName = "base"
	otherdisk := blocktest.MemoryConfig(blocktest.StoreOf(bytes.Repeat([]byte("other..."), yardSize/8)))
	otherdisk.NodeName = "otherdisk"
	slow := blocktest.SlowConfig(y.gate, blocktest.FaultConfig(y.faults, ref("base")))
	slow.NodeName = "slow"
	mid := overlay("mid", yardSize, ref("pbase"))
	mid.Options.(*cowOptions).header = "pbase"
	for _, c := range []*block.Config{
		base, slow, y.pass("pbase", "slow"), mid, y.pass("pmid", "mid"),
		cowConfig("top", y.top, ref("pmid")), cowConfig("side", y.side, ref("pmid")), y.pass("ptop", "top"),
		otherdisk, y.pass("other", "otherdisk"), overlay("new", yardSize, nil),
	} {
		y.nodes[c.NodeName] = opened(t, y.g, c)
	}
	y.export = attached(t, y.nodes["ptop"], "export 'a'", rd|wr, rd)
	y.reader = attached(t, y.nodes["side"], "reader", rd, all)
	y.lane = y.export.NewLane(0, nil)
	t.Cleanup(y.lane.Close)
	y.must(y.export.Do(ctx, func(ctx context.Context) error { return y.export.WriteAt(ctx, []byte("written"), 1000, 0) }))
	y.contents, y.readContents = y.read(y.export), y.read(y.reader)
	y.ev.take()
	return y
}

func (y *yard) pass(name, child string) *block.Config {
	c := filtering(name, y.ev, ref(child))
	c.Options.(*nodeOptions).veto = y.s.veto
	return c
}

func (y *yard) must(err error) {
	y.t.Helper()
	if err != nil {
		y.t.Fatalf("%v", err)
	}
}

func (y *yard) read(r *block.Root) []byte {
	y.t.Helper()
	p := make([]byte, r.Size())
	y.must(r.Do(ctx, func(ctx context.Context) error { return r.ReadAt(ctx, p, 0) }))
	return p
}

// keep has a node released at the end.
func (y *yard) keep(n *block.Node, err error) error {
	if err == nil {
		y.t.Cleanup(func() { release(y.t, y.g, n) })
	}
	return err
}

// works checks that the users read what they should, and can write.
func (y *yard) works(contents, readContents []byte) {
	y.t.Helper()
	verify(y.t, y.g)
	if got := y.read(y.export); !bytes.Equal(got, contents) {
		y.t.Errorf("the export reads %q, want %q", clip(got), clip(contents))
	}
	if got := y.read(y.reader); !bytes.Equal(got, readContents) {
		y.t.Errorf("the reader reads %q, want %q", clip(got), clip(readContents))
	}
	if refused(y.lane) {
		y.t.Errorf("the export is left drained")
	}
	if got := y.base.Bytes(); !bytes.Equal(got, bytes.Repeat([]byte("base"), yardSize/4)) {
		y.t.Errorf("the base has changed: %q", clip(got))
	}
	balancedDrains(y.t, y.ev)
}

func clip(p []byte) []byte { return p[:min(16, len(p))] }

// An operation changes a yard.
type operation struct {
	name string
	run  func(y *yard, ctx context.Context) error
	// links are some of those that must be there afterwards: "top.backing=pmid".
	links string
	// reads gives what export and reader read afterwards; nil: what they did before.
	reads func(y *yard) (contents, readContents []byte)
	// drains are the users that must pause: "export", "reader", in this order.
	drains string
}

func otherBytes(y *yard) []byte { return bytes.Repeat([]byte("other..."), yardSize/8) }

var operations = []operation{
	{"Replace", func(y *yard, ctx context.Context) error { return y.g.Replace(ctx, y.nodes["top"], y.nodes["other"]) },
		"ptop.file=other top.backing=pmid", func(y *yard) ([]byte, []byte) { return otherBytes(y), y.readContents }, "export"},
	{"Replace of what a root uses", func(y *yard, ctx context.Context) error { return y.g.Replace(ctx, y.nodes["ptop"], y.nodes["other"]) },
		"export=other ptop.file=top", func(y *yard) ([]byte, []byte) { return otherBytes(y), y.readContents }, "export"},
	{"Replace by what is above", func(y *yard, ctx context.Context) error {
		return y.g.Replace(ctx, y.nodes["mid"], y.nodes["pmid"]) // nothing to do: pmid is mid's only user
	}, "pmid.file=mid", nil, "export reader"},
	{"InsertFilter", func(y *yard, ctx context.Context) error {
		return y.keep(y.g.InsertFilter(ctx, y.pass("filter", "top"), y.nodes["top"]))
	}, "ptop.file=filter filter.file=top", nil, "export"},
	{"InsertFilter below two", func(y *yard, ctx context.Context) error {
		return y.keep(y.g.InsertFilter(ctx, y.pass("filter", "pmid"), y.nodes["pmid"]))
	}, "top.backing=filter side.backing=filter filter.file=pmid", nil, "export reader"},
	{"RemoveFilter", func(y *yard, ctx context.Context) error { return y.g.RemoveFilter(ctx, y.nodes["pmid"]) },
		"top.backing=mid side.backing=mid", nil, "export reader"},
	{"RemoveFilter below a root", func(y *yard, ctx context.Context) error { return y.g.RemoveFilter(ctx, y.nodes["ptop"]) },
		"export=top", nil, "export"},
	{"AppendOverlay", func(y *yard, ctx context.Context) error {
		return y.g.AppendOverlay(ctx, y.nodes["new"], y.nodes["top"])
	},
		"ptop.file=new new.backing=top top.backing=pmid", nil, "export"},
	{"AppendOverlay on a filter", func(y *yard, ctx context.Context) error {
		return y.g.AppendOverlay(ctx, y.nodes["new"], y.nodes["ptop"])
	},
		"export=new new.backing=ptop ptop.file=top", nil, "export"},
	{"SetBacking", func(y *yard, ctx context.Context) error {
		return y.g.SetBacking(ctx, y.nodes["side"], y.nodes["other"])
	},
		"side.backing=other top.backing=pmid", func(y *yard) ([]byte, []byte) { return y.contents, otherBytes(y) }, "reader"},
	{"SetBacking to none", func(y *yard, ctx context.Context) error { return y.g.SetBacking(ctx, y.nodes["side"], nil) },
		"side.backing=", func(y *yard) ([]byte, []byte) { return y.contents, make([]byte, yardSize) }, "reader"},
	{"SetBacking from none", func(y *yard, ctx context.Context) error { return y.g.SetBacking(ctx, y.nodes["new"], y.nodes["pbase"]) },
		"new.backing=pbase", nil, ""},
	{"SetChild", func(y *yard, ctx context.Context) error {
		return y.g.SetChild(ctx, y.nodes["ptop"], "file", y.nodes["other"])
	},
		"ptop.file=other", func(y *yard) ([]byte, []byte) { return otherBytes(y), y.readContents }, "export"},
	{"SetChild backing", func(y *yard, ctx context.Context) error {
		return y.g.SetChild(ctx, y.nodes["side"], "backing", y.nodes["other"])
	},
		"side.backing=other", func(y *yard) ([]byte, []byte) { return y.contents, otherBytes(y) }, "reader"},
	{"DropIntermediate", func(y *yard, ctx context.Context) error {
		return y.g.DropIntermediate(ctx, y.nodes["mid"], y.nodes["base"], "/images/base", "raw")
	}, "pmid.file=base top.backing=pmid side.backing=pmid", nil, "export reader"},
}

// linked checks links and the headers of images.
func (y *yard) linked(links string) {
	y.t.Helper()
	for _, l := range strings.Fields(links) {
		from, to, _ := strings.Cut(l, "=")
		var n *block.Node
		if from == "export" {
			n = y.export.Node()
		} else {
			parent, child, _ := strings.Cut(from, ".")
			if e := y.g.Lookup(parent).Child(child); e != nil {
				n = e.Node()
			}
		}
		got := ""
		if n != nil {
			got = n.Name()
		}
		if got != to {
			y.t.Errorf("%s is '%s', want '%s'", from, got, to)
		}
	}
}

func TestG17OperationsDoWhatTheySay(t *testing.T) {
	for _, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			y := newYard(t)
			y.must(op.run(y, ctx))
			y.linked(op.links)
			contents, readContents := y.contents, y.readContents
			if op.reads != nil {
				contents, readContents = op.reads(y)
			}
			y.works(contents, readContents)
			y.must(y.export.Do(ctx, func(ctx context.Context) error { return y.export.WriteAt(ctx, []byte("more"), 0, 0) }))
			if got := y.read(y.export); string(got[:4]) != "more" {
				t.Errorf("the export wrote 'more' and reads %q", clip(got))
			}
		})
	}
}

// Each driver refuses once, in the order in which they are asked.
func TestG17RefusalAtEveryStepLeavesTheGraphAsItWas(t *testing.T) {
	for _, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			for at := 0; ; at++ {
				y := newYard(t)
				before := dump(y.g)
				y.s.armed, y.s.failAt = true, at
				err := op.run(y, ctx)
				y.s.armed = false
				if y.s.asked <= at {
					y.must(err)
					break
				}
				if err == nil {
					continue // it was asked for less than before: that cannot be refused
				}
				wantError(t, err, syscall.EACCES)
				unchanged(t, y.g, before)
				y.works(y.contents, y.readContents)
			}
		})
	}
}

func TestG17ConflictLeavesTheGraphAsItWas(t *testing.T) {
	for _, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			y := newYard(t)
			// Nobody else may write to the places where the export would go, nor read where the reader would.
			for _, name := range []string{"other", "new", "pbase", "top"} {
				n := y.nodes[name]
				shared := all
				if name == "other" || name == "new" {
					shared = 0
				}
				if name != "new" {
					attached(t, n, "miser of "+name, 0, shared)
				}
			}
			before := dump(y.g)
			err := op.run(y, ctx)
			if err == nil {
				if strings.Contains(op.links, "=other") {
					t.Errorf("the export went where nobody else may be")
				}
				return
			}
			wantError(t, err, block.ErrBusy, "Permission conflict on node 'other': permissions 'consistent read", "miser of other")
			unchanged(t, y.g, before)
			y.works(y.contents, y.readContents)
		})
	}
}

// A request hangs. Operations that concern its user give up in time, and leave
// everything as it was; the others do not notice.
func TestG17HungRequestHoldsUpOnlyWhatItConcerns(t *testing.T) {
	for _, hung := range []string{"export", "reader"} {
		for _, op := range operations {
			t.Run(hung+"/"+op.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					y := newYard(t)
					r := y.export
					if hung == "reader" {
						r = y.reader
					}
					y.gate.Hold(blocktest.OpRead)
					l := r.NewLane(1, nil)
					defer l.Close()
					stuck := start(t, l, readOf(r))
					waitHeld(t, y.gate, 1)
					before := dump(y.g)
					short, cancel := context.WithTimeout(ctx, time.Minute)
					defer cancel()
					began := time.Now()
					err := op.run(y, short)
					if slices.Contains(strings.Fields(op.drains), hung) {
						wantError(t, err, context.DeadlineExceeded, "drain of node", "still has 1 requests in flight")
						unchanged(t, y.g, before)
					} else if err != nil || time.Since(began) != 0 {
						t.Errorf("held up by a request of %s, for %v: %v", hung, time.Since(began), err)
					}
					y.gate.ReleaseAll()
					if err := <-stuck; err != nil {
						t.Error(err)
					}
					if err != nil {
						y.works(y.contents, y.readContents)
					}
				})
			})
		}
	}
}

func TestG17FailedFlushStopsASnapshot(t *testing.T) {
	y := newYard(t)
	// What the export has written to its node is not durable yet.
	c := blocktest.FaultConfig(y.faults, ref("otherdisk"))
	c.NodeName = "disk"
	n := opened(t, y.g, c)
	w := attached(t, n, "writer", rd|wr, rd)
	before := dump(y.g)
	y.faults.Add(blocktest.Fault{Op: blocktest.OpFlush, Err: syscall.EIO, Times: 1})
	wantError(t, y.g.AppendOverlay(ctx, y.nodes["new"], n), syscall.EIO)
	unchanged(t, y.g, before)
	y.must(y.g.AppendOverlay(ctx, y.nodes["new"], n))
	if w.Node() != y.nodes["new"] {
		t.Errorf("the writer uses '%s'", w.Node().Name())
	}
}

func TestG17HeadersFollowDropIntermediate(t *testing.T) {
	y := newYard(t)
	y.must(y.g.DropIntermediate(ctx, y.nodes["mid"], y.nodes["base"], "/images/base", "raw"))
	if y.top.header != "/images/base" || y.side.header != "/images/base" {
		t.Errorf("headers are %q and %q", y.top.header, y.side.header)
	}
}

func TestG17DropIntermediateNamesTheFileOfBase(t *testing.T) {
	y := newYard(t)
	c := overlay("snap", yardSize, ref("top"))
	c.Options.(*cowOptions).header = "/images/top"
	snap := opened(t, y.g, c)
	// The base that stays is an image with a file name; filters over it do not count.
	y.must(y.g.DropIntermediate(ctx, y.nodes["top"], y.nodes["pmid"], "", ""))
	if got, _ := snap.Instance().(block.BackingChanger).BackingFile(); got != "/images/mid" {
		t.Errorf("the header names %q", got)
	}
	// One without a file name cannot be named.
	before := dump(y.g)
	wantError(t, y.g.DropIntermediate(ctx, y.nodes["mid"], y.nodes["pbase"], "", ""), block.ErrInvalid, "Node 'pbase' has no file name for the header of node '")
	unchanged(t, y.g, before)
}

func TestG17FailedHeaderPutsTheOthersBack(t *testing.T) {
	for _, failing := range []func(*yard) *cowOptions{
		func(y *yard) *cowOptions { return y.top },
		func(y *yard) *cowOptions { return y.side },
	} {
		y := newYard(t)
		failing(y).fail = block.ErrNoSpace
		before := dump(y.g)
		wantError(t, y.g.DropIntermediate(ctx, y.nodes["mid"], y.nodes["base"], "/images/base", "raw"), block.ErrNoSpace,
			"Could not change the backing file of node '", "' to '/images/base': ")
		failing(y).fail = nil
		unchanged(t, y.g, before)
		y.works(y.contents, y.readContents)
	}
}

func TestG17DropIntermediateNeedsAChain(t *testing.T) {
	y := newYard(t)
	for _, pair := range [][2]string{{"mid", "mid"}, {"mid", "top"}, {"top", "other"}, {"base", "mid"}} {
		before := dump(y.g)
		err := y.g.DropIntermediate(ctx, y.nodes[pair[0]], y.nodes[pair[1]], "/x", "raw")
		wantError(t, err, block.ErrInvalid, fmt.Sprintf("Node '%s' is not in the backing chain of '%s'", pair[1], pair[0]))
		unchanged(t, y.g, before)
	}
}

func TestG17RootsThatStay(t *testing.T) {
	y := newYard(t)
	job, err := y.g.AttachRoot(ctx, block.RootConfig{User: "job", Node: y.nodes["mid"], Perm: rd, Shared: all, StayAtNode: true})
	y.must(err)
	defer detach(t, job)
	y.must(y.keep(y.g.InsertFilter(ctx, y.pass("filter", "mid"), y.nodes["mid"])))
	y.linked("pmid.file=filter")
	if job.Node() != y.nodes["mid"] {
		t.Errorf("the job was moved to '%s'", job.Node().Name())
	}
	y.works(y.contents, y.readContents)
	before := dump(y.g)
	wantError(t, y.g.DropIntermediate(ctx, y.nodes["mid"], y.nodes["base"], "/images/base", "raw"), block.ErrBusy, "Should not change 'root' link to 'mid'")
	unchanged(t, y.g, before)
}

func TestG17InsertFilterWantsAFilter(t *testing.T) {
	y := newYard(t)
	before := dump(y.g)
	for _, c := range []*block.Config{node("format", y.ev, filter, ref("top")), y.pass("beside", "other")} {
		_, err := y.g.InsertFilter(ctx, c, y.nodes["top"])
		wantError(t, err, block.ErrInvalid, "Node '"+c.NodeName+"' is no filter of node 'top'")
		unchanged(t, y.g, before)
	}
	_, err := y.g.InsertFilter(ctx, &block.Config{Driver: "nonesuch"}, y.nodes["top"])
	wantError(t, err, nil, "Unknown driver 'nonesuch'")
	wantError(t, y.g.RemoveFilter(ctx, y.nodes["top"]), block.ErrInvalid, "Node 'top' is no filter")
	unchanged(t, y.g, before)
}

func TestG17OverlayMustBeNewAndAbleTo(t *testing.T) {
	y := newYard(t)
	opened(t, y.g, overlay("filled", yardSize, ref("other")))
	before := dump(y.g)
	r := attach(t, y.nodes["new"], "somebody", rd, all)
	wantError(t, y.g.AppendOverlay(ctx, y.nodes["new"], y.nodes["top"]), block.ErrBusy, "The overlay is already in use")
	detach(t, r)
	wantError(t, y.g.AppendOverlay(ctx, y.g.Lookup("filled"), y.nodes["top"]), block.ErrInvalid, "The overlay already has a backing image")
	wantError(t, y.g.AppendOverlay(ctx, y.nodes["otherdisk"], y.nodes["top"]), block.ErrNotSupported, "The overlay does not support backing images")
	unblock := y.nodes["new"].BlockOps("it is being looked at", block.OpExternalSnapshot)
	wantError(t, y.g.AppendOverlay(ctx, y.nodes["new"], y.nodes["top"]), block.ErrBusy, "Node 'new' is busy: it is being looked at")
	unblock()
	unchanged(t, y.g, before)
	y.works(y.contents, y.readContents)
}

// A node that is opened over a drained one, in the middle of a change, still works on
// its children: the change is made when it is open, and concerns it as well.
func TestG17OpeningInsideTheSectionIsWaitedFor(t *testing.T) {
	blocktest.Watchdog(t, 30*time.Second)
	g := newGraph(t)
	flushes, opens := blocktest.NewGate(), blocktest.NewGate()
	c := blocktest.SlowConfig(flushes, disk("", 4096))
	c.NodeName = "base"
	base := opened(t, g, c)
	over := opened(t, g, overlay("over", 4096, nil))
	flushes.Hold(blocktest.OpFlush)
	changed := make(chan error, 1)
	go func() { changed <- g.AppendOverlay(ctx, over, base) }()
	waitHeld(t, flushes, 1) // the section has begun
	opens.Hold(blocktest.OpOpen)
	late := make(chan *block.Node, 1)
	go func() {
		c := blocktest.SlowConfig(opens, ref("base"))
		c.NodeName = "late"
		late <- open(t, g, c)
	}()
	waitHeld(t, opens, 1)
	flushes.Release(1)
	for base.Quiesced() > 0 {
	}
	if over.Backing() != nil {
		t.Errorf("the change was made under a node that is being opened")
	}
	opens.ReleaseAll()
	flushes.ReleaseAll()
	n := <-late
	defer release(t, g, n)
	if err := <-changed; err != nil {
		t.Fatal(err)
	}
	if got := n.Child("file").Node(); got != over {
		t.Errorf("the late node uses '%s'", got.Name())
	}
	verify(t, g)
}

func TestG15CyclesAreRefusedByName(t *testing.T) {
	y := newYard(t)
	before := dump(y.g)
	for _, c := range []struct {
		err         error
		child, name string
		parent      string
	}{
		{y.g.SetBacking(ctx, y.nodes["mid"], y.nodes["top"]), "top", "backing", "mid"},
		{y.g.SetBacking(ctx, y.nodes["mid"], y.nodes["mid"]), "mid", "backing", "mid"},
		{y.g.SetChild(ctx, y.nodes["pbase"], "file", y.nodes["ptop"]), "ptop", "file", "pbase"},
		{y.g.SetChild(ctx, y.nodes["ptop"], "file", y.nodes["ptop"]), "ptop", "file", "ptop"},
		{y.g.AppendOverlay(ctx, y.nodes["new"], y.nodes["new"]), "new", "backing", "new"},
	} {
		wantError(t, c.err, block.ErrInvalid, fmt.Sprintf("Making '%s' a %s child of '%s' would create a cycle", c.child, c.name, c.parent))
	}
	unchanged(t, y.g, before)
	y.works(y.contents, y.readContents)
}

func TestG15FrozenLinksStay(t *testing.T) {
	for _, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			y := newYard(t)
			thawTop, err := y.g.Freeze(y.nodes["ptop"], y.nodes["base"])
			y.must(err)
			thawSide, err := y.g.Freeze(y.nodes["side"], nil)
			y.must(err)
			before := dump(y.g)
			err = op.run(y, ctx)
			frozen := map[string]string{
				"Replace":                  "Cannot change 'file' link from 'ptop' to 'top'",
				"InsertFilter":             "Cannot change 'file' link from 'ptop' to 'top'",
				"InsertFilter below two":   "Cannot change 'backing' link from 'top' to 'pmid'",
				"RemoveFilter":             "Cannot change 'backing' link from 'top' to 'pmid'",
				"AppendOverlay":            "Cannot change 'file' link from 'ptop' to 'top'",
				"SetBacking":               "Cannot change frozen 'backing' link from 'side' to 'pmid'",
				"SetBacking to none":       "Cannot change frozen 'backing' link from 'side' to 'pmid'",
				"SetChild":                 "Cannot change frozen 'file' link from 'ptop' to 'top'",
				"SetChild backing":         "Cannot change frozen 'backing' link from 'side' to 'pmid'",
				"DropIntermediate":         "Cannot change 'file' link from 'pmid' to 'mid'",
				"Replace by what is above": "",
			}
			if want := frozen[op.name]; want != "" {
				wantError(t, err, block.ErrBusy, want)
				unchanged(t, y.g, before)
				y.works(y.contents, y.readContents)
			} else if err != nil {
				t.Errorf("no frozen link is concerned: %v", err)
			}
			thawTop()
			thawSide()
			if want := frozen[op.name]; want != "" {
				y.must(op.run(y, ctx))
			}
		})
	}
	y := newYard(t)
	_, err := y.g.Freeze(y.nodes["mid"], y.nodes["top"])
	wantError(t, err, block.ErrInvalid, "Node 'top' is not in the backing chain of 'mid'")
}

func TestG18SetBackingOfWhatCannotHaveOne(t *testing.T) {
	y := newYard(t)
	before := dump(y.g)
	wantError(t, y.g.SetBacking(ctx, y.nodes["ptop"], y.nodes["other"]), block.ErrNotSupported, "Driver 'testfilter' of node 'ptop' does not support backing files")
	for _, n := range []*block.Node{y.nodes["pmid"], nil} {
		same := y.g.SetBacking(ctx, y.nodes["top"], y.nodes["pmid"]) // what it is already
		if n == nil {
			same = y.g.SetBacking(ctx, y.nodes["new"], nil)
		}
		if same != nil {
			t.Errorf("no change: %v", same)
		}
	}
	unchanged(t, y.g, before)
}

func TestG18ChildrenAreChangedByName(t *testing.T) {
	y := newYard(t)
	before := dump(y.g)
	for _, c := range []struct {
		node, name, child string
		is                error
		text              string
	}{
		{"ptop", "backing", "other", block.ErrInvalid, "'ptop' is a testfilter filter node that does not support a backing child"},
		{"top", "data-file", "other", block.ErrInvalid, "The node top does not have a child named data-file"},
		{"ptop", "file", "", block.ErrInvalid, "The node ptop must have a child named file"},
		{"base", "backing", "other", block.ErrNotSupported, "Driver 'memory' of node 'base' does not support backing files"},
	} {
		wantError(t, y.g.SetChild(ctx, y.nodes[c.node], c.name, y.nodes[c.child]), c.is, c.text)
	}
	y.must(y.g.SetChild(ctx, y.nodes["ptop"], "file", y.nodes["top"]))
	unchanged(t, y.g, before)
}

func TestG18BackingNodesAreBlocked(t *testing.T) {
	y := newYard(t)
	for op := block.OpBackupSource; op <= block.OpReplace; op++ {
		err := y.nodes["pmid"].OpAllowed(op)
		switch op {
		case block.OpCommitTarget, block.OpStream, block.OpBackupSource, block.OpBackupTarget:
			if err != nil {
				t.Errorf("%s of a backing node: %v", op, err)
			}
		default:
			wantError(t, err, block.ErrBusy, "Node 'pmid' is busy: node is used as backing hd of 'top'")
		}
		if err := y.nodes["top"].OpAllowed(op); err != nil {
			t.Errorf("%s of a node that is no backing node: %v", op, err)
		}
	}
	before := dump(y.g)
	busy := "Node 'pmid' is busy: node is used as backing hd of 'top'"
	wantError(t, y.g.Replace(ctx, y.nodes["pmid"], y.nodes["other"]), block.ErrBusy, busy)
	wantError(t, y.g.AppendOverlay(ctx, y.nodes["new"], y.nodes["pmid"]), block.ErrBusy, busy)
	unchanged(t, y.g, before)
	// The blockers follow the links.
	y.must(y.g.SetBacking(ctx, y.nodes["top"], y.nodes["other"]))
	wantError(t, y.nodes["pmid"].OpAllowed(block.OpResize), block.ErrBusy, "Node 'pmid' is busy: node is used as backing hd of 'side'")
	wantError(t, y.nodes["other"].OpAllowed(block.OpResize), block.ErrBusy, "Node 'other' is busy: node is used as backing hd of 'top'")
	y.must(y.g.SetBacking(ctx, y.nodes["side"], nil))
	if err := y.nodes["pmid"].OpAllowed(block.OpResize); err != nil {
		t.Error(err)
	}
}

func TestG23BlockedOperationsNameTheReason(t *testing.T) {
	y := newYard(t)
	top := y.nodes["top"]
	before := dump(y.g)
	unblock := top.BlockOps("block device is in use by block job: mirror", block.OpReplace, block.OpExternalSnapshot)
	again := top.BlockOps("block device is in use by block job: mirror", block.OpReplace)
	busy := "Node 'top' is busy: block device is in use by block job: mirror"
	wantError(t, y.g.Replace(ctx, top, y.nodes["other"]), block.ErrBusy, busy)
	wantError(t, y.g.AppendOverlay(ctx, y.nodes["new"], top), block.ErrBusy, busy)
	if err := top.OpAllowed(block.OpResize); err != nil {
		t.Errorf("resize is not blocked: %v", err)
	}
	unchanged(t, y.g, before)
	unblock()
	wantError(t, y.g.Replace(ctx, top, y.nodes["other"]), block.ErrBusy, busy)
	again()
	all := top.BlockOps("everything")
	wantError(t, top.OpAllowed(block.OpEject), block.ErrBusy, "Node 'top' is busy: everything")
	all()
	y.must(y.g.AppendOverlay(ctx, y.nodes["new"], top))
	y.works(y.contents, y.readContents)
}

func TestG28OnlySomeNodesTakeChildren(t *testing.T) {
	y := newYard(t)
	_, err := y.g.AddChild(ctx, y.nodes["top"], y.nodes["other"])
	wantError(t, err, block.ErrNotSupported, "The node top does not support adding a child")
	wantError(t, y.g.RemoveChild(ctx, y.nodes["top"], "backing"), block.ErrNotSupported, "The node top does not support removing a child")
}

func TestG17LimitsFollowAChange(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	aligned := func(name string, a int64) *block.Config {
		return &block.Config{Driver: "memory", NodeName: name, Options: &blocktest.MemoryOptions{
			Store: blocktest.NewStore(8192), Limits: block.Limits{RequestAlignment: a, MaxTransfer: 8 * a}}}
	}
	small, large := opened(t, g, aligned("small", 512)), opened(t, g, aligned("large", 4096))
	top := opened(t, g, node("top", ev, filter, node("mid", ev, filter, ref("small"))))
	r := attached(t, top, "export", rd|wr, all)
	for _, n := range []*block.Node{large, small, large} {
		if err := g.SetChild(ctx, g.Lookup("mid"), "file", n); err != nil {
			t.Fatal(err)
		}
		want := n.Limits()
		if got := r.Limits(); got.RequestAlignment != want.RequestAlignment || got.MaxTransfer != want.MaxTransfer {
			t.Errorf("limits %+v, want those of '%s', %+v", got, n.Name(), want)
		}
		// Requests are aligned to the new limits: the node below would complain.
		if err := r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, make([]byte, 5000), 7, 0) }); err != nil {
			t.Error(err)
		}
	}
}

// The rule of QEMU that write needs resize where the size is no multiple of the request
// alignment has no place here: sizes are exact, and what pads the last block is dropped.
func TestG11WriteAtAnUnalignedEndNeedsNoResize(t *testing.T) {
	g := newGraph(t)
	s := blocktest.StoreOf(bytes.Repeat([]byte("x"), 1000))
	disk := opened(t, g, &block.Config{Driver: "memory", NodeName: "disk", Options: &blocktest.MemoryOptions{Store: s, Limits: block.Limits{RequestAlignment: 512}}})
	r := attached(t, disk, "export", rd|wr, rd)
	err := r.Do(ctx, func(ctx context.Context) error {
		return errors.Join(r.WriteAt(ctx, []byte("end"), 997, 0), r.WriteZeroes(ctx, 900, 24, 0), r.WriteAt(ctx, make([]byte, 24), 1000, 0))
	})
	if err != nil {
		t.Error(err)
	}
	if got := s.Bytes(); len(got) != 1000 || string(got[997:]) != "end" || got[899] != 'x' || got[900] != 0 || got[924] != 'x' {
		t.Errorf("%d bytes, the last %q", len(got), got[890:])
	}
	if err := r.WriteAt(ctx, []byte("past"), 998, 0); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("a write of something into the padding: %v", err)
	}
}
