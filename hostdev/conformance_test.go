package hostdev

import (
	"path/filepath"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

var (
	buffered = block.CacheMode{}
	direct   = block.CacheMode{Direct: true}
	noFlush  = block.CacheMode{NoFlush: true}
)

func TestFileConforms(t *testing.T) {
	for _, c := range []struct {
		name  string
		dir   func(testing.TB) string
		cache block.CacheMode
	}{
		{"Buffered", func(t testing.TB) string { return t.TempDir() }, buffered},
		{"Direct", func(t testing.TB) string { return t.TempDir() }, direct},
		{"NoFlush", func(t testing.TB) string { return t.TempDir() }, noFlush},
		{"Tmpfs", tmpfs, buffered},
		{"TmpfsDirect", tmpfs, direct},
		{"Xfs", func(t testing.TB) string { return mounted(t, "xfs") }, buffered},
		{"XfsDirect", func(t testing.TB) string { return mounted(t, "xfs") }, direct},
		{"Btrfs", func(t testing.TB) string { return mounted(t, "btrfs") }, buffered},
		{"BtrfsDirect", func(t testing.TB) string { return mounted(t, "btrfs") }, direct},
		// No extents, so no way to zero without writing, nor to keep what was zeroed allocated.
		{"Ext2", func(t testing.TB) string { return mounted(t, "ext2") }, buffered},
	} {
		f := blocktest.Factory{FastZero: c.name != "Ext2", DiscardZeroes: true, Locates: !c.cache.Direct, Holes: true}
		t.Run(c.name, func(t *testing.T) {
			f := f
			f.New = disks(c.dir(t), 100_001, c.cache)
			f.Resizes = !c.cache.Direct // the padding of the last block belongs to nobody
			blocktest.Conformance(t, f)
		})
		if c.cache.Direct {
			t.Run(c.name+"Resizable", func(t *testing.T) {
				f := f
				f.New = disks(c.dir(t), 104<<10, c.cache)
				f.Resizes = true
				blocktest.Conformance(t, f)
			})
		}
	}
}

func TestReadOnlyFileConforms(t *testing.T) {
	blocktest.Conformance(t, blocktest.Factory{
		New: disks(t.TempDir(), 100_001, buffered), ReadOnly: true, Locates: true, Holes: true,
	})
}

func TestDeviceConforms(t *testing.T) {
	const size = 128 << 10
	for _, c := range []struct {
		name   string
		sector int
		cache  block.CacheMode
	}{
		{"512", 512, buffered},
		{"512Direct", 512, direct},
		{"4096", 4096, buffered},
		{"4096Direct", 4096, direct},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "disk")
			newFile(t, file, nil, size)
			blocktest.Conformance(t, blocktest.Factory{
				New:      devices(loopDevice(t, file, c.sector), size, c.cache),
				FastZero: false, // what a loop device can do depends on the file system below
				Locates:  !c.cache.Direct,
			})
		})
	}
}
