package export

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/internal/iostat"
)

// Config describes an export: plain data.
type Config struct {
	Name        string // at most 4096 bytes of UTF-8 without NUL; "" is the default export
	Description string // for people, shown by lists; likewise
	ID          string // of the root, see [block.RootConfig]; "" for none
	Graph       *block.Graph
	Node        *block.Node // the export takes its own reference
	ReadOnly    bool
	// ShareRW lets other users of the node write to it.
	ShareRW bool
	// WriteThrough makes every write durable before it is answered.
	WriteThrough bool
	// Activation says when the nodes are active. With ActivationOnConnect they may be
	// inactive at first; else they are activated now.
	Activation Activation
	// Linger is how long the nodes stay active once the last client has left, with
	// ActivationOnConnect. [0]
	Linger time.Duration
}

// An Export is a node that clients can use. Its methods may be called in parallel.
type Export struct {
	name, description string
	readOnly          bool
	root              *block.Root
	activation        Activation
	linger            time.Duration
	life              *nodeLife // of the nodes below root
	stat              iostat.Export
	clients           atomic.Int64
	lastWarning       atomic.Int64 // ns on the server's clock, for the rate of log lines
}

// Name is the canonical name.
func (e *Export) Name() string { return e.name }

// Description is the text for people.
func (e *Export) Description() string { return e.description }

// ReadOnly tells whether clients can only read.
func (e *Export) ReadOnly() bool { return e.readOnly }

// Root is where the export's requests enter the graph.
func (e *Export) Root() *block.Root { return e.root }

// Drained tells whether requests wait for a drain to end. An export that is
// inactive, or on the way there or back, has no requests and is not drained.
func (e *Export) Drained() bool {
	_, p := e.life.activity()
	return p == active && e.root.Drained()
}

// Activity tells how the nodes were activated and inactivated.
func (e *Export) Activity() iostat.Activity {
	a, _ := e.life.activity()
	return a
}

// Clients is the number of clients in transmission.
func (e *Export) Clients() int { return int(e.clients.Load()) }

// Stats sums up the requests of all connections, past and present.
func (e *Export) Stats() iostat.Snapshot { return e.stat.Snapshot() }

func checkString(what, s string) error {
	switch {
	case len(s) > maxString:
		return fmt.Errorf("%s %q has %d bytes; at most %d are allowed", what, clip(s, 80), len(s), maxString)
	case !utf8.ValidString(s) || strings.ContainsRune(s, 0):
		return fmt.Errorf("%s %q must be UTF-8 text without NUL", what, clip(s, 80))
	}
	return nil
}

// AddExport attaches a root to cfg.Node and offers it to clients. It fails if the
// name is taken or invalid, the node cannot do what is asked, or its permissions
// conflict with another user's.
func (s *Server) AddExport(ctx context.Context, cfg Config) (*Export, error) {
	if err := errors.Join(checkString("export name", cfg.Name), checkString("description", cfg.Description)); err != nil {
		return nil, err
	}
	if cfg.Node.ReadOnly() && !cfg.ReadOnly {
		return nil, fmt.Errorf("export %q: node '%s' is read-only and cannot be exported writable; export it read-only", cfg.Name, cfg.Node.Name())
	}
	rc := block.RootConfig{
		User: fmt.Sprintf("export '%s'", cfg.Name), ID: cfg.ID, Node: cfg.Node, WriteThrough: cfg.WriteThrough,
		Perm:   block.PermConsistentRead,
		Shared: block.PermConsistentRead | block.PermWriteUnchanged,
	}
	if !cfg.ReadOnly {
		rc.Perm |= block.PermWrite
	}
	if cfg.ShareRW {
		rc.Shared |= block.PermWrite
	}
	// The name is taken first: while the root is attached, nobody else gets it.
	e := &Export{name: cfg.Name, description: cfg.Description, readOnly: cfg.ReadOnly, activation: cfg.Activation, linger: cfg.Linger}
	if err := s.reserve(e, cfg); err != nil {
		return nil, err
	}
	rc.Busy = e.inFlight
	if cfg.Activation == ActivationOnConnect {
		rc.AllowInactive = e.life.allowInactive
	}
	if err := e.attach(ctx, cfg.Graph, rc); err != nil {
		s.forget(e)
		return nil, fmt.Errorf("export %q: %w", cfg.Name, err)
	}
	if !s.publish(e) {
		return nil, errors.Join(ErrStopped, e.root.Detach(ctx))
	}
	return e, nil
}

// attach makes the root. An export that is always active has a lease for its life.
func (e *Export) attach(ctx context.Context, g *block.Graph, rc block.RootConfig) (err error) {
	if e.activation == ActivationAlways {
		if err := e.life.acquire(ctx); err != nil {
			return err
		}
		defer func() {
			if err != nil {
				e.life.release(0)
			}
		}()
	}
	if e.root, err = g.AttachRoot(ctx, rc); err != nil {
		return err
	}
	e.life.nodes.add(e.root)
	return nil
}

// lease makes the nodes active for a client, who gives the lease back with release.
func (e *Export) lease(ctx context.Context) error {
	if e.activation == ActivationAlways {
		return nil
	}
	return e.life.acquire(ctx)
}

func (e *Export) release() {
	if e.activation != ActivationAlways {
		e.life.release(e.linger)
	}
}

// size is what a client that only asks is told: of an inactive export it is read afresh.
func (e *Export) size(ctx context.Context) (int64, error) {
	if _, p := e.life.activity(); p == active {
		return e.root.Size(), nil
	}
	return e.root.PeekSize(ctx)
}

// flags are the transmission flags for a client.
func (e *Export) flags(structured bool) uint16 {
	f := flagHasFlags | flagSendFlush | flagSendFUA | flagCanMultiConn | flagSendCache
	if !e.root.MayWrite() {
		f |= flagReadOnly
	} else {
		f |= flagSendTrim | flagSendWriteZeroes | flagSendFastZero
	}
	if e.root.Limits().Rotational {
		f |= flagRotational
	}
	if structured {
		f |= flagSendDF
	}
	return f
}

// blockSizes are the size constraints: minimum, preferred, maximum, in bytes.
func (e *Export) blockSizes() (least, preferred, most uint32) {
	l := e.root.Limits()
	p := max(4096, l.RequestAlignment, min(l.PreferredTransfer, maxPayload))
	if p&(p-1) != 0 {
		p = 1 << (bits.Len64(uint64(p)) - 1)
	}
	return uint32(l.RequestAlignment), uint32(p), maxPayload
}

// flush makes what clients wrote durable. It waits while the root is drained, until ctx ends.
func (e *Export) flush(ctx context.Context) error {
	if e.readOnly {
		return nil
	}
	return e.root.Do(ctx, func(context.Context) error { return e.root.Flush(context.Background()) })
}

// worthLogging tells whether a further failure of a request may go to the log: one a second does.
func (e *Export) worthLogging(now time.Duration) bool {
	last := e.lastWarning.Load()
	return (last == 0 || now-time.Duration(last) > time.Second) && e.lastWarning.CompareAndSwap(last, int64(now))
}
