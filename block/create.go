package block

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"syscall"
)

// A Creator makes new images of a driver (rule G26).
type Creator interface {
	// NewCreateOptions returns a pointer to the options of a new image with their
	// defaults, a struct as of [Driver.NewOptions], but for size and backing file; nil
	// for none.
	NewCreateOptions() any
	// Create makes what c describes; what was there is lost. A format checks the options
	// first, makes the file by [Creation.CreateFile] and writes to it by
	// [Creation.WriteFile]. A protocol makes the file, of c.Size bytes that read as zero,
	// and sets c.Undo. An image that is too large for the format is an error that wraps
	// EFBIG.
	Create(ctx context.Context, c *Creation) error
}

// A Creation is an image to be made.
type Creation struct {
	Filename string // as the protocol takes it
	Size     int64  // bytes
	Options  any    // of the type that NewCreateOptions returns
	// Backing is the name of the backing file as it is to be stored, "" for none, and
	// BackingFormat its format. They are for drivers with [Driver.Backing].
	Backing, BackingFormat string
	// Undo takes a file away that was not there before; nil: there was one.
	Undo func() error

	graph       *Graph
	protocol    *Driver
	fileOptions any
}

// CreateFile makes the file for an image, of size bytes that read as zero. What was
// there is lost. It may be called once.
func (c *Creation) CreateFile(ctx context.Context, size int64) error {
	file := &Creation{Filename: c.Filename, Size: size, Options: c.fileOptions}
	err := c.protocol.Creator.Create(ctx, file)
	c.Undo = file.Undo
	return err
}

// WriteFile runs f as a request on the file that CreateFile made. Nobody else may use
// the file meanwhile.
func (c *Creation) WriteFile(ctx context.Context, f func(ctx context.Context, file *Root) error) error {
	n, err := c.graph.Open(ctx, &Config{Driver: c.protocol.Name, Filename: c.Filename})
	if err != nil {
		return err
	}
	r, err := c.graph.AttachRoot(ctx, RootConfig{User: "image creation", Node: n, Perm: PermConsistentRead | PermWrite | PermResize})
	if err == nil {
		err = errors.Join(r.Do(ctx, func(ctx context.Context) error { return f(ctx, r) }), r.Detach(ctx))
	}
	return errors.Join(err, c.graph.Release(ctx, n))
}

// A NewImage describes an image for [Graph.CreateImage].
type NewImage struct {
	Filename string // may state a protocol
	Format   string // name of the driver
	// Options are those of the format and of the protocol, and size, backing_file and
	// backing_fmt in place of the fields below. nil: none.
	Options *Options
	// Size is in bytes; a format may round it up. nil: that of the backing file.
	Size *int64
	// Backing is the name of the backing file, relative to the image's folder; nil: none.
	Backing       *string
	BackingFormat string
	// Unchecked does not look at the backing file, which need not be there.
	Unchecked bool
}

// newImageOptions are those of new images that drivers do not see.
type newImageOptions struct {
	Size          int64  `option:"size"`
	Backing       string `option:"backing_file"`
	BackingFormat string `option:"backing_fmt"`
}

