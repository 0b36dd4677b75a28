package export

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// A fakeTree is a tree whose changes end when the test says so.
type fakeTree struct {
	t     *testing.T
	up    atomic.Bool
	busy  atomic.Int32
	calls chan *change
}

// A change is an activation or inactivation under way.
type change struct {
	up  bool
	end chan error
}

func (f *fakeTree) active() bool { return f.up.Load() }

func (f *fakeTree) activate(ctx context.Context) error   { return f.change(ctx, true) }
func (f *fakeTree) inactivate(ctx context.Context) error { return f.change(ctx, false) }

func (f *fakeTree) change(ctx context.Context, up bool) error {
	if f.up.Load() == up || f.busy.Add(1) != 1 {
		f.t.Errorf("a change to %v of a tree that is %v, or two changes at once", up, f.up.Load())
	}
	defer f.busy.Add(-1)
	c := &change{up, make(chan error)}
	select {
	case f.calls <- c:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-c.end:
		if err == nil {
			f.up.Store(up)
		}
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A lifeTest is a life of a fake tree, in a bubble of time.
type lifeTest struct {
	*life
	t      *testing.T
	tree   *fakeTree
	hurry  context.CancelFunc
	failed []error // of the clients that got no lease
	mu     sync.Mutex
}

// inLife runs a test of a life that begins inactive, or active.
func inLife(t *testing.T, up bool, f func(l *lifeTest)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		l := &lifeTest{t: t, tree: &fakeTree{t: t, calls: make(chan *change)}, hurry: cancel}
		l.tree.up.Store(up)
		l.life = newLife(ctx, l.tree, slog.New(slog.DiscardHandler))
		l.rest()
		defer func() {
			l.stop()
			l.hurry() // what nobody answers any more
			<-l.ended
		}()
		f(l)
	})
}

// connect asks for a lease in the background. The returned function makes the client give up.
func (l *lifeTest) connect() (leave func()) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		err := l.acquire(ctx)
		if err == nil && !l.tree.active() {
			l.t.Error("a lease of an inactive tree")
		}
		if err != nil {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.failed = append(l.failed, err)
		}
	}()
	synctest.Wait()
	return func() {
		cancel()
		synctest.Wait()
	}
}

// next is the change that has begun.
func (l *lifeTest) next(up bool) *change {
	l.t.Helper()
	synctest.Wait()
	select {
	case c := <-l.tree.calls:
		if c.up != up {
			l.t.Fatalf("a change to %v, want %v", c.up, up)
		}
		return c
	default:
		l.t.Fatalf("no change to %v has begun", up)
		return nil
	}
}

// nothing demands that no change has begun.
func (l *lifeTest) nothing() {
	l.t.Helper()
	synctest.Wait()
	select {
	case c := <-l.tree.calls:
		l.t.Fatalf("a change to %v has begun", c.up)
	default:
	}
}

func (l *lifeTest) ends(c *change, err error) {
	c.end <- err
	synctest.Wait()
}

// is demands a state.
func (l *lifeTest) is(p phase, leases, failed int) {
	l.t.Helper()
	synctest.Wait()
	l.life.mu.Lock()
	defer l.life.mu.Unlock()
	if l.phase != p || l.leases != leases || len(l.failed) != failed {
		l.t.Fatalf("phase %d, %d leases, %d clients failed; want %d, %d, %d", l.phase, l.leases, len(l.failed), p, leases, failed)
	}
}

func TestClientsThatConnectAtOnceShareOneActivation(t *testing.T) {
	inLife(t, false, func(l *lifeTest) {
		l.connect()
		c := l.next(true)
		l.connect() // while it is activated
		l.is(activating, 0, 0)
		l.ends(c, nil)
		l.is(active, 2, 0)
		l.connect() // and afterwards
		l.is(active, 3, 0)
		l.nothing()
		for range 3 {
			l.nothing()
			l.release(0)
		}
		l.ends(l.next(false), nil)
		l.is(inactive, 0, 0)
		if a, _ := l.activity(); a.Activations != 1 || a.Inactivations != 1 || a.Active {
			t.Errorf("%+v", a)
		}
	})
}

func TestTreeIsNotInactivatedBeforeAnExportLetsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lifeTest{t: t, tree: &fakeTree{t: t, calls: make(chan *change)}}
		l.tree.up.Store(true)
		l.life = newLife(t.Context(), l.tree, slog.New(slog.DiscardHandler))
		time.Sleep(time.Hour)
		l.nothing()
		l.connect() // an export that is always active, and could not be added
		l.release(0)
		l.nothing()
		l.rest()
		l.ends(l.next(false), nil)
		l.is(inactive, 0, 0)
		l.stop()
		<-l.ended
	})
}

