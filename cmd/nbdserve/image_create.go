package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/formats/qcow2"
	"github.com/nbdserve/nbdserve/hostdev"
)

func imageCreateCommand() *cli.Command {
	return &cli.Command{
		Name:      "create",
		Usage:     "create a disk image",
		ArgsUsage: "PATH [SIZE]",
		Description: "Creates an image of SIZE (bytes, or a number with one of the suffixes k, M, G, T, P, E); what PATH held is lost.\n" +
			"Without SIZE the image has the size of its backing file.\n" +
			"Options of raw: preallocation (off, falloc, full). Options of qcow2: cluster_size, compat (1.1, 0.10), compression_type (zlib, zstd), refcount_bits.",
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "format", Aliases: []string{"f"}, Value: "raw", Usage: "image `FORMAT`: " + namesOf(formatChoices())},
			&cli.StringFlag{Name: "backing", Aliases: []string{"b"}, Usage: "take what is not written from backing `FILE`; a relative name is relative to PATH's folder"},
			&cli.StringFlag{Name: "backing-format", Aliases: []string{"F"}, Usage: "`FORMAT` of the backing file; must be given with it"},
			&cli.StringSliceFlag{Name: "option", Aliases: []string{"o"}, Usage: "set options of the format, `NAME=VALUE`[,NAME=VALUE...]; may be repeated"},
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "print nothing"},
		},
		Action: func(c *cli.Context) error {
			n, err := parseCreate(c)
			if err != nil {
				return err
			}
			return n.create(c)
		},
	}
}

// A newImage is what image create is to make.
type newImage struct {
	path, format string
	prealloc     hostdev.Prealloc    // raw
	qcow2        qcow2.CreateOptions // Size is that of raw images too; -1: of the backing file
}

var preallocs = map[string]hostdev.Prealloc{"off": hostdev.PreallocOff, "falloc": hostdev.PreallocFalloc, "full": hostdev.PreallocFull}

