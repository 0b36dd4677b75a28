package blocktest

import "time"

// SetGoroutineWait changes how long goroutines may take to end, and returns what changes it back.
func SetGoroutineWait(d time.Duration) func() {
	old := goroutineWait
	goroutineWait = d
	return func() { goroutineWait = old }
}
