package main

import (
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
	filters      []filter       // above the disk, lower ones first
	export       exportOptions
}

// A filter is a node for which serve has a short option, by the name of the driver.
type filter struct {
	driver  string
	options *block.Options
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
	i := &imageOptions{options: new(block.Options),
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
	if c.Bool("copy-on-read") {
		i.filters = append(i.filters, filter{"copy-on-read", new(block.Options)})
	}
	if c.IsSet("throttle") {
		limits, err := parseThrottle(c.String("throttle"))
		if err != nil {
			return nil, fmt.Errorf("--throttle '%s': %w", c.String("throttle"), err)
		}
		i.filters = append(i.filters, filter{"throttle", limits})
	}
	return i, i.export.check()
}

// parseThrottle reads limits by the names of the driver throttle, of which bps and iops
// are short for bps-total and iops-total.
func parseThrottle(text string) (*block.Options, error) {
	o, err := block.ParseOptions(text, "")
	if err != nil {
		return nil, err
	}
	short := struct {
		Bps  *string `option:"bps"`
		Iops *string `option:"iops"`
	}{}
	if err := o.Extract(&short); err != nil {
		return nil, err
	}
	for name, value := range map[string]*string{"bps-total": short.Bps, "iops-total": short.Iops} {
		if value != nil {
			if err := o.Set(name, *value); err != nil {
				return nil, err
			}
		}
	}
	return o, nil
}

// open opens the nodes with openNode, which keeps the references.
func (s *source) open(g *block.Graph, openNode func(*block.Config) (*block.Node, error)) error {
	if s.allow != nil || s.allowReadOnly != nil {
		if err := g.AllowDrivers(s.allow, s.allowReadOnly); err != nil {
			return err
		}
	}
	for _, o := range s.nodes {
		cfg, err := g.Configure("", o)
		if err == nil && cfg.NodeName == "" {
			err = errors.New("'node-name' must be specified for the root node")
		}
		if err == nil {
			_, err = openNode(cfg)
		}
		if err != nil {
			name := struct {
				Node string `option:"node-name"`
			}{}
			if o.Extract(&name) == nil && name.Node != "" {
				return fmt.Errorf("--blockdev node-name=%s: %w", name.Node, err)
			}
			return fmt.Errorf("--blockdev: %w", err)
		}
	}
	if s.image != nil {
		return s.image.open(g, openNode)
	}
	return nil
}

// open opens IMAGE: its file, its format, and above that a raw node where only a part
// is served, and filters. The nodes have names that metrics and logs can be searched
// for: disk; file; whole, of which disk is a part; throttle and copy-on-read.
func (i *imageOptions) open(g *block.Graph, openNode func(*block.Config) (*block.Node, error)) error {
	cfg, err := g.Configure(i.name, i.options)
	if err != nil {
		return err
	}
	if cfg.Given&block.GivenDiscard == 0 {
		cfg.Unmap = true
	}
	if cfg.Filename != "" && cfg.Children["file"] == nil {
		if cfg.Children == nil {
			cfg.Children = make(map[string]*block.Config)
		}
		cfg.Children["file"] = &block.Config{Filename: cfg.Filename, NodeName: "file"}
		cfg.Filename = ""
	}
	part := i.offset != 0 || i.size != 0
	if cfg.NodeName == "" {
		cfg.NodeName = "disk"
		if part {
			cfg.NodeName = "whole"
		}
	}
	below, err := openNode(cfg)
	if err != nil {
		return err
	}
	above := func(cfg *block.Config, name string) error {
		cfg.NodeName, cfg.ReadOnly, cfg.Unmap = name, below.ReadOnly(), true
		cfg.Children = map[string]*block.Config{"file": {Ref: below.Name()}}
		n, err := openNode(cfg)
		if err == nil {
			below = n
		}
		return err
	}
	if part {
		if err := above(&block.Config{Driver: "raw", Options: &raw.Options{Offset: i.offset, Size: i.size}}, "disk"); err != nil {
			return err
		}
	}
	for _, f := range i.filters {
		err := f.options.Set("driver", f.driver)
		if err == nil {
			cfg, err = g.Configure("", f.options)
		}
		if err == nil {
			err = above(cfg, f.driver)
		}
		if err != nil {
			return fmt.Errorf("--%s: %w", f.driver, err)
		}
	}
	i.export.NodeName = below.Name()
	return nil
}

// exportConfigs describes the exports; that of IMAGE is as writable as its node.
func (s *source) exportConfigs(g *block.Graph) ([]export.Config, error) {
	list := s.exports
	if s.image != nil {
		list = []exportOptions{s.image.export}
	}
	var configs []export.Config
	for _, e := range list {
		n, err := g.FindNode(e.NodeName)
		if err != nil {
			return nil, fmt.Errorf("--export: %w", err)
		}
		readOnly := !e.Writable
		if s.image != nil {
			readOnly = n.ReadOnly()
		}
		configs = append(configs, export.Config{
			Name: *e.Name, Description: e.Description, ID: e.ID, Graph: g, Node: n,
			ReadOnly: readOnly, ShareRW: e.ShareRW, WriteThrough: e.WriteThrough,
		})
	}
	return configs, nil
}

// label is a short name of what is served, for logs and sockets.
func (s *source) label() string {
	switch {
	case s.image == nil:
		return s.exports[0].NodeName
	case strings.HasPrefix(s.image.name, "json:"):
		return s.image.export.NodeName
	}
	return s.image.name
}
