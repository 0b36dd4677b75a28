package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/formats/raw"
)

// probeSize is how many bytes of an image tell its format (rule G8).
const probeSize = 512

// imageOptions say which disk to open, and how.
type imageOptions struct {
	path         string
	format       string // "": probed
	readOnly     bool
	cache        block.CacheMode
	unmap        bool
	detectZeroes block.DetectZeroes
	offset, size int64 // the part to serve, in bytes; a size of 0 reaches to the end
}

// config describes the graph for the image: its file, its format, and a raw node
// on top where only a part is served. The nodes have names that metrics and logs
// can be searched for: disk, what clients see; file; whole, of which disk is a part.
func (o imageOptions) config(ctx context.Context, g *block.Graph, log *slog.Logger) (*block.Config, error) {
	format, probed, err := o.format, false, error(nil)
	if format == "" {
		if format, err = probe(ctx, g, o.path); err != nil {
			return nil, err
		}
		if probed = format == "raw"; probed {
			log.Warn("Image format was not specified and probing guessed raw: writes to sector 0 that would look like "+
				"another format are refused; specify --format raw to lift that", "image", o.path)
		}
	}
	file := fileConfig(o.path)
	file.NodeName = "file"
	top := &block.Config{
		Driver: format, NodeName: "disk", Probed: probed, ReadOnly: o.readOnly, Cache: o.cache, Unmap: o.unmap, DetectZeroes: o.detectZeroes,
		Children: map[string]*block.Config{"file": file},
	}
	if o.offset != 0 || o.size != 0 {
		whole := *top
		whole.NodeName = "whole"
		whole.DetectZeroes = block.DetectZeroesOff
		top.Driver, top.Probed = "raw", false
		top.Options = &raw.Options{Offset: o.offset, Size: o.size}
		top.Children = map[string]*block.Config{"file": &whole}
	}
	return top, nil
}

// probe tells the format of the image at path by its first bytes. It disturbs nobody
// who uses the image.
func probe(ctx context.Context, g *block.Graph, path string) (format string, err error) {
	file := fileConfig(path)
	file.ReadOnly, file.NoIO = true, true
	err = withRoot(ctx, g, file, block.RootConfig{User: "format probe", Shared: block.PermAll}, func(ctx context.Context, r *block.Root) error {
		head := make([]byte, min(probeSize, r.Size()))
		if err := r.ReadAt(ctx, head, 0); err != nil {
			return fmt.Errorf("cannot read the first sector of '%s' to probe its format: %w", path, err)
		}
		format = g.ProbeFormat(head)
		return nil
	})
	return format, err
}

// withRoot opens a node, runs f on a root above it as one request, and closes the
// node again. rc.Node is filled in.
func withRoot(ctx context.Context, g *block.Graph, cfg *block.Config, rc block.RootConfig, f func(context.Context, *block.Root) error) (err error) {
	n, err := g.Open(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.Release(ctx, n)) }()
	rc.Node = n
	r, err := g.AttachRoot(ctx, rc)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Detach(ctx)) }()
	return r.Do(ctx, func(ctx context.Context) error { return f(ctx, r) })
}
