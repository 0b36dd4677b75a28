package block_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"pgregory.net/rapid"
)

func TestG13PermissionsOfChildren(t *testing.T) {
	filterRole := block.RoleFiltered | block.RolePrimary
	data := block.RoleData | block.RolePrimary
	for _, c := range []struct {
		name                       string
		role                       block.Role
		writable, noIO, forceShare bool
		perm, shared               block.Perm
		wantPerm, wantShared       block.Perm
	}{
		{"filter passes through", filterRole, true, false, false, rd | wr, rd | rs, rd | wr, rd | rs},
		{"filter passes nothing through", filterRole, true, false, false, 0, all, 0, all},
		{"COW reads only", block.RoleCOW, true, false, false, all, rd, rd, rd | wu},
		{"COW shares write and resize as the parent shares write", block.RoleCOW, true, false, false, rd, rd | wr, rd, rd | wu | wr | rs},
		{"COW without a reading parent", block.RoleCOW, true, false, false, wr, all, 0, all},
		{"image, writable, unused", block.RoleImage, true, false, false, 0, all, rd | wr | rs, rd | wu},
		{"image, writable, written", block.RoleImage, true, false, false, rd | wr, rd, rd | wr | rs, rd},
		{"image, read-only", block.RoleImage, false, false, false, rd, all, rd, rd | wu},
		{"image, looked at", block.RoleImage, false, true, true, rd, all, 0, all},
		{"image, force-share", block.RoleImage, false, false, true, rd, rd, rd, all},
		{"metadata alone", block.RoleMetadata, true, false, false, 0, all, rd | wr | rs, rd | wu},
		{"data: write brings resize", data, true, false, false, rd | wr, all, rd | wr | rs, rd | wr | wu},
		{"data: write-unchanged brings write and resize", data, true, false, false, rd | wu, all, rd | wu | wr | rs, rd | wr | wu},
		{"data: read", data, true, false, false, rd, all, rd, rd | wr | wu},
	} {
		perm, shared := block.ChildPerm(c.role, c.writable, c.noIO, c.forceShare, c.perm, c.shared)
		if perm != c.wantPerm || shared != c.wantShared {
			t.Errorf("%s: %s / %s, want %s / %s", c.name, perm, shared, c.wantPerm, c.wantShared)
		}
	}
}

func TestG12ConflictNamesNodePermissionAndBothUsers(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("disk0", 512))
	attached(t, n, "export 'a'", rd|wr, rd)
	before := dump(g)

	_, err := g.AttachRoot(ctx, block.RootConfig{User: "export 'b'", Node: n, Perm: rd | wr, Shared: all})
	wantError(t, err, block.ErrBusy, "Permission conflict on node 'disk0': permissions 'write' are both required by export 'b' (uses node 'disk0' as 'root' child) and unshared by export 'a' (uses node 'disk0' as 'root' child).")
	_, err = g.AttachRoot(ctx, block.RootConfig{User: "export 'c'", Node: n, Perm: rd, Shared: rd})
	wantError(t, err, block.ErrBusy, "permissions 'write' are both required by export 'a'", "unshared by export 'c'")
	if after := dump(g); after != before {
		t.Errorf("refused users left a trace:\n%s\nbefore:\n%s", after, before)
	}
	attached(t, n, "export 'd'", rd, rd|wr) // who shares it may come
}

func TestG12ConflictBelowAFormatNamesItsChild(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	top := opened(t, g, node("fmt", ev, image, disk("file0", 512)))
	before := dump(g)
	_, err := g.AttachRoot(ctx, block.RootConfig{User: "export 'raw'", Node: g.Lookup("file0"), Perm: rd | wr | rs, Shared: all})
	wantError(t, err, block.ErrBusy, "Permission conflict on node 'file0'", "permissions 'write, resize'", "required by export 'raw' (uses node 'file0' as 'root' child)", "unshared by node 'fmt' (uses node 'file0' as 'file' child)")
	if after := dump(g); after != before {
		t.Errorf("a refused user left a trace:\n%s\nbefore:\n%s", after, before)
	}
	attached(t, top, "export 'fmt'", rd|wr, rd)
	r := attached(t, g.Lookup("file0"), "backup", rd, all) // reading is shared
	if err := r.Do(ctx, r.Flush); err != nil {
		t.Error(err)
	}
}

