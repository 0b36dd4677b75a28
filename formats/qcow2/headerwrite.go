package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
)

// sectorSize is what a disk writes all or nothing, in bytes.
const sectorSize = 512

// replaceHeader makes h the header of the image in f, durably. At every moment the
// file has the old header or the new one, whichever sectors of a request a crash leaves
// written: all but a long name lies in the first sector, and the name goes to a place
// that the old header does not use. The table of feature names is left out of h where
// it does not fit in there. It fails with [block.ErrNoSpace], having changed nothing,
// where there is no room.
func replaceHeader(ctx context.Context, f Target, h *Header) error {
	if len(h.BackingFile) > MaxBackingFileName {
		return invalid("Backing file name too long: %d bytes, at most %d", len(h.BackingFile), MaxBackingFileName)
	}
	old := make([]byte, h.ClusterSize())
	if err := f.ReadAt(ctx, old[:min(int64(len(old)), f.Size())], 0); err != nil {
		return fmt.Errorf("read qcow2 header: %w", err)
	}
	was, err := parseFixed(old)
	if err == nil && was.ClusterBits != h.ClusterBits {
		err = corrupt("the cluster size of the image has changed")
	}
	if err == nil {
		err = was.parseVariable(old)
	}
	if err != nil {
		return err
	}
	sector := h.appendExtensions(h.marshalFixed())
	if len(sector) > sectorSize {
		h.FeatureNames = nil
		sector = h.appendExtensions(h.marshalFixed())
	}
	name := int64(len(h.BackingFile))
	at := int64(len(sector))
	if at > sectorSize {
		return fmt.Errorf("the header has %d bytes with its extensions, of which %d can be changed at once: %w", at, sectorSize, block.ErrNoSpace)
	}
	inside := name <= sectorSize-at
	if name > 0 && !inside {
		var moves bool
		if at, moves = was.placeName(old, h.BackingFile); at+name > int64(len(old)) {
			return fmt.Errorf("the header has no room for a backing file name of %d bytes; a cluster has %d: %w", name, len(old), block.ErrNoSpace)
		}
		if moves {
			if err := f.WriteAt(ctx, []byte(h.BackingFile), at, 0); err != nil {
				return fmt.Errorf("write qcow2 header: %w", err)
			}
			if err := f.Flush(ctx); err != nil {
				return err
			}
		}
	}
	if name > 0 {
		binary.BigEndian.PutUint64(sector[8:], uint64(at))
		binary.BigEndian.PutUint32(sector[16:], uint32(name))
		if inside {
			sector = append(sector, h.BackingFile...)
		}
	}
	sector = append(sector, make([]byte, sectorSize-len(sector))...)
	if err := f.WriteAt(ctx, sector, 0, 0); err != nil {
		return fmt.Errorf("write qcow2 header: %w", err)
	}
	return f.Flush(ctx)
}

// placeName finds a place for another name of a backing file behind the first sector
// of the first cluster, old, where h, the header that is there, has nothing. It tells
// whether the name must be written: it may be there already.
func (h *Header) placeName(old []byte, name string) (at int64, write bool) {
	be := binary.BigEndian
	nameAt, nameEnd := int64(be.Uint64(old[8:])), int64(be.Uint64(old[8:]))+int64(be.Uint32(old[16:]))
	if nameAt >= sectorSize && string(old[nameAt:nameEnd]) == name {
		return nameAt, false
	}
	limit := int64(len(old))
	if nameAt != 0 {
		limit = nameAt
	}
	end := int64(h.HeaderLength)
	for end+8 <= limit {
		typ, n := be.Uint32(old[end:]), int64(be.Uint32(old[end+4:]))
		end += 8
		if typ == ExtEnd {
			break
		}
		end += (n + 7) &^ 7
	}
	at = max(sectorSize, end)
	if at < nameEnd && at+int64(len(name)) > nameAt {
		at = nameEnd
	}
	return at, true
}
