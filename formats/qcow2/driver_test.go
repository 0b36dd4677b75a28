package qcow2

import (
	"fmt"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

func TestQcow2NodesConform(t *testing.T) {
	for _, c := range []struct {
		opts    CreateOptions
		backing int64 // 0: none
	}{
		{CreateOptions{ClusterSize: 512, RefcountBits: 1}, 100000},
		{CreateOptions{ClusterSize: 4096, RefcountBits: 64, Version: 3}, 300000},
		{CreateOptions{ClusterSize: 65536}, 0},
		{CreateOptions{ClusterSize: 65536, Version: 2}, 400000},
	} {
		c.opts.Size = 256<<10 + 512
		name := fmt.Sprintf("v%d cluster %d refcount %d backing %d", c.opts.Version, c.opts.ClusterSize, c.opts.RefcountBits, c.backing)
		t.Run(name, func(t *testing.T) {
			blocktest.Conformance(t, blocktest.Factory{
				FastZero: c.opts.Version != 2, DiscardZeroes: c.opts.Version != 2 || c.backing == 0, Locates: true,
				Holes: c.backing == 0 || c.opts.ClusterSize <= 4096,
				New: func(tb blocktest.TB) blocktest.Subject {
					s := emptyStore(t, c.opts)
					contents := make([]byte, c.opts.Size)
					var backing *block.Config
					if c.backing != 0 {
						base := pattern(3, c.backing)
						clear(base[c.backing/2 : c.backing/2+8192])
						copy(contents, base)
						b := blocktest.NewStore(c.backing)
						b.Write(base[:c.backing/2], 0)
						b.Write(base[c.backing/2+8192:], c.backing/2+8192)
						backing = blocktest.MemoryConfig(b)
					}
					return blocktest.Subject{
						Graph: testGraph(tb), Config: storeNode(s, backing), Contents: contents,
						Verify: func(tb blocktest.TB, _ []byte) { checkStore(tb, s, false) },
					}
				},
			})
		})
	}
}
