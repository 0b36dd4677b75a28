// Package quorum is the driver "quorum": it writes to several children and reads what
// enough of them agree on, so that a child that fails or lies does no harm.
package quorum

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/filter"
)

// ReadPattern says which children are read.
type ReadPattern uint8

const (
	ReadQuorum ReadPattern = iota // all, and they vote
	ReadFIFO                      // the first, in the order of their names, that does not fail
)

var patternNames = [...]string{"quorum", "fifo"}

// String is QEMU's name of the pattern.
func (p ReadPattern) String() string { return patternNames[p] }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (p *ReadPattern) UnmarshalText(text []byte) error {
	i := slices.Index(patternNames[:], string(text))
	if i < 0 {
		return fmt.Errorf("Please set read-pattern as fifo or quorum, not '%s': %w", text, block.ErrInvalid)
	}
	*p = ReadPattern(i)
	return nil
}

// Options of a quorum node.
type Options struct {
	// VoteThreshold is how many children must agree on what is read, and must do a
	// change. From 1 to the number of children.
	VoteThreshold int64 `option:"vote-threshold,strong"`
	// RewriteCorrupted writes what was voted for to the children that have something else.
	RewriteCorrupted bool `option:"rewrite-corrupted,strong"`
	// Verify says, for two children that both must agree, where they differ (blkverify).
	Verify      bool        `option:"blkverify,strong"`
	ReadPattern ReadPattern `option:"read-pattern,strong"`
}

func (o *Options) check(children int) error {
	switch {
	case children < 1:
		return invalid("Number of provided children must be 1 or more")
	case o.VoteThreshold < 1:
		return invalid("Parameter 'vote-threshold' expects a value >= 1")
	case o.VoteThreshold > int64(children):
		return invalid("threshold may not exceed children count")
	case o.ReadPattern != ReadQuorum || !o.Verify:
		return nil
	case children != 2 || o.VoteThreshold != 2:
		return invalid("blkverify=on can only be set if there are exactly two files and vote-threshold is 2")
	case o.RewriteCorrupted:
		return invalid("rewrite-corrupted=on cannot be used with blkverify=on")
	}
	return nil
}

// An invalidError is a refusal of QEMU's text.
type invalidError string

func invalid(format string, args ...any) error { return invalidError(fmt.Sprintf(format, args...)) }

func (e invalidError) Error() string { return string(e) }
func (invalidError) Unwrap() error   { return block.ErrInvalid }

const childPrefix = "children."

// Driver returns the driver "quorum". Its children are children.0, children.1 and so
// on, of one size; more can be added and taken away with [block.Graph.AddChild] and
// [block.Graph.RemoveChild]. A child that is added must hold the same data, or else is
// outvoted until it is rewritten.
//
// A request succeeds if vote-threshold children agree on it. Discards make zeroes,
// because the children must go on to agree, and are dropped where a child cannot do
// that without writing.
func Driver() *block.Driver {
	return &block.Driver{
		Name:       "quorum",
		Kind:       block.Filter,
		Children:   []string{childPrefix + "*"},
		NewOptions: func() any { return new(Options) },
		// Nobody else may make the children differ.
		Needs: func(cfg *block.Config) (perm, unshared block.Perm) {
			if o, ok := cfg.Options.(*Options); ok && o.RewriteCorrupted && !cfg.ReadOnly {
				perm = block.PermWrite
			}
			return perm, block.PermWrite | block.PermResize
		},
		Open: open,
	}
}

func open(ctx context.Context, o *block.Opening) (block.Instance, error) {
	opts, ok := o.Config.Options.(*Options)
	if !ok {
		return nil, fmt.Errorf("the 'quorum' block driver takes options of type *quorum.Options, not %T", o.Config.Options)
	}
	count := 0
	for name := range o.Config.Children {
		if strings.HasPrefix(name, childPrefix) {
			count++
		}
	}
	if err := opts.check(count); err != nil {
		return nil, err
	}
	n := &node{node: o.Node(), log: o.Node().Graph().Log().With("node", o.NodeName), opts: *opts}
	var edges []*block.Edge
	for i := range count {
		e, err := o.OpenChild(ctx, childPrefix+strconv.Itoa(i), block.RoleData, nil)
		if err != nil {
			return nil, err
		}
		if err := sameSize(e.Node(), edges); err != nil {
			return nil, err
		}
		edges = append(edges, e)
	}
	n.ChildrenChanged(edges)
	return n, nil
}

// sameSize tells whether child has the size of the others.
func sameSize(child *block.Node, others []*block.Edge) error {
	if len(others) > 0 && others[0].Size() != child.Size() {
		return invalid("Node '%s' has %d bytes, and the children of a quorum must have the same size: '%s' has %d",
			child.Name(), child.Size(), others[0].Node().Name(), others[0].Size())
	}
	return nil
}

