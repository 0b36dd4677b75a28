package block

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
)

// probeSize is how much of an image tells its format, in bytes (rule G8).
const probeSize = 512

// An origin says where a node is opened: what it inherits from, and what is found
// out by itself. The zero value is that of a node without a parent.
type origin struct {
	parent   *Config // effective
	role     Role
	protocol bool // without a driver it is no image to probe, but the file of one
}

// effective is cfg with what is inherited.
func (o origin) effective(cfg *Config) *Config {
	if o.parent == nil {
		c := *cfg
		return &c
	}
	return inherit(o.parent, o.role, cfg)
}

// below is where a child of a node is opened (rule G9): which children are probed
// follows from what they are to the parent.
func (o *Opening) below(role Role) origin {
	format := o.node.driver.Kind == Format
	protocol := o.protocol
	switch {
	case format && role&RoleCOW == 0 || role&RoleMetadata != 0:
		protocol = true
	case !format && role&RoleData != 0 && role&RoleFiltered == 0:
		protocol = false
	}
	return origin{o.Config, role, protocol}
}

var errNoDriver = errors.New("Must specify either driver or file")

// open opens the node that cfg describes.
func (g *Graph) open(ctx context.Context, cfg *Config, at origin) (_ *Node, err error) {
	if cfg.Ref != "" {
		return g.reference(cfg)
	}
	if cfg.Snapshot {
		return nil, refuse(ErrInvalid, "snapshot=on is for the node on top only")
	}
	explicit := *cfg
	o := &Opening{graph: g, protocol: at.protocol}
	d, err := o.settle(ctx, &explicit, at)
	if o.file != nil {
		defer func() { err = errors.Join(err, g.Release(ctx, o.file)) }()
	}
	if err != nil {
		return nil, err
	}
	eff := at.effective(&explicit)
	n := &Node{graph: g, driver: d, refs: 1, busy: true, shared: PermAll}
	n.explicit.Store(&explicit)
	n.config.Store(eff)
	n.inactive.Store(eff.Inactive)
	o.Config, o.node = eff, n
	if err := o.check(ctx, d); err != nil {
		return nil, err
	}
	g.mu.Lock()
	err = g.reserve(n, explicit.NodeName)
	g.mu.Unlock()
	if err != nil {
		return nil, err
	}
	o.NodeName = n.name
	inst, err := d.Open(ctx, o)
	if err != nil {
		return nil, errors.Join(err, g.dismantle(ctx, n))
	}
	g.mu.Lock()
	n.setInstance(inst)
	n.busy = false
	g.signalReady()
	g.mu.Unlock()
	n.tell(true) // a child may be drained
	if eff.Probed && d.Name == "raw" && !eff.ReadOnly {
		g.log.Warn("Image format was not specified and probing guessed raw: writes to sector 0 that would look like "+
			"another format are refused; specify the format raw to lift that", "image", n.Filename(), "node", n.name)
	}
	return n, nil
}

// reference takes a reference to the node that cfg names.
func (g *Graph) reference(cfg *Config) (*Node, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	n, err := g.referred(cfg)
	if err == nil {
		n.refs++
	}
	return n, err
}

// referred is the node that cfg names. Graph.mu is held.
func (g *Graph) referred(cfg *Config) (*Node, error) {
	if cfg.Driver != "" || cfg.Filename != "" || cfg.NodeName != "" || cfg.Options != nil || len(cfg.Children) > 0 || cfg.unread != nil {
		return nil, errReference
	}
	return g.lookup(cfg.Ref)
}

// settle finds out which driver opens c, and completes c with that. It may open
// child "file" for it.
func (o *Opening) settle(ctx context.Context, c *Config, at origin) (d *Driver, err error) {
	g := o.graph
	name := c.Filename
	if c.Driver == "" && at.protocol {
		if name == "" {
			return nil, errNoDriver
		}
		if d, name, err = g.protocolFor(name); err != nil {
			return nil, err
		}
		c.Driver = d.Name
	} else if c.Driver != "" {
		if d = g.drivers[c.Driver]; d == nil {
			return nil, unknownDriver(c.Driver)
		}
	}
	if c.Filename = ""; name != "" {
		if err := c.setFilename(d, name); err != nil {
			return nil, err
		}
	}
	if d == nil {
		if d, err = o.probe(ctx, c, at); err != nil {
			return nil, err
		}
		if c.Children["backing"] != nil && !d.Backing {
			return nil, errNoBacking
		}
		c.Driver, c.Probed = d.Name, true
	}
	if c.Options == nil {
		c.Options, err = d.decode(c.unread.clone())
	}
	c.unread = nil
	return d, err
}

// setFilename makes name the option of a protocol, and else child "file".
func (c *Config) setFilename(d *Driver, name string) error {
	if d != nil && d.Kind == Protocol {
		if name == "//" && !d.hasOption("filename") {
			return nil // null-co:// and the like
		}
		if c.Options != nil || c.unread != nil && c.unread.find("filename") != nil {
			return errTwoNames
		}
		c.unread = c.unread.clone()
		return c.unread.Set("filename", name)
	}
	if c.Children["file"] != nil {
		return errTwoNames
	}
	c.Children = maps.Clone(c.Children)
	if c.Children == nil {
		c.Children = make(map[string]*Config)
	}
	c.Children["file"] = &Config{Filename: name}
	return nil
}

