package iostat

import (
	"sync"
	"testing"
	"testing/quick"
	"time"
)

func TestBucketHoldsWhatItsBoundSays(t *testing.T) {
	check := func(n uint32) bool {
		d := time.Duration(n)
		b := bucket(d)
		return (b == NumBuckets-1 || d <= BucketBound(b)) && (b == 0 || d > BucketBound(b-1))
	}
	if err := quick.Check(check, nil); err != nil {
		t.Fatal(err)
	}
	for i := range NumBuckets - 1 {
		if bucket(BucketBound(i)) != i || bucket(BucketBound(i)+1) != i+1 {
			t.Errorf("bucket %d: bound is in %d, what is above in %d", i, bucket(BucketBound(i)), bucket(BucketBound(i)+1))
		}
	}
	if bucket(0) != 0 || bucket(-1) != 0 || bucket(time.Hour) != NumBuckets-1 {
		t.Error("the ends")
	}
}

func TestFiguresOutliveTheirConnection(t *testing.T) {
	var e Export
	a, b := e.NewConn(), e.NewConn()
	a.Start(Write, 3)
	a.Finish(Write, true, 100, time.Millisecond)
	a.Finish(Write, false, 0, time.Second)
	b.FinishInline(Read, 5, 500, time.Microsecond)
	s := e.Snapshot()
	if f := s.Ops[Write]; f.InFlight != 1 || f.OK != 1 || f.Failed != 1 || f.Bytes != 100 || f.Duration != time.Second+time.Millisecond {
		t.Errorf("write %+v", f)
	}
	if f := s.Ops[Read]; f.InFlight != 0 || f.OK != 5 || f.Bytes != 500 || f.Buckets[0] != 5 || f.Duration != 5*time.Microsecond {
		t.Errorf("read %+v", f)
	}
	a.Finish(Write, true, 0, 0)
	e.Remove(a)
	e.Remove(b)
	if s = e.Snapshot(); s.Connections != 0 || s.Ops[Write].OK != 2 || s.Ops[Read].OK != 5 || s.Ops[Write].InFlight != 0 {
		t.Errorf("after the connections: %+v", s)
	}
}

func TestTrackedRequestsAreFoundAndForgotten(t *testing.T) {
	var e Export
	c := e.NewConn()
	now := time.Now()
	c.Track(0, Read, 4096, 512, now.Add(-time.Minute).UnixNano())
	c.Track(NumPlaces-1, BlockStatus, 1<<50, 1<<32, now.UnixNano())
	s := e.Snapshot()
	if len(s.Slow) != 2 || s.Slow[0].Op != Read || s.Slow[0].Off != 4096 || s.Slow[0].Length != 512 || s.Slow[1].Length != 1<<32 || s.Slow[1].Op != BlockStatus || s.Slow[1].Off != 1<<50 {
		t.Fatalf("%+v", s.Slow)
	}
	if d := s.Oldest(now); d != time.Minute {
		t.Errorf("oldest %v", d)
	}
	c.Untrack(0)
	if list := e.Slow(); len(list) != 1 || list[0].Op != BlockStatus {
		t.Errorf("%+v", list)
	}
	c.Untrack(NumPlaces - 1)
	if s := e.Snapshot(); len(s.Slow) != 0 || s.Oldest(now) != 0 {
		t.Errorf("%+v", s.Slow)
	}
}

func TestSnapshotNeverShowsNegativeFigures(t *testing.T) {
	var e Export
	var wg sync.WaitGroup
	for w := range 4 {
		c := e.NewConn()
		wg.Go(func() {
			for i := range int64(2000) {
				c.Start(Read, 1)
				c.Track(w, Read, i<<10|int64(w), i+2, i+1)
				c.Untrack(w)
				c.Finish(Read, true, 1, 0)
			}
			e.Remove(c)
		})
	}
	for range 200 {
		s := e.Snapshot()
		if f := s.Ops[Read]; f.InFlight < 0 || f.InFlight > 4 || f.OK > 8000 {
			t.Errorf("%+v", f)
		}
		for _, r := range s.Slow {
			if r.Since.UnixNano() != r.Off>>10+1 || r.Length != r.Off>>10+2 {
				t.Errorf("start and offset of two requests mixed: %+v", r)
			}
		}
	}
	wg.Wait()
	if f := e.Snapshot().Ops[Read]; f.OK != 8000 || f.Bytes != 8000 {
		t.Errorf("%+v", f)
	}
}

func TestCountingDoesNotAllocate(t *testing.T) {
	var e Export
	c := e.NewConn()
	if n := testing.AllocsPerRun(100, func() {
		c.Start(Write, 1)
		c.Track(3, Write, 0, 1, 1)
		c.Untrack(3)
		c.Finish(Write, true, 1, 1)
		c.FinishInline(Read, 1, 1, 1)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
