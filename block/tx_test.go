package block_test

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// A consent is a driver that takes its time to answer CheckPerm, when it is asked for
// write and has not agreed to that yet.
type consent struct {
	asked  chan struct{} // one for each question
	answer chan error
	always bool // ask again
	agreed bool
}

func newConsent() *consent { return &consent{asked: make(chan struct{}), answer: make(chan error)} }

// hesitant is a node whose driver asks c.
func hesitant(name string, ev *events, c *consent, kids ...any) *block.Config {
	cfg := node(name, ev, kids...)
	cfg.Options.(*nodeOptions).veto = func(perm, _ block.Perm) error {
		if perm&wr == 0 || c.agreed && !c.always {
			return nil
		}
		c.asked <- struct{}{}
		err := <-c.answer
		c.agreed = err == nil
		return err
	}
	return cfg
}

func attachTo(n *block.Node, user string, perm, shared block.Perm) func() (*block.Root, error) {
	return func() (*block.Root, error) {
		return n.Graph().AttachRoot(ctx, block.RootConfig{User: user, Node: n, Perm: perm, Shared: shared})
	}
}

// An attempt is a call that goes on in the background.
type attempt struct {
	root *block.Root
	done chan error
}

func try(f func() (*block.Root, error)) *attempt {
	a := &attempt{done: make(chan error, 1)}
	go func() {
		var err error
		a.root, err = f()
		a.done <- err
	}()
	return a
}

func TestG14SlowConsentHoldsUpNobodyElse(t *testing.T) {
	blocktest.Watchdog(t, 30*time.Second)
	g := newGraph(t)
	ev := new(events)
	c := newConsent()
	slow := opened(t, g, hesitant("slow", ev, c))
	other := opened(t, g, node("other", ev, filter, disk("disk", 4096)))
	r := attached(t, other, "export 'b'", rd|wr, rd)
	before := dump(g)

	a := try(attachTo(slow, "export 'a'", rd|wr, rd))
	<-c.asked
	// Everything about the other export goes on.
	drain(t, g, other)
	g.DrainEnd(other)
	f, err := g.InsertFilter(ctx, blocktest.SlowConfig(blocktest.NewGate(), ref("other")), other)
	if err != nil {
		t.Fatal(err)
	}
	detach(t, attach(t, f, "reader", rd, all))
	if err := r.Do(ctx, readOf(r)); err != nil {
		t.Error(err)
	}
	if err := g.RemoveFilter(ctx, f); err != nil {
		t.Error(err)
	}
	release(t, g, f)
	// The node itself can be drained, too.
	drain(t, g, slow)
	g.DrainEnd(slow)
	// A change of it waits for its turn.
	short, cancel := context.WithCancel(ctx)
	cancel()
	_, err = g.AttachRoot(short, block.RootConfig{User: "late", Node: slow, Perm: rd, Shared: all})
	wantError(t, err, context.Canceled, "another change of node 'slow' did not end")
	late := try(attachTo(slow, "reader", rd, all))
	c.answer <- syscall.EAGAIN
	if err := <-a.done; !errors.Is(err, syscall.EAGAIN) {
		t.Errorf("attach after a refusal: %v", err)
	}
	if err := <-late.done; err != nil {
		t.Errorf("attach that waited: %v", err)
	}
	detach(t, late.root)
	unchanged(t, g, before)
}

