package block_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"pgregory.net/rapid"
)

// A permModel is a brute-force model of the permission rules G11 and G13 over a graph
// with shared backing. It knows nothing of transactions: it computes everything anew.
type permModel struct {
	nodes []*modelNode // children before parents
	edges []*modelEdge // of nodes and roots that are there
}

type modelNode struct {
	name                       string
	node                       *block.Node
	readOnly, noIO, forceShare bool
}

type modelEdge struct {
	parent       *modelNode // nil: a root
	root         *block.Root
	name         string
	user         string
	child        *modelNode
	role         block.Role
	perm, shared block.Perm // of a root; of others as computed
}

func (m *permModel) into(n *modelNode) []*modelEdge {
	return slices.DeleteFunc(slices.Clone(m.edges), func(e *modelEdge) bool { return e.child != n })
}

func (m *permModel) outOf(n *modelNode) []*modelEdge {
	return slices.DeleteFunc(slices.Clone(m.edges), func(e *modelEdge) bool { return e.parent != n })
}

// below lists n and what is below it.
func (m *permModel) below(n *modelNode) []*modelNode {
	list := []*modelNode{n}
	for i := 0; i < len(list); i++ {
		for _, e := range m.outOf(list[i]) {
			list = append(list, e.child)
		}
	}
	return list
}

// order lists the nodes, parents before children, whatever links they have.
func (m *permModel) order() []*modelNode {
	var list []*modelNode
	left := slices.Clone(m.nodes)
	for len(left) > 0 {
		i := slices.IndexFunc(left, func(n *modelNode) bool {
			return !slices.ContainsFunc(m.into(n), func(e *modelEdge) bool { return e.parent != nil && slices.Contains(left, e.parent) })
		})
		list = append(list, left[i])
		left = slices.Delete(left, i, i+1)
	}
	return list
}

// compute gives each edge its permissions, and says whether that is allowed.
func (m *permModel) compute() error {
	for _, n := range m.order() {
		held, shared := block.Perm(0), all
		for _, a := range m.into(n) {
			held |= a.perm
			shared &= a.shared
			for _, b := range m.into(n) {
				for _, p := range []block.Perm{rd, wr, wu, rs} {
					if a != b && a.perm&p != 0 && b.shared&p == 0 {
						return fmt.Errorf("%s needs %s of %s, %s does not share it", a.user, p, n.name, b.user)
					}
				}
			}
		}
		if n.readOnly && (held&wr != 0 || held&wu != 0) {
			return fmt.Errorf("%s is read-only", n.name)
		}
		for _, e := range m.outOf(n) {
			e.perm, e.shared = modelRule(e, held, shared)
		}
	}
	return nil
}

// modelRule is rule G13, one permission at a time.
func modelRule(e *modelEdge, held, shared block.Perm) (block.Perm, block.Perm) {
	isData, isMeta := e.role&block.RoleData != 0, e.role&block.RoleMetadata != 0
	need := map[block.Perm]bool{}
	share := map[block.Perm]bool{}
	switch {
	case e.role&block.RoleFiltered != 0:
		for _, p := range []block.Perm{rd, wr, wu, rs} {
			need[p], share[p] = held&p != 0, shared&p != 0
		}
	case e.role&block.RoleCOW != 0:
		need[rd] = held&rd != 0
		share[rd], share[wu] = true, true
		share[wr] = shared&wr != 0
		share[rs] = share[wr]
	default:
		need[rd] = held&rd != 0 || isMeta && !e.parent.noIO
		need[wu] = held&wu != 0
		need[wr] = held&wr != 0 || isMeta && !e.parent.readOnly || isData && need[wu]
		need[rs] = held&rs != 0 || isMeta && !e.parent.readOnly || isData && need[wr]
		share[rd], share[wu] = shared&rd != 0, shared&wu != 0
		share[wr] = shared&wr != 0 && !isMeta
		share[rs] = false
		if !isData && !isMeta {
			share[rs] = shared&rs != 0
		}
	}
	var n, s block.Perm
	for _, p := range []block.Perm{rd, wr, wu, rs} {
		if need[p] && !e.parent.noIO {
			n |= p
		}
		if share[p] || e.child.forceShare {
			s |= p
		}
	}
	return n, s
}