// CreateImage makes a new image (rule G26) and returns its size in bytes. What the file
// held before is lost, but not if options are wrong or somebody uses it. Where it fails
// a file that was not there before is gone again.
func (g *Graph) CreateImage(ctx context.Context, i NewImage) (size int64, err error) {
	format, protocol, name, err := g.creators(i.Format, i.Filename)
	if err != nil {
		return 0, err
	}
	c := &Creation{Filename: name, graph: g, protocol: protocol}
	rest := i.Options.clone()
	var common newImageOptions
	given, err := rest.decode(&common)
	if err != nil {
		return 0, err
	}
	c.Options, c.fileOptions, err = createOptions(rest, format, protocol)
	if err != nil {
		return 0, err
	}
	backing := i.Backing
	if backing == nil && given["backing_file"] {
		backing = &common.Backing
	}
	if backing != nil {
		c.Backing = *backing
	}
	c.BackingFormat = i.BackingFormat
	if c.BackingFormat == "" {
		c.BackingFormat = common.BackingFormat
	}
	switch {
	case backing != nil && !format.Backing:
		return 0, refuse(ErrNotSupported, "Backing file not supported for file format '%s'", format.Name)
	case c.BackingFormat != "" && !format.Backing:
		return 0, refuse(ErrNotSupported, "Backing format not supported for file format '%s'", format.Name)
	case backing != nil && *backing == i.Filename:
		return 0, refuse(ErrInvalid, "Error: Trying to create an image with the same filename as the backing file")
	case backing != nil && *backing == "":
		return 0, refuse(ErrInvalid, "Expected backing file name, got empty string")
	case backing == nil && c.BackingFormat != "":
		return 0, refuse(ErrInvalid, "Backing format '%s' is given without a backing file", c.BackingFormat)
	case i.Size != nil && given["size"]:
		return 0, refuse(ErrInvalid, "The image size must be specified only once")
	}
	sized := i.Size != nil || given["size"]
	if c.Size = common.Size; i.Size != nil {
		c.Size = *i.Size
	}
	if backing != nil {
		below, err := g.backingSize(ctx, i, c)
		if err != nil {
			return 0, err
		}
		if !sized && !i.Unchecked {
			c.Size, sized = below, true
		}
	}
	switch {
	case !sized:
		return 0, refuse(ErrInvalid, "Image creation needs a size parameter")
	case c.Size < 0:
		return 0, refuse(ErrInvalid, "Image size must be less than 8 EiB and not negative, not %d", c.Size)
	case c.Size > maxOffset:
		return 0, tooLarge(format)
	}
	if err := format.Creator.Create(ctx, c); err != nil {
		if c.Undo != nil {
			err = errors.Join(err, c.Undo())
		}
		if errors.Is(err, syscall.EFBIG) {
			err = tooLarge(format)
		}
		return 0, err
	}
	return c.Size, nil
}

func tooLarge(d *Driver) error {
	hint := ""
	if slices.ContainsFunc(optionsOf(d.Creator.NewCreateOptions()), func(o option) bool { return o.name == "cluster_size" }) {
		hint = " (try using a larger cluster size)"
	}
	return refuse(syscall.EFBIG, "The image size is too large for file format '%s'%s", d.Name, hint)
}

// creators finds the drivers for a new image, and the name of its file.
func (g *Graph) creators(format, filename string) (f, p *Driver, name string, err error) {
	f = g.drivers[format]
	if f == nil {
		return nil, nil, "", refuse(ErrInvalid, "Unknown file format '%s'", format)
	}
	if p, name, err = g.protocolFor(filename); err != nil {
		return nil, nil, "", err
	}
	switch {
	case f.Creator == nil || f.Kind != Format:
		return nil, nil, "", refuse(ErrNotSupported, "Format driver '%s' does not support image creation", f.Name)
	case p.Creator == nil:
		return nil, nil, "", refuse(ErrNotSupported, "Protocol driver '%s' does not support image creation", p.Name)
	}
	return f, p, name, nil
}

