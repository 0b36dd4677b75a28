package block

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"strings"
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
	// Children names the children that options can describe, but for "backing"; one
	// that ends in ".*" stands for a list ("children.*": children.0, children.1, ...).
	// nil: "file" for formats and filters, none for protocols.
	Children []string
	// Mutable names the driver's own options that a reopen may change, see [Reopener].
	Mutable []string
	// Needs, if not nil, tells which permissions a node needs of its children, and does
	// not share, for itself: in addition to what its users need and do not share, from
	// which rule G13 computes those of the children. It is called with the graph's lock held.
	Needs func(cfg *Config) (perm, unshared Perm)
	// NewOptions returns a pointer to the driver's own options with their defaults: a
	// struct with tags for those that text can set, see [Options.Decode].
	NewOptions func() any
	// Open opens an instance. It reads o.Config.Options (of NewOptions' type), opens
	// children through o, and has no other effect beyond what it returns. On error
	// everything that was opened through o is closed by the caller.
	Open func(ctx context.Context, o *Opening) (Instance, error)
	// Probe scores the first bytes of an image, 0 (not mine) to 100; formats only. nil: never probed.
	Probe func(head []byte) int
	// ProbeName scores a file name, 0 (not mine) to 100; protocols only. It goes before
	// a protocol that the name states (rule G7). nil: never.
	ProbeName func(name string) int
}

// CacheMode says how a node's data relates to the host's page cache.
type CacheMode struct {
	Direct  bool `option:"cache.direct"`   // O_DIRECT: bypass the page cache
	NoFlush bool `option:"cache.no-flush"` // flushes are not passed to the disk ("unsafe")
}

// DetectZeroes says what happens to writes of zeroes.
type DetectZeroes uint8

const (
	DetectZeroesOff   DetectZeroes = iota // written as they are
	DetectZeroesOn                        // turned into WriteZeroes
	DetectZeroesUnmap                     // turned into WriteZeroes with MayUnmap; needs Unmap
)

var detectZeroesNames = [...]string{"off", "on", "unmap"}

func (d DetectZeroes) String() string { return detectZeroesNames[d] }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (d *DetectZeroes) UnmarshalText(text []byte) error {
	i := slices.Index(detectZeroesNames[:], string(text))
	if i < 0 {
		return fmt.Errorf("'%s' is not one of %s", text, strings.Join(detectZeroesNames[:], ", "))
	}
	*d = DetectZeroes(i)
	return nil
}

// Given is a set of those options that a child inherits where they are not given
// (rule G9).
type Given uint8

const (
	GivenCacheDirect Given = 1 << iota
	GivenCacheNoFlush
	GivenReadOnly
	GivenAutoReadOnly
	GivenForceShare
	GivenDiscard
)

// Config describes a node to open: plain data. The zero value of each field is the
// default. [Graph.Configure] makes one of text.
type Config struct {
	Driver string // name of the driver; "": found out by Filename, or else by probing child "file" (rules G7, G8)
	// Filename is the name of an image or device, relative to the working directory or
	// absolute, or with a protocol ("file:NAME"). For a protocol node it is the option of
	// that name, for others it describes child "file".
	Filename string
	NodeName string // "": one is made up (#block123)
	ReadOnly bool
	// AutoReadOnly opens read-only what cannot be written.
	AutoReadOnly bool
	Cache        CacheMode
	// Unmap passes discards on; else they are dropped and MayUnmap is ignored (discard=unmap|ignore).
	Unmap        bool
	DetectZeroes DetectZeroes
	// ForceShare shares every permission with the other users of the image, other
	// processes too. Only with ReadOnly.
	ForceShare bool
	// NoIO opens to look only: the node takes no permissions on its children, and a
	// protocol node no lock (probing, image info). Children that hold metadata are
	// opened as if it were not set: they share what [Role] says, see ForceShare.
	NoIO bool
	// Inactive opens the node, and the children that it opens itself, inactive
	// (active=off): without locks, permissions and caches. See [Graph.SetActive].
	Inactive bool
	// Given says which fields count although they are zero: where a field is zero and
	// not given, a child inherits it from its parent.
	Given Given
	// NoBacking opens no backing node, whatever the image says (backing: null).
	NoBacking bool
	// Snapshot puts a temporary overlay over the node, which takes its name; what is
	// written is lost at the end (rule G20). Not for children.
	Snapshot bool
	// Probed says that the format was guessed; see rule G8.
	Probed bool
	// Options is what Driver.NewOptions returns, filled in. nil: the defaults.
	Options any
	// Children configures children by name, e.g. "file", "backing". What a driver
	// opens by itself (a backing file named in a header) is overridden by an entry here.
	Children map[string]*Config
	// Ref, instead of all the above, names an existing node.
	Ref string

	// unread are the driver's options by name, until it is known which driver that is.
	unread *Options
}

