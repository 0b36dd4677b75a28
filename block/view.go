package block

import (
	"cmp"
	"slices"
)

// A View is a graph as it was at one moment. Its order depends on names only. Written
// as JSON it has what QEMU's x-debug-query-block-graph has, and more.
type View struct {
	Nodes []ViewNode `json:"nodes"` // roots by user, then nodes by name
	Edges []ViewEdge `json:"edges"` // by parent; those of a node in the order of its children
}

// A ViewNode is a root or a node.
type ViewNode struct {
	ID   int    `json:"id"`   // 1 is the first
	Type string `json:"type"` // "block-backend" for a root, "block-driver" for a node
	Name string `json:"name"` // of a root: who uses it
	// Drained is in how many drained sections it is.
	Drained int `json:"drained"`

	*RootView
	*NodeView
}

// A RootView is what a root has beyond its name.
type RootView struct {
	Device   string `json:"device,omitempty"`
	InFlight int64  `json:"in-flight"` // requests admitted and not ended
}

// A NodeView is what a node has beyond its name.
type NodeView struct {
	Driver     string `json:"driver"`
	Filename   string `json:"filename"`
	Size       int64  `json:"size"` // bytes
	ReadOnly   bool   `json:"read-only"`
	Active     bool   `json:"active"`
	References int    `json:"references"`
}

// A ViewEdge joins a parent to a child.
type ViewEdge struct {
	Parent int      `json:"parent"` // ID
	Child  int      `json:"child"`  // ID
	Name   string   `json:"name"`
	Role   Role     `json:"role"`
	Perm   PermList `json:"perm"`        // held by the parent
	Shared PermList `json:"shared-perm"` // that others may hold
	Frozen bool     `json:"frozen,omitempty"`
}

// A PermList is written to JSON as a list of QEMU's names.
type PermList Perm

// View describes the graph as it is now.
func (g *Graph) View() *View {
	g.mu.Lock()
	defer g.mu.Unlock()
	v := new(View)
	var nodes []*Node
	var roots []*Root
	for _, n := range g.nodes {
		if n.inst == nil || n.refs <= 0 {
			continue
		}
		nodes = append(nodes, n)
		for _, e := range n.parents {
			if e.root != nil {
				roots = append(roots, e.root)
			}
		}
	}
	slices.SortFunc(nodes, func(a, b *Node) int { return cmp.Compare(a.name, b.name) })
	slices.SortFunc(roots, func(a, b *Root) int {
		return cmp.Or(cmp.Compare(a.user, b.user), cmp.Compare(a.Node().name, b.Node().name))
	})
	ids := make(map[*Node]int)
	for i, n := range nodes {
		ids[n] = len(roots) + i + 1
	}
	edge := func(parent int, e *Edge) {
		if child := ids[e.Node()]; child != 0 { // else it is being closed
			v.Edges = append(v.Edges, ViewEdge{parent, child, e.name, e.role, PermList(e.perm.load()), PermList(e.shared), e.frozen > 0})
		}
	}
	for i, r := range roots {
		v.Nodes = append(v.Nodes, ViewNode{ID: i + 1, Type: "block-backend", Name: r.user, Drained: r.quiesce,
			RootView: &RootView{Device: r.id, InFlight: r.InFlight()}})
		edge(i+1, &r.edge)
	}
	names := make(naming)
	for _, n := range nodes {
		v.Nodes = append(v.Nodes, ViewNode{ID: ids[n], Type: "block-driver", Name: n.name, Drained: n.quiesce,
			NodeView: &NodeView{Driver: n.driver.Name, Filename: names.filename(n), Size: n.inst.Size(), ReadOnly: n.cfg().ReadOnly,
				Active: n.Active(), References: n.refs}})
		for _, e := range n.children {
			edge(ids[n], e)
		}
	}
	return v
}
