package block_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// maker creates images that are a name: it notes what it is asked for.
type maker struct {
	made []string
	err  error // of Create
}

type makerOptions struct {
	ClusterSize int64 `option:"cluster_size"`
}

func (*maker) NewCreateOptions() any { return new(makerOptions) }

func (m *maker) Create(ctx context.Context, c *block.Creation) error {
	if err := c.CreateFile(ctx, 0); err != nil {
		return err
	}
	m.made = append(m.made, fmt.Sprintf("image %s of %d bytes over '%s' (%s), %+v", c.Filename, c.Size, c.Backing, c.BackingFormat, c.Options))
	return m.err
}

// fileMaker creates files.
type fileMaker struct{ m *maker }

func (fileMaker) NewCreateOptions() any { return nil }

func (f fileMaker) Create(_ context.Context, c *block.Creation) error {
	f.m.made = append(f.m.made, "file "+c.Filename)
	c.Undo = func() error { f.m.made = append(f.m.made, "no file "+c.Filename); return nil }
	return nil
}

// makerGraph can create images of format "img" in files; "plain" has no backing files,
// "none" cannot be created, and neither can the protocol "memory".
func makerGraph(t *testing.T, m *maker) *block.Graph {
	t.Helper()
	open := func(context.Context, *block.Opening) (block.Instance, error) {
		return blocktest.Nothing{Length: 1000}, nil
	}
	type named struct {
		Filename string `option:"filename,strong"`
	}
	return blocktest.NewGraph(t,
		&block.Driver{Name: "img", Kind: block.Format, Backing: true, Open: open, Creator: m},
		&block.Driver{Name: "plain", Kind: block.Format, Open: open, Creator: m},
		&block.Driver{Name: "none", Kind: block.Format, Open: open},
		&block.Driver{Name: "file", Kind: block.Protocol, NewOptions: func() any { return new(named) }, Open: open, Creator: fileMaker{m}},
	)
}

func TestG26RulesOfCreation(t *testing.T) {
	size := func(n int64) *int64 { return &n }
	name := func(s string) *string { return &s }
	for _, c := range []struct {
		image   block.NewImage
		options string
		text    string // the error; "" for none
		made    string
	}{
		{block.NewImage{Format: "xyz", Size: size(1)}, "", "Unknown file format 'xyz'", ""},
		{block.NewImage{Format: "none", Size: size(1)}, "", "Format driver 'none' does not support image creation", ""},
		{block.NewImage{Format: "file", Size: size(1)}, "", "Format driver 'file' does not support image creation", ""},
		{block.NewImage{Filename: "memory:a", Format: "img", Size: size(1)}, "", "Protocol driver 'memory' does not support image creation", ""},
		{block.NewImage{Format: "img"}, "", "Image creation needs a size parameter", ""},
		{block.NewImage{Format: "img", Size: size(1)}, "size=1", "The image size must be specified only once", ""},
		{block.NewImage{Format: "img", Size: size(-1)}, "", "Image size must be less than 8 EiB and not negative, not -1", ""},
		{block.NewImage{Format: "img", Size: size(1<<63 - 1)}, "", "The image size is too large for file format 'img' (try using a larger cluster size)", ""},
		{block.NewImage{Format: "img", Size: size(1)}, "colour=red", "Invalid parameter 'colour'; images of format img in a file have cluster_size", ""},
		{block.NewImage{Format: "plain", Size: size(1), Backing: name("b"), BackingFormat: "img"}, "", "Backing file not supported for file format 'plain'", ""},
		{block.NewImage{Format: "plain", Size: size(1), BackingFormat: "img"}, "", "Backing format not supported for file format 'plain'", ""},
		{block.NewImage{Format: "img", Size: size(1), Backing: name("")}, "", "Expected backing file name, got empty string", ""},
		{block.NewImage{Format: "img", Size: size(1)}, "backing_file=", "Expected backing file name, got empty string", ""},
		{block.NewImage{Filename: "a", Format: "img", Backing: name("a"), BackingFormat: "img"}, "", "Error: Trying to create an image with the same filename as the backing file", ""},
		{block.NewImage{Format: "img", Size: size(1), Backing: name("b"), Unchecked: true}, "", "Backing file specified without backing format", ""},
		{block.NewImage{Format: "img", Size: size(1), BackingFormat: "img"}, "", "Backing format 'img' is given without a backing file", ""},
		{block.NewImage{Format: "img", Size: size(1), Backing: name("b"), BackingFormat: "xyz"}, "", "Unknown backing file format 'xyz'", ""},

		{block.NewImage{Format: "img", Size: size(1)}, "cluster_size=4k", "", "image f of 1 bytes over '' (), &{ClusterSize:4096}"},
		{block.NewImage{Format: "img"}, "size=1M", "", "image f of 1048576 bytes over '' (), &{ClusterSize:0}"},
		{block.NewImage{Format: "img", Size: size(0)}, "", "", "image f of 0 bytes over '' (), &{ClusterSize:0}"},
		{block.NewImage{Filename: "file:f", Format: "plain", Size: size(513)}, "", "", "image f of 513 bytes over '' (), &{ClusterSize:0}"},
		{block.NewImage{Format: "img", Backing: name("b"), BackingFormat: "img"}, "", "", "image f of 1000 bytes over 'b' (img), &{ClusterSize:0}"},
		{block.NewImage{Format: "img"}, "backing_file=b,backing_fmt=img", "", "image f of 1000 bytes over 'b' (img), &{ClusterSize:0}"},
		{block.NewImage{Format: "img", Size: size(5120), Backing: name("b"), BackingFormat: "img", Unchecked: true}, "", "", "image f of 5120 bytes over 'b' (img), &{ClusterSize:0}"},
	} {
		m := new(maker)
		g := makerGraph(t, m)
		var err error
		c.image.Options, err = block.ParseOptions(c.options, "")
		must(t, err)
		if c.image.Filename == "" {
			c.image.Filename = "f"
		}
		_, err = g.CreateImage(ctx, c.image)
		switch {
		case c.text != "" && (err == nil || err.Error() != c.text):
			t.Errorf("%+v: %v, want %q", c.image, err, c.text)
		case c.text != "" && len(m.made) > 0:
			t.Errorf("%s: and yet there is %q", c.text, m.made)
		case c.text == "" && (err != nil || !slices.Equal(m.made, []string{"file f", c.made})):
			t.Errorf("%+v: %q, %v, want %q", c.image, m.made, err, c.made)
		}
	}
}

