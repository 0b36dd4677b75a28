package blocktest

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestWatchdogBarksOnlyWhenNothingHappens(t *testing.T) {
	defer func(f func(string)) { deadlocked = f }(deadlocked)
	synctest.Test(t, func(t *testing.T) {
		barked := make(chan string, 10)
		deadlocked = func(text string) { barked <- text }
		beat := Watchdog(t, time.Minute)
		for range 5 {
			time.Sleep(59 * time.Second)
			beat()
		}
		synctest.Wait()
		if len(barked) != 0 {
			t.Fatalf("barked at a test that goes on: %q", <-barked)
		}
		time.Sleep(61 * time.Second)
		synctest.Wait()
		if len(barked) != 1 {
			t.Fatalf("barked %d times at a test that hangs", len(barked))
		}
		if text := <-barked; !strings.Contains(text, t.Name()) {
			t.Errorf("a test that hangs: %q", text)
		}
	})
}
