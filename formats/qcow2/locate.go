package qcow2

import "github.com/nbdserve/nbdserve/block"

// Locate implements [block.Locator]. It takes no lock and allocates nothing.
func (im *image) Locate(shard block.Shard, off, n int64) block.Location {
	ask := block.Location{Kind: block.LocateAsk, Length: n}
	if im.fatal.Load() != nil {
		return ask
	}
	m, hit := im.lookup(off, n)
	if !hit {
		return ask // ReadAt counts the miss
	}
	im.hits.Add(shard, 1)
	switch m.kind {
	case ClusterData:
		if m.host+m.length > im.file.Size() {
			return ask
		}
		l := im.file.Locate(shard, m.host, m.length)
		l.Stable = false
		if l.Kind == block.LocateAsk {
			l.Length = m.length
		}
		return l
	case ClusterZero, ClusterZeroAlloc:
		return block.Location{Kind: block.LocateZero, Length: m.length}
	case ClusterUnallocated:
		if im.backing() == nil {
			return block.Location{Kind: block.LocateZero, Length: m.length}
		}
		there := im.backing().Size() - off
		if there <= 0 {
			return block.Location{Kind: block.LocateZero, Length: m.length, Depth: 1}
		}
		l := im.backing().Locate(shard, off, min(m.length, there))
		l.Stable = false
		l.Depth++
		return l
	}
	ask.Length = m.length
	return ask
}
