package integration

import (
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

var metricsURL = regexp.MustCompile(`http://[0-9.:]+/metrics`)

// metricsOf is the address of a server that was started with --metrics 127.0.0.1:0.
func metricsOf(t testing.TB, s *server) string {
	t.Helper()
	return strings.TrimSuffix(metricsURL.FindString(s.stderr.await(t, "/metrics")), "/metrics")
}

func get(t testing.TB, url string) (int, string) {
	t.Helper()
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(body)
}

// figures are the samples of one scrape.
type figures map[string]float64

func scrape(t testing.TB, address string) figures {
	t.Helper()
	code, body := get(t, address+"/metrics")
	if code != http.StatusOK {
		t.Fatalf("/metrics answers %d: %s", code, body)
	}
	f := figures{}
	for line := range strings.Lines(body) {
		line = strings.TrimSpace(line)
		if i := strings.LastIndexByte(line, ' '); i > 0 && line[0] != '#' {
			v, err := strconv.ParseFloat(line[i+1:], 64)
			if err != nil {
				t.Fatal(err)
			}
			f[line[:i]] = v
		}
	}
	return f
}

func TestMetricsCountWhatAClientDid(t *testing.T) {
	t.Parallel()
	disk := newImage(t)
	s := start(t, "--metrics", "127.0.0.1:0", "--name", "disk", "--format", "qcow2", disk)
	address := metricsOf(t, s)
	c := connect(t, s)
	data := make([]byte, 4096)
	for i := range int64(10) {
		if err := c.writeAt(data, i*4096); err != nil {
			t.Fatal(err)
		}
	}
	for range 7 {
		if err := c.readAt(data, 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{c.flush(), c.do(cmdTrim, 0, 0, mib, nil, nil), c.do(cmdZeroes, 0, 0, mib, nil, nil)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := c.writeAt(data, 16*mib); err == nil {
		t.Fatal("a write past the end succeeds")
	}
	f := scrape(t, address)
	for sample, want := range map[string]float64{
		`nbdserve_connections{export="disk"}`:                                         1,
		`nbdserve_export_drained{export="disk"}`:                                      0,
		`nbdserve_oldest_request_seconds{export="disk"}`:                              0,
		`nbdserve_requests_in_flight{export="disk",op="read"}`:                        0,
		`nbdserve_requests_in_flight{export="disk",op="write"}`:                       0,
		`nbdserve_requests_total{export="disk",op="read",result="ok"}`:                7,
		`nbdserve_requests_total{export="disk",op="write",result="ok"}`:               10,
		`nbdserve_requests_total{export="disk",op="write",result="error"}`:            1,
		`nbdserve_requests_total{export="disk",op="flush",result="ok"}`:               1,
		`nbdserve_request_bytes_total{export="disk",op="read"}`:                       7 * 4096,
		`nbdserve_request_duration_seconds_count{export="disk",op="read"}`:            7,
		`nbdserve_request_duration_seconds_bucket{export="disk",op="read",le="+Inf"}`: 7,
		`nbdserve_request_duration_seconds_count{export="disk",op="write"}`:           11,
	} {
		if got, ok := f[sample]; !ok || got != want {
			t.Errorf("%s is %v (there: %v), expected %v", sample, got, ok, want)
		}
	}
	for _, prefix := range []string{"nbdserve_build_info{", "nbdserve_node_", "go_goroutines", "process_resident_memory_bytes"} {
		found := false
		for sample := range f {
			found = found || strings.HasPrefix(sample, prefix)
		}
		if !found {
			t.Errorf("there is no %s", prefix)
		}
	}
	for path, want := range map[string]int{
		"/healthz": 200, "/readyz": 200, "/readyz?export=disk": 200, "/readyz?export=other": 404, "/": 404,
	} {
		if code, body := get(t, address+path); code != want {
			t.Errorf("%s answers %d, expected %d: %s", path, code, want, body)
		}
	}
	c.Close()
	awaitFigure(t, address, `nbdserve_connections{export="disk"}`, 0)
}

// awaitFigure scrapes until a figure has a value.
func awaitFigure(t testing.TB, address, sample string, want float64) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		f := scrape(t, address)
		if f[sample] == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s stays %v, expected %v", sample, f[sample], want)
		}
	}
}

func TestInFlightReturnsToZero(t *testing.T) {
	t.Parallel()
	disk := filepath.Join(tempDir(t), "disk")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", disk, "64M")
	s := start(t, "--metrics", "127.0.0.1:0", "--format", "qcow2", disk)
	address := metricsOf(t, s)
	// Clients that are gone in the middle of their requests.
	for i := range 10 {
		c := connect(t, s)
		for k := range int64(100) {
			if err := c.request(cmdWrite, 0, k*64*kib, 64*kib, noise(uint64(i), 64*kib)); err != nil {
				t.Fatal(err)
			}
		}
		c.Close()
	}
	for _, op := range []string{"read", "write"} {
		awaitFigure(t, address, fmt.Sprintf(`nbdserve_requests_in_flight{export="",op="%s"}`, op), 0)
	}
	awaitFigure(t, address, `nbdserve_connections{export=""}`, 0)
	awaitFigure(t, address, `nbdserve_oldest_request_seconds{export=""}`, 0)
}

func TestPublicMetricsAddressWarns(t *testing.T) {
	t.Parallel()
	s := start(t, "--metrics", ":0", "--format", "qcow2", newImage(t))
	s.stderr.await(t, "other hosts")
	refused(t, []string{"serve", "--metrics", "192.0.2.1:1", "--format", "qcow2", newImage(t)}, "192.0.2.1:1")
}