// A node is a quorum node.
type node struct {
	node *block.Node
	log  *slog.Logger
	opts Options

	children atomic.Pointer[[]*block.Edge] // changes only with nothing in flight
	ranges   ranges

	// What went wrong.
	failures, mismatches, rewrites, childErrors atomic.Int64
	logged                                      atomic.Int64 // ns since 1970, of the last line
}

var _ interface {
	block.Instance
	block.Zeroer
	block.Discarder
	block.StatusReporter
	block.ChildAdder
	block.Measurer
	block.Reopener
} = (*node)(nil)

func (n *node) edges() []*block.Edge { return *n.children.Load() }

// pass is a child, which has the alignment of the node.
func (n *node) pass(e *block.Edge) filter.Pass {
	return filter.Pass{Child: e, Align: n.node.Limits().RequestAlignment}
}

// each does f on all children at once, and returns what they answer.
func (n *node) each(ctx context.Context, edges []*block.Edge, f func(ctx context.Context, i int, c filter.Pass) error) []error {
	errs := make([]error, len(edges))
	// Only the goroutine of the request may yield its worker.
	others := block.WithShard(ctx, block.ShardOf(ctx))
	done := make(chan struct{}, len(edges))
	for i, e := range edges[1:] {
		go func() {
			errs[i+1] = f(others, i+1, n.pass(e))
			done <- struct{}{}
		}()
	}
	errs[0] = f(ctx, 0, n.pass(edges[0]))
	for range edges[1:] {
		<-done
	}
	return errs
}

// verdict decides by the answers of children to a request. If too few have done it,
// the error is the one that most of the others have met.
func (n *node) verdict(what string, off, length int64, edges []*block.Edge, errs []error) error {
	succeeded, met, most := 0, error(nil), 0
	count := make(map[syscall.Errno]int)
	for i, err := range errs {
		if err == nil {
			succeeded++
			continue
		}
		n.childErrors.Add(1)
		n.report("a child of a quorum fails", "child", edges[i].Name(), "request", what, "offset", off, "length", length, "err", err)
		errno := block.Errno(err)
		if count[errno]++; count[errno] > most {
			met, most = err, count[errno]
		}
	}
	if int64(succeeded) >= n.opts.VoteThreshold {
		return nil
	}
	n.failures.Add(1)
	return fmt.Errorf("quorum: %d of %d children succeed, %d must: %w", succeeded, len(errs), n.opts.VoteThreshold, met)
}

// report writes a line to the log, of which there is one a second.
func (n *node) report(text string, args ...any) {
	last, now := n.logged.Load(), time.Now().UnixNano()
	if now-last > int64(time.Second) && n.logged.CompareAndSwap(last, now) {
		n.log.Warn(text, args...)
	}
}

// change does a change on all children.
func (n *node) change(ctx context.Context, what string, off, length int64, f func(ctx context.Context, c filter.Pass) error) error {
	s := n.ranges.begin(off, length, true)
	defer n.ranges.end(s)
	edges := n.edges()
	return n.verdict(what, off, length, edges, n.each(ctx, edges, func(ctx context.Context, _ int, c filter.Pass) error { return f(ctx, c) }))
}

// ReadAt implements [block.Instance].
func (n *node) ReadAt(ctx context.Context, p []byte, off int64) error {
	s := n.ranges.begin(off, int64(len(p)), false)
	if n.opts.ReadPattern == ReadFIFO {
		defer n.ranges.end(s)
		return n.readFirst(ctx, p, off)
	}
	outvoted, err := n.vote(ctx, p, off, true)
	n.ranges.end(s)
	if len(outvoted) == 0 || !n.opts.RewriteCorrupted || n.node.ReadOnly() {
		return err
	}
	// Once more, with nobody else at these bytes, and then the minority is put right.
	s = n.ranges.begin(off, int64(len(p)), true)
	defer n.ranges.end(s)
	if outvoted, err = n.vote(ctx, p, off, false); err != nil {
		return err
	}
	for _, e := range outvoted {
		if err := n.pass(e).WriteAt(ctx, p, off, 0); err != nil {
			n.childErrors.Add(1)
			n.report("a corrupted child of a quorum cannot be rewritten", "child", e.Name(), "offset", off, "length", len(p), "err", err)
			continue
		}
		n.rewrites.Add(1)
	}
	return nil
}

