package quorum

import "sync"

// ranges are the requests that go on. Those that concern the same bytes run one after
// the other, in the order of their arrival, if one of them writes: so that all children
// see writes in one order, and a vote never sees half of a write.
type ranges struct {
	mu   sync.Mutex
	list []*span // in the order of arrival
}

type span struct {
	off, end int64
	writes   bool
	done     chan struct{} // made by who waits first
}

// begin enters a request, and waits for those before it.
func (r *ranges) begin(off, length int64, writes bool) *span {
	s := &span{off: off, end: off + length, writes: writes}
	var before []*span
	r.mu.Lock()
	for _, o := range r.list {
		if o.off < s.end && s.off < o.end && (o.writes || s.writes) {
			if o.done == nil {
				o.done = make(chan struct{})
			}
			before = append(before, o)
		}
	}
	r.list = append(r.list, s)
	r.mu.Unlock()
	for _, o := range before {
		<-o.done
	}
	return s
}

func (r *ranges) end(s *span) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, o := range r.list {
		if o == s {
			r.list = append(r.list[:i], r.list[i+1:]...)
			break
		}
	}
	if s.done != nil {
		close(s.done)
	}
}
