package block

import (
	"slices"
)

// An Op is something that is done to a node as a whole and that a user of the node
// can forbid meanwhile (rule G23).
type Op uint8

const (
	OpBackupSource Op = iota
	OpBackupTarget
	OpChange
	OpCommitSource
	OpCommitTarget
	OpDriveDel
	OpEject
	OpExternalSnapshot
	OpInternalSnapshot
	OpInternalSnapshotDelete
	OpMirrorSource
	OpMirrorTarget
	OpResize
	OpStream
	OpReplace
	numOps
)

var opNames = [numOps]string{"backup-source", "backup-target", "change", "commit-source", "commit-target", "drive-del", "eject",
	"external-snapshot", "internal-snapshot", "internal-snapshot-delete", "mirror-source", "mirror-target", "resize", "stream", "replace"}

// String is QEMU's name of the operation.
func (o Op) String() string { return opNames[o] }

type blocker struct {
	ops    uint32 // bit Op
	reason string
}

// BlockOps forbids ops on the node, all of them if none is named, until the
// returned function is called, once. reason is for the text of the refusal.
func (n *Node) BlockOps(reason string, ops ...Op) (unblock func()) {
	b := blocker{reason: reason}
	for _, o := range ops {
		b.ops |= 1 << o
	}
	if len(ops) == 0 {
		b.ops = 1<<numOps - 1
	}
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	n.blockers = append(n.blockers, b)
	return func() {
		n.graph.mu.Lock()
		defer n.graph.mu.Unlock()
		if i := slices.Index(n.blockers, b); i >= 0 {
			n.blockers = slices.Delete(n.blockers, i, i+1)
		}
	}
}

// OpAllowed returns an error that wraps [ErrBusy] and names the reason if o is forbidden.
func (n *Node) OpAllowed(o Op) error {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.opAllowed(o)
}

// opAllowed is OpAllowed. Graph.mu is held.
func (n *Node) opAllowed(o Op) error {
	for _, b := range n.blockers {
		if b.ops&(1<<o) != 0 {
			return refuse(ErrBusy, "Node '%s' is busy: %s", n.name, b.reason)
		}
	}
	return nil
}
