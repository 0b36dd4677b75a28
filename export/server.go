package export

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nbdserve/nbdserve/block"
)

// Options of a server. A zero field means the default in brackets.
type Options struct {
	Log *slog.Logger // [discard]
	// MaxClients bounds the clients in transmission; who comes later is told so and
	// has to try again. 0: no limit.
	MaxClients int
	// MaxHandshakes bounds the connections in negotiation. When one more comes, the
	// oldest is cut. [256]
	MaxHandshakes int
	// HandshakeTimeout bounds negotiation, from accept on. [10 s]
	HandshakeTimeout time.Duration
	// MaxOptions bounds the options that a connection may send in negotiation; for
	// each export there are four more. [256]
	MaxOptions int
	// SendTimeout is how long a client may receive nothing of what is being sent before it is cut. [60 s]
	SendTimeout time.Duration
	// PayloadTimeout is how long a client that has begun to send a WRITE may take for
	// each further 256 KiB or the rest. [30 s]
	PayloadTimeout time.Duration
	// CloseTimeout is how long a connection is kept for the client to close it first. [1 s]
	CloseTimeout time.Duration
	// MaxInFlight bounds the requests of a connection that are not answered yet. [128]
	MaxInFlight int
	// MaxBytes bounds the data of these requests, in bytes; at least 33 MiB, which is the default.
	MaxBytes int64
	// Memory bounds the data of all connections beyond the first MiB of each, in bytes; at least 33 MiB. [512 MiB]
	Memory int64
	// Workers bounds the requests of a connection that run at the same time. [16]
	Workers int
	// SlowAfter is the age at which a request is logged as slow. [30 s]
	SlowAfter time.Duration
	// OnClientsGone is called when the last client in transmission has left and its
	// export is flushed. It is not called by Shutdown. It may call Shutdown.
	OnClientsGone func()
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

func (o *Options) setDefaults() {
	setDefault(&o.Log, slog.New(slog.DiscardHandler))
	setDefault(&o.MaxHandshakes, 256)
	setDefault(&o.HandshakeTimeout, 10*time.Second)
	setDefault(&o.MaxOptions, 256)
	setDefault(&o.SendTimeout, time.Minute)
	setDefault(&o.PayloadTimeout, 30*time.Second)
	setDefault(&o.CloseTimeout, time.Second)
	setDefault(&o.MaxInFlight, 128)
	setDefault(&o.Memory, 512<<20)
	setDefault(&o.Workers, 16)
	setDefault(&o.SlowAfter, 30*time.Second)
	o.MaxBytes = max(o.MaxBytes, maxPayload+reserveBytes)
	o.Memory = max(o.Memory, maxPayload+reserveBytes)
	o.Workers = min(max(o.Workers, 2), maxWorkers)
}

// A Server serves exports to clients. Its methods may be called in parallel.
type Server struct {
	opt       Options
	log       *slog.Logger
	epoch     time.Time // of the server's clock
	epochWall int64
	pool      pool
	shard     atomic.Uint32
	hurry     context.Context // ends when Shutdown can wait no longer
	hurryUp   context.CancelFunc

	accepted, refused, failed atomic.Int64

	mu        sync.Mutex
	exports   []*Export // in the order in which they were added
	names     map[string]*Export
	lives     []*nodeLife
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	clients   int // connections in transmission whose client has not left
	serving   int // connections in transmission, until all is flushed and closed
	stopping  bool
	monitor   chan struct{} // closed to end the monitor; nil: not running

	running sync.WaitGroup // connections and the monitor
}

// NewServer returns a server without exports. It must be ended with Shutdown.
func NewServer(opt Options) *Server {
	opt.setDefaults()
	s := &Server{opt: opt, log: opt.Log, names: make(map[string]*Export),
		listeners: make(map[net.Listener]struct{}), conns: make(map[*conn]struct{})}
	s.pool.free = opt.Memory
	s.epoch = time.Now()
	s.epochWall = s.epoch.UnixNano()
	s.hurry, s.hurryUp = context.WithCancel(context.Background())
	return s
}

// ErrStopped is returned for calls after Shutdown.
var ErrStopped = errors.New("the NBD server is shutting down")

// reserve takes the name, and gives e its part in the life of the node.
func (s *Server) reserve(e *Export, cfg Config) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return ErrStopped
	}
	if _, taken := s.names[e.name]; taken {
		return fmt.Errorf("NBD server already has export named '%s'", e.name)
	}
	s.names[e.name] = e
	e.life = s.lifeOf(cfg)
	e.life.users++
	return nil
}

