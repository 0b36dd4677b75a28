package block_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// Drivers whose nodes are opened by names and options, as those of the command are.

// files are what the drivers "file" and "device" can open, by name. Names in locked
// can only be read.
type files struct {
	stores map[string]*blocktest.Store
	locked map[string]bool
}

type fileOptions struct {
	Filename string `option:"filename,strong"`
	Locking  mode   `option:"locking"`
}

// mode is an enumeration.
type mode string

func (m mode) String() string { return string(m) }

func (m *mode) UnmarshalText(text []byte) error {
	if s := string(text); s != "auto" && s != "on" && s != "off" {
		return fmt.Errorf("no mode is called %s", s)
	}
	*m = mode(text)
	return nil
}

type fileNode struct {
	block.Instance
	name string
}

func (f *fileNode) Filename() string { return f.name }

func (f *files) driver(t blocktest.TB, name string) *block.Driver {
	memory := blocktest.Memory(t)
	return &block.Driver{
		Name:       name,
		Kind:       block.Protocol,
		NewOptions: func() any { return &fileOptions{Locking: "auto"} },
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			opts := o.Config.Options.(*fileOptions)
			switch store := f.stores[opts.Filename]; {
			case opts.Filename == "":
				return nil, fmt.Errorf("The '%s' block driver requires a file name", name)
			case store == nil:
				return nil, fmt.Errorf("Could not open '%s': %w", opts.Filename, syscall.ENOENT)
			case f.locked[opts.Filename] && !o.Config.ReadOnly:
				if err := o.AutoReadOnly(ctx, fmt.Errorf("Could not open '%s': %w", opts.Filename, syscall.EACCES)); err != nil {
					return nil, err
				}
				fallthrough
			default:
				o.Config.Options = &blocktest.MemoryOptions{Store: store, Limits: blocktest.AllFlags}
				inst, err := memory.Open(ctx, o)
				o.Config.Options = opts
				return &fileNode{inst, opts.Filename}, err
			}
		},
	}
}

type imgOptions struct {
	CacheSize int64    `option:"cache-size"`
	Lazy      bool     `option:"lazy"`
	Offset    int64    `option:"offset,strong"`
	Key       string   `option:"encrypt.key,strong"`
	Paths     []string `option:"paths,strong"`
	Rules     []rule   `option:"rule"`
	Limit     *int64   `option:"limit"`
}

type rule struct {
	Event string `option:"event"`
	Once  bool   `option:"once"`
}

// imgNode is an image of the format "img": a first line with the name of its backing
// file and that one's format, then nothing.
type imgNode struct {
	block.Instance
	backing, format string
}

func (n *imgNode) BackingFile() (name, format string) { return n.backing, n.format }

// imgFile is the file of an image.
func imgFile(backing, format string) *blocktest.Store {
	return blocktest.StoreOf(append(fmt.Appendf(nil, "IMG|%s|%s\n", backing, format), make([]byte, 4096)...))
}

type passNode struct{ file *block.Edge }

func (n *passNode) ReadAt(ctx context.Context, p []byte, off int64) error {
	return n.file.ReadAt(ctx, p, off)
}

func (n *passNode) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	return n.file.WriteAt(ctx, p, off, flags)
}
func (n *passNode) Flush(ctx context.Context) error { return n.file.Flush(ctx) }
func (n *passNode) Size() int64                     { return n.file.Size() }
func (n *passNode) Limits() block.Limits            { return n.file.Limits() }
func (n *passNode) Close(context.Context) error     { return nil }

func imgDriver() *block.Driver {
	return &block.Driver{
		Name:       "img",
		Kind:       block.Format,
		Backing:    true,
		NewOptions: func() any { return new(imgOptions) },
		Probe: func(head []byte) int {
			if bytes.HasPrefix(head, []byte("IMG|")) {
				return 100
			}
			return 0
		},
		Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			file, err := o.OpenChild(ctx, "file", block.RoleImage, nil)
			if err != nil {
				return nil, err
			}
			head := make([]byte, min(512, file.Size()))
			if err := file.ReadAt(ctx, head, 0); err != nil {
				return nil, err
			}
			line, _, ok := strings.Cut(string(head), "\n")
			parts := strings.Split(line, "|")
			if !ok || len(parts) != 3 || parts[0] != "IMG" {
				return nil, fmt.Errorf("Image is not in img format")
			}
			cfg, _, err := o.BackingConfig(parts[1], parts[2])
			if err == nil && cfg != nil {
				_, err = o.OpenBacking(ctx, cfg)
			}
			if err != nil {
				return nil, fmt.Errorf("Could not open backing file: %w", err)
			}
			return &imgNode{&passNode{file}, parts[1], parts[2]}, nil
		},
	}
}

// passDriver is a driver over one child, or over a list.
func passDriver(name string, kind block.DriverKind, role block.Role) *block.Driver {
	d := &block.Driver{Name: name, Kind: kind, Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
		e, err := o.OpenChild(ctx, "file", role, nil)
		return &passNode{e}, err
	}}
	if role&block.RoleFiltered == 0 {
		d.Children = []string{"children.*"}
		d.Open = func(ctx context.Context, o *block.Opening) (block.Instance, error) {
			n := new(passNode)
			for i := range len(o.Config.Children) {
				e, err := o.OpenChild(ctx, fmt.Sprintf("children.%d", i), role, nil)
				if err != nil {
					return nil, err
				}
				n.file = e
			}
			return n, nil
		}
	}
	return d
}

// namedGraph is a graph with the drivers file, device, img, raw, pass (a filter) and
// many (a list of children), and these files.
func namedGraph(t blocktest.TB, stores map[string]*blocktest.Store) (*block.Graph, *files) {
	f := &files{stores: stores, locked: make(map[string]bool)}
	device := f.driver(t, "device")
	device.ProbeName = func(name string) int {
		if strings.Contains(name, "dev/") {
			return 100
		}
		return 0
	}
	g := blocktest.NewGraph(t, f.driver(t, "file"), device, imgDriver(),
		passDriver("raw", block.Format, block.RoleFiltered|block.RolePrimary),
		passDriver("pass", block.Filter, block.RoleFiltered|block.RolePrimary),
		passDriver("many", block.Filter, block.RoleData))
	return g, f
}

// configure describes a node by options in text, of which "" are none.
func configure(g *block.Graph, filename, options string) (*block.Config, error) {
	o, err := block.ParseOptions(options, "driver")
	if err != nil {
		return nil, err
	}
	return g.Configure(filename, o)
}

// openText opens a node by options in text.
func openText(g *block.Graph, filename, options string) (*block.Node, error) {
	c, err := configure(g, filename, options)
	if err != nil {
		return nil, err
	}
	return g.Open(ctx, c)
}

func openedText(t blocktest.TB, g *block.Graph, filename, options string) *block.Node {
	t.Helper()
	n, err := openText(g, filename, options)
	if err != nil {
		t.Fatalf("%s %s: %v", filename, options, err)
	}
	t.Cleanup(func() { release(t, g, n) })
	return n
}

// wantText demands an error of exactly this text.
func wantText(t *testing.T, what string, err error, text string) {
	t.Helper()
	if err == nil || err.Error() != text {
		t.Errorf("%s:\n got %v\nwant %s", what, err, text)
	}
}
