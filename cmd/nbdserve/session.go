package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/export"
	"github.com/nbdserve/nbdserve/hostdev"
	"github.com/nbdserve/nbdserve/metrics"
)

// shutdownTimeout is what clients' requests get to finish once we are told to end.
const shutdownTimeout = 30 * time.Second

// A session is a running serve. It is taken up by start, in the order of the
// fields, and given back by close, whatever start came to.
type session struct {
	*serveOptions
	metrics   *metricsServer // nil: not asked for
	graph     *block.Graph
	nodes     []*block.Node // those that we hold
	server    *export.Server
	listeners []*listener
	accepting sync.WaitGroup // the loops that accept
	ownFolder string         // of the socket for --run; "": none
	command   *captive       // of --run; nil: none

	published atomic.Bool // exports and nodes may be asked for figures
	ready     atomic.Bool // clients are accepted

	// What ends a session.
	signals      chan os.Signal
	parentGone   <-chan struct{} // nil: not watched
	clientsGone  chan struct{}   // holds a value when the last client has left
	acceptFailed chan error
}

// serve opens the image, serves it until something ends the session, and closes all.
func (o *serveOptions) serve(stdout io.Writer) error {
	signal.Ignore(syscall.SIGPIPE) // writing to a log that nobody reads fails; that is enough
	limitMemory()
	s := &session{serveOptions: o, signals: make(chan os.Signal, 4), clientsGone: make(chan struct{}, 1), acceptFailed: make(chan error, 1)}
	err := s.start(stdout)
	if err == nil && s.printGraph == nil {
		err = s.wait()
	}
	if cerr := s.close(); cerr != nil {
		// What was lost at the end counts more than how a command of --run ended.
		err = &exitError{1, cerr}
	}
	return err
}

// start gets everything ready, the image first and the sockets last.
func (s *session) start(stdout io.Writer) (err error) {
	ctx := context.Background()
	if s.printGraph != nil {
		if err := s.open(ctx); err != nil {
			return err
		}
		return s.printGraph(s.graph.View(), stdout)
	}
	if s.exitWithParent {
		if s.parentGone, err = watchParent(); err != nil {
			return err
		}
	}
	if s.listeners, err = activated(); err != nil {
		return err
	}
	if len(s.listeners) > 0 && len(s.listen) > 0 {
		return fmt.Errorf("--listen cannot be given where systemd opens the sockets (LISTEN_FDS is %d)", len(s.listeners))
	}
	if s.metricsAddress != "" {
		if s.metrics, err = startMetrics(s.metricsAddress, s, s.ready.Load, s.log); err != nil {
			return err
		}
	}
	if err := s.open(ctx); err != nil {
		return err
	}
	s.published.Store(true)

	// Up to here a signal just ends the process; now there is something to tidy up.
	signal.Notify(s.signals, syscall.SIGTERM)
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGHUP} {
		if !signal.Ignored(sig) { // nohup, or a script's background, wants it so
			signal.Notify(s.signals, sig)
		}
	}
	if err := s.bind(); err != nil {
		return err
	}
	for _, l := range s.listeners {
		s.accepting.Go(func() {
			if err := s.server.Serve(l); err != nil {
				select {
				case s.acceptFailed <- err:
				default: // one reason is enough
				}
			}
		})
	}
	s.ready.Store(true)
	return s.announce(stdout)
}

// open opens the nodes, and adds the exports.
func (s *session) open(ctx context.Context) error {
	s.graph = newGraph(s.log)
	if err := s.source.open(s.graph, func(cfg *block.Config) (*block.Node, error) { return s.openNode(ctx, cfg) }); err != nil {
		return err
	}
	s.server = export.NewServer(export.Options{Log: s.log, MaxClients: s.maxClients, OnClientsGone: s.onClientsGone})
	exports, err := s.source.exportConfigs(s.graph)
	if err != nil {
		return err
	}
	for _, e := range exports {
		e.Activation, e.Linger = s.activation, s.linger
		if _, err := s.server.AddExport(ctx, e); err != nil {
			return err
		}
	}
	if s.activation == export.ActivationOnConnect {
		s.warnOfLocalLocks()
	}
	return nil
}

// warnOfLocalLocks names the images that servers on other hosts can use although this
// one has a client.
func (s *session) warnOfLocalLocks() {
	for _, n := range s.graph.Nodes() {
		if n.Driver().Kind != block.Protocol || n.Filename() == "" {
			continue
		}
		if why := hostdev.LocalLocks(n.Filename()); why != "" {
			s.log.Warn("other hosts do not see who has the image: see to it that one server at a time has clients", "image", n.Filename(), "why", why)
		}
	}
}

// openNode opens a node that we hold until the end.
func (s *session) openNode(ctx context.Context, cfg *block.Config) (*block.Node, error) {
	if s.activation == export.ActivationOnConnect {
		if cfg.Snapshot {
			return nil, errors.New("a temporary snapshot and --activation on-connect exclude each other: the image below would change in between")
		}
		cfg.Inactive = true
	}
	n, err := s.graph.Open(ctx, cfg)
	if err == nil {
		s.nodes = append(s.nodes, n)
	}
	return n, err
}