// lifeOf finds the life of a node, or begins it. Server.mu is held.
func (s *Server) lifeOf(cfg Config) *nodeLife {
	for _, l := range s.lives {
		if l.nodes.top() == cfg.Node {
			return l
		}
	}
	nodes := &nodeTree{graph: cfg.Graph, node: cfg.Node}
	l := &nodeLife{life: newLife(s.hurry, nodes, s.log.With("node", cfg.Node.Name())), nodes: nodes}
	s.lives = append(s.lives, l)
	return l
}

// forget undoes reserve.
func (s *Server) forget(e *Export) {
	s.mu.Lock()
	delete(s.names, e.name)
	e.life.users--
	last := e.life.users == 0
	if last {
		s.lives = slices.DeleteFunc(s.lives, func(l *nodeLife) bool { return l == e.life })
	}
	s.mu.Unlock()
	if last {
		e.life.stop()
		<-e.life.ended
	}
}

// publish offers e to clients, unless the server has ended meanwhile.
func (s *Server) publish(e *Export) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.exports = append(s.exports, e)
	return true
}

// Exports lists the exports in the order in which they were added.
func (s *Server) Exports() []*Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.exports)
}

// export finds an export by the name that a client gave. "" names the only one.
func (s *Server) export(name string) *Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.exports {
		if e.name == name {
			return e
		}
	}
	if name == "" && len(s.exports) == 1 {
		return s.exports[0]
	}
	return nil
}

// Stats are figures of a server.
type Stats struct {
	Handshakes int   // connections in negotiation now
	Clients    int   // clients in transmission now
	Accepted   int64 // connections ever
	Refused    int64 // clients turned away because there were too many
	Failed     int64 // connections that ended in negotiation by an error or a time-out
}

// Stats may be called at any time.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Stats{Clients: s.clients, Accepted: s.accepted.Load(), Refused: s.refused.Load(), Failed: s.failed.Load()}
	for c := range s.conns {
		if c.export == nil {
			st.Handshakes++
		}
	}
	return st
}