// probe opens child "file" of an image and finds out its format (rule G8).
func (o *Opening) probe(ctx context.Context, c *Config, at origin) (*Driver, error) {
	file := c.Children["file"]
	if file == nil {
		return nil, errNoDriver
	}
	var err error
	o.file, err = o.graph.open(ctx, file, origin{at.effective(c), RoleImage, true})
	if err != nil {
		return nil, err
	}
	var head []byte
	err = o.graph.look(ctx, o.file, func(ctx context.Context, r *Root) error {
		head = make([]byte, min(probeSize, r.Size()))
		return r.edge.ReadAt(ctx, head, 0) // of an inactive file too
	})
	if err != nil {
		return nil, fmt.Errorf("Could not read image for determining its format: %w", err)
	}
	format := o.graph.ProbeFormat(head)
	d := o.graph.drivers[format]
	if d == nil {
		return nil, unknownDriver(format)
	}
	return d, nil
}

// look runs f as a request on a root that asks for nothing and disturbs nobody.
func (g *Graph) look(ctx context.Context, n *Node, f func(context.Context, *Root) error) error {
	r, err := g.AttachRoot(ctx, RootConfig{User: "format probe", Node: n, Shared: PermAll})
	if err != nil {
		return err
	}
	return errors.Join(r.Do(ctx, func(ctx context.Context) error { return f(ctx, r) }), r.Detach(ctx))
}

// check tells whether the node may be opened so, and makes it read-only where it must be
// and may be.
func (o *Opening) check(ctx context.Context, d *Driver) error {
	c := o.Config
	switch writable, readable := o.graph.allowed(d.Name); {
	case writable, readable && c.ReadOnly:
	case readable:
		err := refuse(ErrNotSupported, "Driver '%s' can only be used for read-only devices", d.Name)
		if err := o.AutoReadOnly(ctx, err); err != nil {
			return err
		}
	default:
		return refuse(ErrNotSupported, "Driver '%s' is not whitelisted", d.Name)
	}
	return c.check()
}

// check tells whether the options go together.
func (c *Config) check() error {
	switch {
	case c.ForceShare && !c.ReadOnly:
		return errors.New("force-share=on can only be used with read-only images")
	case c.DetectZeroes == DetectZeroesUnmap && !c.Unmap:
		return errors.New("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
	}
	return nil
}

// openChild opens cfg as a child of the node, or takes the file that was opened to probe it.
func (o *Opening) openChild(ctx context.Context, name string, role Role, cfg *Config) (_ *Edge, err error) {
	g, child := o.graph, o.file
	if child == nil || name != "file" {
		if child, err = g.open(ctx, cfg, o.below(role)); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, g.Release(ctx, child)) }()
	}
	if child.ReadOnly() && o.Config.AutoReadOnly && role&RoleCOW == 0 {
		if err := o.AutoReadOnly(ctx, nil); err != nil {
			return nil, err
		}
	}
	e := newEdge(o.node, child, name, role)
	err = g.changeBy(ctx, o.by, func(t *tx) error {
		if cfg.Ref == "" {
			child.heir = heir{o.node, role}
		}
		return t.link(e)
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}

// AllowDrivers bounds which drivers may open nodes (rule G31): those in readWrite, and
// those in readOnly for nodes that are read-only. Without a call all may. It comes
// before the first node.
func (g *Graph) AllowDrivers(readWrite, readOnly []string) error {
	allow := make(map[string]bool)
	for _, list := range [][]string{readOnly, readWrite} {
		for _, name := range list {
			if g.drivers[name] == nil {
				return unknownDriver(name)
			}
			allow[name] = false
		}
	}
	for _, name := range readWrite {
		allow[name] = true
	}
	g.allow = allow
	return nil
}

// allowed tells whether nodes of the driver may be opened, and for writing.
func (g *Graph) allowed(driver string) (writable, readable bool) {
	if g.allow == nil {
		return true, true
	}
	writable, readable = g.allow[driver]
	return writable, readable
}

// An Overlay is a new, empty image in temporary storage.
type Overlay struct {
	Config *Config // opens it; its Children can be added to
	// Storage is closed after the node: nothing is left then.
	Storage io.Closer
}

// TemporaryOverlays says how overlays for snapshot=on are made: of size bytes, to be
// opened in g. It comes before the first node.
func (g *Graph) TemporaryOverlays(create func(ctx context.Context, g *Graph, size int64) (Overlay, error)) {
	g.overlay = create
}

// openSnapshot opens cfg read-only, and a temporary overlay over it (rule G20).
func (g *Graph) openSnapshot(ctx context.Context, cfg *Config) (_ *Node, err error) {
	if g.overlay == nil {
		return nil, refuse(ErrNotSupported, "Could not create temporary overlay: this program has none")
	}
	below := *cfg
	below.Snapshot, below.NodeName, below.ReadOnly, below.DetectZeroes = false, "", true, DetectZeroesOff
	base, err := g.open(ctx, &below, origin{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, g.Release(ctx, base)) }()
	o, err := g.overlay(ctx, g, base.Size())
	if err != nil {
		return nil, fmt.Errorf("Could not create temporary overlay: %w", err)
	}
	top := *o.Config
	top.NodeName, top.ReadOnly, top.Unmap, top.DetectZeroes = cfg.NodeName, cfg.ReadOnly, cfg.Unmap, cfg.DetectZeroes
	top.Cache = CacheMode{NoFlush: true}
	top.Children = maps.Clone(top.Children)
	top.Children["backing"] = &Config{Ref: base.name}
	n, err := g.open(ctx, &top, origin{})
	if err != nil {
		return nil, errors.Join(err, o.Storage.Close())
	}
	n.storage = o.Storage
	return n, nil
}
