// Package blocktest has what tests of nodes need: a disk in memory ([Store]) and
// the nodes over it (drivers memory, fault, slow and crash), the states in which a
// power cut may leave a disk ([Log.States]), a graph that fails the test when a
// node or goroutine is left ([NewGraph]), and the suite that every kind of node
// passes ([Conformance]).
package blocktest

// TB is what the helpers need of a test; *testing.T, *testing.F, *testing.B and *rapid.T have it.
type TB interface {
	Helper()
	Name() string
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
}