// While a driver makes up its mind, its node may be drained and the drain may end. What
// is undone afterwards must not leave a gate closed or open.
func TestG14DrainsDuringARefusedChange(t *testing.T) {
	for _, drained := range []string{"before", "during", "until after", "over and over"} {
		for _, what := range []string{"attach", "open over", "replace"} {
			t.Run(what+"/"+drained, func(t *testing.T) {
				blocktest.Watchdog(t, 30*time.Second)
				g := newGraph(t)
				ev := new(events)
				c := newConsent()
				slow := opened(t, g, hesitant("slow", ev, c))
				old := opened(t, g, disk("old", 0))
				mid := opened(t, g, node("mid", ev, filter, ref("old")))
				r := attached(t, mid, "user", rd|wr, all)
				l := r.NewLane(0, nil)
				defer l.Close()
				before := dump(g)
				if drained == "before" || drained == "over and over" {
					drain(t, g, slow)
				}
				a := try(func() (*block.Root, error) {
					switch what {
					case "attach":
						return attachTo(slow, "new", rd|wr, all)()
					case "open over":
						_, err := g.Open(ctx, node("top", ev, image, ref("slow")))
						return nil, err
					}
					return nil, g.Replace(ctx, old, slow)
				})
				<-c.asked
				switch drained {
				case "before":
					g.DrainEnd(slow)
				case "during":
					drain(t, g, slow)
					g.DrainEnd(slow)
				case "until after":
					drain(t, g, slow)
				case "over and over":
					g.DrainEnd(slow)
					drain(t, g, slow)
				}
				c.answer <- syscall.EACCES
				if err := <-a.done; !errors.Is(err, syscall.EACCES) {
					t.Errorf("the driver has refused: %v", err)
				}
				if drained == "until after" || drained == "over and over" {
					verify(t, g)
					g.DrainEnd(slow)
				}
				unchanged(t, g, before)
				if refused(l) {
					t.Errorf("the user's gate is left closed")
				}
			})
		}
	}
}

// The reference that a change has taken may be the last one when it is undone.
func TestG14NodeReleasedDuringARefusedChangeIsClosed(t *testing.T) {
	blocktest.Watchdog(t, 30*time.Second)
	g := newGraph(t)
	ev := new(events)
	c := newConsent()
	slow := open(t, g, hesitant("slow", ev, c))
	a := try(attachTo(slow, "export 'a'", rd|wr, rd))
	<-c.asked
	release(t, g, slow)
	c.answer <- syscall.EACCES
	if err := <-a.done; !errors.Is(err, syscall.EACCES) {
		t.Errorf("the driver has refused: %v", err)
	}
	if left := dump(g); left != "" {
		t.Errorf("nodes left:\n%s", left)
	}
}

func TestG14DriversAreAskedOneChangeAtATime(t *testing.T) {
	blocktest.Watchdog(t, 30*time.Second)
	g := newGraph(t)
	ev := new(events)
	c := newConsent()
	c.always = true
	opened(t, g, hesitant("base", ev, c))
	one := opened(t, g, node("one", ev, filter, ref("base")))
	two := opened(t, g, node("two", ev, filter, ref("base")))
	ev.take()
	a := try(attachTo(one, "a", rd|wr, all))
	<-c.asked
	b := try(attachTo(two, "b", rd|wr, all))
	c.answer <- nil
	if err := <-a.done; err != nil {
		t.Error(err)
	}
	<-c.asked
	c.answer <- nil
	if err := <-b.done; err != nil {
		t.Error(err)
	}
	perms := fmt.Sprintf("%d/%d", rd|wr, all)
	wantEvents(t, ev, "check one "+perms, "check base "+perms, "set one "+perms, "set base "+perms,
		"check two "+perms, "check base "+perms, "set two "+perms, "set base "+perms)
	leave := try(func() (*block.Root, error) { return nil, a.root.Detach(ctx) })
	<-c.asked // base is still written by b
	c.answer <- nil
	if err := <-leave.done; err != nil {
		t.Error(err)
	}
	detach(t, b.root)
}

// A link that a change is moving is frozen only when it is known where it leads.
func TestG14FreezeWaitsForAChange(t *testing.T) {
	blocktest.Watchdog(t, 30*time.Second)
	g := newGraph(t)
	ev := new(events)
	c := newConsent()
	old := opened(t, g, disk("old", 0))
	slow := opened(t, g, hesitant("slow", ev, c))
	top := opened(t, g, node("top", ev, filter, ref("old"), backing, ref("old")))
	attached(t, top, "writer", rd|wr, all)
	before := dump(g)
	a := try(func() (*block.Root, error) { return nil, g.SetChild(ctx, top, "file", slow) })
	<-c.asked
	frozen := make(chan func())
	go func() {
		thaw, err := g.Freeze(top, old)
		if err != nil {
			t.Error(err)
		}
		frozen <- thaw
	}()
	select {
	case <-frozen:
		t.Error("a link was frozen in the middle of a change")
	default:
	}
	c.answer <- syscall.EACCES
	<-a.done
	(<-frozen)()
	unchanged(t, g, before)
}