// Serve accepts connections from l, which it closes at the end. It returns nil
// after Shutdown, else the error of l. Several Serve may run at once.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	stopping := s.stopping
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	if stopping {
		l.Close()
	}
	for {
		nc, err := l.Accept()
		if err == nil {
			if c := s.enter(nc); c != nil {
				go s.run(c)
			}
			continue
		}
		s.mu.Lock()
		stopping := s.stopping
		if stopping {
			delete(s.listeners, l)
		}
		s.mu.Unlock()
		if stopping {
			return nil
		}
		if passing(err) {
			s.log.Warn("cannot accept a connection", "listen", l.Addr().String(), "err", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		l.Close()
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
		return fmt.Errorf("accept on %s: %w", l.Addr(), err)
	}
}

// passing tells whether accepting may work again later.
func passing(err error) bool {
	for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// ServeConn serves one connection, which it closes, and returns when its requests
// have ended. After Shutdown it closes the connection at once.
func (s *Server) ServeConn(nc net.Conn) {
	if c := s.enter(nc); c != nil {
		s.run(c)
	}
}

// enter makes a connection known.
func (s *Server) enter(nc net.Conn) *conn {
	s.accepted.Add(1)
	c := newConn(s, nc)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		nc.Close()
		return nil
	}
	s.evict()
	s.conns[c] = struct{}{}
	s.running.Add(1)
	s.startMonitor()
	return c
}

// evict cuts the oldest connection in negotiation when there are too many. Server.mu is held.
func (s *Server) evict() {
	n := 0
	var oldest *conn
	for c := range s.conns {
		if c.export == nil && !c.evicted {
			n++
			if oldest == nil || c.id < oldest.id {
				oldest = c
			}
		}
	}
	if n >= s.opt.MaxHandshakes {
		oldest.evicted = true
		oldest.abort()
		s.log.Warn("too many connections in negotiation: cut the oldest", "client", oldest.peer, "limit", s.opt.MaxHandshakes)
	}
}

// run is the life of a connection.
func (s *Server) run(c *conn) {
	e := c.negotiate()
	if e == nil {
		c.close()
	} else {
		c.transmit()
	}
	s.mu.Lock()
	delete(s.conns, c)
	if e != nil {
		s.serving--
	}
	gone := e != nil && s.serving == 0 && !s.stopping
	s.mu.Unlock()
	s.running.Done()
	if gone && s.opt.OnClientsGone != nil {
		s.opt.OnClientsGone()
	}
}

// A refusal says why an export cannot be had.
type refusal struct {
	reply uint32
	text  string
}

// full tells why there is no place for one more client; nil: there is.
func (s *Server) full() *refusal {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.noPlace()
}

// noPlace is full. Server.mu is held.
func (s *Server) noPlace() *refusal {
	if s.stopping {
		return &refusal{repErrShutdown, ErrStopped.Error()}
	}
	if s.opt.MaxClients > 0 && s.clients >= s.opt.MaxClients {
		s.refused.Add(1)
		return &refusal{repErrPolicy, fmt.Sprintf("the server has all the %d clients that it may have; try again later, or raise its limit of clients", s.opt.MaxClients)}
	}
	return nil
}

// admit makes c a client of e, or says why not.
func (s *Server) admit(c *conn, e *Export) *refusal {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.noPlace(); r != nil {
		return r
	}
	s.clients++
	s.serving++
	e.clients.Add(1)
	c.export = e
	return nil
}

// left frees the place of a client.
func (s *Server) left(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clients--
}

func (s *Server) isStopping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopping
}

// Shutdown ends the server: no new connections, negotiation is refused, clients'
// requests are not read any more; those read are finished and answered, exports are
// flushed, connections closed and roots detached; an activation or inactivation that
// has begun ends first. When ctx ends first, what was
// not begun is answered with NBD_ESHUTDOWN and the connections are cut; what was
// begun finishes nevertheless, and Shutdown waits for it. The error is what went
// wrong with the exports.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.stopping = true
	for l := range s.listeners {
		l.Close()
	}
	for c := range s.conns {
		c.stop()
	}
	if s.monitor != nil {
		close(s.monitor)
		s.monitor = nil
	}
	lives := slices.Clone(s.lives)
	s.mu.Unlock()
	for _, l := range lives {
		l.stop()
	}

	ended := make(chan struct{})
	go func() {
		s.running.Wait()
		for _, l := range lives {
			<-l.ended
		}
		close(ended)
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		s.hurryUp()
		s.eachConn((*conn).expire)
		select {
		case <-ended:
		case <-time.After(s.opt.CloseTimeout):
			s.Cut()
			<-ended
		}
	}
	s.hurryUp()

	s.mu.Lock()
	exports := s.exports
	s.exports = nil
	clear(s.names)
	s.mu.Unlock()
	var errs []error
	for _, e := range exports {
		if err := e.root.Detach(context.WithoutCancel(ctx)); err != nil {
			errs = append(errs, fmt.Errorf("export %q: %w", e.name, err))
		}
	}
	return errors.Join(errs...)
}

// Cut ends all connections at once, without answers. Requests that were begun
// finish; [Server.Shutdown] waits for them.
func (s *Server) Cut() { s.eachConn((*conn).cut) }

func (s *Server) eachConn(f func(*conn)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		f(c)
	}
}

// nextShard spreads connections over the shards.
func (s *Server) nextShard() block.Shard { return block.Shard(s.shard.Add(1) % block.NumShards) }
