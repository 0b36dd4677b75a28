package metrics

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/internal/iostat"
)

type export struct {
	name     string
	stats    iostat.Export
	drained  bool
	activity iostat.Activity
}

func (e *export) Name() string              { return e.name }
func (e *export) Stats() iostat.Snapshot    { return e.stats.Snapshot() }
func (e *export) Drained() bool             { return e.drained }
func (e *export) Activity() iostat.Activity { return e.activity }

type source struct {
	exports []Export
	nodes   []*block.Node
}

func (s *source) Exports() []Export    { return s.exports }
func (s *source) Nodes() []*block.Node { return s.nodes }

// emptyNode is a node of 4096 zero bytes that measures two figures.
type emptyNode struct{}

func (emptyNode) ReadAt(_ context.Context, p []byte, _ int64) error            { clear(p); return nil }
func (emptyNode) WriteAt(context.Context, []byte, int64, block.ReqFlags) error { return nil }
func (emptyNode) Flush(context.Context) error                                  { return nil }
func (emptyNode) Size() int64                                                  { return 4096 }
func (emptyNode) Limits() block.Limits                                         { return block.Limits{} }
func (emptyNode) Close(context.Context) error                                  { return nil }
func (emptyNode) Measurements() []block.Measurement {
	return []block.Measurement{
		{Name: "l2_cache_hits_total", Help: "Hits of the L2 cache.", Value: 7, Counter: true},
		{Name: "limbo_bytes", Help: "Freed and not reusable yet.", Value: 65536},
	}
}

func openNode(t *testing.T) *block.Node {
	t.Helper()
	ctx := context.Background()
	g := block.NewGraph(slog.New(slog.DiscardHandler), &block.Driver{Name: "empty", Kind: block.Protocol,
		Open: func(context.Context, *block.Opening) (block.Instance, error) { return emptyNode{}, nil }})
	n, err := g.Open(ctx, &block.Config{Driver: "empty", NodeName: "disk0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Release(ctx, n); err != nil {
			t.Error(err)
		}
		if err := g.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return n
}

func TestFiguresOfARequest(t *testing.T) {
	e := &export{name: "a"}
	c := e.stats.NewConn()
	now := time.Now()
	c.Start(iostat.Read, 2)
	c.Finish(iostat.Read, true, 4096, 3*time.Microsecond)
	c.Track(0, iostat.Read, 512, 4096, now.Add(-2*time.Second).UnixNano())
	c.Start(iostat.Write, 1)
	c.Finish(iostat.Write, false, 0, time.Hour)

	r := prometheus.NewPedanticRegistry()
	r.MustRegister(&exportCollector{source: &source{exports: []Export{e}}, now: func() time.Time { return now }})
	want := `
# HELP nbdserve_connections Clients in the transmission phase.
# TYPE nbdserve_connections gauge
nbdserve_connections{export="a"} 1
# HELP nbdserve_export_drained 1 while the export admits no requests because its graph changes.
# TYPE nbdserve_export_drained gauge
nbdserve_export_drained{export="a"} 0
# HELP nbdserve_oldest_request_seconds Age of the oldest request in flight, 0 without one.
# TYPE nbdserve_oldest_request_seconds gauge
nbdserve_oldest_request_seconds{export="a"} 2
`
	if err := testutil.GatherAndCompare(r, strings.NewReader(want),
		"nbdserve_connections", "nbdserve_export_drained", "nbdserve_oldest_request_seconds"); err != nil {
		t.Error(err)
	}
	text := scrape(t, NewHandler(r, &source{}, func() bool { return true }), "/metrics", http.StatusOK)
	for _, line := range []string{
		`nbdserve_requests_in_flight{export="a",op="read"} 1`,
		`nbdserve_requests_in_flight{export="a",op="write"} 0`,
		`nbdserve_requests_total{export="a",op="read",result="ok"} 1`,
		`nbdserve_requests_total{export="a",op="write",result="error"} 1`,
		`nbdserve_request_bytes_total{export="a",op="read"} 4096`,
		`nbdserve_request_duration_seconds_bucket{export="a",op="read",le="2e-06"} 0`,
		`nbdserve_request_duration_seconds_bucket{export="a",op="read",le="4e-06"} 1`,
		`nbdserve_request_duration_seconds_count{export="a",op="read"} 1`,
		// An hour lies past the last finite bucket, and still counts.
		`nbdserve_request_duration_seconds_bucket{export="a",op="write",le="4.194304"} 0`,
		`nbdserve_request_duration_seconds_bucket{export="a",op="write",le="+Inf"} 1`,
		`nbdserve_request_duration_seconds_sum{export="a",op="write"} 3600`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("the scrape lacks %s", line)
		}
	}
}

