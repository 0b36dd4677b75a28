package block_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

func TestG2NodesAndRootsHaveOneNameSpace(t *testing.T) {
	g := newGraph(t)
	n := opened(t, g, disk("node", 512))
	attachID := func(id string) (*block.Root, error) {
		return g.AttachRoot(ctx, block.RootConfig{User: "u", ID: id, Node: n, Shared: all})
	}
	r, err := attachID("root")
	if err != nil {
		t.Fatal(err)
	}
	_, err = attachID("root")
	wantText(t, "second root", err, "Device with id 'root' already exists")
	_, err = attachID("node")
	wantText(t, "root like a node", err, "Device name 'node' conflicts with an existing node name")
	_, err = attachID("1")
	wantText(t, "malformed", err, "Invalid device name '1'")
	_, err = g.Open(ctx, disk("root", 512))
	wantText(t, "node like a root", err, "node-name=root is conflicting with a device id")
	if m := open(t, g, ref("root")); m != n {
		t.Errorf("the root's name leads to node '%s'", m.Name())
	} else {
		release(t, g, m)
	}
	_, err = g.Open(ctx, ref("none"))
	wantText(t, "lookup", err, "Cannot find device='none' nor node-name='none'")
	_, err = g.FindNode("none")
	wantText(t, "lookup of a node", err, "Failed to find node with node-name='none'")
	detach(t, r)
	release(t, g, open(t, g, disk("root", 512))) // the name is free
	// A root that cannot be attached has taken no name.
	b := attach(t, n, "b", 0, 0)
	_, err = g.AttachRoot(ctx, block.RootConfig{User: "u", ID: "x", Node: n, Perm: rd, Shared: all})
	wantError(t, err, block.ErrBusy, "Permission conflict")
	release(t, g, open(t, g, disk("x", 512)))
	detach(t, b)
}

func TestG19WhatTheBackingNodeIs(t *testing.T) {
	stores := map[string]*blocktest.Store{
		"top": imgFile("base", "img"), "base": imgFile("", ""), "other": imgFile("", ""), "alone": imgFile("", ""),
		"json": imgFile(`json:{"driver":"raw"}`, "img"), "noformat": imgFile("base", ""), "nameless": imgFile("file:", "raw"), "gone": imgFile("none", "raw"),
		"proto": imgFile("nbd:x", "raw"),
	}
	g, _ := namedGraph(t, stores)
	openedText(t, g, "", "img,node-name=node,file.filename=other,read-only=on")
	for _, c := range []struct{ name, text, want string }{
		{"top", "", "img base"},
		{"top", "backing=", ""},
		{"", `{"file": {"filename": "top"}, "backing": null}`, ""},
		{"top", "backing=node", "img other"},
		{"top", "backing.file.filename=other", "img other"},
		{"top", "backing.filename=other", "img other"},
		{"top", "backing.driver=raw,backing.file.filename=other", "raw other"},
		{"top", "backing.driver=file,backing.filename=other", "file other"},
		{"top", "backing.driver=raw", "raw base"},      // the file of the header
		{"top", "backing.read-only=off", "img base"},   // file and format of the header
		{"noformat", "backing.driver=raw", "raw base"}, //
		{"noformat", "", "img base"},                   // the driver may refuse that; this one has it probed
		{"alone", "", ""},
		{"alone", "backing=node", "img other"},
	} {
		n, err := openText(g, c.name, c.text)
		if err != nil {
			t.Errorf("%s %s: %v", c.name, c.text, err)
			continue
		}
		got := ""
		if e := n.Backing(); e != nil {
			b := e.Node()
			got = b.Driver().Name + " " + b.ExactFilename()
			if c.text == "backing.read-only=off" && b.ReadOnly() {
				t.Errorf("%s %s: the backing node is read-only", c.name, c.text)
			}
		}
		if got != c.want {
			t.Errorf("%s %s: backing node '%s', want '%s'", c.name, c.text, got, c.want)
		}
		release(t, g, n)
	}
	for _, c := range []struct{ name, text, want string }{
		{"json", "", `Could not open backing file: backing file 'json:{"driver":"raw"}': json: names in image headers are not followed; name the backing node in the configuration`},
		{"nameless", "", "Could not open backing file: backing file 'file:' has no file name"},
		{"gone", "", "Could not open backing file: Could not open 'none': no such file or directory"},
		{"proto", "", "Could not open backing file: Unknown protocol 'nbd' (a file of this name is './nbd:x')"},
		{"top", "backing=none", "Could not open backing file: Cannot find device='none' nor node-name='none'"},
		{"alone", "backing.read-only=on", "Could not open backing file: Must specify either driver or file"},
		{"alone", "backing.driver=img", `Could not open backing file: A block device must be specified for "file"`},
		{"alone", "driver=raw,backing=node", "Driver doesn't support backing files"},
		{"stores", "backing=node", "Could not open 'stores': no such file or directory"},
	} {
		n, err := openText(g, c.name, c.text)
		if err == nil {
			release(t, g, n)
		}
		wantText(t, c.name+" "+c.text, err, c.want)
	}
	stores["plain"] = blocktest.NewStore(512)
	_, err := openText(g, "plain", "backing=node")
	wantText(t, "probed raw with a backing node", err, "Driver doesn't support backing files")
}

