package main

import (
	"os"
	"runtime/debug"
)

// limitMemory makes the garbage collector work for a small process: the heap holds
// buffers for requests in flight and little else. What the operator sets by GOGC
// or GOMEMLIMIT counts.
func limitMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(40 << 20)
	}
}
