package block

import (
	"context"
	"fmt"
	"strings"
)

// statesProtocol tells whether a file name begins with a protocol: a colon stands
// before the first slash (rule G6).
func statesProtocol(name string) bool {
	i := strings.IndexAny(name, ":/")
	return i >= 0 && name[i] == ':'
}

// literal writes the name of a file so that it states no protocol.
func literal(name string) string {
	if statesProtocol(name) {
		return "./" + name
	}
	return name
}

// protocolFor finds the driver for a file name, and the name that this driver takes
// (rule G7): what a driver knows by looking goes before a protocol that the name states.
func (g *Graph) protocolFor(name string) (*Driver, string, error) {
	var found *Driver
	best := 0
	for _, d := range g.Drivers() {
		if d.ProbeName == nil {
			continue
		}
		if score := d.ProbeName(name); score > best {
			found, best = d, score
		}
	}
	if found != nil {
		return found, name, nil
	}
	if !statesProtocol(name) {
		if d := g.drivers["file"]; d != nil {
			return d, name, nil
		}
		return nil, "", unknownDriver("file")
	}
	protocol, rest, _ := strings.Cut(name, ":")
	if d := g.drivers[protocol]; d != nil && d.Kind == Protocol {
		return d, literal(rest), nil
	}
	return nil, "", refuse(ErrNotSupported, "Unknown protocol '%s' (a file of this name is './%s')", protocol, name)
}

// ProtocolConfig describes the protocol node for a file name (rule G7), without the
// format of what it holds.
func (g *Graph) ProtocolConfig(name string) (*Config, error) {
	d, name, err := g.protocolFor(name)
	if err != nil {
		return nil, err
	}
	c := &Config{Driver: d.Name}
	if err := c.setFilename(d, name); err != nil {
		return nil, err
	}
	c.Options, err = d.decode(c.unread.clone())
	c.unread = nil
	return c, err
}

// CombineNames resolves a name that the file called base refers to (rule G6): one
// that is not absolute and states no protocol but "file:" is relative to base's folder.
func CombineNames(base, name string) string {
	file, isFile := strings.CutPrefix(name, "file:")
	switch {
	case file == "" || file[0] == '/':
		return file
	case !isFile && statesProtocol(name):
		return name
	}
	base = strings.TrimPrefix(base, "file:")
	// Not path.Join: "a/../b" differs from "b" where a is a symbolic link.
	return literal(base[:strings.LastIndexByte(base, '/')+1] + file)
}

// BackingName resolves the name of a backing file that the header of n's image has
// (rule G6).
func (n *Node) BackingName(name string) (string, error) {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.backingName(name)
}

// backingName is BackingName. Graph.mu is held.
func (n *Node) backingName(name string) (string, error) {
	if full := CombineNames("", name); full == "" || full[0] == '/' || statesProtocol(full) {
		return full, nil
	}
	// Relative to what is lowest: an image in a part of a file is still in the file's folder.
	p, base := n, ""
	for p.primary() != nil {
		p = p.primary()
	}
	if f, ok := p.inst.(Named); ok {
		base = f.Filename()
	}
	if base == "" {
		return "", refuse(ErrInvalid, "Cannot use relative backing file names for '%s': Cannot generate a base directory for %s nodes", name, p.driver.Name)
	}
	return CombineNames(base, name), nil
}

// primary is the child that stands for n's file name, or nil. Graph.mu is held.
func (n *Node) primary() *Node {
	for _, e := range n.children {
		if e.role&RolePrimary != 0 {
			return e.Node()
		}
	}
	return nil
}

