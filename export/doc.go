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
// # Locks
//
// None of these is held while another one is taken, except as shown, and none
// across I/O:
//
//	Server.mu        connections, exports, state of the server
//	conn.mu          queue, waiting requests and workers of a connection
//	  (Lane.Begin)
//	output.mu        answers not yet sent
//	budget.mu        bytes of a connection
//	  pool.mu        bytes of the server
package export
