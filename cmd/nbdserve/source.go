package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/export"
	"github.com/nbdserve/nbdserve/formats/raw"
)

// A source is what a server serves: the nodes to open, in their order, and the
// exports of them. IMAGE and its options are short for a node and an export.
type source struct {
	nodes   []*block.Options
	exports []exportOptions
	image   *imageOptions // nil: there is none

	allow, allowReadOnly []string // drivers; both nil: all
}

// exportOptions are those of --export, by the names of QEMU.
type exportOptions struct {
	Type         string  `option:"type"`
	ID           string  `option:"id"`
	NodeName     string  `option:"node-name"`
	Name         *string `option:"name"` // nil: the name of the node
	Description  string  `option:"description"`
	Writable     bool    `option:"writable"`
	WriteThrough bool    `option:"writethrough"`
	ShareRW      bool    `option:"share-rw"` // QEMU has no such option
}

// imageOptions say which disk IMAGE is, and how to open it.
type imageOptions struct {
	name         string         // path, or another name (rules G5 to G7)
	options      *block.Options // those given, which precede what the name says
	offset, size int64          // the part to serve, in bytes; a size of 0 reaches to the end
	throttle     *block.Options // nil: no limits
	copyOnRead   bool
	export       exportOptions
}

// imageFlags are the options of serve that say something about IMAGE.
var imageFlags = []string{"format", "read-only", "cache", "discard", "detect-zeroes", "offset", "size", "snapshot", "throttle",
	"copy-on-read", "share-rw", "name", "description"}

// parseSource reads what is to be served.
func parseSource(c *cli.Context) (s source, err error) {
	for _, text := range c.StringSlice("blockdev") {
		o, err := block.ParseOptions(text, "driver")
		if err != nil {
			return s, fmt.Errorf("--blockdev '%s': %w", text, err)
		}
		s.nodes = append(s.nodes, o)
	}
	for _, text := range c.StringSlice("export") {
		e, err := parseExport(text)
		if err != nil {
			return s, fmt.Errorf("--export '%s': %w", text, err)
		}
		s.exports = append(s.exports, e)
	}
	for name, list := range map[string]*[]string{"allow-drivers": &s.allow, "allow-drivers-read-only": &s.allowReadOnly} {
		if c.IsSet(name) {
			*list = strings.Split(c.String(name), ",")
		}
	}
	if len(s.exports) == 0 {
		s.image, err = parseImage(c)
		return s, err
	}
	if c.Args().Present() {
		return s, errors.New("IMAGE and --export exclude each other: IMAGE is an export of its own")
	}
	for _, name := range imageFlags {
		if c.IsSet(name) {
			return s, fmt.Errorf("--%s is about IMAGE; with --export, say it in --blockdev or --export", name)
		}
	}
	return s, nil
}

func parseExport(text string) (e exportOptions, err error) {
	o, err := block.ParseOptions(text, "type")
	if err != nil {
		return e, err
	}
	e.Type = "nbd"
	if err := o.Decode(&e); err != nil {
		return e, err
	}
	switch {
	case e.Type != "nbd":
		return e, fmt.Errorf("Parameter 'type' does not accept value '%s'", e.Type)
	case e.NodeName == "":
		return e, errors.New("Parameter 'node-name' is missing")
	}
	if e.Name == nil {
		e.Name = &e.NodeName
	}
	return e, e.check()
}

// check tells whether the texts may be sent to clients.
func (e *exportOptions) check() error {
	for what, s := range map[string]string{"name": *e.Name, "description": e.Description} {
		if len(s) > maxText {
			return fmt.Errorf("export %s of %d bytes is too long: at most %d are allowed", what, len(s), maxText)
		} else if !utf8.ValidString(s) {
			return fmt.Errorf("export %s %q is not UTF-8", what, s)
		}
	}
	return nil
}

func parseImage(c *cli.Context) (_ *imageOptions, err error) {
	name := c.String("name")
	i := &imageOptions{options: new(block.Options), copyOnRead: c.Bool("copy-on-read"),
		export: exportOptions{NodeName: "disk", Name: &name, Description: c.String("description"), ShareRW: c.Bool("share-rw")}}
	if i.name, err = oneImage(c); err != nil {
		return nil, err
	}
	set := func(option string, value any) {
		if err == nil {
			err = i.options.Set(option, value)
		}
	}
	format, ferr := formatOption(c)
	cache, cerr := choose(c, "cache", cacheModes)
	_, derr := choose(c, "discard", discardModes)
	_, zerr := choose(c, "detect-zeroes", detectZeroesModes)
	if err := errors.Join(ferr, cerr, derr, zerr); err != nil {
		return nil, err
	}
	if format != "" {
		set("driver", format)
	}
	if c.IsSet("read-only") {
		set("read-only", c.Bool("read-only"))
	}
	if c.IsSet("cache") {
		set("cache.direct", cache.Direct)
		set("cache.no-flush", cache.NoFlush)
		i.export.WriteThrough = cache.writeThrough
	}
	for _, name := range []string{"discard", "detect-zeroes"} {
		if c.IsSet(name) {
			set(name, c.String(name))
		}
	}
	if c.IsSet("snapshot") {
		set("snapshot", c.Bool("snapshot"))
	}
	if err != nil {
		return nil, err
	}
	if i.offset, err = sizeOption(c, "offset"); err != nil {
		return nil, err
	}
	if i.size, err = sizeOption(c, "size"); err != nil {
		return nil, err
	}
	if c.IsSet("size") && i.size == 0 {
		return nil, errors.New("--size must be more than 0; leave it out to serve up to the end of the disk")
	}
	if c.IsSet("throttle") {
		if i.throttle, err = parseThrottle(c.String("throttle")); err != nil {
			return nil, fmt.Errorf("--throttle '%s': %w", c.String("throttle"), err)
		}
	}
	return i, i.export.check()
}
