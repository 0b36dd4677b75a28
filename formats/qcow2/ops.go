package qcow2

import (
	"context"
	"errors"
	"math/bits"
	"strings"

	"github.com/nbdserve/nbdserve/block"
)

// The calls that concern an open image as a whole. Nothing is in flight.

// ImageInfo implements [block.Informer].
func (im *image) ImageInfo() block.ImageInfo { return im.facts.Load().image }

func imageInfo(h *Header) block.ImageInfo {
	shift := int(h.ClusterBits) + bits.Len64(uint64(h.L2Entries())) - 1
	return block.ImageInfo{ClusterSize: h.ClusterSize(), VMStateOffset: h.L1Needed(h.Size) << shift, Dirty: h.Dirty()}
}

// HasZeroInit implements [block.ZeroIniter]. What has tables from the start shows what the file holds.
func (im *image) HasZeroInit() bool {
	return !im.facts.Load().preallocated || im.file.Node().HasZeroInit()
}

// CanStoreBitmap implements [block.BitmapStorer]: it cannot.
func (im *image) CanStoreBitmap(string, int64) error {
	if im.facts.Load().info.Compat == "0.10" {
		return unsupported("Cannot store dirty bitmaps in qcow2 v2 files")
	}
	return unsupported("images that have persistent bitmaps cannot be written")
}

// ChangeBackingFile implements [block.BackingChanger].
func (im *image) ChangeBackingFile(ctx context.Context, name, format string) error {
	return im.editHeader(ctx, func(h *Header) error { return h.setBacking(name, format) })
}

func (h *Header) setBacking(name, format string) error {
	switch {
	case name == "" && format != "":
		return invalid("backing format %q without a backing file", format)
	case name != "" && format == "":
		return invalid("backing file %q needs its format stated, e.g. raw or qcow2", name)
	case strings.IndexByte(name, 0) >= 0:
		return invalid("backing file name %q has a NUL byte", name)
	}
	h.BackingFile, h.BackingFormat = name, format
	return nil
}

// editHeader changes the header, durably, as one change.
func (im *image) editHeader(ctx context.Context, edit func(h *Header) error) error {
	if err := im.failed(); err != nil {
		return err
	}
	if !im.writable {
		return block.ErrReadOnly
	}
	im.mu.Lock()
	h := *im.header
	im.mu.Unlock()
	if err := edit(&h); err != nil {
		return err
	}
	if err := replaceHeader(ctx, im.file, &h); err != nil {
		return err
	}
	c := im.contents
	c.header, c.badBits = &h, outline(&h).badBits
	im.become(c, im.inspect(ctx, &h))
	return nil
}

// amendOptions are what [image.Amend] knows, by QEMU's names.
type amendOptions struct {
	Compat        compat `option:"compat"`
	LazyRefcounts bool   `option:"lazy_refcounts"`
	RefcountBits  int64  `option:"refcount_bits"`
	Size          int64  `option:"size"`
	BackingFile   string `option:"backing_file"`
	BackingFormat string `option:"backing_fmt"`
}

func (h *Header) amendable() amendOptions {
	return amendOptions{compat(h.Version), h.Compatible&CompatLazyRefcounts != 0, 1 << h.RefcountOrder, h.Size, h.BackingFile, h.BackingFormat}
}

// NewAmendOptions implements [block.Amender].
func (im *image) NewAmendOptions() any {
	im.mu.Lock()
	defer im.mu.Unlock()
	return new(im.header.amendable())
}

// Amend implements [block.Amender] for what is in the header alone.
func (im *image) Amend(ctx context.Context, options any) error {
	o, ok := options.(*amendOptions)
	if !ok {
		return invalid("options to amend are %T, not %T", options, o)
	}
	return im.editHeader(ctx, func(h *Header) error { return h.amend(o) })
}

func (h *Header) amend(o *amendOptions) error {
	is := h.amendable()
	switch {
	case o.Compat < is.Compat:
		return unsupported("Downgrading an image to compat=%s is not supported", o.Compat)
	case o.Compat > is.Compat && h.NbSnapshots > 0:
		return unsupported("Upgrading an image that has snapshots to compat=%s is not supported", o.Compat)
	case o.RefcountBits != is.RefcountBits:
		return unsupported("Changing refcount_bits from %d to %d is not supported", is.RefcountBits, o.RefcountBits)
	case o.Size != is.Size:
		return unsupported("Changing the size from %d to %d bytes is not an amendment; resize the image", is.Size, o.Size)
	case o.LazyRefcounts && o.Compat < 3:
		return invalid("Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)")
	}
	if o.Compat > is.Compat {
		h.Version, h.HeaderLength = uint32(o.Compat), headerLenV3
		h.Unknown = make([]byte, headerLenV3-headerLenV3Min-1)
		h.FeatureNames = standardFeatureNames
	}
	if h.Compatible &^= CompatLazyRefcounts; o.LazyRefcounts {
		h.Compatible |= CompatLazyRefcounts
	}
	return h.setBacking(o.BackingFile, o.BackingFormat)
}

// Check implements [block.Checker]. What was repaired is read anew.
func (im *image) Check(ctx context.Context, fix block.CheckFix, report func(line string)) (*block.CheckResult, error) {
	if err := im.failed(); err != nil {
		return nil, err
	}
	if im.writable {
		if err := im.finish(ctx); err != nil {
			return nil, err
		}
	}
	im.mu.Lock()
	h := *im.header
	im.mu.Unlock()
	if fix == block.FixNothing {
		return Check(ctx, im.file, &h, report)
	}
	if !im.writable {
		return nil, block.ErrReadOnly
	}
	res, err := Repair(ctx, im.file, &h, fix, report)
	if res == nil {
		return nil, err // nothing was touched
	}
	if rerr := im.reload(ctx); rerr != nil {
		// What is in memory may contradict what is stored.
		im.fatal.CompareAndSwap(nil, &rerr)
		err = errors.Join(err, rerr)
	}
	return res, err
}

// reload reads everything anew.
func (im *image) reload(ctx context.Context) error {
	h, err := im.ready(ctx, im.writable)
	if err != nil {
		return err
	}
	c, info, err := im.load(ctx, h, im.node.Config().Options.(*Options), im.writable)
	if err != nil {
		return err
	}
	im.stopReaper()
	old := im.contents
	im.become(c, info)
	im.startReaper()
	return old.release()
}