func TestG3AutoReadOnly(t *testing.T) {
	stores := map[string]*blocktest.Store{"x": imgFile("base", "img"), "base": imgFile("", ""), "free": blocktest.NewStore(512)}
	g, f := namedGraph(t, stores)
	f.locked["x"] = true
	_, err := openText(g, "x", "")
	wantError(t, err, syscall.EACCES, "Could not open 'x'")
	_, err = openText(g, "x", "auto-read-only=on,file.auto-read-only=off")
	wantError(t, err, syscall.EACCES, "Could not open 'x'")
	// Without the right to fall back the image needs what its file cannot give.
	_, err = openText(g, "x", "file.auto-read-only=on")
	wantError(t, err, block.ErrReadOnly, "is read-only")
	n := openedText(t, g, "x", "auto-read-only=on")
	if !n.ReadOnly() || !n.Child("file").Node().ReadOnly() {
		t.Errorf("image read-only %t, file %t", n.ReadOnly(), n.Child("file").Node().ReadOnly())
	}
	if p := n.Child("file").Perm(); p&(wr|rs) != 0 {
		t.Errorf("the image holds '%s' on its file", p)
	}
	_, err = g.AttachRoot(ctx, block.RootConfig{User: "u", Node: n, Perm: wr, Shared: all})
	wantError(t, err, block.ErrReadOnly, "Block node '"+n.Name()+"' is read-only")
	if w := openedText(t, g, "free", "auto-read-only=on"); w.ReadOnly() || w.Child("file").Node().ReadOnly() {
		t.Errorf("an image that can be written is read-only")
	}
	// A driver that has no reason to tell.
	g = blocktest.NewGraph(t, &block.Driver{Name: "rom", Open: func(ctx context.Context, o *block.Opening) (block.Instance, error) {
		return nil, errors.Join(o.AutoReadOnly(ctx, nil), errors.New("end"))
	}})
	_, err = openText(g, "", "rom")
	wantText(t, "writable", err, "Image is read-only\nend")
	for _, text := range []string{"rom,read-only=on", "rom,auto-read-only=on"} {
		_, err = openText(g, "", text)
		wantText(t, text, err, "end")
	}
}

// An overlayCloser is the storage of a temporary overlay.
type overlayCloser struct {
	closed bool
	err    error
}

func (c *overlayCloser) Close() error { c.closed = true; return c.err }

