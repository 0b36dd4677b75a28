package export

import (
	"fmt"
	"slices"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/internal/iostat"
)

// now reads the server's clock.
func (s *Server) now() time.Duration { return time.Since(s.epoch) }

// wall tells the time of day of a reading of the server's clock, in ns since 1970.
func (s *Server) wall(now time.Duration) int64 { return s.epochWall + int64(now) }

// startMonitor starts the goroutine that looks after connections now and then,
// unless it runs. Server.mu is held.
func (s *Server) startMonitor() {
	if s.monitor != nil {
		return
	}
	s.monitor = make(chan struct{})
	s.running.Add(1)
	go s.watch(s.monitor)
}

func (s *Server) watch(end <-chan struct{}) {
	defer s.running.Done()
	tick := time.NewTicker(min(time.Second, max(s.opt.SlowAfter/4, time.Millisecond)))
	defer tick.Stop()
	logged := make(map[iostat.Slow]bool)
	for {
		select {
		case <-end:
			return
		case <-tick.C:
		}
		s.mu.Lock()
		for c := range s.conns {
			if c.export != nil {
				c.dismissIdle(s.now())
			}
			c.noticeHangUp()
		}
		s.mu.Unlock()
		logged = s.logSlow(logged)
	}
}

// logSlow logs requests that have become slow, once each, and returns those that are.
func (s *Server) logSlow(logged map[iostat.Slow]bool) map[iostat.Slow]bool {
	slow := make(map[iostat.Slow]bool)
	for _, e := range s.Exports() {
		for _, r := range e.stat.Slow() {
			age := time.Since(r.Since)
			if age < s.opt.SlowAfter {
				continue
			}
			slow[r] = true
			if !logged[r] {
				s.log.Warn("slow request", "export", e.name, "op", r.Op.String(), "offset", r.Off, "length", r.Length, "age", age.Round(time.Millisecond),
					"node", e.root.Node().Name(), "waits", waits(e.root.Node()))
			}
		}
	}
	return slow
}

// inFlight describes the requests that run, the oldest first, for the text of a drain
// that does not finish in time.
func (e *Export) inFlight() []string {
	slow := e.stat.Slow()
	slices.SortFunc(slow, func(a, b iostat.Slow) int { return a.Since.Compare(b.Since) })
	var list []string
	for _, r := range slow {
		list = append(list, fmt.Sprintf("%s of %d bytes at offset %d for %v", r.Op, r.Length, r.Off, time.Since(r.Since).Round(time.Millisecond)))
	}
	return list
}

// waits says what the nodes from n down wait for.
func waits(n *block.Node) string {
	text := ""
	if w, ok := n.Instance().(block.Waiter); ok {
		if what, age, ok := w.OldestWait(); ok {
			text = fmt.Sprintf("node '%s': %s for %v", n.Name(), what, age.Round(time.Millisecond))
		}
	}
	for _, e := range n.Children() {
		if below := waits(e.Node()); below != "" {
			if text != "" {
				text += "; "
			}
			text += below
		}
	}
	return text
}
