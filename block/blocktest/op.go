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
	OpInactivate // of a fault node, and what follows
	OpActivate
	OpReopen // preparing it
	OpApply  // a reopen that was prepared
	numOps
)

var opNames = [numOps]string{"read", "write", "zero", "discard", "flush", "status", "truncate", "prefetch", "open", "close", "inactivate", "activate", "reopen", "apply"}

func (o Op) String() string { return opNames[o] }