func TestG20TemporaryOverlay(t *testing.T) {
	x := imgFile("", "")
	stores := map[string]*blocktest.Store{"x": x, "plain": blocktest.NewStore(4096)}
	g, _ := namedGraph(t, stores)
	_, err := openText(g, "x", "snapshot=on")
	wantText(t, "no overlays here", err, "Could not create temporary overlay: this program has none")
	var storage overlayCloser
	sizes := []int64{}
	var fail error
	g.TemporaryOverlays(func(_ context.Context, _ *block.Graph, size int64) (block.Overlay, error) {
		storage = overlayCloser{}
		sizes = append(sizes, size)
		stores["overlay"] = imgFile("", "")
		file := &block.Config{Driver: "file", Options: &fileOptions{Filename: "overlay"}}
		return block.Overlay{Config: &block.Config{Driver: "img", Children: map[string]*block.Config{"file": file}}, Storage: &storage}, fail
	})
	n, err := openText(g, "x", "snapshot=on,node-name=disk,discard=unmap,detect-zeroes=unmap,cache.direct=on")
	if err != nil {
		t.Fatal(err)
	}
	base := n.Backing().Node()
	if n.Name() != "disk" || g.Lookup("disk") != n || base.Child("file").Node().ExactFilename() != "x" {
		t.Errorf("the overlay is '%s', over '%s'", n.Name(), base.Filename())
	}
	top, low := n.Config(), base.Config()
	if top.ReadOnly || !top.Unmap || top.DetectZeroes != block.DetectZeroesUnmap || top.Cache != (block.CacheMode{NoFlush: true}) {
		t.Errorf("the overlay has %s", settings(top))
	}
	if !low.ReadOnly || low.DetectZeroes != 0 || low.Cache != (block.CacheMode{Direct: true}) || sizes[0] != base.Size() {
		t.Errorf("the image below has %s, the overlay was made for %d bytes", settings(low), sizes[0])
	}
	r := attach(t, n, "writer", rd|wr, 0)
	before := x.Bytes()
	if err := r.Do(ctx, func(ctx context.Context) error { return r.WriteAt(ctx, []byte("written"), 1000, 0) }); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, x.Bytes()) {
		t.Errorf("a write reached the image")
	}
	detach(t, r)
	if storage.closed {
		t.Errorf("the storage was closed with the node open")
	}
	release(t, g, n)
	if !storage.closed {
		t.Errorf("the storage is not closed")
	}
	ro, err := openText(g, "x", "snapshot=on,read-only=on")
	if err != nil || !ro.ReadOnly() {
		t.Errorf("a read-only snapshot: %v", err)
	} else {
		storage.err = io.ErrClosedPipe
		wantError(t, g.Release(ctx, ro), io.ErrClosedPipe)
	}
	_, err = openText(g, "", "many,children.0.driver=raw,children.0.file.filename=plain,children.0.snapshot=on")
	wantText(t, "snapshot of a child", err, "Block format 'raw' does not support the option 'snapshot'")
	_, err = g.Open(ctx, &block.Config{Driver: "raw", Children: map[string]*block.Config{"file": {Filename: "plain", Snapshot: true}}})
	wantError(t, err, block.ErrInvalid, "snapshot=on is for the node on top only")
	_, err = g.Open(ctx, &block.Config{Children: map[string]*block.Config{"file": {Filename: "plain", Snapshot: true}}})
	wantError(t, err, block.ErrInvalid, "snapshot=on is for the node on top only")
	fail = syscall.ENOSPC
	_, err = openText(g, "x", "snapshot=on")
	wantText(t, "no space", err, "Could not create temporary overlay: no space left on device")
	if left := g.Nodes(); len(left) > 0 {
		t.Errorf("%d nodes are left", len(left))
	}
}

