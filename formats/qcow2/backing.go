package qcow2

import (
	"context"
	"fmt"

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
	cfg, name, err := o.BackingConfig(h.BackingFile, h.BackingFormat)
	if err != nil || cfg == nil {
		return err
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
	if name != "" {
		if err := checkBacking(o, h, cfg); err != nil {
			return err
		}
		if err := link.find(host.Identity(name), name); err != nil {
			return err
		}
	}
	if _, err := o.OpenBacking(context.WithValue(ctx, chainKey{}, link), cfg); err != nil {
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

// checkBacking tells whether the backing node, which the header names, may be opened.
// The images of the chain have the options of the one on top.
func checkBacking(o *block.Opening, h *Header, cfg *block.Config) error {
	opts := *o.Config.Options.(*Options)
	switch {
	case opts.RefuseBacking:
		return fmt.Errorf("the header names the backing file '%s', and backing files are not allowed: %w", h.BackingFile, block.ErrPermission)
	case cfg.Driver == "":
		return invalid("backing file '%s': its format is not stated in the image; state it with 'qemu-img rebase -u -b %s -F FORMAT IMAGE', where FORMAT is raw or qcow2", h.BackingFile, h.BackingFile)
	}
	d := o.Node().Graph().Driver(cfg.Driver)
	if d == nil || d.Kind != block.Format {
		return unsupported("backing file '%s': Unknown driver '%s'", h.BackingFile, cfg.Driver)
	}
	if d == o.Node().Driver() && o.Config.Children["backing"] == nil {
		opts.broken = 0
		cfg.Options = &opts
	}
	return nil
}

// BackingFile is what the header says, see [block.BackingChanger].
func (im *image) BackingFile() (name, format string) {
	f := im.facts.Load()
	return f.backingFile, f.backingFormat
}
