// Package block is the graph of nodes that every export is the root of.
//
// A [Driver] opens nodes of one kind: a protocol (file, host_device), a format
// (raw, qcow2) or a filter (throttle). A [Node] is an opened driver: it has a
// node name, options, children and parents. An [Edge] joins a parent to a child
// in a [Role] and carries the permissions that the parent holds on the child. A
// [Root] is an edge without a parent node: an export, a job, a tool.
//
// # Requests
//
// Parents never call a driver's [Instance] directly. They call the methods of
// their Edge, and between the two stands one seam (seam.go) that checks range,
// flags and permission, aligns and splits, emulates what the driver lacks and
// counts. An Instance may therefore rely on valid arguments.
//
// Requests take no graph lock. They are admitted and counted once, at the root
// ([Lane.Begin]); edges change only while the roots above the nodes concerned
// are drained, and that gate is the memory barrier. The seam never waits on a
// drain, or a parent in flight could not finish its child request.
//
// A request that was admitted always finishes: contexts carry the lane of the
// connection (see [Lane.Context]) and end background work, they do not cancel
// requests.
//
// # Lock order
//
//	Graph.mu           the graph: node table, edges, permissions, drain counts
//	  Root.mu          the lanes of a root and what waits on them
//	    Node.rmu       ranges of writes in flight on a node with alignment
//	    Node.gmu       growth of such a node
//	      locks inside an Instance
//
// Graph.mu is never taken by a request, and never held across anything that may
// wait for a disk, a lock or another process: drivers are opened, closed, drained and
// asked for permissions without it. A transaction that asks for permissions has
// occupied the nodes concerned (see tx.go), so that only changes of these wait for it.
package block
