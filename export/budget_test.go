package export

import (
	"testing"

	"pgregory.net/rapid"
)

func newBudgets(memory int64, n int) (*pool, []*budget) {
	p := &pool{free: memory}
	bs := make([]*budget, n)
	for i := range bs {
		bs[i] = new(budget)
		bs[i].init(p, 10, 64<<20)
	}
	return p, bs
}

// TestPoolAccounts: what is given back is what was taken, the reserve is not the
// pool's, and the pool is overdrawn by one connection at most.
func TestPoolAccounts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const memory = 40 << 20
		p, bs := newBudgets(memory, 4)
		held := make([][]int64, len(bs))
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			i := rapid.IntRange(0, len(bs)-1).Draw(t, "who")
			b := bs[i]
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0, 1:
				n := int64(rapid.IntRange(1, 32<<20).Draw(t, "bytes"))
				if b.tryBytes(n) {
					held[i] = append(held[i], n)
				}
			case 2:
				if len(held[i]) > 0 {
					b.give(0, held[i][0])
					held[i] = held[i][1:]
				}
			case 3:
				b.settled()
			}
			lent, over := int64(0), 0
			for j, b := range bs {
				sum := int64(0)
				for _, n := range held[j] {
					sum += n
				}
				if b.bytes != sum || sum > b.maxBytes && len(held[j]) > 1 {
					t.Fatalf("connection %d holds %d bytes, counted are %d", j, sum, b.bytes)
				}
				lent += beyond(sum)
				if b.queued {
					over++
				}
			}
			if p.free != memory-lent || p.free < -64<<20 || len(p.queue) != over {
				t.Fatalf("free %d with %d lent, %d in the queue of %d who wait", p.free, lent, len(p.queue), over)
			}
		}
		for i, b := range bs {
			for _, n := range held[i] {
				b.give(0, n)
			}
			b.settled()
		}
		if p.free != memory || len(p.queue) != 0 || p.favour != nil {
			t.Fatalf("left: %+v", p)
		}
	})
}

func TestLongestWaiterGoesFirst(t *testing.T) {
	p, bs := newBudgets(33<<20, 4)
	hog, favoured, first, second := bs[0], bs[1], bs[2], bs[3]
	if !hog.tryBytes(33<<20) || !favoured.tryBytes(3<<20) {
		t.Fatal("the favoured one does not get its bytes")
	}
	if first.tryBytes(3<<20) || second.tryBytes(3<<20) {
		t.Fatal("a second one overdraws")
	}
	hog.give(0, 33<<20)
	select {
	case <-first.wake:
	default:
		t.Fatal("nobody told the first that there is memory")
	}
	if second.tryBytes(3 << 20) {
		t.Fatal("the second overtook the first")
	}
	if !first.tryBytes(3<<20) || !second.tryBytes(3<<20) {
		t.Fatal("there is memory")
	}
	for _, b := range bs[1:] {
		b.give(0, 3<<20)
		b.settled()
	}
	if p.free != 33<<20 {
		t.Fatalf("free %d", p.free)
	}
}

// TestQueueIsFirstInFirstOut holds the ring against a slice.
func TestQueueIsFirstInFirstOut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var q queue
		var model []uint64
		for i := range uint64(rapid.IntRange(1, 300).Draw(t, "steps")) {
			if rapid.Bool().Draw(t, "push") {
				q.push(&request{cookie: i})
				model = append(model, i)
			} else if len(model) > 0 {
				var r request
				q.pop(&r)
				if r.cookie != model[0] {
					t.Fatalf("%d came before %d", r.cookie, model[0])
				}
				model = model[1:]
			}
			if q.n != len(model) {
				t.Fatalf("%d in the queue, want %d", q.n, len(model))
			}
		}
	})
}

// TestBatchKeepsTheOrder: text and data leave in the order in which they were added, merged or not.
func TestBatchKeepsTheOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var all, own batch
		var want, got []byte
		for range rapid.IntRange(1, 50).Draw(t, "steps") {
			bytes := rapid.SliceOfN(rapid.Byte(), 1, 20).Draw(t, "bytes")
			switch rapid.IntRange(0, 2).Draw(t, "what") {
			case 0:
				own.text = append(own.text, bytes...)
				want = append(want, bytes...)
			case 1:
				own.add(bytes, nil)
				want = append(want, bytes...)
			case 2:
				all.merge(&own)
			}
		}
		all.merge(&own)
		for _, b := range all.buffers(nil) {
			if len(b) == 0 {
				t.Fatal("an empty buffer")
			}
			got = append(got, b...)
		}
		if string(got) != string(want) {
			t.Fatalf("%x, want %x", got, want)
		}
	})
}

// TestWhoNeedsNoPoolAnyMoreDoesNotBlockIt: the first in the queue got its bytes from its own reserve.
func TestWhoNeedsNoPoolAnyMoreDoesNotBlockIt(t *testing.T) {
	p, b := newBudgets(10<<20, 4)
	first, second, holder, overdrawer := b[0], b[1], b[2], b[3]
	if !holder.tryBytes(reserveBytes+10<<20) || !overdrawer.tryBytes(reserveBytes+1<<20) {
		t.Fatal("the pool is not as it should be")
	}
	if !first.tryBytes(reserveBytes) || first.tryBytes(1<<20) || second.tryBytes(2<<20) {
		t.Fatal("a pool that is overdrawn lends")
	}
	first.give(0, reserveBytes) // an answer has been sent
	if !first.tryBytes(1 << 20) {
		t.Fatal("the reserve is refused")
	}
	holder.give(0, reserveBytes+10<<20)
	if !second.tryBytes(2 << 20) {
		t.Error("one that does not wait any more is still the first in the queue")
	}
	overdrawer.settled()
	if p.favour != nil || len(p.queue) != 0 {
		t.Errorf("queue %v, favour %v", p.queue, p.favour)
	}
}
