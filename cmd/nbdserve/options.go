package main

import (
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/export"
)

// A choice is one value of an option that has few.
type choice[T any] struct {
	name  string
	value T
}

// choose finds the value of option --name.
func choose[T any](c *cli.Context, name string, choices []choice[T]) (T, error) {
	given := c.String(name)
	for _, ch := range choices {
		if ch.name == given {
			return ch.value, nil
		}
	}
	var none T
	return none, fmt.Errorf("--%s '%s' is not one of %s", name, given, namesOf(choices))
}

func namesOf[T any](choices []choice[T]) string {
	var names []string
	for _, ch := range choices {
		names = append(names, ch.name)
	}
	return strings.Join(names, ", ")
}

// A caching is what --cache means: how the image is opened, and whether each write is made durable.
type caching struct {
	block.CacheMode
	writeThrough bool
}

var cacheModes = []choice[caching]{
	{"writeback", caching{}},
	{"none", caching{CacheMode: block.CacheMode{Direct: true}}},
	{"writethrough", caching{writeThrough: true}},
	{"directsync", caching{CacheMode: block.CacheMode{Direct: true}, writeThrough: true}},
	{"unsafe", caching{CacheMode: block.CacheMode{NoFlush: true}}},
}

var activations = []choice[export.Activation]{
	{export.ActivationAlways.String(), export.ActivationAlways},
	{export.ActivationOnConnect.String(), export.ActivationOnConnect},
}

var discardModes = []choice[bool]{{"unmap", true}, {"ignore", false}}

var detectZeroesModes = []choice[block.DetectZeroes]{
	{"off", block.DetectZeroesOff},
	{"on", block.DetectZeroesOn},
	{"unmap", block.DetectZeroesUnmap},
}

var logLevels = []choice[slog.Level]{
	{"debug", slog.LevelDebug}, {"info", slog.LevelInfo}, {"warn", slog.LevelWarn}, {"error", slog.LevelError},
}

var logFormats = []choice[func(io.Writer, *slog.HandlerOptions) slog.Handler]{
	{"text", func(w io.Writer, o *slog.HandlerOptions) slog.Handler { return slog.NewTextHandler(w, o) }},
	{"json", func(w io.Writer, o *slog.HandlerOptions) slog.Handler { return slog.NewJSONHandler(w, o) }},
}

var graphFormats = []choice[func(*block.View, io.Writer) error]{
	{"text", (*block.View).WriteText}, {"dot", (*block.View).WriteDot}, {"json", (*block.View).WriteJSON},
}

// formatChoices are the drivers that --format may name.
func formatChoices() []choice[string] {
	var cs []choice[string]
	for _, name := range block.NewGraph(nil, drivers()...).DriverNames(block.Format) {
		cs = append(cs, choice[string]{name, name})
	}
	return cs
}

// formatOption reads --format; "" means to probe.
func formatOption(c *cli.Context) (string, error) {
	if !c.IsSet("format") {
		return "", nil
	}
	return choose(c, "format", formatChoices())
}

func sizeOption(c *cli.Context, name string) (int64, error) {
	if !c.IsSet(name) {
		return 0, nil
	}
	n, err := block.ParseSize(c.String(name))
	if err != nil {
		return 0, fmt.Errorf("--%s: %w", name, err)
	}
	return n, nil
}

// oneImage is the single operand of a command.
func oneImage(c *cli.Context) (string, error) {
	switch args := c.Args(); args.Len() {
	case 0:
		return "", fmt.Errorf("no IMAGE given (see 'nbdserve %s --help')", c.Command.Name)
	case 1:
		if args.First() == "" {
			return "", fmt.Errorf("IMAGE is empty: give the path of a disk image or block device")
		}
		return args.First(), nil
	default:
		return "", fmt.Errorf("one IMAGE is expected, but got %d: '%s'", args.Len(), strings.Join(args.Slice(), "' '"))
	}
}
