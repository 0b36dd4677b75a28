package blocktest

// Op is a kind of request to a node.
type Op uint8

const (
	OpRead Op = iota
	OpWrite
	OpZero
	OpDiscard
	OpFlush
	OpStatus
	OpTruncate
	OpPrefetch
	OpOpen
	OpClose
	numOps
)

var opNames = [numOps]string{"read", "write", "zero", "discard", "flush", "status", "truncate", "prefetch", "open", "close"}

func (o Op) String() string { return opNames[o] }
