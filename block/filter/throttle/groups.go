package throttle

import (
	"fmt"
	"slices"
	"sync"

	"github.com/nbdserve/nbdserve/block"
)

// Groups are the throttle groups by name. The methods may be called in parallel. The
// zero value is ready.
type Groups struct {
	mu sync.Mutex
	m  map[string]*group
}

// Create makes a group. The errors are those of [Limits.Validate], or wrap [block.ErrBusy]
// if there is one of that name.
func (gs *Groups) Create(name string, l Limits) error {
	if name == "" {
		return &limitsError{"Please specify a name for the throttle group"}
	}
	if err := l.Validate(); err != nil {
		return err
	}
	gs.mu.Lock()
	defer gs.mu.Unlock()
	if gs.m[name] != nil {
		return fmt.Errorf("Throttle group '%s' exists already: %w", name, block.ErrBusy)
	}
	if gs.m == nil {
		gs.m = make(map[string]*group)
	}
	gs.m[name] = newGroup(name, l)
	return nil
}

// SetLimits changes the limits of a group. They hold at once, for requests that wait
// already, too; what they have used up before is forgotten.
func (gs *Groups) SetLimits(name string, l Limits) error {
	if err := l.Validate(); err != nil {
		return err
	}
	gs.mu.Lock()
	defer gs.mu.Unlock()
	g, err := gs.find(name)
	if err != nil {
		return err
	}
	g.setLimits(l)
	return nil
}

// Limits are the limits of a group.
func (gs *Groups) Limits(name string) (Limits, error) {
	gs.mu.Lock()
	defer gs.mu.Unlock()
	g, err := gs.find(name)
	if err != nil {
		return Limits{}, err
	}
	return g.currentLimits(), nil
}

// Names lists the groups.
func (gs *Groups) Names() []string {
	gs.mu.Lock()
	defer gs.mu.Unlock()
	var names []string
	for name := range gs.m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Delete takes a group away. While it has members it is refused, wrapping [block.ErrBusy].
func (gs *Groups) Delete(name string) error {
	gs.mu.Lock()
	defer gs.mu.Unlock()
	g, err := gs.find(name)
	if err != nil {
		return err
	}
	if g.members > 0 {
		return fmt.Errorf("Throttle group '%s' has %d members: %w", name, g.members, block.ErrBusy)
	}
	delete(gs.m, name)
	return nil
}

// find looks a group up. mu is held.
func (gs *Groups) find(name string) (*group, error) {
	if g := gs.m[name]; g != nil {
		return g, nil
	}
	return nil, &limitsError{fmt.Sprintf("Throttle group '%s' does not exist", name)}
}

// join gives the group that a node of these options belongs to.
func (gs *Groups) join(o *Options) (*group, error) {
	switch {
	case o.Group == "" && o.Limits == None():
		return nil, &limitsError{"Please specify a throttle group"}
	case o.Group == "":
		if err := o.Limits.Validate(); err != nil {
			return nil, err
		}
		return newGroup("", o.Limits), nil
	case o.Limits != None():
		return nil, &limitsError{"throttle-group and limits of its own cannot be used at the same time"}
	}
	gs.mu.Lock()
	defer gs.mu.Unlock()
	g, err := gs.find(o.Group)
	if err != nil {
		return nil, err
	}
	g.members++
	return g, nil
}

// leave ends a membership.
func (gs *Groups) leave(g *group) {
	gs.mu.Lock()
	defer gs.mu.Unlock()
	g.members--
}
