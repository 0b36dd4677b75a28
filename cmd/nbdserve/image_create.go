package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/nbdserve/nbdserve/block"
)

func imageCreateCommand() *cli.Command {
	return &cli.Command{
		Name:      "create",
		Usage:     "create a disk image",
		ArgsUsage: "PATH [SIZE]",
		Description: "Creates an image of SIZE (bytes, or a number with one of the suffixes k, M, G, T, P, E); what PATH held is lost.\n" +
			"Without SIZE the image has the size of its backing file.\n" +
			"Options of raw: preallocation (off, falloc, full). Options of qcow2: cluster_size, compat (1.1, 0.10), compression_type (zlib, zstd), lazy_refcounts, refcount_bits.",
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "format", Aliases: []string{"f"}, Value: "raw", Usage: "image `FORMAT`: " + namesOf(formatChoices())},
			&cli.StringFlag{Name: "backing", Aliases: []string{"b"}, Usage: "take what is not written from backing `FILE`; a relative name is relative to PATH's folder"},
			&cli.StringFlag{Name: "backing-format", Aliases: []string{"F"}, Usage: "`FORMAT` of the backing file; must be given with it"},
			&cli.StringSliceFlag{Name: "option", Aliases: []string{"o"}, Usage: "set options of the format, `NAME=VALUE`[,NAME=VALUE...]; may be repeated"},
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "print nothing"},
		},
		Action: func(c *cli.Context) error {
			i, err := parseCreate(c)
			if err != nil {
				return err
			}
			return create(c, i)
		},
	}
}

func parseCreate(c *cli.Context) (i block.NewImage, err error) {
	i.Format, i.BackingFormat = c.String("format"), c.String("backing-format")
	if c.IsSet("backing") {
		i.Backing = new(c.String("backing"))
	}
	switch args := c.Args(); args.Len() {
	case 0:
		return i, errors.New("no PATH given (see 'nbdserve image create --help')")
	case 1:
	case 2:
		size, err := block.ParseSize(args.Get(1))
		if err != nil {
			return i, err
		}
		i.Size = &size
	default:
		return i, fmt.Errorf("PATH and SIZE are expected, but got '%s'", strings.Join(args.Slice(), "' '"))
	}
	i.Filename = c.Args().First()
	i.Options, err = block.ParseOptions(strings.Join(c.StringSlice("option"), ","), "")
	return i, err
}

func create(c *cli.Context, i block.NewImage) (err error) {
	ctx := context.Background()
	g := newToolGraph(c)
	defer func() { err = errors.Join(err, g.Close(ctx)) }()
	size, err := g.CreateImage(ctx, i)
	if errors.Is(err, block.ErrNoBackingFormat) {
		return fmt.Errorf("%w; state the format with -F", err)
	}
	if err != nil || c.Bool("quiet") {
		return err
	}
	backing := ""
	if i.Backing != nil {
		backing = fmt.Sprintf(", backing file '%s' of format %s", *i.Backing, i.BackingFormat)
	}
	_, err = fmt.Fprintf(c.App.Writer, "Created '%s': format %s, size %d bytes%s\n", i.Filename, i.Format, size, backing)
	return err
}