// agree compares the graph with the model.
func (m *permModel) agree(t *rapid.T, g *block.Graph) {
	t.Helper()
	count := 0
	for _, n := range m.nodes {
		for _, e := range m.outOf(n) {
			got := n.node.Child(e.name)
			if got == nil || got.Node() != e.child.node || got.Perm() != e.perm || got.Shared() != e.shared {
				t.Fatalf("child '%s' of '%s' should be '%s' with %s / %s:\n%s", e.name, n.name, e.child.name, e.perm, e.shared, dump(g))
			}
			count++
		}
		count -= len(n.node.Children())
	}
	if count != 0 {
		t.Fatalf("the graph has %d edges more than the model:\n%s", -count, dump(g))
	}
	verify(t, g)
}

// tryout runs f, which changes the graph, after change has changed the model: both must
// agree on whether that is allowed, and a refusal leaves both as they were.
func (m *permModel) tryout(t *rapid.T, g *block.Graph, what string, change func(), f func() error) {
	t.Helper()
	type saved struct {
		e     *modelEdge
		value modelEdge
	}
	before := dump(g)
	nodes, edges := slices.Clone(m.nodes), slices.Clone(m.edges)
	var old []saved
	for _, e := range m.edges {
		old = append(old, saved{e, *e})
	}
	change()
	want := m.compute()
	got := f()
	if (want == nil) != (got == nil) {
		t.Fatalf("%s: the graph says %v, the model %v\n%s", what, got, want, dump(g))
	}
	if want != nil {
		m.nodes, m.edges = nodes, edges
		for _, s := range old {
			*s.e = s.value
		}
		if after := dump(g); after != before {
			t.Fatalf("%s was refused (%v), and the graph is\n%s\nbefore:\n%s", what, got, after, before)
		}
	}
	m.agree(t, g)
}

var modelPerms = rapid.Map(rapid.IntRange(0, int(all)), func(i int) block.Perm { return block.Perm(i) })

// kids draws the children of a node: references to nodes that are there.
func (m *permModel) kids(t *rapid.T, n *modelNode) (list []*modelEdge) {
	add := func(name string, role block.Role) {
		if len(m.nodes) > 0 {
			list = append(list, &modelEdge{parent: n, name: name, user: "node " + n.name, role: role, child: rapid.SampledFrom(m.nodes).Draw(t, name)})
		}
	}
	switch rapid.IntRange(0, 5).Draw(t, "kind") {
	case 0: // a leaf
	case 1:
		add("file", block.RoleFiltered|block.RolePrimary)
	case 2:
		add("file", block.RoleImage)
		add("backing", block.RoleCOW)
	case 3:
		add("children.0", block.RoleData)
		add("children.1", block.RoleData)
	case 4:
		add("file", block.RoleMetadata|block.RolePrimary)
		add("data-file", block.RoleData)
		add("backing", block.RoleCOW)
	case 5:
		add("backing", block.RoleCOW)
	}
	return list
}

func (m *permModel) open(t *rapid.T, g *block.Graph, i int) {
	n := &modelNode{name: fmt.Sprintf("n%d", i)}
	n.readOnly = rapid.Bool().Draw(t, "read-only")
	n.noIO = rapid.IntRange(0, 5).Draw(t, "no I/O") == 0
	n.forceShare = n.readOnly && rapid.IntRange(0, 3).Draw(t, "force-share") == 0
	kids := m.kids(t, n)
	var args []any
	for _, e := range kids {
		args = append(args, kid{e.name, e.role}, ref(e.child.name))
	}
	cfg := node(n.name, new(events), args...)
	cfg.ReadOnly, cfg.NoIO, cfg.ForceShare = n.readOnly, n.noIO, n.forceShare
	m.tryout(t, g, "open of "+n.name, func() {
		m.nodes = append(m.nodes, n)
		m.edges = append(m.edges, kids...)
	}, func() (err error) {
		n.node, err = g.Open(ctx, cfg)
		return err
	})
}

