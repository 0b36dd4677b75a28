package hostdev

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
)

// begun calls begin in a goroutine; the channel receives the slot.
func begun(w *workers) chan int {
	got := make(chan int, 1)
	go func() { got <- w.begin(opRead) }()
	return got
}

// untilWaiting waits until so many requests wait for a slot of w.
func untilWaiting(w *workers, n int) {
	for {
		if _, waiting := w.inFlight(); waiting == n {
			return
		}
		runtime.Gosched()
	}
}

func takeSlots(w *workers, n int) []int {
	var slots []int
	for range n {
		slots = append(slots, w.begin(opRead))
	}
	return slots
}

func endAll(w *workers, slots []int) {
	for _, s := range slots {
		w.end(s)
	}
}

func wantIdle(t *testing.T, tok *tokens, nodes ...*workers) {
	t.Helper()
	if used := tok.used.Load(); used != 0 {
		t.Errorf("%d tokens are in use at the end", used)
	}
	for _, w := range nodes {
		if running, waiting := w.inFlight(); running != 0 || waiting != 0 {
			t.Errorf("%d run and %d wait at the end", running, waiting)
		}
	}
}

func TestNodeHasSixtyFourSlots(t *testing.T) {
	tok := &tokens{limit: allTokens}
	w := &workers{tokens: tok}
	slots := takeSlots(w, nodeSlots)
	first, second := begun(w), begun(w)
	untilWaiting(w, 2)
	if running, _ := w.inFlight(); running != nodeSlots {
		t.Fatalf("%d run, want %d", running, nodeSlots)
	}
	endAll(w, slots)
	w.end(<-first)
	w.end(<-second)
	wantIdle(t, tok, w)
}

func TestNodeCannotTakeTheSlotsOfOthers(t *testing.T) {
	tok := &tokens{limit: 4}
	hung, other := &workers{tokens: tok}, &workers{tokens: tok}
	slots := takeSlots(hung, ownSlots+4)
	late := begun(hung)
	untilWaiting(hung, 1)
	own := takeSlots(other, ownSlots) // does not wait
	endAll(other, own)
	if _, waiting := hung.inFlight(); waiting != 1 {
		t.Error("a node got a slot that is another's")
	}
	endAll(hung, slots)
	hung.end(<-late)
	wantIdle(t, tok, hung, other)
}

func TestTokenWakesNodeWhoseOwnCallsHang(t *testing.T) {
	tok := &tokens{limit: 1}
	a, b := &workers{tokens: tok}, &workers{tokens: tok}
	slotsA, slotsB := takeSlots(a, ownSlots+1), takeSlots(b, ownSlots)
	late := begun(b)
	untilWaiting(b, 1)
	for _, s := range slotsA {
		a.end(s) // one of them has the token
	}
	b.end(<-late)
	endAll(b, slotsB)
	wantIdle(t, tok, a, b)
}

func TestNodeThatWaitsNoMoreDoesNotSwallowToken(t *testing.T) {
	tok := &tokens{limit: 1}
	holder, stale, waiting := &workers{tokens: tok}, &workers{tokens: tok}, &workers{tokens: tok}
	held := takeSlots(holder, ownSlots+1)
	staleSlots, waitingSlots := takeSlots(stale, ownSlots), takeSlots(waiting, ownSlots)
	// stale registers, and then gets a slot of its own.
	late := begun(stale)
	untilWaiting(stale, 1)
	stale.end(staleSlots[0])
	staleSlots[0] = <-late
	last := begun(waiting)
	untilWaiting(waiting, 1)
	endAll(holder, held)
	waiting.end(<-last)
	endAll(stale, staleSlots)
	endAll(waiting, waitingSlots)
	wantIdle(t, tok, holder, stale, waiting)
}

func TestSlotsUnderLoad(t *testing.T) {
	tok := &tokens{limit: 5}
	nodes := make([]*workers, 4)
	var wg sync.WaitGroup
	for i := range nodes {
		w := &workers{tokens: tok}
		nodes[i] = w
		for g := range 3 * ownSlots {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(i), uint64(g)))
				for range 300 {
					s := w.begin(opWrite)
					if used := tok.used.Load(); used > tok.limit {
						t.Errorf("%d tokens are in use, of %d", used, tok.limit)
					}
					for range rng.IntN(3) {
						runtime.Gosched()
					}
					w.end(s)
				}
			})
		}
	}
	wg.Wait()
	wantIdle(t, tok, nodes...)
}

func TestOldestWaitNamesTheLongestCall(t *testing.T) {
	w := &workers{tokens: &tokens{limit: 1}}
	if what, _, ok := w.oldest(); ok {
		t.Errorf("nothing runs, and the oldest is %q", what)
	}
	a, b := w.begin(opSync), w.begin(opRead)
	if what, _, ok := w.oldest(); !ok || what != "flush" {
		t.Errorf("the oldest is %q, want flush", what)
	}
	w.end(a)
	if what, _, ok := w.oldest(); !ok || what != "read" {
		t.Errorf("the oldest is %q, want read", what)
	}
	w.end(b)
}

func BenchmarkSlot(b *testing.B) {
	w := &workers{tokens: processTokens}
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			w.end(w.begin(opRead))
		}
	})
}