// BackingConfig describes the backing node of an image whose header names the file
// name, "" for none, of format (rule G19). What the configuration says counts; what it
// leaves open is taken from the header. cfg is nil if there is to be no backing node;
// file is the header's file name, resolved, if it is used.
func (o *Opening) BackingConfig(name, format string) (cfg *Config, file string, err error) {
	given := o.Config.Children["backing"]
	if o.Config.NoBacking || given == nil && name == "" {
		return nil, "", nil
	}
	cfg = new(Config)
	if given != nil {
		*cfg = *given
	}
	d := o.graph.drivers[cfg.Driver]
	complete := cfg.Ref != "" || cfg.Filename != "" || cfg.Children["file"] != nil || d != nil && d.Kind == Protocol
	if complete || name == "" {
		return cfg, "", nil
	}
	if strings.HasPrefix(name, "json:") {
		return nil, "", refuse(ErrNotSupported, "backing file '%.200s': json: names in image headers are not followed; name the backing node in the configuration", name)
	}
	if cfg.Filename, err = o.node.BackingName(name); err != nil {
		return nil, "", err
	}
	if cfg.Filename == "" {
		return nil, "", refuse(ErrInvalid, "backing file '%s' has no file name", name)
	}
	if cfg.Driver == "" {
		cfg.Driver = format
	}
	return cfg, cfg.Filename, nil
}

// OpenBacking opens the backing node, as [Opening.BackingConfig] has described it.
func (o *Opening) OpenBacking(ctx context.Context, cfg *Config) (*Edge, error) {
	return o.openChild(ctx, "backing", RoleCOW, cfg)
}

// ExactFilename is the plain file name by which the node can be opened again, given
// its driver. It is "" where there is none (rule G25): a filter, an option that changes
// what is read, a backing node that the header does not name.
func (n *Node) ExactFilename() string {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return make(naming).of(n).exact
}

// Filename is the file name by which the node can be opened again: the plain name if
// there is one, and else "json:" with all options that it takes (rule G25).
func (n *Node) Filename() string {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return make(naming).filename(n)
}

// FullOptions are the options with which the node can be opened again, but for those
// that do not change what is read (rule G25).
func (n *Node) FullOptions() *Options {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return make(naming).of(n).options
}

// A naming finds out how nodes can be opened again. Graph.mu is held.
type naming map[*Node]*address

type address struct {
	exact   string // "": none
	options *Options
}

func (all naming) filename(n *Node) string {
	a := all.of(n)
	if a.exact != "" {
		return a.exact
	}
	text, err := a.options.MarshalJSON()
	if err != nil {
		panic(fmt.Errorf("options of node '%s' cannot be written: %w", n.name, err)) // texts, numbers and booleans can
	}
	return "json:" + string(text)
}

func (all naming) of(n *Node) *address {
	if a := all[n]; a != nil {
		return a
	}
	a := &address{options: new(Options)}
	all[n] = a
	plain := true // the file and the format say it all
	set := func(name string, value any) {
		if err := a.options.Set(name, value); err != nil {
			panic(fmt.Errorf("driver '%s': %w", n.driver.Name, err)) // a driver's names are good
		}
	}
	set("driver", n.driver.Name)
	if n.driver.NewOptions != nil {
		for name, value := range strongOptions(n.cfg().Options, n.driver.NewOptions()) {
			set(name, value)
			plain = false
		}
	}
	overridden := all.overridden(n)
	for _, e := range n.children {
		child := all.of(e.Node())
		if e.role&RoleCOW == 0 || overridden {
			at, _, err := a.options.at(e.name, 0)
			if err != nil {
				panic(fmt.Errorf("driver '%s': %w", n.driver.Name, err))
			}
			*at = *child.options
		}
		if e.role&RolePrimary != 0 && e.Node().driver.Kind == Protocol && n.driver.Kind == Format {
			a.exact = child.exact
		}
	}
	if overridden && n.Backing() == nil {
		set("backing", nil)
	}
	if !plain || overridden {
		a.exact = ""
	}
	if f, ok := n.inst.(Named); ok {
		a.exact = f.Filename()
	}
	return a
}

// overridden tells whether n's backing node is another than the header says.
func (all naming) overridden(n *Node) bool {
	name, format := "", ""
	if h, ok := n.inst.(interface{ BackingFile() (name, format string) }); ok {
		name, format = h.BackingFile()
	}
	e := n.Backing()
	if e == nil || name == "" {
		return e != nil || name != ""
	}
	backing := e.Node()
	full, err := n.backingName(name)
	return err != nil || full != all.of(backing).exact || format != "" && format != backing.driver.Name
}