// readFirst reads from the first child that can be read.
func (n *node) readFirst(ctx context.Context, p []byte, off int64) error {
	var err error
	for _, e := range n.edges() {
		if err = n.pass(e).ReadAt(ctx, p, off); err == nil {
			return nil
		}
		n.childErrors.Add(1)
		n.report("a child of a quorum fails", "child", e.Name(), "request", "read", "offset", off, "length", len(p), "err", err)
	}
	n.failures.Add(1)
	return err
}

// vote reads p from all children, and fills it with what most of them have. It
// returns those that have something else, of which it tells if tell says so.
func (n *node) vote(ctx context.Context, p []byte, off int64, tell bool) (outvoted []*block.Edge, err error) {
	edges := n.edges()
	data := make([][]byte, len(edges))
	data[0] = p
	for i := range edges[1:] {
		data[i+1] = block.GetBuffer(len(p))
		defer block.PutBuffer(data[i+1])
	}
	errs := n.each(ctx, edges, func(ctx context.Context, i int, c filter.Pass) error { return c.ReadAt(ctx, data[i], off) })
	if err := n.verdict("read", off, int64(len(p)), edges, errs); err != nil {
		return nil, err
	}
	winner, votes := -1, 0
	for i := range edges {
		if errs[i] != nil {
			continue
		}
		same := 0
		for j := range edges {
			if errs[j] == nil && bytes.Equal(data[j], data[i]) {
				same++
			}
		}
		if same > votes {
			winner, votes = i, same
		}
	}
	for i, e := range edges {
		if errs[i] == nil && !bytes.Equal(data[i], data[winner]) {
			outvoted = append(outvoted, e)
			if tell {
				n.differs(e, data[i], data[winner], off)
			}
		}
	}
	if int64(votes) < n.opts.VoteThreshold {
		n.failures.Add(1)
		return nil, fmt.Errorf("quorum: %d of %d children agree on %d bytes at offset %d, %d must: %w", votes, len(edges), len(p), off, n.opts.VoteThreshold, syscall.EIO)
	}
	if winner > 0 {
		copy(p, data[winner])
	}
	return outvoted, nil
}

// differs tells of a child that does not have what others agree on, or, with
// blkverify, what the first one has.
func (n *node) differs(e *block.Edge, has, others []byte, off int64) {
	n.mismatches.Add(1)
	i := 0
	for has[i] == others[i] {
		i++
	}
	text := "a child of a quorum is outvoted"
	if n.opts.Verify {
		text = "blkverify: contents mismatch"
	}
	n.report(text, "child", e.Name(), "offset", off+int64(i), "has", has[i], "others have", others[i])
}

// WriteAt implements [block.Instance].
func (n *node) WriteAt(ctx context.Context, p []byte, off int64, flags block.ReqFlags) error {
	return n.change(ctx, "write", off, int64(len(p)), func(ctx context.Context, c filter.Pass) error { return c.WriteAt(ctx, p, off, flags) })
}

// WriteZeroes implements [block.Zeroer].
func (n *node) WriteZeroes(ctx context.Context, off, length int64, flags block.ReqFlags) error {
	return n.zero(ctx, "zero", off, length, flags)
}

// Discard implements [block.Discarder].
func (n *node) Discard(ctx context.Context, off, length int64) error {
	for _, e := range n.edges() {
		if can := block.MayUnmap | block.NoFallback; e.Limits().ZeroFlags&can != can {
			return block.ErrNotSupported
		}
	}
	return n.zero(ctx, "discard", off, length, block.MayUnmap|block.NoFallback)
}

// zero zeroes a range of all children. Without fallback the first one decides whether
// that is to be; the others follow in any case.
func (n *node) zero(ctx context.Context, what string, off, length int64, flags block.ReqFlags) error {
	s := n.ranges.begin(off, length, true)
	defer n.ranges.end(s)
	edges := n.edges()
	var errs []error
	if flags&block.NoFallback != 0 {
		err := n.pass(edges[0]).WriteZeroes(ctx, off, length, flags)
		if errors.Is(err, block.ErrNotSupported) {
			return err
		}
		flags &^= block.NoFallback
		errs = []error{err}
	}
	if rest := edges[len(errs):]; len(rest) > 0 {
		errs = append(errs, n.each(ctx, rest, func(ctx context.Context, _ int, c filter.Pass) error { return c.WriteZeroes(ctx, off, length, flags) })...)
	}
	return n.verdict(what, off, length, edges, errs)
}

// Flush implements [block.Instance].
func (n *node) Flush(ctx context.Context) error {
	edges := n.edges()
	return n.verdict("flush", 0, 0, edges, n.each(ctx, edges, func(ctx context.Context, _ int, c filter.Pass) error { return c.Flush(ctx) }))
}

