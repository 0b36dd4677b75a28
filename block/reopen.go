package block

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
)

// A Reopener is a driver whose nodes can get other options while they are open (rule
// G21). Which of the driver's own options may change is in [Driver.Mutable]; all others
// are known to be the same, and need no look.
type Reopener interface {
	// PrepareReopen checks that the node can become what r says, and gets ready what
	// may fail. Nothing is in flight; all data written so far was flushed. The node
	// holds its old permissions and links and must go on as it is for now: a flush is
	// fine, a change of behaviour is not. Children were prepared before their parents.
	// A node that is inactive has nothing open, and only takes note.
	PrepareReopen(ctx context.Context, r *Reopening) (Switch, error)
}

// A Switch is a reopen that was prepared. Apply may be called, once; then exactly one
// of Commit and Abort is. All calls come with nothing in flight; but Size, Limits and
// what else tells of the node may be called in parallel.
type Switch interface {
	// Apply makes the node what was prepared. Its links are the new ones, and it has
	// the permissions of before and of afterwards together. Children come before
	// parents. After an error, of this or of another node, Abort follows.
	Apply(ctx context.Context) error
	// Commit lets go of what only the old state needed. It cannot fail.
	Commit()
	// Abort makes the node again what it was, whether or not Apply was called. Its links
	// and permissions may still be as for Apply. It cannot fail.
	Abort()
}

// NoSwitch is the [Switch] of a node that has nothing to do.
type NoSwitch struct{}

func (NoSwitch) Apply(context.Context) error { return nil }
func (NoSwitch) Commit()                     {}
func (NoSwitch) Abort()                      {}

// A Reopening is what a node is to become.
type Reopening struct {
	// Node is the node. Its Config is the old one until the end.
	Node *Node
	// Config is the new effective configuration; Options are of the driver's type.
	Config *Config

	relinked []string
}

// Relinked tells whether another node becomes the child called name.
func (r *Reopening) Relinked(name string) bool { return slices.Contains(r.relinked, name) }

// AutoReadOnly makes the node read-only instead, because it cannot be written for the
// reason that cause gives. Where auto-read-only=on does not allow that it returns
// cause. It is for PrepareReopen.
func (r *Reopening) AutoReadOnly(cause error) error {
	if r.Config.AutoReadOnly {
		r.Config.ReadOnly = true
		return nil
	}
	return cause
}

// CannotChange refuses a reopen because of an option that stays as it was opened.
func CannotChange(option string) error {
	return refuse(ErrInvalid, "Cannot change the option '%s'", option)
}

// A ReopenRequest says what a node is to be. It is a description in full, as for
// [Graph.Open]: an option that it does not mention goes back to its default. The
// driver and the node name stay, and need not be given; so does whether the node is
// active.
//
// A child that it does not mention stays, but for a backing node, which must be
// mentioned: Children["backing"] or NoBacking. A child that the node has opened itself
// follows with the options that it inherits; a description of it in Children reopens it
// too. Ref in Children["file"] or Children["backing"] makes another node that child.
type ReopenRequest struct {
	Node   *Node
	Config *Config
	// Force makes the node read-only even while roots above hold permission to write.
	// They lose it, and their writes fail with EPERM, until the node is reopened
	// read-write.
	Force bool
}

// Reopen gives nodes other options while they are in use (rule G21): all of them, or
// on an error none. It drains the nodes, so clients notice a pause only; ctx bounds the
// wait for that, and is passed to the drivers. The nodes must stay referenced by the caller.
func (g *Graph) Reopen(ctx context.Context, requests ...ReopenRequest) error {
	r := &reopen{graph: g}
	var err error
	// What is below is claimed as well: its permissions may have to go back.
	c, busy := g.claimWhenFree(ctx, func() []*Node {
		r.nodes, r.links = nil, nil
		err = r.plan(requests)
		return topological(r.concerned()...)
	})
	if busy != nil {
		return busy
	}
	if r.claim = c; err == nil {
		err = g.drained(ctx, func() error { return r.run(ctx) }, r.concerned()...)
	}
	return g.end(c, err)
}

// A reopen is one call of [Graph.Reopen].
type reopen struct {
	graph  *Graph
	claim  *claim
	nodes  []*reopened // parents before children
	links  []relink
	denied []denial // what was done
}

