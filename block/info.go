package block

// ImageInfo is what a driver tells of its image; see [Informer]. The zero value of a
// field says that there is nothing of that kind.
type ImageInfo struct {
	ClusterSize    int64 // bytes
	SubclusterSize int64 // bytes
	VMStateOffset  int64 // where the state of a machine is stored, past the end of the disk; bytes
	Dirty          bool  // the image was not closed
}

// Info describes n's image (rule G24). A filter has that of what it filters.
func (n *Node) Info() ImageInfo {
	n.graph.mu.Lock()
	defer n.graph.mu.Unlock()
	return n.info()
}

// info is Info. Graph.mu is held.
func (n *Node) info() ImageInfo {
	if i, ok := n.inst.(Informer); ok {
		info := i.ImageInfo()
		if info.SubclusterSize == 0 {
			info.SubclusterSize = info.ClusterSize
		}
		return info
	}
	if e := n.filteredEdge(); e != nil {
		return e.Node().info()
	}
	return ImageInfo{}
}

// HasZeroInit tells that n, if it is as it was created, reads as zero everywhere (rule
// G24). One with a backing node never does.
func (n *Node) HasZeroInit() bool {
	if n.Backing() != nil {
		return false
	}
	if z, ok := n.inst.(ZeroIniter); ok {
		return z.HasZeroInit()
	}
	e := n.filtered()
	return e != nil && e.Node().HasZeroInit()
}

// AllocatedSize is the space in bytes that n's data takes where it is stored (rule
// G24): what the driver says, or else the sum over the children that hold its data or
// metadata, so backing files do not count. It fails with [ErrNotSupported] where a
// protocol node does not know.
func (n *Node) AllocatedSize() (int64, error) {
	if a, ok := n.inst.(Allocator); ok {
		size, err := a.AllocatedSize()
		return size, n.fail("allocated size", 0, 0, err)
	}
	if n.driver.Kind == Protocol {
		return 0, n.fail("allocated size", 0, 0, ErrNotSupported)
	}
	var sum int64
	for _, e := range n.Children() {
		if e.role&(RoleData|RoleMetadata|RoleFiltered) == 0 {
			continue
		}
		size, err := e.Node().AllocatedSize()
		if err != nil {
			return 0, err
		}
		sum += size
	}
	return sum, nil
}

// NodeInfo describes an open node, by the names of QEMU's query-named-block-nodes.
type NodeInfo struct {
	NodeName     string       `json:"node-name"`
	Driver       string       `json:"drv"`
	File         string       `json:"file"`
	ReadOnly     bool         `json:"ro"`
	Active       bool         `json:"active"`
	BackingFile  string       `json:"backing_file,omitempty"`
	BackingDepth int          `json:"backing_file_depth"` // images below in the backing chain
	DetectZeroes string       `json:"detect_zeroes"`
	Cache        NodeCache    `json:"cache"`
	Children     []NodeChild  `json:"children"`
	Image        NodeImage    `json:"image"`
	Bitmaps      []BitmapInfo `json:"dirty-bitmaps,omitempty"`
}

// NodeCache says how a node's data is cached.
type NodeCache struct {
	Writeback bool `json:"writeback"` // always
	Direct    bool `json:"direct"`
	NoFlush   bool `json:"no-flush"`
}

// NodeChild names a child.
type NodeChild struct {
	Child    string `json:"child"`
	NodeName string `json:"node-name"`
}

// NodeImage describes what a node shows, by the names of qemu-img info.
type NodeImage struct {
	Filename       string          `json:"filename"`
	Format         string          `json:"format"`
	VirtualSize    int64           `json:"virtual-size"`          // bytes
	ActualSize     *int64          `json:"actual-size,omitempty"` // bytes; nil: not known
	ClusterSize    int64           `json:"cluster-size,omitempty"`
	Dirty          bool            `json:"dirty-flag"`
	BackingFile    string          `json:"backing-filename,omitempty"` // as the header says
	FullBacking    string          `json:"full-backing-filename,omitempty"`
	BackingFormat  string          `json:"backing-filename-format,omitempty"`
	FormatSpecific *FormatSpecific `json:"format-specific,omitempty"`
}

// FormatSpecific is what [Inspector] returns, with the driver's name.
type FormatSpecific struct {
	Type string `json:"type"`
	Data any    `json:"data"`
}

// NamedNodes describes all open nodes, by name.
func (g *Graph) NamedNodes() []NodeInfo {
	list := []NodeInfo{}
	for _, n := range g.Nodes() {
		list = append(list, n.Describe())
	}
	return list
}

// Describe describes the node as it is now.
func (n *Node) Describe() NodeInfo {
	c := n.cfg()
	i := NodeInfo{
		NodeName: n.name, Driver: n.driver.Name, File: n.Filename(), ReadOnly: c.ReadOnly, Active: n.Active(),
		BackingDepth: len(n.Images()) - 1, DetectZeroes: c.DetectZeroes.String(),
		Cache: NodeCache{true, c.Cache.Direct, c.Cache.NoFlush}, Children: []NodeChild{}, Image: n.image(),
	}
	if e := n.Backing(); e != nil {
		i.BackingFile = e.Node().Filename()
	}
	for _, e := range n.Children() {
		i.Children = append(i.Children, NodeChild{e.name, e.Node().name})
	}
	for _, b := range n.Bitmaps() {
		i.Bitmaps = append(i.Bitmaps, b.Info())
	}
	return i
}

func (n *Node) image() NodeImage {
	info := n.Info()
	i := NodeImage{Filename: n.Filename(), Format: n.driver.Name, VirtualSize: n.Size(), ClusterSize: info.ClusterSize, Dirty: info.Dirty}
	if size, err := n.AllocatedSize(); err == nil {
		i.ActualSize = &size
	}
	if b, ok := n.inst.(BackingChanger); ok {
		if i.BackingFile, i.BackingFormat = b.BackingFile(); i.BackingFile != "" {
			if full, err := n.BackingName(i.BackingFile); err == nil {
				i.FullBacking = full
			}
		}
	}
	if s, ok := n.inst.(Inspector); ok {
		i.FormatSpecific = &FormatSpecific{n.driver.Name, s.Inspect()}
	}
	return i
}

// DriverNames lists the names of the drivers of a kind in their order.
func (g *Graph) DriverNames(kind DriverKind) []string {
	names := []string{}
	for _, d := range g.Drivers() {
		if d.Kind == kind {
			names = append(names, d.Name)
		}
	}
	return names
}