// settings are the functions that set the options of a format, by format and name.
func (n *newImage) settings() map[string]map[string]func(value string) error {
	fromMap := func(name string, found bool, known string) error {
		if !found {
			return fmt.Errorf("option %s is one of %s", name, known)
		}
		return nil
	}
	return map[string]map[string]func(string) error{
		"raw": {
			"preallocation": func(v string) (err error) {
				var ok bool
				n.prealloc, ok = preallocs[v]
				return fromMap("preallocation", ok, "off, falloc, full")
			},
		},
		"qcow2": {
			"cluster_size": func(v string) (err error) {
				n.qcow2.ClusterSize, err = block.ParseSize(v)
				return err
			},
			"compat": func(v string) error {
				var ok bool
				n.qcow2.Version, ok = map[string]uint32{"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}[v]
				return fromMap("compat", ok, "1.1, 0.10")
			},
			"compression_type": func(v string) error {
				var ok bool
				n.qcow2.Compression, ok = map[string]uint8{"zlib": qcow2.CompressionZlib, "zstd": qcow2.CompressionZstd}[v]
				return fromMap("compression_type", ok, "zlib, zstd")
			},
			"refcount_bits": func(v string) (err error) {
				if n.qcow2.RefcountBits, err = strconv.Atoi(v); err != nil || n.qcow2.RefcountBits < 1 {
					return errors.New("option refcount_bits is a power of two from 1 to 64")
				}
				return nil
			},
		},
	}
}

func parseCreate(c *cli.Context) (*newImage, error) {
	n := &newImage{}
	var err error
	if n.format, err = choose(c, "format", formatChoices()); err != nil {
		return nil, err
	}
	switch args := c.Args(); args.Len() {
	case 0:
		return nil, errors.New("no PATH given (see 'nbdserve image create --help')")
	case 1:
		n.qcow2.Size = -1
		if !c.IsSet("backing") {
			return nil, errors.New("Image creation needs a size parameter")
		}
	case 2:
		if n.qcow2.Size, err = block.ParseSize(args.Get(1)); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("PATH and SIZE are expected, but got '%s'", strings.Join(args.Slice(), "' '"))
	}
	n.path = c.Args().First()
	n.qcow2.BackingFile, n.qcow2.BackingFormat = c.String("backing"), c.String("backing-format")
	switch {
	case c.IsSet("backing") && n.qcow2.BackingFile == "":
		return nil, errors.New("Expected backing file name, got empty string")
	case n.qcow2.BackingFile != "" && n.format == "raw":
		return nil, errors.New("format raw has no backing files; choose --format qcow2")
	case n.qcow2.BackingFile != "" && n.qcow2.BackingFormat == "":
		return nil, errors.New("Backing file specified without backing format; state it with -F raw or -F qcow2")
	case n.qcow2.BackingFile == "" && n.qcow2.BackingFormat != "":
		return nil, errors.New("--backing-format is given without --backing")
	case n.qcow2.BackingFormat != "":
		if _, err := choose(c, "backing-format", formatChoices()); err != nil {
			return nil, err
		}
	}
	settings := n.settings()[n.format]
	for _, list := range c.StringSlice("option") {
		for setting := range strings.SplitSeq(list, ",") {
			name, value, _ := strings.Cut(setting, "=")
			set := settings[name]
			if set == nil {
				return nil, fmt.Errorf("format %s has no option '%s'; it has %s", n.format, name, strings.Join(slices.Sorted(maps.Keys(settings)), ", "))
			}
			if err := set(value); err != nil {
				return nil, fmt.Errorf("-o %s: %w", setting, err)
			}
		}
	}
	return n, nil
}

func (n *newImage) create(c *cli.Context) (err error) {
	ctx := context.Background()
	g := newToolGraph(c)
	defer func() { err = errors.Join(err, g.Close(ctx)) }()
	file, err := g.ProtocolConfig(n.path)
	if err != nil {
		return err
	}
	opts, ok := file.Options.(*hostdev.Options)
	if !ok {
		return fmt.Errorf("images cannot be created by protocol '%s'", file.Driver)
	}
	n.path = opts.Filename
	if n.qcow2.BackingFile != "" {
		if err := n.openBacking(ctx, g); err != nil {
			return err
		}
	}
	if n.format == "raw" {
		err = hostdev.Create(n.path, n.qcow2.Size, n.prealloc)
	} else {
		err = n.createQcow2(ctx, g, file)
	}
	if err != nil || c.Bool("quiet") {
		return err
	}
	_, err = fmt.Fprintf(c.App.Writer, "Created '%s': format %s, size %d bytes%s\n", n.path, n.format, n.qcow2.Size, n.describeBacking())
	return err
}

func (n *newImage) describeBacking() string {
	if n.qcow2.BackingFile == "" {
		return ""
	}
	return fmt.Sprintf(", backing file '%s' of format %s", n.qcow2.BackingFile, n.qcow2.BackingFormat)
}

// openBacking proves that the backing file can be opened and that the new image is
// no part of it, and takes its size where none was given.
func (n *newImage) openBacking(ctx context.Context, g *block.Graph) error {
	cfg := &block.Config{
		Driver: n.qcow2.BackingFormat, ReadOnly: true, ForceShare: true, NoIO: true,
		Filename: block.CombineNames(n.path, n.qcow2.BackingFile),
	}
	b, err := g.Open(ctx, cfg)
	if err != nil {
		return fmt.Errorf("Could not open backing image: %w", err)
	}
	if n.qcow2.Size < 0 {
		n.qcow2.Size = b.Size()
	}
	for _, node := range g.Nodes() {
		if name := node.ExactFilename(); name != "" && identity(name) == identity(n.path) {
			err = fmt.Errorf("'%s' is part of the backing chain of the image that would replace it", n.path)
		}
	}
	return errors.Join(err, g.Release(ctx, b))
}

// createQcow2 makes the file and the image in it. A file that was not there before
// is removed again if that fails.
func (n *newImage) createQcow2(ctx context.Context, g *block.Graph, file *block.Config) (err error) {
	_, serr := os.Lstat(n.path)
	isNew := errors.Is(serr, fs.ErrNotExist)
	if err := hostdev.Create(n.path, 0, hostdev.PreallocOff); err != nil {
		return err
	}
	rc := block.RootConfig{User: "image create", Perm: block.PermConsistentRead | block.PermWrite | block.PermResize}
	err = withRoot(ctx, g, file, rc, func(ctx context.Context, file *block.Root) error {
		return qcow2.Create(ctx, file, n.qcow2)
	})
	if err != nil && isNew {
		err = errors.Join(err, os.Remove(n.path))
	}
	return err
}
