package block

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode"
)

// MarshalJSON implements [json.Marshaler].
func (p PermList) MarshalJSON() ([]byte, error) {
	list := bitNames(uint8(p), permNames[:])
	for i, n := range list {
		list[i] = strings.ReplaceAll(n, " ", "-")
	}
	return json.Marshal(list)
}

// MarshalJSON implements [json.Marshaler]: a list of names.
func (r Role) MarshalJSON() ([]byte, error) { return json.Marshal(bitNames(uint8(r), roleNames[:])) }

func (p PermList) String() string {
	if p == 0 {
		return "nothing"
	}
	return Perm(p).String()
}

// describe tells what a node is doing, for people.
func (n *ViewNode) describe() string {
	var parts []string
	if r := n.RootView; r != nil {
		if r.Device != "" {
			parts = append(parts, "id "+r.Device)
		}
		parts = append(parts, fmt.Sprintf("%d in flight", r.InFlight))
	} else {
		access := "read-write"
		if n.ReadOnly {
			access = "read-only"
		}
		if !n.Active {
			access += ", inactive"
		}
		parts = append(parts, n.Driver, exactSize(n.Size), access)
		if !strings.HasPrefix(n.Filename, "json:") { // too long, and the tree says it all
			parts = append(parts, n.Filename)
		}
	}
	if n.Drained > 0 {
		parts = append(parts, fmt.Sprintf("drained %d", n.Drained))
	}
	return strings.Join(parts, ", ")
}

// exactSize writes a number of bytes in the largest unit that needs no fraction.
func exactSize(n int64) string {
	unit := -1
	for n != 0 && n%1024 == 0 && unit+1 < len(sizeSuffixes) {
		n /= 1024
		unit++
	}
	if unit < 0 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%d %ciB", n, sizeSuffixes[unit])
}

// WriteText writes the graph as trees, one from each root and each node without a
// parent. What is below a node that is in several places is written in the first only.
func (v *View) WriteText(w io.Writer) error {
	t := textView{View: v, seen: make(map[int]bool), below: make(map[int][]ViewEdge)}
	hasParent := make(map[int]bool)
	for _, e := range v.Edges {
		t.below[e.Parent] = append(t.below[e.Parent], e)
		hasParent[e.Child] = true
	}
	for i := range v.Nodes {
		if n := &v.Nodes[i]; !hasParent[n.ID] {
			t.node(n, "")
		}
	}
	_, err := io.WriteString(w, t.String())
	return err
}

// oneLine makes text that others chose harmless for a terminal.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

type textView struct {
	*View
	strings.Builder
	seen  map[int]bool
	below map[int][]ViewEdge
}

func (t *textView) node(n *ViewNode, indent string) {
	if t.seen[n.ID] {
		fmt.Fprintf(t, "%s%s: see above\n", indent, oneLine(n.Name))
		return
	}
	t.seen[n.ID] = true
	fmt.Fprintf(t, "%s%s: %s\n", indent, oneLine(n.Name), oneLine(n.describe()))
	for i, e := range t.below[n.ID] {
		tee, bar := "├─ ", "│  "
		if i == len(t.below[n.ID])-1 {
			tee, bar = "└─ ", "   "
		}
		frozen := ""
		if e.Frozen {
			frozen = ", frozen"
		}
		fmt.Fprintf(t, "%s%s%s (%s%s): needs %s; shares %s\n", indent, tee, e.Name, e.Role, frozen, e.Perm, e.Shared)
		t.node(&t.Nodes[e.Child-1], indent+bar)
	}
}

// WriteDot writes the graph for Graphviz (dot -Tsvg).
func (v *View) WriteDot(w io.Writer) error {
	var b strings.Builder
	b.WriteString("digraph block {\n\tnode [fontname=\"monospace\"]\n\tedge [fontname=\"monospace\", fontsize=10]\n")
	for i := range v.Nodes {
		n := &v.Nodes[i]
		shape, lines := "box", []string{n.Name, n.describe()}
		if n.RootView != nil {
			shape = "ellipse"
		}
		fmt.Fprintf(&b, "\tn%d [shape=%s, label=%s]\n", n.ID, shape, dotLabel(lines...))
	}
	for _, e := range v.Edges {
		fmt.Fprintf(&b, "\tn%d -> n%d [label=%s]\n", e.Parent, e.Child,
			dotLabel(e.Name, e.Role.String(), "needs "+e.Perm.String(), "shares "+e.Shared.String()))
	}
	b.WriteString("}\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// dotLabel quotes lines for Graphviz.
func dotLabel(lines ...string) string {
	for i, l := range lines {
		lines[i] = strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(oneLine(l))
	}
	return `"` + strings.Join(lines, `\n`) + `"`
}

// WriteJSON writes the graph as one object.
func (v *View) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "    ")
	return e.Encode(v)
}