func TestFailedActivationIsToldToAllWhoWaitAndLeavesItInactive(t *testing.T) {
	inLife(t, false, func(l *lifeTest) {
		l.connect()
		c := l.next(true)
		l.connect()
		l.ends(c, unix.EBUSY)
		l.is(inactive, 0, 2)
		for _, err := range l.failed {
			if !errors.Is(err, unix.EBUSY) {
				t.Errorf("the client is told %v", err)
			}
		}
		l.nothing() // it is not tried again for nobody
		l.connect()
		l.ends(l.next(true), nil)
		l.is(active, 1, 2)
		if a, _ := l.activity(); a.Activations != 1 || a.ActivationsFailed != 1 || !a.Active {
			t.Errorf("%+v", a)
		}
	})
}

func TestClientThatLeavesDuringActivationHoldsNothing(t *testing.T) {
	for _, stays := range []bool{false, true} {
		inLife(t, false, func(l *lifeTest) {
			leave := l.connect()
			c := l.next(true)
			if stays {
				l.connect()
			}
			leave()
			l.is(activating, 0, 1) // it does not wait for the activation
			l.ends(c, nil)
			if stays {
				l.is(active, 1, 1)
				l.nothing()
				return
			}
			l.ends(l.next(false), nil)
			l.is(inactive, 0, 1)
		})
	}
}

func TestClientThatLeavesBeforeActivationBeginsCausesNone(t *testing.T) {
	inLife(t, true, func(l *lifeTest) {
		c := l.next(false)
		leave := l.connect()
		leave()
		l.ends(c, nil)
		l.nothing()
		l.is(inactive, 0, 1)
	})
}

func TestClientThatConnectsDuringInactivationGetsTheTreeAnew(t *testing.T) {
	inLife(t, true, func(l *lifeTest) {
		c := l.next(false)
		l.connect()
		l.is(inactivating, 0, 0)
		l.ends(c, nil)
		c = l.next(true)
		l.is(activating, 0, 0)
		l.ends(c, nil)
		l.is(active, 1, 0)
	})
}

func TestClientThatConnectsDuringAFailingInactivationStays(t *testing.T) {
	inLife(t, true, func(l *lifeTest) {
		c := l.next(false)
		l.connect()
		l.ends(c, unix.ENOSPC)
		l.is(active, 1, 0)
		time.Sleep(time.Hour)
		l.nothing()
	})
}

func TestLeaseWithinTheLingerTimeKeepsItActive(t *testing.T) {
	inLife(t, false, func(l *lifeTest) {
		l.connect()
		l.ends(l.next(true), nil)
		for range 3 {
			l.release(10 * time.Second)
			time.Sleep(10*time.Second - 1)
			l.nothing()
			l.connect()
			l.is(active, 1, 0)
			time.Sleep(time.Minute)
			l.nothing()
		}
		l.release(10 * time.Second)
		time.Sleep(10 * time.Second)
		l.ends(l.next(false), nil)
		l.is(inactive, 0, 0)
	})
}

func TestFailedInactivationIsTriedAgainEverLater(t *testing.T) {
	inLife(t, true, func(l *lifeTest) {
		for _, wait := range []int{1, 2, 4, 8, 16, 32, 60, 60} {
			c := l.next(false)
			l.ends(c, unix.ENOSPC)
			l.is(active, 0, 0) // and so it keeps its locks
			time.Sleep(time.Duration(wait)*time.Second - 1)
			l.nothing()
			time.Sleep(time.Nanosecond)
		}
		l.ends(l.next(false), nil)
		l.is(inactive, 0, 0)
		if a, _ := l.activity(); a.InactivationsFailed != 8 || a.Inactivations != 1 {
			t.Errorf("%+v", a)
		}
	})
}

func TestClientAfterAFailedInactivationIsServedAndTheNextTryIsAtOnce(t *testing.T) {
	inLife(t, true, func(l *lifeTest) {
		for range 4 {
			l.ends(l.next(false), unix.EIO)
			time.Sleep(time.Minute)
		}
		l.ends(l.next(false), unix.EIO)
		l.connect()
		l.is(active, 1, 0)
		time.Sleep(time.Hour)
		l.nothing()
		l.release(0)
		l.ends(l.next(false), unix.EIO)
		time.Sleep(time.Second) // the first wait again
		l.ends(l.next(false), nil)
		l.is(inactive, 0, 0)
	})
}