// An Opening is what a driver's Open gets: the node under construction.
type Opening struct {
	// Config is the effective configuration; Options is not nil.
	Config *Config
	// NodeName is the name of the node, made up if none was given.
	NodeName string

	graph    *Graph
	node     *Node
	protocol bool   // its children are not probed by default
	file     *Node  // child "file", if it was opened to probe it
	by       *claim // on the node, if that is open already
}

// Node is the node under construction. Its Instance is not set yet.
func (o *Opening) Node() *Node { return o.node }

// OpenChild opens the child called name in role, from Config.Children[name] or, if
// there is none, from def; nil for both is an error that names the child. It inherits
// what rule G9 says. The edge holds the permissions of its role from now on, and is
// closed with the node.
//
// If the child is read-only although the node was to be writable, and the node may
// fall back (auto-read-only=on), the node is read-only from then on: see Config.ReadOnly.
func (o *Opening) OpenChild(ctx context.Context, name string, role Role, def *Config) (*Edge, error) {
	cfg := o.Config.Children[name]
	if cfg == nil {
		cfg = def
	}
	if cfg == nil {
		return nil, refuse(ErrInvalid, "A block device must be specified for \"%s\"", name)
	}
	return o.openChild(ctx, name, role, cfg)
}

// AutoReadOnly makes the node read-only, because it cannot be written for the reason
// that cause gives, nil for none in particular. Where auto-read-only=on does not allow
// that it returns cause.
func (o *Opening) AutoReadOnly(ctx context.Context, cause error) error {
	switch {
	case o.Config.ReadOnly:
		return nil
	case o.Config.AutoReadOnly:
		return o.graph.change(ctx, func(t *tx) error {
			o.Config.ReadOnly = true
			t.recheck(o.node) // less is needed of the children now
			return nil
		})
	case cause == nil:
		return refuse(ErrReadOnly, "Image is read-only")
	}
	return cause
}

// inherit gives the effective configuration of a child (rule G9).
func inherit(parent *Config, role Role, child *Config) *Config {
	c := *child
	from := func(field *bool, given Given, value bool) {
		if c.Given&given == 0 {
			*field = *field || value
		}
	}
	from(&c.Cache.Direct, GivenCacheDirect, parent.Cache.Direct)
	from(&c.Cache.NoFlush, GivenCacheNoFlush, parent.Cache.NoFlush)
	from(&c.ForceShare, GivenForceShare, parent.ForceShare)
	from(&c.Unmap, GivenDiscard, true)
	if role&RoleCOW != 0 {
		from(&c.ReadOnly, GivenReadOnly, true)
	} else {
		from(&c.ReadOnly, GivenReadOnly, parent.ReadOnly)
		from(&c.AutoReadOnly, GivenAutoReadOnly, parent.AutoReadOnly)
	}
	c.Inactive = c.Inactive || parent.Inactive
	if role&RoleMetadata == 0 {
		c.NoIO = c.NoIO || parent.NoIO
	}
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
