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
		return i.ImageInfo()
	}
	if e := n.filteredEdge(); e != nil {
		return e.Node().info()
	}
	return ImageInfo{}
}
