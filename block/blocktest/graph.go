package blocktest

import (
	"context"
	"log/slog"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nbdserve/nbdserve/block"
)

// NewGraph returns a graph with the drivers memory, fault, slow and crash, and
// those given. At its end the test fails if a node of the graph is still open, or
// a goroutine that the test started since its first NewGraph still runs.
func NewGraph(t TB, drivers ...*block.Driver) *block.Graph {
	t.Helper()
	watchGoroutines(t)
	log := slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	g := block.NewGraph(log, append([]*block.Driver{Memory(t), FaultDriver(), SlowDriver(), CrashDriver(t)}, drivers...)...)
	t.Cleanup(func() {
		if err := g.Close(context.Background()); err != nil {
			t.Errorf("%v", err)
		}
	})
	return g
}

// testWriter puts log lines into the output of the test.
type testWriter struct{ t TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}

const labelKey = "blocktest"

var (
	watchedMu sync.Mutex
	watched   = map[TB]bool{}
)

// watchGoroutines labels the goroutine of the test, and thereby those it starts,
// and looks for the label when the test ends.
func watchGoroutines(t TB) {
	watchedMu.Lock()
	defer watchedMu.Unlock()
	if watched[t] {
		return
	}
	watched[t] = true
	pprof.SetGoroutineLabels(pprof.WithLabels(context.Background(), pprof.Labels(labelKey, t.Name())))
	t.Cleanup(func() {
		watchedMu.Lock()
		delete(watched, t)
		watchedMu.Unlock()
		pprof.SetGoroutineLabels(context.Background())
		if left := waitGoroutines(t.Name()); left != "" {
			t.Errorf("goroutines left at the end of the test:\n%s", left)
		}
	})
}

// goroutineWait is how long goroutines may take to end once their work is done.
var goroutineWait = 5 * time.Second

// waitGoroutines gives goroutines that have done their work the time to end.
func waitGoroutines(name string) string {
	left := labelled(name)
	for end := time.Now().Add(goroutineWait); left != "" && time.Now().Before(end); left = labelled(name) {
		runtime.Gosched()
	}
	return left
}

// labelled lists the stacks of the goroutines with the label of the test.
func labelled(name string) string {
	var b strings.Builder
	if err := pprof.Lookup("goroutine").WriteTo(&b, 1); err != nil {
		return err.Error()
	}
	mark := strconv.Quote(labelKey) + ":" + strconv.Quote(name)
	var left []string
	for _, stack := range strings.Split(b.String(), "\n\n") {
		if strings.Contains(stack, mark) {
			left = append(left, stack)
		}
	}
	return strings.Join(left, "\n\n")
}