// A reopened node is one whose options change.
type reopened struct {
	node      *Node
	explicit  *Config
	effective *Config
	old       *Config // effective
	asked     bool    // for itself; else it inherits something
	force     bool
	sw        Switch // nil: not prepared yet
}

// A relink is a child that becomes another one.
type relink struct {
	edge *Edge // as it is, or new
	from *Node // nil: there was none
	to   *Node // nil: there will be none
}

// A denial is a root that may not write any more, or may again.
type denial struct {
	root *Root
	was  *Node
}

// concerned lists the nodes that change, or have another parent.
func (r *reopen) concerned() []*Node {
	var list []*Node
	for _, p := range r.nodes {
		list = append(list, p.node)
	}
	for _, l := range r.links {
		for _, n := range []*Node{l.from, l.to} {
			if n != nil && !slices.Contains(list, n) {
				list = append(list, n)
			}
		}
	}
	return list
}

// plan finds out what the requests come to. Graph.mu is held.
func (r *reopen) plan(requests []ReopenRequest) error {
	asked := make(map[*Node]*reopened)
	var nodes []*Node
	for _, q := range requests {
		if err := r.ask(asked, q.Node, q.Config, q.Force); err != nil {
			return err
		}
		nodes = append(nodes, q.Node)
	}
	planned := make(map[*Node]*Config) // effective
	for _, n := range topological(nodes...) {
		p := asked[n]
		above := n.inheritsFrom()
		switch {
		case p != nil:
		case above == nil || planned[above] == nil:
			continue
		default:
			p = &reopened{node: n, explicit: n.explicit.Load(), old: n.cfg()}
		}
		eff := *p.explicit
		if above != nil {
			parent := planned[above]
			if parent == nil {
				parent = above.cfg()
			}
			eff = *inherit(parent, n.heir.role, p.explicit)
		}
		eff.Inactive, eff.NoIO, eff.Probed = p.old.Inactive, p.old.NoIO, p.old.Probed
		p.effective = &eff
		if !p.asked && p.sameOptions() {
			continue
		}
		if err := p.check(); err != nil {
			return err
		}
		planned[n] = &eff
		r.nodes = append(r.nodes, p)
	}
	return nil
}

// inheritsFrom is the parent that has opened the node as its child, if it still has it.
func (n *Node) inheritsFrom() *Node {
	for _, e := range n.parents {
		if e.parent != nil && e.parent == n.heir.parent {
			return e.parent
		}
	}
	return nil
}

// ask notes what n is to be, and what that says about its children. Graph.mu is held.
func (r *reopen) ask(asked map[*Node]*reopened, n *Node, cfg *Config, force bool) error {
	if asked[n] != nil {
		return refuse(ErrInvalid, "Node '%s' is named twice", n.name)
	}
	was := n.explicit.Load()
	c := *cfg
	switch {
	case c.Ref != "":
		return errReference
	case c.Driver != "" && c.Driver != was.Driver:
		return CannotChange("driver")
	case c.NodeName != "" && c.NodeName != n.name:
		return CannotChange("node-name")
	case c.Snapshot:
		return CannotChange("snapshot")
	}
	c.Driver, c.NodeName = was.Driver, was.NodeName
	if name := c.Filename; name != "" {
		c.Filename = ""
		if err := c.setFilename(n.driver, name); err != nil {
			return err
		}
	}
	if c.Options == nil {
		var err error
		if c.Options, err = n.driver.decode(c.unread.clone()); err != nil {
			return err
		}
	}
	c.unread = nil
	asked[n] = &reopened{node: n, explicit: &c, old: n.cfg(), asked: true, force: force}
	if err := r.askBacking(n, &c); err != nil {
		return err
	}
	for name, child := range c.Children {
		if err := r.askChild(asked, n, name, child, force); err != nil {
			return err
		}
	}
	c.Children = maps.Clone(c.Children)
	for name, child := range was.Children {
		if name != "backing" && c.Children[name] == nil {
			if c.Children == nil {
				c.Children = make(map[string]*Config)
			}
			c.Children[name] = child
		}
	}
	return nil
}

