package main

import (
	"os"
	"runtime/debug"
)

// limitMemory makes the garbage collector work for a small process: the heap holds
// buffers for requests in flight and little else, so collecting it often is cheap.
// What the operator sets by GOGC counts.
func limitMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
}
