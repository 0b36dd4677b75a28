package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
)

// growRefcountTable replaces the refcount table by one that has an entry for
// refcount block b (rule R3). The new table, and the blocks for it, lie where the
// old table ended: nothing on disk refers to these clusters. Both are durable
// before the header leads to them.
func (im *image) growRefcountTable(ctx context.Context, b int64) error {
	im.flushMu.Lock()
	defer im.flushMu.Unlock()
	im.mu.Lock()
	defer im.mu.Unlock()
	r := im.refs
	old := int64(len(r.table))
	if b < old {
		return nil // somebody else has grown it
	}
	perCluster := im.clusterSize / 8
	perBlock := int64(1) << r.blockBits
	most := int64(MaxRefcountTableBytes) >> im.clusterBits
	clusters, blocks := int64(0), int64(1)
	for {
		clusters = min(most, (max(old+old/2, old+blocks)+perCluster)/perCluster)
		if need := (clusters + blocks + perBlock - 1) / perBlock; need > blocks {
			blocks = need
			continue
		}
		break
	}
	if old+blocks > clusters*perCluster {
		return fmt.Errorf("the refcount table has reached its limit of %d bytes; the image file cannot grow with clusters of %d bytes: %w", MaxRefcountTableBytes, im.clusterSize, block.ErrNoSpace)
	}
	area := extent{old << r.blockBits, blocks + clusters}
	if area.end()<<im.clusterBits > MaxHostOffset {
		return fmt.Errorf("the image file has reached 2^56 bytes: %w", block.ErrNoSpace)
	}
	if _, err := r.claim(area); err != nil {
		return err
	}
	table := make([]uint64, clusters*perCluster)
	copy(table, r.table)
	refs := make([]byte, blocks<<im.clusterBits)
	for i := range area.n {
		block := refs[i>>r.blockBits<<im.clusterBits:]
		RefcountSet(block, r.order, i&(perBlock-1), 1)
	}
	for i := range blocks {
		table[old+i] = uint64((area.first + i) << im.clusterBits)
	}
	raw := make([]byte, len(table)*8)
	for i, v := range table {
		binary.BigEndian.PutUint64(raw[i*8:], v)
	}
	// The new table leads to all blocks, so what they hold must be on disk too.
	var list []patch
	for i, s := range r.slices {
		if s.dirty || s.writing {
			off, err := r.blockOffset(i >> (r.blockBits - r.sliceBits))
			if err != nil {
				return err
			}
			list = append(list, patch{r.sliceOffset(i, off), s.data})
		}
	}
	tableOffset := (area.first + blocks) << im.clusterBits
	list = append(list, patch{area.first << im.clusterBits, refs}, patch{tableOffset, raw})
	im.file.Debug(block.EventReftableGrow)
	if err := im.write(ctx, list); err != nil {
		return err
	}
	if im.broken&ruleTableFirst == 0 {
		if err := im.file.Flush(ctx); err != nil {
			return err
		}
	}
	field := binary.BigEndian.AppendUint64(nil, uint64(tableOffset))
	field = binary.BigEndian.AppendUint32(field, uint32(clusters))
	if err := im.file.WriteAt(ctx, field, refcountTableField, 0); err != nil {
		return err
	}
	if err := im.file.Flush(ctx); err != nil {
		return err
	}
	before := extent{r.tableOffset >> im.clusterBits, int64(im.header.RefcountTableClusters)}
	im.header.RefcountTableOffset, im.header.RefcountTableClusters = tableOffset, uint32(clusters)
	r.table, r.tableOffset = table, tableOffset
	im.dirty.Add(-int64(len(r.dirtyTable)))
	clear(r.dirtyTable)
	im.fixed.remove(before.first, before.n)
	im.fixed.add(area.first, area.n)
	im.free(before)
	return nil
}
