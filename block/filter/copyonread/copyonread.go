// Package copyonread is the filter driver "copy-on-read": what is read and not held by
// the image below, but by its backing files, is copied into the image.
package copyonread

import (
	"context"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/filter"
)

// Options of a copy-on-read node.
type Options struct {
	// Bottom is the name of the last node of the backing chain that is copied from;
	// what lies below it is read and not copied. "": all is copied.
	Bottom string `option:"bottom"`
}

// Driver returns the driver "copy-on-read". It has one child, "file".
func Driver() *block.Driver {
	return &block.Driver{
		Name:       "copy-on-read",
		Kind:       block.Filter,
		NewOptions: func() any { return new(Options) },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			opts, ok := o.Config.Options.(*Options)
			if !ok {
				return nil, fmt.Errorf("the 'copy-on-read' block driver takes options of type *copyonread.Options, not %T", o.Config.Options)
			}
			_ = opts
			return filter.Open(ctx, o, "file")
		},
	}
}