// askBacking sees to it that the backing node is not forgotten, and to its absence.
func (r *reopen) askBacking(n *Node, c *Config) error {
	e := n.Backing()
	named := ""
	if b, ok := n.inst.(BackingChanger); ok {
		named, _ = b.BackingFile()
	}
	switch {
	case c.Children["backing"] != nil:
	case c.NoBacking && e != nil:
		r.links = append(r.links, relink{edge: e, from: e.Node()})
	case !c.NoBacking && n.driver.Backing && (e != nil || named != ""):
		return refuse(ErrInvalid, "backing is missing for '%s'", n.name)
	}
	return nil
}

// askChild notes what child name of n is to be.
func (r *reopen) askChild(asked map[*Node]*reopened, n *Node, name string, c *Config, force bool) error {
	var e *Edge
	for _, o := range n.children {
		if o.name == name {
			e = o
		}
	}
	if c.Ref == "" {
		if e == nil || e.Node().inheritsFrom() != n {
			return CannotChange(name)
		}
		return r.ask(asked, e.Node(), c, force)
	}
	to, err := r.graph.referred(c)
	switch {
	case err != nil:
		return err
	case e != nil && e.Node() == to:
	case e == nil && name == "backing" && n.driver.Backing:
		r.links = append(r.links, relink{edge: newEdge(n, to, name, RoleCOW), to: to})
	case e == nil || name != "file" && name != "backing":
		return CannotChange(name)
	default:
		r.links = append(r.links, relink{edge: e, from: e.Node(), to: to})
	}
	return nil
}

// sameOptions tells that the node stays what it is.
func (p *reopened) sameOptions() bool {
	a, b := p.effective, p.old
	return a.ReadOnly == b.ReadOnly && a.AutoReadOnly == b.AutoReadOnly && a.Cache == b.Cache &&
		a.Unmap == b.Unmap && a.DetectZeroes == b.DetectZeroes && a.ForceShare == b.ForceShare
}

// check tells whether the node can be reopened with these options at all.
func (p *reopened) check() error {
	n, c := p.node, p.effective
	if err := n.driver.mayChange(p.old.Options, c.Options); err != nil {
		return err
	}
	if c.ForceShare != p.old.ForceShare {
		return CannotChange("force-share")
	}
	if _, ok := n.inst.(Reopener); !ok {
		return refuse(ErrNotSupported, "Block format '%s' used by node '%s' does not support reopening files", n.driver.Name, n.name)
	}
	if writable, _ := n.graph.allowed(n.driver.Name); !writable && !c.ReadOnly {
		return refuse(ErrNotSupported, "Driver '%s' can only be used for read-only devices", n.driver.Name)
	}
	return c.check()
}

// mayChange compares two options of the driver.
func (d *Driver) mayChange(from, to any) error {
	if d.NewOptions == nil {
		return nil
	}
	std, old := optionsOf(d.NewOptions()), optionsOf(from)
	for i, o := range optionsOf(to) {
		switch v := o.field.Interface(); {
		case reflect.DeepEqual(v, old[i].field.Interface()) || slices.Contains(d.Mutable, o.name):
		case reflect.DeepEqual(v, std[i].field.Interface()):
			return refuse(ErrInvalid, "Option '%s' cannot be reset to its default value", o.name)
		default:
			return CannotChange(o.name)
		}
	}
	return nil
}

// run does what was planned. All nodes concerned are drained.
func (r *reopen) run(ctx context.Context) error {
	for _, p := range r.nodes {
		if n := p.node; n.Active() && !p.old.ReadOnly && !p.old.NoIO {
			if err := n.inst.Flush(ctx); err != nil {
				return fmt.Errorf("Error flushing drive: node '%s': %w", n.name, err)
			}
		}
	}
	err := r.prepare(ctx)
	if err == nil {
		err = r.change(r.enter)
	}
	if err != nil {
		r.abort()
		return err
	}
	for _, p := range slices.Backward(r.nodes) {
		if err = p.sw.Apply(ctx); err != nil {
			err = fmt.Errorf("Could not reopen node '%s': %w", p.node.name, err)
			break
		}
	}
	if err == nil {
		err = r.change(r.leave)
	}
	if err != nil {
		r.abort()
		return errors.Join(err, r.change(r.back))
	}
	for _, p := range r.nodes {
		p.sw.Commit()
		p.node.explicit.Store(p.explicit)
	}
	return nil
}

