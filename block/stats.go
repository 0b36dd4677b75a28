package block

import "sync/atomic"

// A nodeCell counts the requests that pass a node's seam, for one shard.
type nodeCell struct {
	reads, readBytes, writes, writeBytes, zeroes, discards, flushes, statuses atomic.Int64

	changes atomic.Int64 // see flush.go
	_       [56]byte
}

// NodeStats are the requests that a node was asked for since it was opened,
// located reads included. A read that was located, but then had to wait for the
// device, is asked for twice.
type NodeStats struct {
	Reads, ReadBytes, Writes, WriteBytes, Zeroes, Discards, Flushes, Statuses int64
}

// Stats sums up the requests of the node. It may be called in parallel with them.
func (n *Node) Stats() NodeStats {
	var s NodeStats
	for i := range n.stats {
		c := &n.stats[i]
		s.Reads += c.reads.Load()
		s.ReadBytes += c.readBytes.Load()
		s.Writes += c.writes.Load()
		s.WriteBytes += c.writeBytes.Load()
		s.Zeroes += c.zeroes.Load()
		s.Discards += c.discards.Load()
		s.Flushes += c.flushes.Load()
		s.Statuses += c.statuses.Load()
	}
	return s
}

func (n *Node) countRead(s Shard, bytes int64) {
	c := &n.stats[s%NumShards]
	c.reads.Add(1)
	c.readBytes.Add(bytes)
}

func (n *Node) countWrite(s Shard, bytes int64) {
	c := &n.stats[s%NumShards]
	c.writes.Add(1)
	c.writeBytes.Add(bytes)
}
