package block

import "context"

// The calls that concern the image of an open node as a whole (rule G26). Each drains
// the node; ctx bounds the wait for that and is passed to the driver. The node must
// stay referenced by the caller.

// CheckFix says what a check repairs.
type CheckFix uint8

const (
	FixNothing CheckFix = iota
	FixLeaks            // what is allocated and not used
	FixAll              // that, and errors
)

// A CheckResult is what a check found, by the names of qemu-img check.
type CheckResult struct {
	CheckErrors        int64 `json:"check-errors"` // what could not be read
	ImageEndOffset     int64 `json:"image-end-offset"`
	Corruptions        int64 `json:"corruptions,omitempty"`
	Leaks              int64 `json:"leaks,omitempty"` // clusters whose refcount is too high
	CorruptionsFixed   int64 `json:"corruptions-fixed,omitempty"`
	LeaksFixed         int64 `json:"leaks-fixed,omitempty"`
	TotalClusters      int64 `json:"total-clusters,omitempty"` // of the virtual disk
	AllocatedClusters  int64 `json:"allocated-clusters,omitempty"`
	FragmentedClusters int64 `json:"fragmented-clusters,omitempty"`
	CompressedClusters int64 `json:"compressed-clusters,omitempty"`
}

// Check looks for errors in the metadata of n's image; see [Checker]. It fails with
// [ErrNotSupported] where the format has nothing to check.
func (g *Graph) Check(ctx context.Context, n *Node, fix CheckFix, report func(line string)) (res *CheckResult, err error) {
	c, ok := n.inst.(Checker)
	if !ok {
		return nil, refuse(ErrNotSupported, "This image format does not support checks")
	}
	if fix != FixNothing && n.ReadOnly() {
		return nil, refuse(ErrReadOnly, "Block node '%s' is read-only", n.name)
	}
	err = g.drained(ctx, func() error {
		res, err = c.Check(ctx, fix, report)
		return err
	}, n)
	return res, err
}

// Amend changes options that n's image was created with; those that o does not mention
// stay. See [Amender].
func (g *Graph) Amend(ctx context.Context, n *Node, o *Options) error {
	a, ok := n.inst.(Amender)
	if !ok {
		return refuse(ErrNotSupported, "Block driver '%s' does not support option amendment", n.driver.Name)
	}
	opts := a.NewAmendOptions()
	if err := o.Decode(opts); err != nil {
		return err
	}
	if n.ReadOnly() {
		return refuse(ErrReadOnly, "Block node '%s' is read-only", n.name)
	}
	return g.drained(ctx, func() error { return a.Amend(ctx, opts) }, n)
}

// ChangeBackingFile rewrites what the header of n's image says about its backing file;
// "" for none. The graph stays as it is, see [Graph.SetBacking]. A format without a
// file is refused, and so is a file without a format, which would be probed later.
func (g *Graph) ChangeBackingFile(ctx context.Context, n *Node, name, format string) error {
	c, ok := n.inst.(BackingChanger)
	switch {
	case !ok:
		return refuse(ErrNotSupported, "Driver '%s' of node '%s' does not support backing files", n.driver.Name, n.name)
	case name == "" && format != "":
		return refuse(ErrInvalid, "Backing format '%s' is given without a backing file", format)
	case name != "" && format == "":
		return refuse(ErrInvalid, "Backing file specified without backing format")
	case n.ReadOnly():
		return refuse(ErrReadOnly, "Block node '%s' is read-only", n.name)
	}
	if err := n.OpAllowed(OpChange); err != nil {
		return err
	}
	return g.drained(ctx, func() error { return c.ChangeBackingFile(ctx, name, format) }, n)
}
