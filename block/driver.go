package block

import (
	"context"
	"fmt"
	"sort"
)

// DriverKind says where a driver stands in a graph.
type DriverKind uint8

const (
	Protocol DriverKind = iota // talks to storage; a leaf
	Format                     // interprets the bytes of a child
	Filter                     // passes the requests of a child on, changing how they flow
)

func (k DriverKind) String() string { return [...]string{"protocol", "format", "filter"}[k] }

// A Driver opens nodes of one kind. It is plain data, given to [NewGraph]; there is no registration by import.
type Driver struct {
	Name string // QEMU's name: "file", "host_device", "raw", "qcow2"
	Kind DriverKind
	// Backing tells that nodes can have a backing node, child "backing" in role COW.
	Backing bool
	// NewOptions returns a pointer to the driver's own options with their defaults.
	NewOptions func() any
	// Open opens an instance. It reads o.Config.Options (of NewOptions' type), opens
	// children through o, and has no other effect beyond what it returns. On error
	// everything that was opened through o is closed by the caller.
	Open func(ctx context.Context, o *Opening) (Instance, error)
	// Probe scores the first bytes of an image, 0 (not mine) to 100; formats only. nil: never probed.
	Probe func(head []byte) int
}

// CacheMode says how a node's data relates to the host's page cache.
type CacheMode struct {
	Direct  bool // O_DIRECT: bypass the page cache
	NoFlush bool // flushes are not passed to the disk ("unsafe")
}

// DetectZeroes says what happens to writes of zeroes.
type DetectZeroes uint8

const (
	DetectZeroesOff   DetectZeroes = iota // written as they are
	DetectZeroesOn                        // turned into WriteZeroes
	DetectZeroesUnmap                     // turned into WriteZeroes with MayUnmap; needs Unmap
)

// Config describes a node to open: plain data. The zero value of each field is the default.
type Config struct {
	Driver   string // name of the driver
	NodeName string // "": one is made up (#block123)
	ReadOnly bool
	Cache    CacheMode
	// Unmap passes discards on; else they are dropped and MayUnmap is ignored (discard=unmap|ignore).
	Unmap        bool
	DetectZeroes DetectZeroes
	// ForceShare shares every permission with the other users of the image, other
	// processes too. Only with ReadOnly.
	ForceShare bool
	// NoIO opens to look only: no permissions are taken (probing, image info of a busy disk).
	NoIO bool
	// Probed says that the format was guessed; see rule G8.
	Probed bool
	// Options is what Driver.NewOptions returns, filled in. nil: the defaults.
	Options any
	// Children configures children by name, e.g. "file", "backing". What a driver
	// opens by itself (a backing file named in a header) is overridden by an entry here.
	Children map[string]*Config
	// Ref, instead of all the above, names an existing node.
	Ref string
}

// An Opening is what a driver's Open gets: the node under construction.
type Opening struct {
	// Config is the effective configuration; Options is not nil.
	Config *Config
	// NodeName is the name of the node, made up if none was given.
	NodeName string

	graph *Graph
	node  *Node
}

// Node is the node under construction. Its Instance is not set yet.
func (o *Opening) Node() *Node { return o.node }

// OpenChild opens the child called name in role, from Config.Children[name] or, if
// there is none, from def; nil for both is an error that names the child. It
// inherits what rule G9 says: cache mode and force-share always, read-only except
// for COW children, which are always opened read-only; unmap is on for children.
// The edge holds the permissions of its role from now on, and is closed with the node.
func (o *Opening) OpenChild(ctx context.Context, name string, role Role, def *Config) (*Edge, error) {
	cfg := o.Config.Children[name]
	if cfg == nil {
		cfg = def
	}
	if cfg == nil {
		return nil, fmt.Errorf("%s node '%s': a node or file name must be specified for child %q", o.Config.Driver, o.NodeName, name)
	}
	return o.graph.openChild(ctx, o.node, name, role, cfg)
}

// inherit gives the effective configuration of a child.
func inherit(parent *Config, role Role, child *Config) *Config {
	c := *child
	c.Cache = parent.Cache
	c.ForceShare = c.ForceShare || parent.ForceShare
	c.NoIO = c.NoIO || parent.NoIO
	if role&RoleCOW != 0 {
		c.ReadOnly = true
	} else {
		c.ReadOnly = c.ReadOnly || parent.ReadOnly
	}
	c.Unmap = true
	return &c
}

// Driver returns the registered driver called name, or nil.
func (g *Graph) Driver(name string) *Driver { return g.drivers[name] }

// Drivers lists the registered drivers by name.
func (g *Graph) Drivers() []*Driver {
	var ds []*Driver
	for _, d := range g.drivers {
		ds = append(ds, d)
	}
	sort.Slice(ds, func(i, j int) bool { return ds[i].Name < ds[j].Name })
	return ds
}

// ProbeFormat tells which format the first bytes of an image look like. "raw" is
// the answer for what nothing else claims (rule G8).
func (g *Graph) ProbeFormat(head []byte) string {
	best, score := "raw", 1
	for _, d := range g.Drivers() {
		if d.Probe == nil {
			continue
		}
		if s := d.Probe(head); s > score {
			best, score = d.Name, s
		}
	}
	return best
}