// BlockStatus implements [block.StatusReporter]: zero is what all children call so.
func (n *node) BlockStatus(ctx context.Context, off, length int64, precise bool) (block.Extent, error) {
	zero, data := length, int64(0)
	for _, e := range n.edges() {
		x, err := e.BlockStatus(ctx, off, min(length, e.Size()-off), precise)
		switch {
		case err != nil:
			return block.Extent{Flags: block.StatusData | block.StatusAllocated, Length: length}, nil // reading finds out
		case x.Flags&block.StatusZero != 0:
			zero = min(zero, x.Length)
		default:
			data = max(data, x.Length)
		}
	}
	if data > 0 {
		return block.Extent{Flags: block.StatusData | block.StatusAllocated, Length: data}, nil
	}
	return block.Extent{Flags: block.StatusZero | block.StatusAllocated, Length: zero}, nil
}

// Size implements [block.Instance]: of the smallest child, should they differ.
func (n *node) Size() int64 {
	edges := n.edges()
	size := edges[0].Size()
	for _, e := range edges[1:] {
		size = min(size, e.Size())
	}
	return size
}

// maxTransfer bounds a request, and with it the buffers of a vote, in bytes.
const maxTransfer = 1 << 20

// Limits implements [block.Instance]. They are what all children can do.
func (n *node) Limits() block.Limits {
	edges := n.edges()
	l := edges[0].Limits()
	l.ZeroFlags |= block.FUA | block.MayUnmap // where a child lacks them, its seam does without
	for _, e := range edges[1:] {
		o := e.Limits()
		l.RequestAlignment = max(l.RequestAlignment, o.RequestAlignment)
		l.MemAlignment = max(l.MemAlignment, o.MemAlignment)
		l.PreferredTransfer = max(l.PreferredTransfer, o.PreferredTransfer)
		l.DiscardAlignment = max(l.DiscardAlignment, o.DiscardAlignment)
		l.ZeroAlignment = max(l.ZeroAlignment, o.ZeroAlignment)
		l.LogicalBlockSize = max(l.LogicalBlockSize, o.LogicalBlockSize)
		l.PhysicalBlockSize = max(l.PhysicalBlockSize, o.PhysicalBlockSize)
		l.ZeroFlags &= o.ZeroFlags | block.FUA | block.MayUnmap
		l.Rotational = l.Rotational || o.Rotational
	}
	l.WriteFlags = block.FUA
	// The seams of the children split.
	l.MaxTransfer, l.MaxZero, l.MaxDiscard = maxTransfer, 0, 0
	l.DiscardAlignment = max(l.DiscardAlignment, l.ZeroAlignment, l.RequestAlignment)
	return l
}

// Measurements implements [block.Measurer].
func (n *node) Measurements() []block.Measurement {
	counter := func(name, help string, c *atomic.Int64) block.Measurement {
		return block.Measurement{Name: name, Help: help, Value: float64(c.Load()), Counter: true}
	}
	return []block.Measurement{
		counter("quorum_failures_total", "Requests on which too few children agreed.", &n.failures),
		counter("quorum_outvoted_total", "Reads of children that had something else than the others.", &n.mismatches),
		counter("quorum_rewrites_total", "Corrupted ranges of children that were rewritten.", &n.rewrites),
		counter("quorum_child_errors_total", "Requests that failed on a child.", &n.childErrors),
	}
}

// NewChild implements [block.ChildAdder].
func (n *node) NewChild(child *block.Node) (name string, role block.Role, err error) {
	edges := n.edges()
	if n.opts.Verify {
		return "", 0, invalid("Cannot add a child to a quorum in blkverify mode")
	}
	if err := sameSize(child, edges); err != nil {
		return "", 0, err
	}
	next := 0
	for _, e := range edges {
		if i, err := strconv.Atoi(strings.TrimPrefix(e.Name(), childPrefix)); err == nil {
			next = max(next, i+1)
		}
	}
	return childPrefix + strconv.Itoa(next), block.RoleData, nil
}

// MayRemove implements [block.ChildAdder].
func (n *node) MayRemove(*block.Edge) error {
	if int64(len(n.edges())) <= n.opts.VoteThreshold {
		return invalid("The number of children cannot be lower than the vote threshold %d", n.opts.VoteThreshold)
	}
	return nil
}

// ChildrenChanged implements [block.ChildAdder].
func (n *node) ChildrenChanged(children []*block.Edge) { n.children.Store(&children) }

// PrepareReopen implements [block.Reopener]: its own options stay.
func (n *node) PrepareReopen(context.Context, *block.Reopening) (block.Switch, error) {
	return block.NoSwitch{}, nil
}

// Close implements [block.Instance].
func (n *node) Close(context.Context) error { return nil }