func TestG25FileNames(t *testing.T) {
	stores := map[string]*blocktest.Store{
		"/d/top": imgFile("base", "img"), "/d/base": imgFile("low", "raw"), "/d/low": blocktest.NewStore(4096), "/d/alone": imgFile("", ""),
		"/d/<&>": imgFile("", ""),
	}
	g, _ := namedGraph(t, stores)
	openedText(t, g, "", "img,node-name=node,file.filename=/d/alone,read-only=on")
	openedText(t, g, "", "driver=img,node-name=basenode,file.filename=/d/base,read-only=on")
	openedText(t, g, "", "driver=raw,node-name=rawbase,file.filename=/d/base,read-only=on")
	const alone = `"file":{"driver":"file","filename":"/d/alone"}`
	for _, c := range []struct{ text, exact, json string }{
		{"file,filename=/d/alone", "/d/alone", ""},
		{"file,filename=/d/alone,locking=off,read-only=on,cache.direct=on", "/d/alone", ""}, // changes nothing that is read
		{"img,file.filename=/d/alone", "/d/alone", ""},
		{"img,file.filename=/d/alone,lazy=on,cache-size=1M,detect-zeroes=on", "/d/alone", ""},
		{"img,file.filename=/d/alone,offset=0", "/d/alone", ""}, // the default
		{"img,file.filename=/d/alone,offset=512", "", `{"driver":"img",` + alone + `,"offset":512}`},
		{"img,file.filename=/d/alone,encrypt.key=k,paths.0=a,paths.1=b", "", `{"driver":"img","encrypt":{"key":"k"},` + alone + `,"paths":["a","b"]}`},
		{"img,file.filename=/d/top", "/d/top", ""},
		{"img,file.filename=/d/top,backing=basenode", "/d/top", ""}, // what the header says
		{"img,file.filename=/d/top,backing=rawbase", "", `{"backing":{"driver":"raw","file":{"driver":"file","filename":"/d/base"}},"driver":"img","file":{"driver":"file","filename":"/d/top"}}`},
		{"img,file.filename=/d/top,backing=node", "", `{"backing":{"driver":"img",` + alone + `},"driver":"img","file":{"driver":"file","filename":"/d/top"}}`},
		{"img,file.filename=/d/top,backing=", "", `{"backing":null,"driver":"img","file":{"driver":"file","filename":"/d/top"}}`},
		{"img,file.filename=/d/top,backing.backing=node", "", `{"backing":{"backing":{"driver":"img",` + alone + `},"driver":"img","file":{"driver":"file","filename":"/d/base"}},"driver":"img","file":{"driver":"file","filename":"/d/top"}}`},
		{"img,file.filename=/d/alone,backing=node", "", `{"backing":{"driver":"img",` + alone + `},"driver":"img",` + alone + `}`},
		{"pass,file.driver=file,file.filename=/d/alone", "", `{"driver":"pass",` + alone + `}`}, // a filter has no plain name
		{"img,file.driver=pass,file.file.driver=file,file.file.filename=/d/alone", "", `{"driver":"img","file":{"driver":"pass",` + alone + `}}`},
		{"raw,file.driver=img,file.file.filename=/d/alone", "", `{"driver":"raw","file":{"driver":"img",` + alone + `}}`},
		{"many,children.0=node,children.1=basenode", "", `{"children":[{"driver":"img",` + alone + `},{"driver":"img","file":{"driver":"file","filename":"/d/base"}}],"driver":"many"}`},
		{"pass,file.driver=file,file.filename=/d/<&>", "", `{"driver":"pass","file":{"driver":"file","filename":"/d/<&>"}}`},
	} {
		n, err := openText(g, "", c.text+",node-name=it")
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		want := c.exact
		if want == "" {
			want = "json:" + c.json
		}
		if n.ExactFilename() != c.exact || n.Filename() != want {
			t.Errorf("%s:\n got exact '%s', %s\nwant exact '%s', %s", c.text, n.ExactFilename(), n.Filename(), c.exact, want)
		}
		// The name opens the same again.
		name, tree := n.Filename(), treeOf(n)
		driver := ""
		if c.exact != "" {
			driver = "driver=" + n.Driver().Name
		}
		release(t, g, n)
		again, err := openText(g, name, driver)
		if err != nil {
			t.Errorf("%s: %s does not open: %v", c.text, name, err)
			continue
		}
		if got := treeOf(again); got != tree {
			t.Errorf("%s: %s opens\n%s\ninstead of\n%s", c.text, name, got, tree)
		}
		release(t, g, again)
	}
}

// treeOf describes what a node reads.
func treeOf(n *block.Node) string {
	s := n.Driver().Name
	switch o := n.Config().Options.(type) {
	case *fileOptions:
		s += " " + o.Filename
	case *imgOptions:
		s += fmt.Sprint(" ", o.Offset, o.Key, o.Paths)
	}
	for _, e := range n.Children() {
		s += fmt.Sprintf(" %s(%s)", e.Name(), treeOf(e.Node()))
	}
	return s
}

