package block

import "context"

// A Reopener is a driver whose nodes can get other options while they are open (rule
// G21). Which of the driver's own options may change is in [Driver.Mutable]; all others
// are known to be the same, and need no look.
type Reopener interface {
	// PrepareReopen checks that the node can become what r says, and gets ready what
	// may fail. Nothing is in flight; all data written so far was flushed. The node
	// holds its old permissions and links and must go on as it is for now: a flush is
	// fine, a change of behaviour is not. Children were prepared before their parents.
	// A node that is inactive has nothing open, and only takes note.
	PrepareReopen(ctx context.Context, r *Reopening) (Switch, error)
}

// A Switch is a reopen that was prepared. Apply may be called, once; then exactly one
// of Commit and Abort is. All calls come with nothing in flight.
type Switch interface {
	// Apply makes the node what was prepared. Its links are the new ones, and it has
	// the permissions of before and of afterwards together. Children come before
	// parents. After an error, of this or of another node, Abort follows.
	Apply(ctx context.Context) error
	// Commit lets go of what only the old state needed. It cannot fail.
	Commit()
	// Abort makes the node again what it was, whether or not Apply was called. Its links
	// and permissions may still be as for Apply. It cannot fail.
	Abort()
}

// A Reopening is what a node is to become.
type Reopening struct {
	// Node is the node. Its Config is the old one until the end.
	Node *Node
	// Config is the new effective configuration; Options are of the driver's type.
	Config *Config
}