func (m *permModel) drop(e *modelEdge) {
	m.edges = slices.DeleteFunc(m.edges, func(o *modelEdge) bool { return o == e })
}

// close releases the nodes that nobody uses, from n down.
func (m *permModel) close(t *rapid.T, g *block.Graph, n *modelNode) {
	m.tryout(t, g, "release of "+n.name, func() {
		for _, e := range m.outOf(n) {
			m.drop(e)
		}
		m.nodes = slices.DeleteFunc(m.nodes, func(o *modelNode) bool { return o == n })
	}, func() error { return g.Release(ctx, n.node) })
}

func (m *permModel) attach(t *rapid.T, g *block.Graph, i int) {
	e := &modelEdge{name: "root", user: fmt.Sprintf("user%d", i), child: rapid.SampledFrom(m.nodes).Draw(t, "node"),
		perm: modelPerms.Draw(t, "perm"), shared: modelPerms.Draw(t, "shared")}
	m.tryout(t, g, "attach to "+e.child.name, func() { m.edges = append(m.edges, e) }, func() (err error) {
		e.root, err = g.AttachRoot(ctx, block.RootConfig{User: e.user, Node: e.child.node, Perm: e.perm, Shared: e.shared})
		return err
	})
}

func (m *permModel) detach(t *rapid.T, g *block.Graph, e *modelEdge) {
	m.tryout(t, g, "detach of "+e.user, func() { m.drop(e) }, func() error { return e.root.Detach(ctx) })
}

func (m *permModel) roots() []*modelEdge {
	return slices.DeleteFunc(slices.Clone(m.edges), func(e *modelEdge) bool { return e.root == nil })
}

// replace is rule G17.
func (m *permModel) replace(t *rapid.T, g *block.Graph) {
	from, to := rapid.SampledFrom(m.nodes).Draw(t, "from"), rapid.SampledFrom(m.nodes).Draw(t, "to")
	if len(m.into(from)) == 0 || slices.ContainsFunc(m.into(from), func(e *modelEdge) bool { return e.role == block.RoleCOW && e.parent != nil }) {
		return // nothing to do, or refused: it is used as backing hd
	}
	inside := m.below(to)
	move := slices.DeleteFunc(m.into(from), func(e *modelEdge) bool { return e.parent != nil && slices.Contains(inside, e.parent) })
	m.tryout(t, g, "replace of "+from.name+" by "+to.name, func() {
		for _, e := range move {
			e.child = to
		}
	}, func() error { return g.Replace(ctx, from.node, to.node) })
}

func TestG11PermissionsAgreeWithABruteForceModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := newGraph(t)
		m := new(permModel)
		for i := range rapid.IntRange(2, 40).Draw(t, "steps") {
			what := rapid.IntRange(0, 9).Draw(t, "step")
			switch {
			case len(m.nodes) < 3 || what < 3 && len(m.nodes) < 9:
				m.open(t, g, i)
			case what < 6:
				m.attach(t, g, i)
			case what < 7 && len(m.roots()) > 0:
				m.detach(t, g, rapid.SampledFrom(m.roots()).Draw(t, "root"))
			case what < 8:
				if n := rapid.SampledFrom(m.nodes).Draw(t, "node"); len(m.into(n)) == 0 {
					m.close(t, g, n)
				}
			default:
				m.replace(t, g)
			}
		}
		for _, e := range m.roots() {
			m.detach(t, g, e)
		}
		for len(m.nodes) > 0 {
			m.close(t, g, m.order()[0])
		}
	})
}
