// Package metrics publishes figures of exports and nodes for Prometheus, and tells
// over HTTP whether the server is alive and its exports ready.
package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/internal/iostat"
)

// An Export is what the collectors need of an export. Its methods may be called in parallel.
type Export interface {
	Name() string
	Stats() iostat.Snapshot
	Drained() bool
	Activity() iostat.Activity
}

// A Source tells what there is to measure at the moment of a scrape.
type Source interface {
	Exports() []Export
	Nodes() []*block.Node
}

var (
	connections = prometheus.NewDesc("nbdserve_connections",
		"Clients in the transmission phase.", []string{"export"}, nil)
	inFlight = prometheus.NewDesc("nbdserve_requests_in_flight",
		"Requests admitted and not answered yet.", []string{"export", "op"}, nil)
	oldest = prometheus.NewDesc("nbdserve_oldest_request_seconds",
		"Age of the oldest request in flight, 0 without one.", []string{"export"}, nil)
	requests = prometheus.NewDesc("nbdserve_requests_total",
		"Requests ended, by result (ok, error).", []string{"export", "op", "result"}, nil)
	requestBytes = prometheus.NewDesc("nbdserve_request_bytes_total",
		"Bytes that ended requests were about.", []string{"export", "op"}, nil)
	duration = prometheus.NewDesc("nbdserve_request_duration_seconds",
		"Time from the arrival of a request to its answer.", []string{"export", "op"}, nil)
	drained = prometheus.NewDesc("nbdserve_export_drained",
		"1 while the export admits no requests because its graph changes.", []string{"export"}, nil)
	isActive = prometheus.NewDesc("nbdserve_export_active",
		"1 while the image is locked for clients of the export, 0 while others may use it.", []string{"export"}, nil)
	activations = prometheus.NewDesc("nbdserve_export_activations_total",
		"Times that the image was locked and opened for a client, by result (ok, error).", []string{"export", "result"}, nil)
	inactivations = prometheus.NewDesc("nbdserve_export_inactivations_total",
		"Times that the image was stored and unlocked without a client, by result (ok, error: it stays locked).", []string{"export", "result"}, nil)
)

// exportCollector publishes the figures of exports. They are counted by
// connection as requests run, and summed up here, at the scrape.
type exportCollector struct {
	source Source
	now    func() time.Time
}

func (c *exportCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{connections, inFlight, oldest, requests, requestBytes, duration, drained, isActive, activations, inactivations} {
		ch <- d
	}
}

func (c *exportCollector) Collect(ch chan<- prometheus.Metric) {
	for _, e := range c.source.Exports() {
		c.export(ch, e)
	}
}

func (c *exportCollector) export(ch chan<- prometheus.Metric, e Export) {
	const counter, gauge = prometheus.CounterValue, prometheus.GaugeValue
	put := func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, t, v, append([]string{e.Name()}, labels...)...)
	}
	s := e.Stats()
	put(connections, gauge, float64(s.Connections))
	put(oldest, gauge, s.Oldest(c.now()).Seconds())
	put(drained, gauge, oneIf(e.Drained()))
	a := e.Activity()
	put(isActive, gauge, oneIf(a.Active))
	put(activations, counter, float64(a.Activations), "ok")
	put(activations, counter, float64(a.ActivationsFailed), "error")
	put(inactivations, counter, float64(a.Inactivations), "ok")
	put(inactivations, counter, float64(a.InactivationsFailed), "error")
	for op := range iostat.NumOps {
		f := &s.Ops[op]
		put(inFlight, gauge, float64(f.InFlight), op.String())
		put(requests, counter, float64(f.OK), op.String(), "ok")
		put(requests, counter, float64(f.Failed), op.String(), "error")
		put(requestBytes, counter, float64(f.Bytes), op.String())
		ch <- histogram(f, e.Name(), op.String())
	}
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// histogram turns the buckets of an op, which count each request once, into
// Prometheus' cumulative ones.
func histogram(f *iostat.OpFigures, labels ...string) prometheus.Metric {
	buckets := make(map[float64]uint64, iostat.NumBuckets-1)
	var sum uint64
	for i, n := range f.Buckets {
		sum += uint64(n)
		if i < iostat.NumBuckets-1 {
			buckets[iostat.BucketBound(i).Seconds()] = sum
		}
	}
	return prometheus.MustNewConstHistogram(duration, sum, f.Duration.Seconds(), buckets, labels...)
}
