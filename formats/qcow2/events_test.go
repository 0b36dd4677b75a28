package qcow2

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"github.com/nbdserve/nbdserve/block/filter"
	"github.com/nbdserve/nbdserve/hostdev"
)

// A witness is a filter that remembers of what events it was told.
type witness struct {
	filter.Pass
	mu   *sync.Mutex
	seen *[]block.DebugEvent
}

func (w *witness) DebugEvent(e block.DebugEvent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	*w.seen = append(*w.seen, e)
}

func (*witness) Breakpoint(block.DebugEvent, string) {}
func (*witness) RemoveBreakpoint(string) error       { return nil }
func (*witness) Resume(string) error                 { return nil }
func (*witness) Suspended(string) bool               { return false }

// A scene is an image over a witness.
type scene struct {
	*disk
	mu   sync.Mutex
	seen []block.DebugEvent
}

func openScene(t *testing.T, cfg *block.Config) *scene {
	t.Helper()
	s := new(scene)
	driver := &block.Driver{Name: "witness", Kind: block.Filter, Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
		p, err := filter.Open(ctx, o, "file")
		return &witness{p, &s.mu, &s.seen}, err
	}}
	cfg.Children["file"] = &block.Config{Driver: "witness", Children: map[string]*block.Config{"file": cfg.Children["file"]}}
	s.disk = openDisk(t, blocktest.NewGraph(t, hostDriver(), hostdev.FileDriver(), driver), cfg)
	if !cfg.ReadOnly {
		s.image().DrainBegin() // no background work
		t.Cleanup(s.image().DrainEnd)
	}
	return s
}

// events are those since the last call. What the seam tells of is tested there.
func (s *scene) events() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for _, e := range s.seen {
		if n := e.String(); !strings.HasPrefix(n, "pwritev") && n != "flush_to_disk" {
			names = append(names, n)
		}
	}
	s.seen = nil
	return strings.Join(slices.Compact(names), " ")
}

// TestG27EventsOfAnImage: what blkdebug can be told to wait for happens when it should.
func TestG27EventsOfAnImage(t *testing.T) {
	base := blocktest.NewStore(4 << 20)
	base.Write(pattern(1, 1<<20), 0)
	small := openScene(t, storeNode(emptyStore(t, CreateOptions{Size: 4 << 20, ClusterSize: 512, RefcountBits: 64}), blocktest.MemoryConfig(base)))
	large := openScene(t, storeNode(emptyStore(t, CreateOptions{Size: 4 << 20, ClusterSize: 512 << 10}), blocktest.MemoryConfig(base)))
	path := imagePath(t, "compressed.qcow2")
	mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
	mustRun(t, "qemu-io", "-f", "qcow2", "-c", "write -c -P 7 0 64k", path)
	packed := imageNode(path)
	packed.ReadOnly = true
	compressed := openScene(t, packed)
	for _, c := range []struct {
		what   string
		s      *scene
		do     func()
		events string
	}{
		{"open", small, func() {}, "reftable_load"},
		{"read from the backing file", small, func() { small.read(0, 512) }, "read_backing_aio"},
		{"write of a cluster", small, func() { small.write(pattern(2, 512), 512) },
			"cluster_alloc refblock_load l2_alloc_write l2_load cluster_alloc write_aio"},
		{"write of a part of a cluster", small, func() { small.write(pattern(2, 10), 1024) }, "cluster_alloc cow_read read_backing_aio write_aio"},
		{"read", small, func() { small.read(512, 512) }, "read_aio"},
		{"write in place", small, func() { small.write(pattern(3, 512), 512) }, "write_aio"},
		{"flush", small, func() { small.flush() }, "refblock_update_part l2_update l1_update"},
		{"flush of nothing", small, func() { small.flush() }, ""},
		{"discard", small, func() { small.must(func(ctx context.Context) error { return small.root.Discard(ctx, 512, 512) }) }, "cluster_free"},
		{"write of a part of a large cluster", large, func() { large.events(); large.write(pattern(2, 512), 300_000) },
			"cluster_alloc refblock_load l2_alloc_write l2_load cluster_alloc cow_read read_backing_aio cow_write cow_read read_backing_aio cow_write " +
				"write_aio cow_read read_backing_aio cow_write"},
		{"read of a compressed cluster", compressed, func() { compressed.read(0, 512) }, "l2_load read_compressed"},
	} {
		c.do()
		if got := c.s.events(); got != c.events {
			t.Errorf("%s: %s, want %s", c.what, got, c.events)
		}
	}
	// Enough for new refcount blocks, and more of them than the table has entries.
	small.write(pattern(3, 4<<20), 0)
	small.flush()
	got := " " + small.events() + " "
	for _, e := range []block.DebugEvent{block.EventRefblockAlloc, block.EventReftableUpdate, block.EventReftableGrow} {
		if !strings.Contains(got, " "+e.String()+" ") {
			t.Errorf("large write: there is no %s", e)
		}
	}
}
