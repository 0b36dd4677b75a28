package block_test

import (
	"strings"
	"testing"

	"github.com/nbdserve/nbdserve/block"
)

// newChain opens f1 -> c -> f2 -> b -> a, of which f1 and f2 are filters; a is the base.
func newChain(t *testing.T) (g *block.Graph, node map[string]*block.Node) {
	t.Helper()
	g = newGraph(t)
	ev := new(events)
	image := func(name, file, header string, backing *block.Config) *block.Config {
		return cowConfig(name, &cowOptions{size: 512, file: file, header: header}, backing)
	}
	c := filtering("f1", ev, image("c", "/vm/disk/c.img", "../base/b.img", filtering("f2", ev, image("b", "/vm/base/b.img", "file:a.img", image("a", "/vm/base/a.img", "", nil)))))
	opened(t, g, c)
	node = map[string]*block.Node{}
	for _, n := range g.Nodes() {
		node[n.Name()] = n
	}
	return g, node
}

func names(nodes []*block.Node) string {
	var list []string
	for _, n := range nodes {
		list = append(list, n.Name())
	}
	return strings.Join(list, " ")
}

func nameOf(n *block.Node) string {
	if n == nil {
		return ""
	}
	return n.Name()
}

func TestG33ChainsAreWalkedThroughFilters(t *testing.T) {
	_, n := newChain(t)
	for name, want := range map[string]struct{ chain, images, base string }{
		"f1": {"f1 c f2 b a", "c b a", "a"},
		"c":  {"c f2 b a", "c b a", "a"},
		"f2": {"f2 b a", "b a", "a"},
		"a":  {"a", "a", "a"},
	} {
		if got := names(n[name].Chain()); got != want.chain {
			t.Errorf("chain of %s: %s, want %s", name, got, want.chain)
		}
		if got := names(n[name].Images()); got != want.images {
			t.Errorf("images of %s: %s, want %s", name, got, want.images)
		}
		if got := n[name].Base().Name(); got != want.base {
			t.Errorf("base of %s: %s, want %s", name, got, want.base)
		}
		if got := n[name].SkipFilters(); got != n[name].Images()[0] {
			t.Errorf("%s without filters is %s", name, got.Name())
		}
		for _, other := range n {
			if got, want := n[name].ChainContains(other), strings.Contains(" "+want.chain+" ", " "+other.Name()+" "); got != want {
				t.Errorf("chain of %s contains %s: %t", name, other.Name(), got)
			}
		}
	}
}

func TestG33OverlaysAreFound(t *testing.T) {
	_, n := newChain(t)
	for _, c := range []struct{ active, base, want string }{
		{"f1", "a", "b"}, {"f1", "b", "c"}, {"f1", "f2", "c"}, {"f1", "c", ""}, {"f1", "f1", ""}, {"c", "b", "c"}, {"b", "c", ""}, {"a", "a", ""},
	} {
		if got := nameOf(n[c.active].Overlay(n[c.base])); got != c.want {
			t.Errorf("overlay of %s in the chain of %s: %q, want %q", c.base, c.active, got, c.want)
		}
	}
}

func TestG33BackingImagesAreFoundByName(t *testing.T) {
	g, n := newChain(t)
	// /vm/link is a symbolic link to /vm/base; what is not there has no canonical path.
	resolve := func(path string) string {
		path = strings.NewReplacer("/vm/disk/../", "/vm/", "/vm/base/../", "/vm/").Replace(path)
		path = strings.Replace(path, "/vm/link/", "/vm/base/", 1)
		if !strings.HasPrefix(path, "/vm/base/") {
			return ""
		}
		return path
	}
	for _, c := range []struct{ active, name, want string }{
		{"f1", "/vm/base/b.img", "b"},
		{"f1", "/vm/link/b.img", "b"},
		{"f1", "../base/b.img", "b"},  // as in the header, relative to c
		{"f1", "../link/a.img", "a"},  // relative to c would be the right folder, but it is b's backing image
		{"f1", "a.img", "a"},          // relative to b
		{"f1", "file:a.img", "a"},     // literally as in the header of b
		{"f1", "file:b.img", ""},      // states a protocol, and no header says so
		{"f1", "/vm/disk/c.img", ""},  // not below
		{"c", "/vm/base/b.img", "b"},  // c itself is no filter
		{"f2", "/vm/base/b.img", ""},  // b is where the search starts
		{"f2", "/vm/base/a.img", "a"}, //
		{"a", "/vm/base/a.img", ""},   // nothing is below
		{"f1", "/vm/else/b.img", ""},  // no such file
		{"f1", "nbd://host/b", ""},    //
		{"f1", "", ""},                //
	} {
		if got := nameOf(n[c.active].FindBacking(c.name, resolve)); got != c.want {
			t.Errorf("'%s' below %s is %q, want %q", c.name, c.active, got, c.want)
		}
	}
	// Without a way to resolve paths they are compared as they are.
	if got := nameOf(n["f1"].FindBacking("/vm/base/b.img", nil)); got != "b" {
		t.Errorf("found %q", got)
	}
	if got := n["f1"].FindBacking("/vm/link/b.img", nil); got != nil {
		t.Errorf("found %q", got.Name())
	}
	// A header that has been overridden does not count.
	other := opened(t, g, cowConfig("other", &cowOptions{size: 512, file: "/vm/base/other.img"}, nil))
	if err := g.SetBacking(ctx, n["c"], other); err != nil {
		t.Fatal(err)
	}
	if got := n["f1"].FindBacking("../base/b.img", resolve); got != nil {
		t.Errorf("by an overridden header: %q", got.Name())
	}
	if got := nameOf(n["f1"].FindBacking("../base/other.img", resolve)); got != "other" {
		t.Errorf("the image that is there: %q", got)
	}
}