func TestG11TwoWritersOfOneFileAreRefused(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	opened(t, g, node("one", ev, image, disk("file0", 512)))
	before := dump(g)
	_, err := g.Open(ctx, node("two", ev, image, ref("file0")))
	wantError(t, err, block.ErrBusy, "Permission conflict on node 'file0'", "node 'one'", "node 'two'")
	if after := dump(g); after != before {
		t.Errorf("a refused format left a trace:\n%s\nbefore:\n%s", after, before)
	}
}

func TestG11BackingFileOfAWriterCannotBeWritten(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	base := disk("base", 512)
	opened(t, g, base)
	top := opened(t, g, node("top", ev, image, disk("file0", 512), backing, ref("base")))
	attached(t, top, "export 'top'", rd|wr, rd)
	_, err := g.AttachRoot(ctx, block.RootConfig{User: "export 'base'", Node: g.Lookup("base"), Perm: rd | wr, Shared: all})
	wantError(t, err, block.ErrBusy, "permissions 'write'", "export 'base'", "node 'top'", "'backing' child")
}

func TestG11ReadOnlyNodesCannotBeWritten(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	c := disk("ro", 512)
	c.ReadOnly = true
	n := opened(t, g, c)
	for _, p := range []block.Perm{wr, wu, rd | wr} {
		_, err := g.AttachRoot(ctx, block.RootConfig{User: "export 'a'", Node: n, Perm: p, Shared: all})
		wantError(t, err, block.ErrReadOnly, "'ro'", "read-only")
	}
	_, err := g.Open(ctx, node("top", ev, image, ref("ro")))
	wantError(t, err, block.ErrReadOnly, "'ro'", "read-only")
}

func TestG14DetachLoosensExactlyWhatAttachTightened(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	top := opened(t, g, node("top", ev, filter, node("fmt", ev, image, disk("file0", 512), backing, disk("base", 512))))
	before := dump(g)
	r := attach(t, top, "export 'a'", rd|wr, rd)
	if dump(g) == before {
		t.Errorf("attaching changed nothing")
	}
	detach(t, r)
	if after := dump(g); after != before {
		t.Errorf("after the detach:\n%s\nbefore the attach:\n%s", after, before)
	}
}

func TestG14DriversHearOfThePermissionsOfAllParents(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	n := opened(t, g, node("n", ev))
	ev.take()
	a := attach(t, n, "a", rd, all)
	b := attach(t, n, "b", rd|wr, rd|wu)
	detach(t, a)
	detach(t, b)
	wantEvents(t, ev,
		fmt.Sprintf("check n %d/%d", rd, all), fmt.Sprintf("set n %d/%d", rd, all),
		fmt.Sprintf("check n %d/%d", rd|wr, rd|wu), fmt.Sprintf("set n %d/%d", rd|wr, rd|wu),
		fmt.Sprintf("check n %d/%d", rd|wr, rd|wu), fmt.Sprintf("set n %d/%d", rd|wr, rd|wu),
		"flush n",
		fmt.Sprintf("check n %d/%d", 0, all), fmt.Sprintf("set n %d/%d", 0, all))
}

// Locks are taken on check, from the top down; a veto takes them back in reverse,
// and the one that vetoed has nothing to take back.
func TestG14VetoAbortsTheChecksBeforeIt(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	locked := node("c", ev)
	refuse := false
	locked.Options.(*nodeOptions).veto = func(perm, shared block.Perm) error {
		if refuse {
			return fmt.Errorf(`Failed to get "write" lock: %w`, syscall.EAGAIN)
		}
		return nil
	}
	n := opened(t, g, node("a", ev, filter, node("b", ev, filter, locked)))
	before := dump(g)
	ev.take()
	refuse = true
	_, err := g.AttachRoot(ctx, block.RootConfig{User: "x", Node: n, Perm: rd | wr, Shared: rd})
	wantError(t, err, syscall.EAGAIN, `Failed to get "write" lock`)
	perms := fmt.Sprintf("%d/%d", rd|wr, rd)
	wantEvents(t, ev, "check a "+perms, "check b "+perms, "check c "+perms, "abort b", "abort a")
	if after := dump(g); after != before {
		t.Errorf("a veto left a trace:\n%s\nbefore:\n%s", after, before)
	}
	refuse = false
	detach(t, attach(t, n, "x", rd|wr, rd))
}