// bind makes the sockets, unless systemd did.
func (s *session) bind() error {
	if len(s.listeners) > 0 {
		return nil
	}
	addresses := s.listen
	if len(addresses) == 0 {
		a, err := s.defaultAddress()
		if err != nil {
			return err
		}
		addresses = []address{a}
	}
	for _, a := range addresses {
		l, err := listen(a)
		if err != nil {
			return err
		}
		s.listeners = append(s.listeners, l)
		if l.public() {
			s.log.Warn("clients of other hosts can connect, without encryption or authentication", "listen", l.Addr().String())
		}
	}
	return nil
}

// defaultAddress is where to listen without --listen: for a command of --run, which
// is told, at a place of its own.
func (s *session) defaultAddress() (address, error) {
	if s.run == "" {
		return defaultListen(s.source.label())
	}
	dir, err := os.MkdirTemp("", "nbdserve-run-")
	if err != nil {
		return address{}, fmt.Errorf("cannot make a folder for the socket of --run: %w", err)
	}
	s.ownFolder = dir
	return parseListen("unix:" + filepath.Join(dir, "sock"))
}

// announce tells everybody who waits that clients are accepted, and starts --run.
func (s *session) announce(stdout io.Writer) error {
	exports := s.server.Exports()
	var uris []string
	for _, l := range s.listeners {
		for _, e := range exports {
			uri, n := uriOf(l.Addr(), l.socketPath(), e.Name()), e.Root().Node()
			uris = append(uris, uri)
			s.log.Info("serving", "uri", uri, "image", n.Filename(), "node", n.Name(), "driver", n.Driver().Name, "size", n.Size(), "read_only", e.ReadOnly())
			if s.printURI {
				if _, err := fmt.Fprintln(stdout, uri); err != nil {
					return fmt.Errorf("--print-uri: %w", err)
				}
			}
		}
	}
	if _, err := daemon.SdNotify(false, fmt.Sprintf("READY=1\nSTATUS=Serving %s on %s", s.source.label(), uris[0])); err != nil {
		return fmt.Errorf("cannot tell systemd that the server is ready: %w", err)
	}
	if s.run == "" {
		return nil
	}
	var err error
	s.command, err = startCaptive(s.run, uris[0], exports[0].Name(), s.listeners[0])
	return err
}

func (s *session) onClientsGone() {
	select {
	case s.clientsGone <- struct{}{}:
	default:
	}
}

// wait returns when the session is to end.
func (s *session) wait() error {
	var lastClient <-chan struct{}
	if s.once {
		lastClient = s.clientsGone
	}
	select {
	case sig := <-s.signals:
		s.log.Info("ending", "signal", sig.String())
	case <-s.parentGone:
		s.log.Info("ending: the parent process has ended")
	case <-lastClient:
		s.log.Info("ending: the last client has left")
	case <-s.command.ended():
	case err := <-s.acceptFailed:
		return err
	}
	return s.endCommand()
}

// endCommand ends the command of --run, if it is still there, and tells how it ended.
// The command goes first: it may have something to write.
func (s *session) endCommand() error {
	if s.command == nil {
		return nil
	}
	select {
	case <-s.command.done:
		return s.command.status()
	default:
	}
	for sig := syscall.SIGTERM; ; sig = syscall.SIGKILL {
		if err := s.command.signal(sig); err != nil {
			return err
		}
		select {
		case <-s.command.done:
			return s.command.status()
		case <-s.signals:
		}
	}
}

// close ends the session. Clients' requests that we have read finish first; a
// second signal cuts their connections.
func (s *session) close() error {
	s.ready.Store(false)
	ctx := context.Background()
	var errs []error
	add := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	if s.server != nil {
		_, err := daemon.SdNotify(false, "STOPPING=1")
		add("cannot tell systemd that the server stops", err)
		for _, l := range s.listeners {
			add("cannot remove the socket", l.unlink())
		}
		add("closing the export", s.shutdown())
	}
	for _, l := range s.listeners { // those that never served
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			add("closing a socket", err)
		}
	}
	s.accepting.Wait()
	if s.command != nil { // the session failed with the command running
		errs = append(errs, s.command.signal(syscall.SIGKILL))
		<-s.command.done
	}
	if s.ownFolder != "" {
		add("cannot remove the folder of the socket", os.Remove(s.ownFolder))
	}
	if s.metrics != nil {
		// Before the nodes: a scrape may be asking one.
		add("closing the metrics server", s.metrics.close())
	}
	for _, n := range slices.Backward(s.nodes) {
		add("closing the image", s.graph.Release(ctx, n))
	}
	if s.graph != nil {
		add("closing the graph", s.graph.Close(ctx))
	}
	return errors.Join(errs...)
}

func (s *session) shutdown() error {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- s.server.Shutdown(ctx) }()
	for {
		select {
		case err := <-ended:
			return err
		case sig := <-s.signals:
			s.log.Warn("cutting all connections", "signal", sig.String())
			s.server.Cut()
		}
	}
}

// Exports and Nodes are what the metrics are about.
func (s *session) Exports() []metrics.Export {
	if !s.published.Load() {
		return nil
	}
	var es []metrics.Export
	for _, e := range s.server.Exports() {
		es = append(es, e)
	}
	return es
}

func (s *session) Nodes() []*block.Node {
	if !s.published.Load() {
		return nil
	}
	return s.graph.Nodes()
}
