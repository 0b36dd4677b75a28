package qcow2

import (
	"context"
	"fmt"

	"github.com/nbdserve/nbdserve/block"
)

// asleep is what requests to an inactive node get. The roots refuse them first.
var asleep error = block.ErrInactive

// openInactive reads the header alone.
func (im *image) openInactive(ctx context.Context, o *block.Opening) error {
	im.fatal.Store(&asleep)
	return im.FollowBacking(ctx, o)
}

// FollowBacking implements [block.BackingFollower].
func (im *image) FollowBacking(ctx context.Context, o *block.Opening) error {
	h, err := readHeader(ctx, im.file, false)
	if err != nil {
		return err
	}
	if err := openBacking(ctx, o, im.host, h, im.file.Node().ExactFilename()); err != nil {
		return err
	}
	im.become(outline(h), im.inspect(ctx, h))
	return nil
}

// Inactivate implements [block.Activator]: all metadata is written, and what is in limbo
// is free.
func (im *image) Inactivate(ctx context.Context) error {
	if !im.writable || im.failed() != nil {
		return nil // nothing of a corrupt image is worth being written
	}
	return im.finish(ctx)
}

// Deactivate implements [block.Activator].
func (im *image) Deactivate() {
	im.stopReaper()
	im.fatal.Store(&asleep)
	old := im.contents
	im.become(outline(old.header), im.facts.Load().info)
	im.mu.Lock()
	im.dirty.Store(0)
	im.barrier, im.limbo = false, limbo{}
	im.mu.Unlock()
	if err := old.release(); err != nil {
		im.log.Error("qcow2: memory of tables could not be given back", "node", im.node.Name(), "error", err)
	}
}

// Activate implements [block.Activator]: everything is read anew.
func (im *image) Activate(ctx context.Context) error {
	c := im.node.Config()
	h, err := im.ready(ctx, isWritable(c))
	if err != nil {
		return err
	}
	if err := im.sameBacking(h); err != nil {
		return err
	}
	fresh, info, err := im.load(ctx, h, c.Options.(*Options), isWritable(c))
	if err != nil {
		return err
	}
	im.become(fresh, info)
	im.fatal.Store(nil)
	im.startReaper()
	return nil
}

// sameBacking tells whether the header still names the backing file that the node
// knows of. Where the configuration says which one it is, the header does not count.
func (im *image) sameBacking(h *Header) error {
	c := im.node.Config()
	name, format := im.BackingFile()
	if h.BackingFile == name && h.BackingFormat == format || c.NoBacking || c.Children["backing"] != nil {
		return nil
	}
	return fmt.Errorf("the header of the image names the backing file '%s' (%s) by now, and named '%s' (%s): %w",
		h.BackingFile, h.BackingFormat, name, format, block.ErrBackingChanged)
}

// Peek implements [block.Peeker].
func (im *image) Peek(ctx context.Context) (block.Peeked, error) {
	h, err := readHeader(ctx, im.file, false)
	if err != nil {
		return block.Peeked{}, err
	}
	return block.Peeked{Size: h.Size, Info: im.inspect(ctx, h)}, nil
}

// PrepareReopen implements [block.Reopener].
func (im *image) PrepareReopen(ctx context.Context, r *block.Reopening) (block.Switch, error) {
	if !im.node.Active() {
		return block.NoSwitch{}, nil
	}
	old, opts := im.node.Config().Options.(*Options), r.Config.Options.(*Options)
	s := &imageSwitch{image: im, opts: opts, writable: isWritable(r.Config), old: im.contents, oldFacts: im.facts.Load()}
	s.reload = s.writable && !im.writable || r.Relinked("file") || old.L2CacheSize != opts.L2CacheSize || old.RefcountCacheSize != opts.RefcountCacheSize
	if im.writable {
		if err := im.failed(); err != nil {
			return nil, err
		}
		if err := im.finish(ctx); err != nil {
			return nil, err
		}
	}
	if s.reload && !r.Relinked("file") {
		if _, err := readHeader(ctx, im.file, s.writable); err != nil {
			if im.writable || !s.writable || r.AutoReadOnly(err) != nil {
				return nil, err
			}
			return block.NoSwitch{}, nil // it stays read-only
		}
	}
	return s, nil
}

// An imageSwitch makes an image read-only or writable, or reads it anew.
type imageSwitch struct {
	*image
	opts     *Options
	writable bool
	reload   bool
	old      contents
	oldFacts *facts
	applied  bool
}

// Apply implements [block.Switch].
func (s *imageSwitch) Apply(ctx context.Context) error {
	im := s.image
	fresh, info := im.contents, s.oldFacts.info
	if s.reload {
		h, err := im.ready(ctx, s.writable)
		if err != nil {
			return err
		}
		if err := im.sameBacking(h); err != nil {
			return err
		}
		if fresh, info, err = im.load(ctx, h, s.opts, s.writable); err != nil {
			return err
		}
	} else if !s.writable {
		fresh.refs, fresh.writable = nil, false
	}
	im.stopReaper()
	im.become(fresh, info)
	s.applied = true
	im.startReaper()
	return nil
}

// Commit implements [block.Switch].
func (s *imageSwitch) Commit() {
	if s.reload {
		s.free(&s.old)
	}
}

// Abort implements [block.Switch].
func (s *imageSwitch) Abort() {
	if !s.applied {
		return
	}
	im := s.image
	im.stopReaper()
	fresh := im.contents
	im.become(s.old, s.oldFacts.info)
	if s.reload {
		s.free(&fresh)
	}
	im.startReaper()
}

func (s *imageSwitch) free(c *contents) {
	if err := c.release(); err != nil {
		s.log.Error("qcow2: memory of tables could not be given back", "node", s.node.Name(), "error", err)
	}
}
