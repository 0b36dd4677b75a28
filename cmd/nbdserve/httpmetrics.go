package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"time"

	"github.com/nbdserve/nbdserve/metrics"
)

// A metricsServer answers /metrics, /healthz and /readyz.
type metricsServer struct {
	http   http.Server
	ended  chan struct{} // closed when Serve has returned
	failed error         // of Serve; valid after ended
}

// startMetrics serves HTTP on address, host:port. The bound address, which tells
// the port where 0 was asked for, goes to the log.
func startMetrics(address string, source metrics.Source, ready func() bool, log *slog.Logger) (*metricsServer, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("--metrics: cannot listen on %s: %w", address, reason(err))
	}
	if (&listener{Listener: l}).public() {
		log.Warn("metrics can be read from other hosts, without authentication", "listen", l.Addr().String())
	}
	log.Info("serving metrics", "url", "http://"+l.Addr().String()+"/metrics")
	registry := metrics.NewRegistry(metrics.Build{Version: buildVersion(), Revision: buildRevision(), GoVersion: runtime.Version()}, source)
	m := &metricsServer{ended: make(chan struct{}), http: http.Server{
		Handler:           metrics.NewHandler(registry, source, ready),
		ReadHeaderTimeout: 5 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}}
	go func() {
		defer close(m.ended)
		if err := m.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			m.failed = err
			log.Error("the metrics server has ended", "err", err)
		}
	}()
	return m, nil
}

// close ends the server; scrapes that have begun are answered, for a second.
func (m *metricsServer) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := m.http.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) { // a slow reader is no fault of ours
		err = m.http.Close()
	}
	<-m.ended
	return errors.Join(err, m.failed)
}