func TestG31AllowedDrivers(t *testing.T) {
	stores := map[string]*blocktest.Store{"x": imgFile("base", "raw"), "base": blocktest.NewStore(512)}
	for _, c := range []struct {
		rw, ro     []string
		text, want string
	}{
		{nil, nil, "img", ""},
		{[]string{"img", "file", "raw"}, nil, "img", ""},
		{[]string{"img", "file"}, []string{"raw"}, "img", ""}, // the backing file is read-only
		{[]string{"img", "file"}, []string{"raw", "img"}, "img", ""},
		{[]string{"img", "file"}, nil, "img", "Could not open backing file: Driver 'raw' is not whitelisted"},
		{[]string{"img"}, []string{"file", "raw"}, "img", "Driver 'file' can only be used for read-only devices"},
		{[]string{"img"}, []string{"file", "raw"}, "img,read-only=on", ""},
		{[]string{}, []string{"file", "raw", "img"}, "img,auto-read-only=on", ""},
		{[]string{}, []string{"file", "raw", "img"}, "img", "Driver 'file' can only be used for read-only devices"},
		{[]string{"file", "raw"}, nil, "img", "Driver 'img' is not whitelisted"},
		{[]string{}, []string{}, "img", "Driver 'file' is not whitelisted"},
	} {
		g, _ := namedGraph(t, stores)
		if c.rw != nil || c.ro != nil {
			if err := g.AllowDrivers(c.rw, c.ro); err != nil {
				t.Fatal(err)
			}
		}
		// Probed, so that the file is opened first.
		n, err := openText(g, "", strings.Replace(c.text, "img", "file.filename=x", 1))
		if c.want == "" && err == nil {
			if auto := strings.Contains(c.text, "auto"); n.ReadOnly() != (auto || strings.Contains(c.text, "read-only=on")) {
				t.Errorf("%v %v: %s is read-only: %t", c.rw, c.ro, c.text, n.ReadOnly())
			}
			release(t, g, n)
			continue
		}
		if err == nil {
			release(t, g, n)
		}
		wantText(t, fmt.Sprint(c.rw, c.ro, c.text), err, c.want)
	}
	g, _ := namedGraph(t, nil)
	wantText(t, "unknown driver", g.AllowDrivers([]string{"foo"}, nil), "Unknown driver 'foo'")
}

func TestNoIOTakesNoPermissions(t *testing.T) {
	g, _ := namedGraph(t, map[string]*blocktest.Store{"x": imgFile("base", "raw"), "base": blocktest.NewStore(512)})
	c, err := configure(g, "x", "read-only=on")
	if err != nil {
		t.Fatal(err)
	}
	c.NoIO = true
	n := opened(t, g, c)
	attached(t, n, "looker", rd, all)
	for _, e := range n.Children() {
		if e.Perm() != 0 {
			t.Errorf("'%s' is held on %s", e.Perm(), e.Name())
		}
	}
	// G9: metadata is read nevertheless; a file of metadata is locked as usual.
	if n.Child("file").Node().Config().NoIO || !n.Backing().Node().Config().NoIO {
		t.Errorf("NoIO of the file %t, of the backing node %t", n.Child("file").Node().Config().NoIO, n.Backing().Node().Config().NoIO)
	}
}

const viewText = `export 'a': id one, 1 in flight, drained 1
└─ root (filtered+primary): needs consistent read, write; shares consistent read
   top: img, 4 KiB, read-write, drained 1
   ├─ file (data+metadata+primary): needs consistent read, write, resize; shares consistent read
   │  pass: pass, 4 KiB, read-write
   │  └─ file (filtered+primary): needs consistent read, write, resize; shares consistent read
   │     low: file, 4 KiB, read-write, /d/top
   └─ backing (cow, frozen): needs consistent read; shares consistent read, write unchanged
      base: raw, 1000 bytes, read-only, /d/base
      └─ file (filtered+primary): needs consistent read; shares consistent read, write unchanged
         basefile: file, 1000 bytes, read-only, /d/base
export 'b` + "\uFFFD" + `': 0 in flight
└─ root (filtered+primary): needs nothing; shares consistent read, write, write unchanged, resize
   base: see above
spare: raw, 0 bytes, read-write, inactive, /d/empty
└─ file (filtered+primary): needs nothing; shares consistent read, write, write unchanged, resize
   sparefile: file, 0 bytes, read-write, inactive, /d/empty
`