func TestG26FailedCreationTakesTheFileAway(t *testing.T) {
	for fail, text := range map[error]string{
		syscall.EIO:   "input/output error",
		syscall.EFBIG: "The image size is too large for file format 'img' (try using a larger cluster size)",
	} {
		m := &maker{err: fail}
		_, err := makerGraph(t, m).CreateImage(ctx, block.NewImage{Filename: "f", Format: "img", Size: new(int64(512))})
		if !errors.Is(err, fail) || err.Error() != text || m.made[len(m.made)-1] != "no file f" {
			t.Errorf("%v: %q", err, m.made)
		}
	}
}

func TestG26WhatADriverCannotDoIsRefused(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("d", 4096))
	_, err := g.Check(ctx, n, block.FixNothing, nil)
	wantError(t, err, block.ErrNotSupported, "This image format does not support checks")
	wantError(t, g.Amend(ctx, n, new(block.Options)), block.ErrNotSupported, "Block driver 'memory' does not support option amendment")
	wantError(t, g.ChangeBackingFile(ctx, n, "a", "raw"), block.ErrNotSupported, "Driver 'memory' of node 'd' does not support backing files")
	m := makerGraph(t, new(maker))
	_, err = m.Measure(ctx, "img", new(block.Options), nil)
	wantError(t, err, block.ErrNotSupported, "Block driver 'img' does not support size measurement")
	_, err = m.Measure(ctx, "none", new(block.Options), nil)
	wantError(t, err, block.ErrNotSupported, "Format driver 'none' does not support image creation")
}

func TestG24AllocatedSizeAndZeroInitOfAChain(t *testing.T) {
	g := blocktest.NewGraph(t, testDriver(), cowDriver(), &block.Driver{Name: "space", Kind: block.Protocol,
		Open: func(_ context.Context, o *block.Opening) (block.Instance, error) {
			return allocator{blocktest.Nothing{Length: 4096}, int64(len(o.NodeName)) * 1000}, nil
		}})
	named := func(name string) *block.Config { return &block.Config{Driver: "space", NodeName: name} }
	n := opened(t, g, node("top", new(events), image, named("a"), kid{"data", block.RoleData}, named("bb"), backing, named("cccc")))
	if size, err := n.AllocatedSize(); err != nil || size != 3000 {
		t.Errorf("%d bytes, %v: want those of the children that hold its data", size, err)
	}
	_, err := opened(t, g, disk("d", 1)).AllocatedSize()
	wantError(t, err, block.ErrNotSupported)
	if !g.Lookup("a").HasZeroInit() || n.HasZeroInit() || g.Lookup("d").HasZeroInit() {
		t.Errorf("zero-init: %t, %t, %t", g.Lookup("a").HasZeroInit(), n.HasZeroInit(), g.Lookup("d").HasZeroInit())
	}
	if names := g.DriverNames(block.Format); !slices.IsSorted(names) || !slices.Contains(names, "cow") || slices.Contains(names, "space") {
		t.Errorf("formats: %q", names)
	}
	var list []string
	for _, i := range g.NamedNodes() {
		list = append(list, fmt.Sprintf("%s %s %d", i.NodeName, i.Driver, len(i.Children)))
	}
	if got := strings.Join(list, ", "); got != "a space 0, bb space 0, cccc space 0, d memory 0, top test 3" {
		t.Errorf("named nodes: %s", got)
	}
}

// allocator knows its space, and is new.
type allocator struct {
	blocktest.Nothing
	space int64
}

func (a allocator) AllocatedSize() (int64, error) { return a.space, nil }
func (a allocator) HasZeroInit() bool             { return true }

// While a node is inactive others may write: the next flush is a real one, and a bitmap
// that records is dirty as a whole.
func TestG29AfterAnActivationNothingIsTakenForKnown(t *testing.T) {
	l := blocktest.NewLog(blocktest.NewStore(100_000))
	g := newGraph(t)
	n := opened(t, g, blocktest.CrashConfig(l))
	r, err := g.AttachRoot(ctx, block.RootConfig{User: "x", Node: n, Perm: rd | wr, Shared: rd, AllowInactive: func() error { return nil }})
	must(t, err)
	defer detach(t, r)
	b, frozen := add(t, n, block.BitmapOptions{Name: "b"}), add(t, n, block.BitmapOptions{Name: "frozen", Disabled: true})
	must(t, r.Flush(ctx))
	from := len(l.Entries())
	must(t, g.SetActive(ctx, false, n))
	must(t, g.SetActive(ctx, true, n))
	must(t, r.Flush(ctx))
	must(t, r.Flush(ctx))
	wantReached(t, l, &from, "flush")
	wantDirty(t, b, "0+100000")
	wantDirty(t, frozen, "")
}
