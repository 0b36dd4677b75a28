package block

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// commonOptions are those that every node has (rule G3).
type commonOptions struct {
	Driver   string `option:"driver"`
	NodeName string `option:"node-name"`
	ReadOnly bool   `option:"read-only"`
	Auto     bool   `option:"auto-read-only"`
	CacheMode
	Discard      discardMode  `option:"discard"`
	DetectZeroes DetectZeroes `option:"detect-zeroes"`
	ForceShare   bool         `option:"force-share"`
	Active       bool         `option:"active"`
}

// discardMode is the option discard: whether discards are passed on.
type discardMode bool

func (d discardMode) String() string {
	if d {
		return "unmap"
	}
	return "ignore"
}

// UnmarshalText implements [encoding.TextUnmarshaler].
func (d *discardMode) UnmarshalText(text []byte) error {
	switch string(text) {
	case "unmap", "on":
		*d = true
	case "ignore", "off":
		*d = false
	default:
		return errInvalidDiscard
	}
	return nil
}

var errInvalidDiscard = errors.New("Invalid discard option")

// givenNames are the names of the options in [Given].
var givenNames = map[string]Given{
	"cache.direct": GivenCacheDirect, "cache.no-flush": GivenCacheNoFlush, "read-only": GivenReadOnly,
	"auto-read-only": GivenAutoReadOnly, "force-share": GivenForceShare, "discard": GivenDiscard,
}

// Configure makes the description of a node of its options. filename is the name of an
// image, "" for none; one that begins with "json:" holds options, of which those in o
// take precedence (rule G5).
//
// Options that a driver reads are checked here if it is known by now, and else when the
// node is opened. Nothing is opened.
func (g *Graph) Configure(filename string, o *Options) (*Config, error) {
	o = o.clone()
	if filename != "" {
		if o.find("filename") != nil {
			return nil, errTwoNames
		}
		given := o.find("driver")
		if err := o.mergeName(&filename); err != nil {
			return nil, err
		}
		// A format that is given takes no name; it is the name of its file then.
		if o.nameFile(filename) {
			filename = ""
		} else if given == nil || g.isProtocol(given.value) {
			if err := o.setName(filename); err != nil {
				return nil, err
			}
			filename = ""
		}
	}
	snapshot := struct {
		On bool `option:"snapshot"`
	}{}
	if _, err := o.decode(&snapshot); err != nil {
		return nil, err
	}
	cfg, err := g.configNode(o, true)
	if err != nil {
		return nil, err
	}
	cfg.Snapshot = snapshot.On
	if filename != "" {
		cfg.Filename = filename
	}
	return cfg, nil
}

var errTwoNames = errors.New("Can't specify 'file' and 'filename' options at the same time")

// mergeName adds the options in *name if that begins with "json:", and clears it then.
func (o *Options) mergeName(name *string) error {
	text, ok := strings.CutPrefix(*name, "json:")
	if !ok {
		return nil
	}
	if len(text) > maxOptionText {
		return fmt.Errorf("Could not parse the JSON options: %d bytes are too many", len(text))
	}
	more := new(Options)
	if err := more.parseJSON(text); errors.Is(err, errNoObject) {
		return err
	} else if err != nil {
		return fmt.Errorf("Could not parse the JSON options: %w", err)
	}
	*name = ""
	o.merge(more)
	return nil
}

// setName sets the option filename, if there is a name.
func (o *Options) setName(name string) error {
	if name == "" {
		return nil
	}
	return o.Set("filename", name)
}

// nameFile makes name that of child "file", if that has options but no name.
func (o *Options) nameFile(name string) bool {
	file := o.find("file")
	return name != "" && file != nil && !file.given && file.find("filename") == nil && file.Set("filename", name) == nil
}

// isProtocol tells whether driver is the name of one.
func (g *Graph) isProtocol(driver any) bool {
	name, _ := driver.(string)
	d := g.drivers[name]
	return d != nil && d.Kind == Protocol
}

