package hostdev

import (
	"context"

	"github.com/nbdserve/nbdserve/block"
)

// PrepareReopen implements [block.Reopener]. Other descriptors of the same file, whatever
// its path leads to by now, take the place of those there are; the locks stay.
func (n *node) PrepareReopen(_ context.Context, r *block.Reopening) (block.Switch, error) {
	old, c := n.self.Config(), r.Config
	if !n.self.Active() {
		return block.NoSwitch{}, nil // it opens its file by its options then
	}
	s := &fileSwitch{node: n, old: n.files, new: n.files}
	s.new.noFlush = c.Cache.NoFlush
	if c.ReadOnly == old.ReadOnly && c.Cache.Direct == old.Cache.Direct {
		return s, nil
	}
	f, _, err := openFiles(n.filename, procPath(n.fd), c, n.kinds)
	if !c.ReadOnly && cannotWrite(err) {
		if err = r.AutoReadOnly(err); err == nil {
			f, _, err = openFiles(n.filename, procPath(n.fd), c, n.kinds)
		}
	}
	if err != nil {
		return nil, err
	}
	s.new, s.opened = f, true
	return s, nil
}

// A fileSwitch changes the descriptors of a node.
type fileSwitch struct {
	*node
	old, new files
	opened   bool // new has descriptors of its own
}

// Apply implements [block.Switch].
func (s *fileSwitch) Apply(context.Context) error {
	s.use(s.new)
	return nil
}

// Commit implements [block.Switch].
func (s *fileSwitch) Commit() {
	if !s.opened {
		return
	}
	s.lockMu.Lock()
	if s.locks != nil {
		s.locks.own = []int{s.locks.fd} // the other one is closed now
	}
	s.lockMu.Unlock()
	s.close(s.old)
}

// Abort implements [block.Switch].
func (s *fileSwitch) Abort() {
	s.use(s.old)
	if s.opened {
		s.close(s.new)
	}
}

func (s *fileSwitch) close(f files) {
	if err := f.closeFiles(); err != nil {
		s.self.Graph().Log().Warn("a file did not close well in a reopen", "node", s.self.Name(), "err", err)
	}
}