func TestViewShowsTheGraph(t *testing.T) {
	top := blocktest.StoreOf(append([]byte("IMG||\n"), make([]byte, 4096-6)...))
	g, _ := namedGraph(t, map[string]*blocktest.Store{"/d/top": top, "/d/base": blocktest.NewStore(1000), "/d/empty": blocktest.NewStore(0)})
	base := openedText(t, g, "", "raw,node-name=base,read-only=on,file.filename=/d/base,file.node-name=basefile")
	n := openedText(t, g, "", "img,node-name=top,file.driver=pass,file.node-name=pass,file.file.driver=file,file.file.filename=/d/top,file.file.node-name=low,backing=base")
	openedText(t, g, "", "raw,node-name=spare,active=off,file.filename=/d/empty,file.node-name=sparefile")
	a, err := g.AttachRoot(ctx, block.RootConfig{User: "export 'a'", ID: "one", Node: n, Perm: rd | wr, Shared: rd})
	if err != nil {
		t.Fatal(err)
	}
	defer detach(t, a)
	attached(t, base, "export 'b\x1b'", 0, all)
	thaw, err := g.Freeze(n, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer thaw()
	view := func() (*block.View, string) {
		v := g.View()
		var b strings.Builder
		if err := v.WriteText(&b); err != nil {
			t.Fatal(err)
		}
		return v, b.String()
	}
	lane := a.NewLane(0, nil)
	defer lane.Close()
	request, ok := lane.Begin()
	if !ok {
		t.Fatal("not admitted")
	}
	drained := make(chan error)
	go func() { drained <- g.DrainBegin(ctx, n) }()
	for n.Quiesced() == 0 {
		// The drain counts at once and waits for the request.
	}
	v, text := view()
	if text != viewText {
		t.Errorf("got\n%swant\n%s", text, viewText)
	}
	var dot, js bytes.Buffer
	if err := errors.Join(v.WriteDot(&dot), v.WriteJSON(&js)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"digraph block {", `n1 [shape=ellipse, label="export 'a'\nid one, 1 in flight, drained 1"]`,
		`[shape=box, label="base\nraw, 1000 bytes, read-only, /d/base"]`, "n1 -> n9 [label=\"root\\nfiltered+primary\\nneeds consistent read, write\\nshares consistent read\"]",
	} {
		if !strings.Contains(dot.String(), want) {
			t.Errorf("no '%s' in\n%s", want, &dot)
		}
	}
	var graph struct {
		Nodes []struct {
			ID         int
			Type, Name string
			Drained    int
			InFlight   *int `json:"in-flight"`
			Size       *int64
		}
		Edges []struct {
			Parent, Child int
			Name          string
			Role          []string
			Perm          []string
			Shared        []string `json:"shared-perm"`
			Frozen        bool
		}
	}
	if err := json.Unmarshal(js.Bytes(), &graph); err != nil {
		t.Fatal(err)
	}
	if len(graph.Nodes) != 9 || len(graph.Edges) != 7 || graph.Nodes[0].Type != "block-backend" || *graph.Nodes[0].InFlight != 1 || *graph.Nodes[2].Size != 1000 {
		t.Errorf("JSON: %s", &js)
	}
	if e := graph.Edges[0]; fmt.Sprint(e.Role, e.Perm, e.Shared) != "[filtered primary] [consistent-read write] [consistent-read]" {
		t.Errorf("first edge: %+v", e)
	}
	lane.End(request)
	if err := <-drained; err != nil {
		t.Fatal(err)
	}
	g.DrainEnd(n)
	if _, text := view(); text == viewText || strings.Contains(text, "drained") {
		t.Errorf("after the drain:\n%s", text)
	}
}

func FuzzOptions(f *testing.F) {
	for _, s := range []string{"img,file.filename=x", "a=b,,c,d=e", `{"driver":"img","file":{"filename":"x"},"l":[1,null,true]}`, "children.0=a,children.1.driver=b",
		`file.filename=json:{"driver":"file"}`, `{"a.b":{"c.d":1}}`, "backing=,file=x", "x.0=1,x.2=3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		g, _ := namedGraph(t, map[string]*blocktest.Store{"x": imgFile("", "")})
		o, err := block.ParseOptions(text, "driver")
		if err != nil {
			return
		}
		js, err := json.Marshal(o)
		if err != nil {
			t.Fatalf("%q cannot be written: %v", text, err)
		}
		if !utf8.ValidString(text) {
			return // JSON cannot say it
		}
		if again, err := block.ParseOptions(string(js), ""); err != nil {
			t.Errorf("%q gives %s, which cannot be read: %v", text, js, err)
		} else if twice, err := json.Marshal(again); err != nil || !bytes.Equal(js, twice) {
			t.Errorf("%q gives %s, and that gives %s (%v)", text, js, twice, err)
		}
		for _, name := range []string{"", "json:" + text, text} {
			c, err := g.Configure(name, o)
			if err != nil {
				continue
			}
			if n, err := g.Open(ctx, c); err == nil {
				release(t, g, n)
			}
		}
		if left := g.Nodes(); len(left) != 0 {
			t.Errorf("%q leaves %d nodes", text, len(left))
		}
	})
}