// A driver that cannot let go of a lock keeps it; whoever asks for less gets that.
func TestG14LooseningIsNeverRefused(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	refuse := false
	c := node("n", ev)
	c.Options.(*nodeOptions).veto = func(block.Perm, block.Perm) error {
		if refuse {
			return syscall.EIO
		}
		return nil
	}
	n := opened(t, g, c)
	reader, writer := attach(t, n, "reader", rd, all), attach(t, n, "writer", rd|wr, rd)
	refuse = true
	before := dump(g)
	_, err := g.AttachRoot(ctx, block.RootConfig{User: "another", Node: n, Perm: rd, Shared: 0})
	wantError(t, err, block.ErrBusy) // the graph forbids it
	_, err = g.AttachRoot(ctx, block.RootConfig{User: "another", Node: n, Perm: rd | wu, Shared: all})
	wantError(t, err, block.ErrBusy)
	unchanged(t, g, before)
	ev.take()
	detach(t, writer)
	perms := fmt.Sprintf("%d/%d", rd, all)
	wantEvents(t, ev, "flush n", "check n "+perms) // and no set: it keeps what it has
	_, err = g.AttachRoot(ctx, block.RootConfig{User: "another", Node: n, Perm: rd, Shared: rd})
	wantError(t, err, syscall.EIO) // more than before can be refused
	detach(t, reader)
	verify(t, g)
}

func TestG14NoDriverIsAskedForWhatTheGraphForbids(t *testing.T) {
	g := newGraph(t)
	ev := new(events)
	shared := disk("file0", 512)
	opened(t, g, shared)
	top := opened(t, g, node("top", ev, filter, ref("file0")))
	attached(t, g.Lookup("file0"), "writer", rd|wr, rd)
	ev.take()
	_, err := g.AttachRoot(ctx, block.RootConfig{User: "x", Node: top, Perm: rd | wr, Shared: all})
	wantError(t, err, block.ErrBusy, "node 'file0'", "node 'top'", "writer")
	wantEvents(t, ev)
}

func TestG11RequestsNeedTheirPermission(t *testing.T) {
	g := newGraph(t)
	s := blocktest.StoreOf([]byte(strings.Repeat("x", 1024)))
	n := opened(t, g, blocktest.MemoryConfig(s))
	reader := attached(t, n, "reader", rd, all)
	growing := attached(t, n, "grower", rd|wr|rs, all)
	want := s.Bytes()
	for name, err := range map[string]error{
		"write":    reader.WriteAt(ctx, []byte{1}, 0, 0),
		"zero":     reader.WriteZeroes(ctx, 0, 512, 0),
		"discard":  reader.Discard(ctx, 0, 512),
		"truncate": reader.Truncate(ctx, 0),
	} {
		if !errors.Is(err, block.ErrPermission) {
			t.Errorf("%s without permission: %v", name, err)
		}
	}
	if got := s.Bytes(); string(got) != string(want) {
		t.Errorf("a refused request changed the disk")
	}
	writer := attached(t, n, "writer", rd|wr, all)
	if err := writer.WriteAt(ctx, []byte{1}, 1024, 0); !errors.Is(err, block.ErrNoSpace) {
		t.Errorf("write past the end without resize: %v", err)
	}
	if err := growing.WriteAt(ctx, []byte{1}, 1030, 0); err != nil || n.Size() != 1031 {
		t.Errorf("growing write: %v, size %d", err, n.Size())
	}
	unchanged := attached(t, n, "copier", rd|wu, all)
	if err := unchanged.WriteAt(ctx, []byte("x"), 100, 0); !errors.Is(err, block.ErrPermission) {
		t.Errorf("write with write-unchanged only: %v", err)
	}
	if err := unchanged.WriteAt(ctx, []byte("x"), 100, block.WriteUnchanged); err != nil {
		t.Errorf("unchanged write: %v", err)
	}
}