// createOptions reads the options for a new image from o, those of the format first.
func createOptions(o *Options, format, protocol *Driver) (forFormat, forFile any, err error) {
	known := make(map[string]bool)
	read := func(d *Driver) (any, error) {
		opts := d.Creator.NewCreateOptions()
		for _, o := range optionsOf(opts) {
			known[o.name] = true
		}
		_, err := o.decode(opts)
		return opts, err
	}
	if forFormat, err = read(format); err != nil {
		return nil, nil, err
	}
	if forFile, err = read(protocol); err != nil {
		return nil, nil, err
	}
	if name := o.first(); name != "" {
		return nil, nil, refuse(ErrInvalid, "Invalid parameter '%s'; images of format %s in a %s have %s",
			name, format.Name, protocol.Name, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
	}
	return forFormat, forFile, nil
}

// backingSize proves that the backing file can be opened and that the new image is no
// part of it, and tells its size.
func (g *Graph) backingSize(ctx context.Context, i NewImage, c *Creation) (size int64, err error) {
	if d := g.drivers[c.BackingFormat]; c.BackingFormat != "" && (d == nil || d.Kind != Format) {
		return 0, refuse(ErrInvalid, "Unknown backing file format '%s'", c.BackingFormat)
	}
	if i.Unchecked {
		if c.BackingFormat == "" {
			return 0, ErrNoBackingFormat
		}
		return 0, nil
	}
	b, err := g.Open(ctx, &Config{Driver: c.BackingFormat, Filename: CombineNames(i.Filename, c.Backing), ReadOnly: true, ForceShare: true, NoIO: true})
	if err != nil {
		return 0, fmt.Errorf("Could not open backing image: %w", err)
	}
	defer func() { err = errors.Join(err, g.Release(ctx, b)) }()
	if c.BackingFormat == "" {
		return 0, fmt.Errorf("%w; the detected format is %s", ErrNoBackingFormat, b.driver.Name)
	}
	g.mu.Lock()
	below := topological(b)
	g.mu.Unlock()
	for _, n := range below {
		if n.driver == c.protocol && c.protocol.SameFile != nil && c.protocol.SameFile(n.ExactFilename(), c.Filename) {
			return 0, refuse(ErrInvalid, "Error: '%s' is part of the backing chain of the image that would replace it", i.Filename)
		}
	}
	return b.Size(), nil
}

// ErrNoBackingFormat is returned by [Graph.CreateImage] for a backing file whose format is not stated.
var ErrNoBackingFormat = refuse(ErrInvalid, "Backing file specified without backing format")

// ImageSizes are the sizes of the file that an image would take, in bytes, by the
// names of qemu-img measure.
type ImageSizes struct {
	Required       int64 `json:"required"`        // with the data that there is
	FullyAllocated int64 `json:"fully-allocated"` // with data everywhere
}

// A Measuring is an image whose file is to be estimated.
type Measuring struct {
	Options any // of the type that NewCreateOptions returns
	// Source is what would be copied into the image; nil: nothing, it is Size bytes.
	Source *Root
	Size   int64 // bytes
	// Backing tells that the image would have a backing file.
	Backing bool
}

// A Sizer estimates the size of files (rule G26).
type Sizer interface {
	// Measure may read m.Source inside a request. An image that is too large for the
	// format is an error that wraps EFBIG.
	Measure(ctx context.Context, m *Measuring) (ImageSizes, error)
}

// Measure tells how large the file of an image of format would be, with the given
// creation options (nil: none): an image with the contents of source, or, if that is
// nil, an empty one with the option size. source must not be drained for long.
func (g *Graph) Measure(ctx context.Context, format string, o *Options, source *Root) (sizes ImageSizes, err error) {
	d := g.drivers[format]
	switch {
	case d == nil:
		return sizes, refuse(ErrInvalid, "Unknown file format '%s'", format)
	case d.Creator == nil || d.Kind != Format:
		return sizes, refuse(ErrNotSupported, "Format driver '%s' does not support image creation", d.Name)
	case d.Sizer == nil:
		return sizes, refuse(ErrNotSupported, "Block driver '%s' does not support size measurement", d.Name)
	}
	rest := o.clone()
	var common newImageOptions
	given, err := rest.decode(&common)
	if err != nil {
		return sizes, err
	}
	m := &Measuring{Options: d.Creator.NewCreateOptions(), Source: source, Size: common.Size, Backing: given["backing_file"]}
	if err := rest.Decode(m.Options); err != nil {
		return sizes, err
	}
	switch {
	case given["size"] && source != nil:
		return sizes, refuse(ErrInvalid, "The size is that of the image '%s' and cannot be given", source.Node().name)
	case !given["size"] && source == nil:
		return sizes, refuse(ErrInvalid, "Either a size or an image must be given")
	}
	measure := func(ctx context.Context) error {
		sizes, err = d.Sizer.Measure(ctx, m)
		return err
	}
	if source == nil {
		err = measure(ctx)
	} else {
		err = source.Do(ctx, measure)
	}
	if errors.Is(err, syscall.EFBIG) {
		err = tooLarge(d)
	}
	return sizes, err
}