// prepare has the drivers check and get ready, children first.
func (r *reopen) prepare(ctx context.Context) error {
	for _, p := range slices.Backward(r.nodes) {
		c := p.effective
		for _, e := range p.node.Children() {
			if e.role&RoleCOW == 0 && c.AutoReadOnly && r.configOf(r.childOf(e)).ReadOnly {
				c.ReadOnly = true
			}
		}
		sw, err := p.node.inst.(Reopener).PrepareReopen(ctx, &Reopening{Node: p.node, Config: c, relinked: r.relinked(p.node)})
		if err != nil {
			return fmt.Errorf("Could not reopen node '%s': %w", p.node.name, err)
		}
		p.sw = sw
	}
	return nil
}

// relinked names the children of n that become other nodes.
func (r *reopen) relinked(n *Node) []string {
	var names []string
	for _, l := range r.links {
		if l.edge.parent == n {
			names = append(names, l.edge.name)
		}
	}
	return names
}

// childOf is the node that e will lead to.
func (r *reopen) childOf(e *Edge) *Node {
	for _, l := range r.links {
		if l.edge == e && l.to != nil {
			return l.to
		}
	}
	return e.Node()
}

// configOf is what n will be.
func (r *reopen) configOf(n *Node) *Config {
	for _, p := range r.nodes {
		if p.node == n {
			return p.effective
		}
	}
	return n.cfg()
}

// abort undoes what the drivers have done so far, parents first.
func (r *reopen) abort() {
	for _, p := range r.nodes {
		if p.sw != nil {
			p.sw.Abort()
		}
	}
}

func (r *reopen) change(edit func(*tx) error) error {
	return r.graph.changeBy(context.Background(), r.claim, edit)
}

// enter makes the graph what it is to be. The drivers keep what they had (locks), so
// that it can go back.
func (r *reopen) enter(t *tx) error {
	t.perms.keep = true
	for _, p := range r.nodes {
		t.configure(p.node, p.effective)
	}
	for _, l := range r.links {
		var err error
		switch {
		case l.from == nil:
			err = t.link(l.edge)
		case l.to == nil:
			err = l.edge.mayChange()
		default:
			err = t.move(l.edge, l.to)
		}
		if err != nil {
			return err
		}
	}
	r.denied = nil
	for _, p := range r.nodes {
		if readOnly := p.effective.ReadOnly; readOnly != p.old.ReadOnly && (p.force || !readOnly) {
			r.deny(t, p.node, p.node, readOnly)
		}
	}
	return nil
}

// leave gives up what only the old state needed.
func (r *reopen) leave(t *tx) error {
	for _, l := range r.links {
		if l.to == nil {
			t.unlink(l.edge)
		}
	}
	r.keepNothing(t)
	return nil
}

// back undoes enter.
func (r *reopen) back(t *tx) error {
	for _, d := range r.denied {
		t.deny(d.root, d.was)
	}
	for _, l := range r.links {
		switch {
		case l.from == nil:
			t.unlink(l.edge)
		case l.to != nil:
			if err := t.move(l.edge, l.from); err != nil {
				return err
			}
		}
	}
	for _, p := range r.nodes {
		t.configure(p.node, p.old)
	}
	r.keepNothing(t)
	return nil
}

// keepNothing ends what enter began.
func (r *reopen) keepNothing(t *tx) {
	t.perms.drop = true
	for _, n := range r.claim.nodes {
		t.recheck(n)
	}
}

// deny takes permission to write from the roots above n, or gives it back where it was
// taken because of cause.
func (r *reopen) deny(t *tx, n, cause *Node, deny bool) {
	for _, e := range n.parents {
		switch root := e.root; {
		case root == nil && e.role&RoleCOW == 0:
			r.deny(t, e.parent, cause, deny)
		case root == nil:
		case deny && root.denied == nil:
			r.denied = append(r.denied, denial{root, nil})
			t.deny(root, cause)
		case !deny && root.denied == cause:
			r.denied = append(r.denied, denial{root, cause})
			t.deny(root, nil)
		}
	}
}

// deny keeps a root from writing because of a node, nil for not.
func (t *tx) deny(r *Root, cause *Node) {
	was := r.denied
	t.onAbort(func() { r.denied = was })
	r.denied = cause
	t.edges = append(t.edges, &r.edge)
	t.recheck(r.Node())
}

// configure gives n other options.
func (t *tx) configure(n *Node, c *Config) {
	was := n.config.Swap(c)
	t.onAbort(func() { n.config.Store(was) })
	t.recheck(n)
}
