// Package blkverify is the filter driver "blkverify": it does everything on two
// children and compares what they answer.
package blkverify

import (
	"context"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/filter"
)

// Options of a blkverify node: there are none but the children.
type Options struct{}

// Driver returns the driver "blkverify". Its children are "test", the node to be
// verified, which is the one that counts, and "raw", which holds the same data.
func Driver() *block.Driver {
	return &block.Driver{
		Name:       "blkverify",
		Kind:       block.Filter,
		NewOptions: func() any { return new(Options) },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			p, err := filter.Open(ctx, o, "raw")
			if err != nil {
				return nil, err
			}
			test, err := o.OpenChild(ctx, "test", block.RoleData, nil)
			if err != nil {
				return nil, err
			}
			if p.Size() != test.Size() {
				return nil, fmt.Errorf("blkverify node '%s': 'raw' has %d bytes, 'test' has %d", o.NodeName, p.Size(), test.Size())
			}
			return p, nil
		},
	}
}
