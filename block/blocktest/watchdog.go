package blocktest

import (
	"fmt"
	"runtime/debug"
	"time"
)

// deadlocked ends the process with the stacks of all goroutines.
var deadlocked = func(text string) {
	debug.SetTraceback("all")
	panic(text)
}

// Watchdog ends the test binary, with the stacks of all goroutines, when the test has
// neither ended nor called beat for d: it hangs. beat may be called in parallel.
func Watchdog(t TB, d time.Duration) (beat func()) {
	timer := time.AfterFunc(d, func() {
		deadlocked(fmt.Sprintf("%s is deadlocked: nothing has happened for %v", t.Name(), d))
	})
	t.Cleanup(func() { timer.Stop() })
	return func() { timer.Reset(d) }
}