func TestFiguresOfActivation(t *testing.T) {
	a := iostat.Activity{Active: true, Activations: 5, ActivationsFailed: 2, Inactivations: 4, InactivationsFailed: 3}
	s := &source{exports: []Export{&export{name: "a", activity: a}, &export{name: "b"}}}
	text := scrape(t, NewHandler(NewRegistry(Build{}, s), s, func() bool { return true }), "/metrics", http.StatusOK)
	for _, line := range []string{
		`nbdserve_export_active{export="a"} 1`,
		`nbdserve_export_active{export="b"} 0`,
		`nbdserve_export_activations_total{export="a",result="ok"} 5`,
		`nbdserve_export_activations_total{export="a",result="error"} 2`,
		`nbdserve_export_inactivations_total{export="a",result="ok"} 4`,
		`nbdserve_export_inactivations_total{export="a",result="error"} 3`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("the scrape lacks %s", line)
		}
	}
}

func TestFiguresOfANode(t *testing.T) {
	n := openNode(t)
	text := scrape(t, NewHandler(NewRegistry(Build{Version: "1.2.3"}, &source{nodes: []*block.Node{n}}), &source{}, func() bool { return true }),
		"/metrics", http.StatusOK)
	for _, line := range []string{
		`nbdserve_build_info{goversion="",revision="",version="1.2.3"} 1`,
		`nbdserve_node_l2_cache_hits_total{driver="empty",node="disk0"} 7`,
		`nbdserve_node_limbo_bytes{driver="empty",node="disk0"} 65536`,
		`nbdserve_node_requests_total{driver="empty",node="disk0",op="read"} 0`,
		"# TYPE nbdserve_node_limbo_bytes gauge",
		"# TYPE nbdserve_node_l2_cache_hits_total counter",
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("the scrape lacks %s", line)
		}
	}
	if !strings.Contains(text, "go_goroutines") || !strings.Contains(text, "process_cpu_seconds_total") {
		t.Error("the scrape lacks the figures of the Go runtime or of the process")
	}
}

func TestNamesPassTheLinter(t *testing.T) {
	s := &source{exports: []Export{&export{name: ""}, &export{name: "b", drained: true}}, nodes: []*block.Node{openNode(t)}}
	problems, err := testutil.GatherAndLint(NewRegistry(Build{}, s))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "nbdserve_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

func TestReadiness(t *testing.T) {
	s := &source{exports: []Export{&export{name: "a"}, &export{name: "b", drained: true}, &export{name: ""}}}
	for _, c := range []struct {
		path  string
		ready bool
		code  int
	}{
		{"/healthz", false, http.StatusOK},
		{"/readyz?export=a", true, http.StatusOK},
		{"/readyz?export=a", false, http.StatusServiceUnavailable},
		{"/readyz?export=b", true, http.StatusServiceUnavailable},
		{"/readyz?export=", true, http.StatusOK},
		{"/readyz?export=c", true, http.StatusNotFound},
		{"/readyz", true, http.StatusServiceUnavailable}, // b
		{"/nothing", true, http.StatusNotFound},
	} {
		scrape(t, NewHandler(prometheus.NewRegistry(), s, func() bool { return c.ready }), c.path, c.code)
	}
}

func scrape(t *testing.T, h http.Handler, path string, code int) string {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	body, err := io.ReadAll(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	if w.Code != code {
		t.Errorf("GET %s: %d %s, want %d", path, w.Code, body, code)
	}
	return string(body)
}
