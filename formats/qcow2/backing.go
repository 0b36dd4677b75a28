package qcow2

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/nbdserve/nbdserve/block"
)

// maxChain is the most images that a backing chain may have.
const maxChain = 256

// A chainLink is an image that is being opened, and the overlay that it is opened
// for. The chain travels down in the context of Open.
type chainLink struct {
	identity string
	name     string
	depth    int
	overlay  *chainLink
}

type chainKey struct{}

// openBacking opens what the configuration or else the header names as backing
// file, if either does. own is the image's own file name.
func openBacking(ctx context.Context, o *block.Opening, host Host, h *Header, own string) error {
	explicit := o.Config.Children["backing"] != nil
	if h.BackingFile == "" && !explicit {
		return nil
	}
	overlay, _ := ctx.Value(chainKey{}).(*chainLink)
	link := &chainLink{name: own, overlay: overlay}
	if overlay != nil {
		link.depth = overlay.depth + 1
	}
	if link.depth+1 >= maxChain {
		return fmt.Errorf("the backing chain has more than %d images: %w", maxChain, block.ErrInvalid)
	}
	if own != "" {
		link.identity = host.Identity(own)
	}
	var def *block.Config
	if !explicit {
		name, err := backingName(own, h)
		if err != nil {
			return err
		}
		opts := *o.Config.Options.(*Options)
		if def, err = backingConfig(o, host, h, name, &opts); err != nil {
			return err
		}
		if err := link.find(host.Identity(name), name); err != nil {
			return err
		}
	}
	if _, err := o.OpenChild(context.WithValue(ctx, chainKey{}, link), "backing", block.RoleCOW, def); err != nil {
		return fmt.Errorf("Could not open backing file: %w", err)
	}
	return nil
}

// find returns an error if the file is in the chain already.
func (l *chainLink) find(identity, name string) error {
	for ; l != nil; l = l.overlay {
		if l.identity != "" && l.identity == identity {
			return fmt.Errorf("the backing chain is a loop: backing file '%s' is the image '%s' above it: %w", name, l.name, block.ErrInvalid)
		}
	}
	return nil
}

// backingName resolves the backing file's name in a header (rule G6).
func backingName(own string, h *Header) (string, error) {
	name := h.BackingFile
	if strings.HasPrefix(name, "json:") {
		return "", unsupported("backing file '%.200s': json: names in image headers are not followed; name the backing node in the configuration", name)
	}
	if rest, ok := strings.CutPrefix(name, "file:"); ok {
		name = rest
	} else if prefix, _, _ := strings.Cut(name, "/"); strings.Contains(prefix, ":") {
		protocol, _, _ := strings.Cut(prefix, ":")
		return "", unsupported("backing file '%s': protocol '%s' is not supported; if this is a file name, state it as './%s'", name, protocol, name)
	}
	switch {
	case name == "":
		return "", invalid("backing file '%s' has no file name", h.BackingFile)
	case path.IsAbs(name):
		return name, nil
	case own == "":
		return "", invalid("Cannot use relative backing file names for '%s': the image has no file name", name)
	}
	// Not path.Join: "a/../b" differs from "b" where a is a symbolic link.
	if i := strings.LastIndexByte(own, '/'); i >= 0 {
		return own[:i+1] + name, nil
	}
	return name, nil
}

// backingConfig describes the backing node that a header names.
func backingConfig(o *block.Opening, host Host, h *Header, name string, opts *Options) (*block.Config, error) {
	format := h.BackingFormat
	switch {
	case opts.RefuseBacking:
		return nil, fmt.Errorf("the header names the backing file '%s', and backing files are not allowed: %w", h.BackingFile, block.ErrPermission)
	case format == "":
		return nil, invalid("backing file '%s': its format is not stated in the image; state it with 'qemu-img rebase -u -b %s -F FORMAT IMAGE', where FORMAT is raw or qcow2", h.BackingFile, h.BackingFile)
	case host.FileConfig == nil:
		return nil, errors.New("backing files cannot be opened here: the qcow2 driver was made without Host.FileConfig")
	}
	d := o.Node().Graph().Driver(format)
	if d == nil || d.Kind != block.Format {
		return nil, unsupported("backing file '%s': Unknown driver '%s'", h.BackingFile, format)
	}
	cfg := &block.Config{Driver: format, Children: map[string]*block.Config{"file": host.FileConfig(name)}}
	if format == o.Node().Driver().Name {
		opts.broken = 0
		cfg.Options = opts
	}
	return cfg, nil
}