// TestStopInEachPhase: whoever waits is told at once, and the owner ends when the
// change that is under way has ended.
func TestStopInEachPhase(t *testing.T) {
	for _, row := range []struct {
		name   string
		up     bool
		before func(l *lifeTest) *change
		after  phase
		failed int
	}{
		{"inactive", false, func(*lifeTest) *change { return nil }, inactive, 0},
		{"activating", false, func(l *lifeTest) *change { l.connect(); return l.next(true) }, active, 1},
		{"active", false, func(l *lifeTest) *change { l.connect(); l.ends(l.next(true), nil); return nil }, active, 0},
		{"lingering", false, func(l *lifeTest) *change { l.connect(); l.ends(l.next(true), nil); l.release(time.Hour); return nil }, active, 0},
		{"inactivating", true, func(l *lifeTest) *change { return l.next(false) }, inactive, 0},
		{"inactivating, with a client that waits", true, func(l *lifeTest) *change { c := l.next(false); l.connect(); return c }, inactive, 1},
		{"waiting to try again", true, func(l *lifeTest) *change { l.ends(l.next(false), unix.EIO); return nil }, active, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			inLife(t, row.up, func(l *lifeTest) {
				c := row.before(l)
				l.stop()
				synctest.Wait()
				if len(l.failed) != row.failed || row.failed > 0 && !errors.Is(l.failed[0], ErrStopped) {
					t.Errorf("who waited is told %v", l.failed)
				}
				if c != nil {
					select {
					case <-l.ended:
						t.Error("it has ended with a change under way")
					default:
					}
					l.ends(c, nil)
				}
				<-l.ended
				if l.phase != row.after {
					t.Errorf("phase %d, want %d", l.phase, row.after)
				}
				if err := l.acquire(t.Context()); !errors.Is(err, ErrStopped) {
					t.Errorf("a lease after the end: %v", err)
				}
			})
		})
	}
}

// TestHurryEndsAChangeThatHangs: Shutdown does not wait for ever.
func TestHurryEndsAChangeThatHangs(t *testing.T) {
	inLife(t, false, func(l *lifeTest) {
		l.connect()
		l.stop()
		l.hurry()
		<-l.ended
		l.is(inactive, 0, 1)
	})
}

// TestLifeKeepsItsPromisesInAnyOrder compares random runs with what a client may expect.
func TestLifeKeepsItsPromisesInAnyOrder(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		inLife(t, rapid.Bool().Draw(rt, "active at first"), func(l *lifeTest) {
			const linger = 3 * time.Second
			var leaves []func() // of those that asked, in order; some have left
			var under *change
			leases := func() int {
				l.life.mu.Lock()
				defer l.life.mu.Unlock()
				return l.leases
			}
			step := func(name string) {
				synctest.Wait()
				if under == nil {
					select {
					case under = <-l.tree.calls:
					default:
					}
				}
				n := leases()
				if n > 0 && (!l.tree.active() || under != nil) {
					rt.Fatalf("after %s: %d leases, active %v, change %+v", name, n, l.tree.active(), under)
				}
			}
			end := func(err error) {
				if under != nil {
					l.ends(under, err)
					under = nil
				}
			}
			for range rapid.IntRange(1, 60).Draw(rt, "steps") {
				op := rapid.SampledFrom([]string{"connect", "leave", "release", "ends", "fails", "time"}).Draw(rt, "step")
				switch op {
				case "connect":
					leaves = append(leaves, l.connect())
				case "leave":
					if len(leaves) > 0 {
						i := rapid.IntRange(0, len(leaves)-1).Draw(rt, "who")
						leaves[i]()
						leaves = slices.Delete(leaves, i, i+1)
					}
				case "release":
					if leases() > 0 {
						l.release(linger)
					}
				case "ends":
					end(nil)
				case "fails":
					end(unix.EIO)
				case "time":
					time.Sleep(time.Duration(rapid.IntRange(1, 5000).Draw(rt, "ms")) * time.Millisecond)
				}
				step(op)
			}
			// Left alone, with a disk that works, everybody gets an answer, and in the end it is inactive.
			for range 5 {
				end(nil)
				step("the end")
			}
			l.life.mu.Lock()
			if len(l.waiting) > 0 {
				rt.Fatalf("%d clients still wait", len(l.waiting))
			}
			l.life.mu.Unlock()
			for leases() > 0 {
				l.release(linger)
			}
			time.Sleep(2 * lastBackoff)
			step("the last client")
			end(nil)
			step("inactivation")
			if l.tree.active() || under != nil {
				rt.Fatalf("active %v, change %+v, without a lease", l.tree.active(), under)
			}
		})
	})
}
