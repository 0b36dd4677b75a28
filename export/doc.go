// Package export is the NBD server: it negotiates with clients and serves the
// nodes of block graphs to them.
//
// # Life of a connection
//
// [Server.Serve] accepts. The connection negotiates (negotiate.go) under one
// deadline and a budget of options; nothing is opened on its behalf. With
// NBD_OPT_GO or NBD_OPT_EXPORT_NAME it becomes a client of an [Export] and enters
// transmission (conn.go).
//
// In transmission one goroutine, the reader, receives as much as has arrived and
// takes all complete requests out of it, in order. Each is admitted at the
// export's root ([block.Lane.Begin]) once it is there in full, payload included.
// While the root is drained, requests wait in the connection's list and are
// admitted, in order, when the drain has ended.
//
// What needs no waiting, reads of data in memory, the reader answers at once
// (inline.go); all these answers leave in one write. The rest goes to the
// connection's queue, which a few workers serve, started as needed (queue.go). The
// reader itself never waits for a disk, a drain or a throttle.
//
// Answers gather in the connection's output (output.go). Whoever finds nobody
// sending sends all that is there. A request has ended, and is counted as such,
// before its answer is sent, so that a client that does not receive cannot hold up
// a drain.
//
// Memory is bounded by the connection's budget (budget.go): requests and bytes, of
// which all but a small reserve come from a pool of the server. A reader whose
// budget is used up stops reading until answers have gone out.
//
// When the client leaves, its admitted requests finish, waiting ones are dropped
// unless it said NBD_CMD_DISC, and the last client of an export flushes it.
//
// # Activation
//
// An export with [ActivationOnConnect] has its image while it has a client, so that
// other processes can have it in between. The nodes below it have a life
// (activation.go): they are inactive, activating, active or inactivating, and one
// goroutine, the owner, changes that. NBD_OPT_GO, NBD_OPT_EXPORT_NAME and
// NBD_OPT_SET_META_CONTEXT take a lease before they are answered. A connection has
// one at most, of the export that it selected last; it is given back when the
// requests of a client that has left have finished. Without a lease the owner
// inactivates, after the linger time; if that fails the nodes stay active, and it
// tries again. All exports of a node share its life.
//
// # Locks
//
// None of these is held while another one is taken, except as shown, and none
// across I/O:
//
//	Server.mu        connections, exports, state of the server
//	  nodeTree.mu    roots on top of a node
//	life.mu          leases of a node tree, and its phase
//	conn.mu          queue, waiting requests and workers of a connection
//	  (Lane.Begin)
//	output.mu        answers not yet sent
//	budget.mu        bytes of a connection
//	  pool.mu        bytes of the server
package export
