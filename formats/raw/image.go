package raw

import (
	"context"

	"github.com/nbdserve/nbdserve/block"
)

// images makes raw images and tells their size: they are files.
type images struct{}

// NewCreateOptions implements [block.Creator]: the options are those of the file.
func (images) NewCreateOptions() any { return nil }

// Create implements [block.Creator].
func (images) Create(ctx context.Context, c *block.Creation) error { return c.CreateFile(ctx, c.Size) }

// Measure implements [block.Sizer]. What is not allocated counts, too.
func (images) Measure(_ context.Context, m *block.Measuring) (block.ImageSizes, error) {
	size := m.Size
	if m.Source != nil {
		size = m.Source.Node().Size()
	}
	size = (size + 511) &^ 511
	return block.ImageSizes{Required: size, FullyAllocated: size}, nil
}

// HasZeroInit implements [block.ZeroIniter].
func (n *node) HasZeroInit() bool { return n.file.Node().HasZeroInit() }
