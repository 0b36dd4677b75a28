package metrics

import (
	"fmt"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Build says which build this is; it labels nbdserve_build_info.
type Build struct {
	Version   string // of nbdserve
	Revision  string // of its source, "" for unknown
	GoVersion string
}

// NewRegistry returns a registry of its own with the collectors of the source,
// of the Go runtime and of the process.
func NewRegistry(b Build, s Source) *prometheus.Registry {
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "nbdserve_build_info",
		Help:        "Always 1; the labels say which build this is.",
		ConstLabels: prometheus.Labels{"version": b.Version, "revision": b.Revision, "goversion": b.GoVersion},
	})
	info.Set(1)
	r := prometheus.NewRegistry()
	r.MustRegister(info,
		&exportCollector{source: s, now: time.Now},
		&nodeCollector{source: s},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// NewHandler serves three paths, for GET and HEAD:
//
//	/metrics             the figures of g
//	/healthz             200 as long as the process answers
//	/readyz?export=NAME  200 if the export admits requests, 503 while it is drained or
//	                     the server not ready, 404 if there is none of that name.
//	                     Without export= it asks for all of them.
//
// ready tells whether the server has begun, and not yet ended, to accept clients.
func NewHandler(g prometheus.Gatherer, s Source, ready func() bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { answer(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if !ready() {
			answer(w, http.StatusServiceUnavailable, "the server accepts no clients")
			return
		}
		q := r.URL.Query()
		code, text := readiness(s.Exports(), q.Get("export"), q.Has("export"))
		answer(w, code, text)
	})
	return mux
}

// readiness judges the export called name, or all of them.
func readiness(exports []Export, name string, one bool) (code int, text string) {
	found := false
	for _, e := range exports {
		if one && e.Name() != name {
			continue
		}
		found = true
		if e.Drained() {
			return http.StatusServiceUnavailable, fmt.Sprintf("export %q is drained", e.Name())
		}
	}
	if one && !found {
		return http.StatusNotFound, fmt.Sprintf("there is no export %q", name)
	}
	return http.StatusOK, "ok"
}

func answer(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	fmt.Fprintln(w, text)
}