// Random users come and go over a graph with a diamond. A refusal must leave
// everything as it was, and at the end nothing but the first state may be left.
func TestG14AbortLeavesTheGraphAsBefore(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		g := newGraph(rt)
		ev := new(events)
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 0))
		locked := node("locked", ev)
		vetoes := 0
		locked.Options.(*nodeOptions).veto = func(perm, _ block.Perm) error {
			if perm&wr != 0 && rng.IntN(3) == 0 {
				vetoes++
				return syscall.EAGAIN
			}
			return nil
		}
		base := disk("base", 512)
		opened(rt, g, base)
		tops := []*block.Node{g.Lookup("base")}
		for i, c := range []*block.Config{
			node("f1", ev, filter, ref("base")),
			node("f2", ev, filter, ref("f1")),
			node("f3", ev, filter, ref("f1"), backing, ref("base")),
			locked,
			node("f4", ev, filter, ref("locked")),
			node("f5", ev, filter, ref("f4"), backing, ref("f2")),
		} {
			_ = i
			tops = append(tops, opened(rt, g, c))
		}
		first := dump(g)
		var roots []*block.Root
		perms := rapid.IntRange(0, int(all))
		for range rapid.IntRange(1, 40).Draw(rt, "steps") {
			before := dump(g)
			if len(roots) > 0 && rapid.Bool().Draw(rt, "detach") {
				i := rapid.IntRange(0, len(roots)-1).Draw(rt, "which")
				detachLoosely(rt, roots[i])
				roots = append(roots[:i], roots[i+1:]...)
				continue
			}
			r, err := g.AttachRoot(ctx, block.RootConfig{
				User: "user", Node: rapid.SampledFrom(tops).Draw(rt, "node"),
				Perm: block.Perm(perms.Draw(rt, "perm")), Shared: block.Perm(perms.Draw(rt, "shared")),
			})
			if err == nil {
				roots = append(roots, r)
			} else if after := dump(g); after != before {
				rt.Fatalf("refused (%v), and the graph is\n%s\nbefore:\n%s", err, after, before)
			}
		}
		for _, r := range roots {
			detachLoosely(rt, r)
		}
		if last := dump(g); last != first {
			rt.Fatalf("at the end:\n%s\nat the beginning:\n%s", last, first)
		}
		balanced(rt, ev.take())
	})
}

// detachLoosely detaches. A veto of the test is not heard: loosening is never refused.
func detachLoosely(rt *rapid.T, r *block.Root) {
	if err := r.Detach(ctx); err != nil {
		rt.Errorf("detach: %v", err)
	}
}

// balanced checks that after each check of a node that passed comes one set or abort.
func balanced(rt *rapid.T, list []string) {
	open := map[string]int{}
	for _, e := range list {
		f := strings.Fields(e)
		switch f[0] {
		case "check":
			open[f[1]]++
		case "set", "abort":
			open[f[1]]--
			if open[f[1]] < 0 {
				rt.Fatalf("%s without a check", e)
			}
		}
	}
	for n, c := range open {
		if c != 0 && n != "locked" { // it vetoes
			rt.Fatalf("%d checks of %s had no end", c, n)
		}
	}
}

func TestG10AtMostOneChildOfAKind(t *testing.T) {
	for _, role := range []block.Role{block.RoleFiltered, block.RoleCOW, block.RolePrimary | block.RoleData} {
		g := newGraph(t)
		two := node("n", new(events), kid{"first", role}, disk("", 4096), kid{"second", role}, disk("", 4096))
		_, err := g.Open(ctx, two)
		only := role &^ block.RoleData
		wantError(t, err, block.ErrInvalid, fmt.Sprintf("Node 'n' has a %s child already, 'first': 'second' cannot be another one", only))
		opened(t, g, node("n", new(events), kid{"first", block.RoleData}, disk("", 4096), kid{"second", block.RoleData}, disk("", 4096)))
	}
}