// configNode describes the node whose options are o, which is used up. names says that a
// file name may state a protocol or hold options; else it is taken as it is.
func (g *Graph) configNode(o *Options, names bool) (*Config, error) {
	filename := ""
	for o.find("driver") == nil {
		f := struct {
			Name string `option:"filename"`
		}{}
		if given, err := o.decode(&f); err != nil {
			return nil, err
		} else if len(given) == 0 {
			break
		}
		if filename = f.Name; !names {
			filename = literal(filename)
			break
		}
		if err := o.mergeName(&filename); err != nil {
			return nil, err
		}
		if filename != "" {
			break
		}
	}
	cfg, err := o.common()
	if err != nil {
		return nil, err
	}
	if !o.nameFile(filename) {
		cfg.Filename = filename
	}
	children := []string{"file"}
	d := g.drivers[cfg.Driver]
	switch {
	case d != nil:
		children = d.childNames()
	case cfg.Driver != "":
		return nil, unknownDriver(cfg.Driver)
	}
	if err := g.configBacking(cfg, o); err != nil {
		return nil, err
	}
	if cfg.Children["backing"] != nil && d != nil && !d.Backing {
		return nil, errNoBacking
	}
	for _, name := range children {
		if err := g.configChildren(cfg, o, name); err != nil {
			return nil, err
		}
	}
	if d == nil {
		cfg.unread = o
		return cfg, nil
	}
	cfg.Options, err = d.decode(o)
	return cfg, err
}

// common takes the common options out of o.
func (o *Options) common() (*Config, error) {
	v := commonOptions{Active: true}
	given, err := o.decode(&v)
	if err != nil {
		return nil, err
	}
	cfg := &Config{
		Driver: v.Driver, NodeName: v.NodeName, ReadOnly: v.ReadOnly, AutoReadOnly: v.Auto, Cache: v.CacheMode,
		Unmap: bool(v.Discard), DetectZeroes: v.DetectZeroes, ForceShare: v.ForceShare, Inactive: !v.Active,
	}
	for name, bit := range givenNames {
		if given[name] {
			cfg.Given |= bit
		}
	}
	return cfg, nil
}

// configBacking describes child "backing", which can be none: null, or "" where the spelling has no null.
func (g *Graph) configBacking(cfg *Config, o *Options) error {
	b := o.find("backing")
	if b == nil {
		return nil
	}
	if b.given && b.sub == nil && (b.value == nil || b.value == "") {
		o.take("backing")
		cfg.NoBacking = true
		return nil
	}
	return g.configChildren(cfg, o, "backing")
}

// configChildren describes the child called name, or the list of children that it stands for.
func (g *Graph) configChildren(cfg *Config, o *Options, name string) error {
	prefix, isList := strings.CutSuffix(name, ".*")
	sub := o.find(prefix)
	if sub == nil {
		return nil
	}
	list := []string{name}
	if isList {
		list = nil
		for _, part := range sub.names() {
			list = append(list, join(prefix, part))
		}
	}
	for _, name := range list {
		child, err := g.configChild(o.take(name), name)
		if err != nil {
			return err
		}
		if cfg.Children == nil {
			cfg.Children = make(map[string]*Config)
		}
		cfg.Children[name] = child
	}
	if isList && !sub.given {
		o.take(prefix) // what is empty by now
	}
	return nil
}

// configChild describes a child: a reference to a node, or options.
func (g *Graph) configChild(o *Options, name string) (*Config, error) {
	if !o.given {
		return g.configNode(o, name == "file" || name == "backing")
	}
	ref, ok := o.value.(string)
	switch {
	case !ok:
		return nil, fmt.Errorf("Invalid parameter type for '%s', expected: string or object", name)
	case len(o.sub) > 0:
		return nil, errReference
	}
	return &Config{Ref: ref}, nil
}

var errNoBacking = errors.New("Driver doesn't support backing files")

var errReference = errors.New("Cannot reference an existing block device with additional options or a new filename")

// childNames lists the children that options can describe, but for "backing".
func (d *Driver) childNames() []string {
	if d.Children == nil && d.Kind != Protocol {
		return []string{"file"}
	}
	return d.Children
}

// decode reads the driver's own options from what is left of o.
func (d *Driver) decode(o *Options) (any, error) {
	var opts any
	if d.NewOptions != nil {
		opts = d.NewOptions()
		if _, err := o.decode(opts); err != nil {
			return nil, err
		}
	}
	name := o.first()
	switch {
	case name == "":
		return opts, nil
	case d.Kind == Protocol:
		return nil, fmt.Errorf("Block protocol '%s' doesn't support the option '%s'", d.Name, name)
	}
	return nil, fmt.Errorf("Block format '%s' does not support the option '%s'", d.Name, name)
}

// hasOption tells whether the driver has an option of its own called name.
func (d *Driver) hasOption(name string) bool {
	return d.NewOptions != nil && slices.ContainsFunc(optionsOf(d.NewOptions()), func(o option) bool { return o.name == name })
}

func unknownDriver(name string) error { return fmt.Errorf("Unknown driver '%s'", name) }
