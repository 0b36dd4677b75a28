package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/urfave/cli/v2"

	"github.com/nbdserve/nbdserve/block"
)

var outputs = []choice[bool]{{"human", false}, {"json", true}}

// lookFlags are the options of the commands that look at an image.
func lookFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "format", Aliases: []string{"f"}, Usage: "image `FORMAT`: " + namesOf(formatChoices()) + "; without it the format is probed"},
		&cli.BoolFlag{Name: "force-share", Aliases: []string{"U"}, Usage: "look at an image that others write to; what is found may be out of date or wrong"},
		&cli.StringFlag{Name: "output", Value: outputs[0].name, Usage: "output `FORMAT`: " + namesOf(outputs)},
	}
}

// A look is an image opened for reading, by image info and image check.
type look struct {
	path   string
	format string
	json   bool
	force  bool
}

func parseLook(c *cli.Context) (l look, err error) {
	l.force = c.Bool("force-share")
	if l.path, err = oneImage(c); err != nil {
		return l, err
	}
	if l.format, err = formatOption(c); err != nil {
		return l, err
	}
	l.json, err = choose(c, "output", outputs)
	return l, err
}

// newToolGraph returns a graph for one command, whose log goes to standard error.
func newToolGraph(c *cli.Context) *block.Graph {
	log := slog.New(slog.NewTextHandler(c.App.ErrWriter, &slog.HandlerOptions{Level: slog.LevelWarn}))
	return newGraph(log)
}

// file runs f on the image's file. Unless forced, nobody may write to the file
// meanwhile where its format has metadata.
func (l *look) file(c *cli.Context, f func(ctx context.Context, file *block.Root) error) (err error) {
	ctx := context.Background()
	g := newToolGraph(c)
	defer func() { err = errors.Join(err, g.Close(ctx)) }()
	cfg, err := g.ProtocolConfig(l.path)
	if err != nil {
		return err
	}
	if l.format == "" {
		if l.format, err = probe(ctx, g, *cfg); err != nil {
			return err
		}
	}
	cfg.ReadOnly, cfg.ForceShare = true, l.force
	shared := block.PermAll
	if l.format != "raw" && !l.force {
		shared &^= block.PermWrite | block.PermResize
	}
	rc := block.RootConfig{User: "image " + c.Command.Name, Perm: block.PermConsistentRead, Shared: shared}
	return withRoot(ctx, g, cfg, rc, f)
}

// probe tells the format of an image by its first bytes. It disturbs nobody who uses the image.
func probe(ctx context.Context, g *block.Graph, file block.Config) (format string, err error) {
	file.ReadOnly, file.NoIO = true, true
	err = withRoot(ctx, g, &file, block.RootConfig{User: "format probe", Shared: block.PermAll}, func(ctx context.Context, r *block.Root) error {
		head := make([]byte, min(probeSize, r.Size()))
		if err := r.ReadAt(ctx, head, 0); err != nil {
			return fmt.Errorf("cannot read the first sector to probe the format: %w", err)
		}
		format = g.ProbeFormat(head)
		return nil
	})
	return format, err
}

// probeSize is how many bytes of an image tell its format (rule G8).
const probeSize = 512
