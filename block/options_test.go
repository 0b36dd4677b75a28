package block_test

import (
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

func TestSizesAreBytesOrPowersOf1024(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "512": 512, "1k": 1 << 10, "1K": 1 << 10, "3M": 3 << 20, "3m": 3 << 20, "10G": 10 << 30, "2T": 2 << 40, "1P": 1 << 50,
		"7E": 7 << 60, "0E": 0, "9223372036854775807": math.MaxInt64, "007": 7,
	} {
		if got, err := block.ParseSize(s); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "k", "-1", "+1", "1.5G", "1kk", "1km", "1 M", " 1", "0x10", "1B", "8E", "9223372036854775808", "99999999999999999999", "1_0", "１"} {
		if got, err := block.ParseSize(s); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", s, got)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"0", "1k", "8E", "7E", "9223372036854775807", "kk", "1km"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := block.ParseSize(s)
		if err == nil && (n < 0 || strings.ContainsAny(s, " -+.")) {
			t.Errorf("ParseSize(%q) = %d", s, n)
		}
	})
}

func TestG3CommonOptionsInAllSpellings(t *testing.T) {
	g, _ := namedGraph(t, nil)
	want := &block.Config{
		Driver: "img", NodeName: "n", ReadOnly: true, AutoReadOnly: true, Cache: block.CacheMode{Direct: true, NoFlush: true},
		Unmap: true, DetectZeroes: block.DetectZeroesUnmap, ForceShare: true, Inactive: true,
		Given: block.GivenCacheDirect | block.GivenCacheNoFlush | block.GivenReadOnly | block.GivenAutoReadOnly | block.GivenForceShare | block.GivenDiscard,
		Options: &imgOptions{CacheSize: 1 << 20, Lazy: true, Offset: 512, Key: "k,1=2", Paths: []string{"a", "b"},
			Rules: []rule{{Event: "x", Once: true}, {Event: "y"}}, Limit: new(int64)},
		Children: map[string]*block.Config{
			"file":    {Driver: "file", Options: &fileOptions{Filename: "x", Locking: "off"}, Given: block.GivenReadOnly},
			"backing": {Ref: "base"},
		},
	}
	keyval := "img,node-name=n,cache.direct=on,cache.no-flush=yes,read-only=true,auto-read-only=y,discard=unmap,detect-zeroes=unmap," +
		"force-share=on,active=off,cache-size=1M,lazy=on,offset=512,encrypt.key=k,,1=2,paths.0=a,paths.1=b,rule.0.event=x,rule.0.once=on," +
		"rule.1.event=y,limit=0,file.driver=file,file.filename=x,file.locking=off,file.read-only=off,backing=base"
	nested := `{"driver": "img", "node-name": "n", "cache": {"direct": true, "no-flush": true}, "read-only": true, "auto-read-only": true,
		"discard": "on", "detect-zeroes": "unmap", "force-share": true, "active": false, "cache-size": 1048576, "lazy": true, "offset": 512,
		"encrypt": {"key": "k,1=2"}, "paths": ["a", "b"], "rule": [{"event": "x", "once": true}, {"event": "y"}], "limit": 0,
		"file": {"driver": "file", "filename": "x", "locking": "off", "read-only": false}, "backing": "base"}`
	dotted := strings.NewReplacer(`"cache": {"direct": true, "no-flush": true}`, `"cache.direct": "on", "cache.no-flush": "on"`,
		`"encrypt": {"key": "k,1=2"}`, `"encrypt.key": "k,1=2"`).Replace(nested)
	for spelling, c := range map[string][2]string{
		"keys with dots": {"", keyval}, "JSON": {"", nested}, "JSON with dots": {"", dotted}, "file name": {"json:" + nested, ""},
	} {
		got, err := configure(g, c[0], c[1])
		if err != nil {
			t.Errorf("%s: %v", spelling, err)
		} else if diff := cmp.Diff(want, got, cmp.AllowUnexported(block.Config{})); diff != "" {
			t.Errorf("%s:\n%s", spelling, diff)
		}
	}
	for text, value := range map[string]bool{"unmap": true, "on": true, "ignore": false, "off": false} {
		c, err := configure(g, "", "img,discard="+text)
		if err != nil || c.Unmap != value || c.Given != block.GivenDiscard {
			t.Errorf("discard=%s: %+v, %v", text, c, err)
		}
	}
}

func TestG3RefusedOptions(t *testing.T) {
	g, _ := namedGraph(t, map[string]*blocktest.Store{"x": imgFile("", ""), "plain": blocktest.NewStore(4096)})
	const img = "driver=img,file.driver=file,file.filename=x,"
	for text, want := range map[string]string{
		img + "foo=1":                            "Block format 'img' does not support the option 'foo'",
		img + "foo.bar=1":                        "Block format 'img' does not support the option 'foo.bar'",
		img + "filename=y":                       "Block format 'img' does not support the option 'filename'",
		img + "file.foo=1":                       "Block protocol 'file' doesn't support the option 'foo'",
		"driver=file,filename=x,cache-size=1":    "Block protocol 'file' doesn't support the option 'cache-size'",
		"driver=file,filename=x,file=y":          "Block protocol 'file' doesn't support the option 'file'",
		"pass,file.filename=x,x=1":               "Block format 'pass' does not support the option 'x'",
		"file.filename=x,foo=1":                  "Block format 'img' does not support the option 'foo'", // known when probed
		img + "snapshot=on,file.snapshot=on":     "Block protocol 'file' doesn't support the option 'snapshot'",
		img + "discard=foo":                      "Invalid discard option",
		img + "detect-zeroes=foo":                "Parameter 'detect-zeroes' does not accept value 'foo'",
		img + "file.locking=foo":                 "Parameter 'locking' does not accept value 'foo'",
		img + "read-only=foo":                    "Parameter 'read-only' expects 'on' or 'off'",
		img + "cache.direct=":                    "Parameter 'cache.direct' expects 'on' or 'off'",
		img + "cache=none":                       "Block format 'img' does not support the option 'cache'",
		img + "offset=-1":                        "Parameter 'offset' expects a non-negative number below 2^63",
		img + "offset=1x":                        "Parameter 'offset' expects a size: '1x' is not a size: digits are expected, then nothing or one of k, M, G, T, P, E (powers of 1024)",
		img + "offset.x=1":                       "Invalid parameter type for 'offset', expected: integer",
		img + "offset=1,offset.x=1":              "Parameters 'offset.*' used inconsistently",
		img + "rule=x":                           "Invalid parameter type for 'rule', expected: array of objects",
		img + "rule.1.event=x":                   "Invalid parameter type for 'rule', expected: array of objects",
		img + "rule.0.event=x,rule.0.foo=y":      "Invalid parameter 'rule.0.foo'",
		img + "paths.1=x":                        "Invalid parameter type for 'paths', expected: array of strings",
		img + "force-share=on":                   "force-share=on can only be used with read-only images",
		img + "detect-zeroes=unmap":              "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
		img + "node-name=1":                      "Invalid node-name: '1' (a letter, then letters, digits, '.', '_' and '-')",
		`{"driver":"file","filename":1}`:         "Invalid parameter type for 'filename', expected: string",
		`{"driver":"file","filename":null}`:      "Invalid parameter type for 'filename', expected: string",
		`{"driver":"file","read-only":1}`:        "Invalid parameter type for 'read-only', expected: boolean",
		`{"driver":"file","discard":true}`:       "Invalid parameter type for 'discard', expected: string",
		`{"driver":"img","offset":true}`:         "Invalid parameter type for 'offset', expected: integer",
		`{"driver":"img","paths":"x"}`:           "Invalid parameter type for 'paths', expected: array of strings",
		`{"driver":"img","file":1}`:              "Invalid parameter type for 'file', expected: string or object",
		`{"driver":"img","file":null}`:           "Invalid parameter type for 'file', expected: string or object",
		`{"driver":"raw","offset":1,"file":"f"}`: "Block format 'raw' does not support the option 'offset'",
	} {
		n, err := openText(g, "", text)
		if err == nil {
			release(t, g, n)
		}
		wantText(t, text, err, want)
	}
	if n := len(g.Nodes()); n != 0 {
		t.Errorf("%d nodes are left", n)
	}
}

func TestG3MalformedTexts(t *testing.T) {
	deep := strings.Repeat(`{"a":`, 600) + "1" + strings.Repeat("}", 600)
	for text, want := range map[string]string{
		"=x":                                "Invalid parameter ''",
		",a=b":                              "Invalid parameter ''",
		"a=b,,":                             "", // the value "b,"
		"a=b,c":                             "Expected '=' after parameter 'c'",
		"a..b=c":                            "Invalid parameter 'a..b'",
		"a.=c":                              "Invalid parameter 'a.'",
		"a=1,a=2":                           "Parameter 'a' is given twice",
		"x,driver=y":                        "Parameter 'driver' is given twice",
		`{"a":1,"a":2}`:                     "Could not parse the JSON options: Parameter 'a' is given twice",
		`{"a":{"b":1,"b":2}}`:               "Could not parse the JSON options: Parameter 'a.b' is given twice",
		`{"a":`:                             "Could not parse the JSON options: unexpected EOF",
		`{`:                                 "Could not parse the JSON options: unexpected EOF",
		`{} {}`:                             "Could not parse the JSON options: there is more text behind the object",
		`{"":1}`:                            "Could not parse the JSON options: Invalid parameter ''",
		"{\"a\":\"\xff\"}":                  "Could not parse the JSON options: invalid UTF-8",
		deep:                                "Could not parse the JSON options: Parameter 'a' is nested too deep: at most 512 levels are allowed",
		strings.Repeat("a", 128) + "=":      "Parameter '" + strings.Repeat("a", 127) + "...' is too long",
		"a=" + strings.Repeat("x", 256<<10): "Options of 262146 bytes are too long: at most 262144 are allowed",
	} {
		_, err := block.ParseOptions(text, "driver")
		if want == "" && err == nil {
			continue
		}
		wantText(t, text[:min(len(text), 40)], err, want)
	}
	if _, err := block.ParseOptions("x", ""); err == nil {
		t.Errorf("a value without a key is accepted")
	}
}

func TestG4DriverOrFile(t *testing.T) {
	g, _ := namedGraph(t, map[string]*blocktest.Store{"x": imgFile("", ""), "y": imgFile("", "")})
	openedText(t, g, "", "file,filename=y,node-name=node")
	for _, c := range []struct{ name, text, want string }{
		{"", "", "Must specify either driver or file"},
		{"", "node-name=a", "Must specify either driver or file"},
		{"", "img,file.read-only=on", "Must specify either driver or file"},
		{"", "foo,file=node", "Unknown driver 'foo'"},
		{"", "img,file.driver=foo", "Unknown driver 'foo'"},
		{"", "img", `A block device must be specified for "file"`},
		{"", "pass", `A block device must be specified for "file"`},
		{"", "file", "The 'file' block driver requires a file name"},
		{"", "img,file=none", "Cannot find device='none' nor node-name='none'"},
		{"", "img,file=node,file.driver=file", "Cannot reference an existing block device with additional options or a new filename"},
		{"", "img,file=node,file.filename=x", "Cannot reference an existing block device with additional options or a new filename"},
		{"x", "file=node", "Can't specify 'file' and 'filename' options at the same time"},
		{"x", "driver=img,file=node", "Can't specify 'file' and 'filename' options at the same time"},
		{"x", "driver=file,filename=y", "Can't specify 'file' and 'filename' options at the same time"},
		{"", "filename=x,file=node", "Can't specify 'file' and 'filename' options at the same time"},
		{"", "img,file.filename=none", "Could not open 'none': no such file or directory"},
		{"x", "file.filename=y", "Can't specify 'file' and 'filename' options at the same time"},
		{"x", "driver=img,file.filename=y", "Can't specify 'file' and 'filename' options at the same time"},
		{"", "raw,file=node,backing=node", "Driver doesn't support backing files"},
		{"", "img,file=node,node-name=node", "Duplicate nodes with node-name='node'"},
	} {
		n, err := openText(g, c.name, c.text)
		if err == nil {
			release(t, g, n)
		}
		wantText(t, c.name+" "+c.text, err, c.want)
	}
	for _, c := range []struct{ name, text, want string }{
		{"x", "", "img < file"},
		{"x", "driver=img", "img < file"},
		{"x", "driver=file", "file"},
		{"x", "file.locking=off", "img < file"},
		{"x", "driver=img,file.driver=file,file.locking=off", "img < file"},
		{"", "img,file=node", "img < file"},
		{"", "file=node", "img < file"},
		{"", "filename=x", "img < file"},
		{"", "file.filename=x", "img < file"},
		{"", "pass,file.file.filename=x", "pass < img < file"},
		{"", "raw,file.driver=img,file.file=node", "raw < img < file"},
		{"", "many,children.0=node,children.1.filename=x", "many < file"}, // see TestG9
	} {
		n, err := openText(g, c.name, c.text)
		if err != nil {
			t.Errorf("%s %s: %v", c.name, c.text, err)
			continue
		}
		if got := shape(n); got != c.want {
			t.Errorf("%s %s: %s, want %s", c.name, c.text, got, c.want)
		}
		release(t, g, n)
	}
	_, err := g.Open(ctx, &block.Config{Ref: "node", Driver: "img"})
	wantText(t, "reference with a driver", err, "Cannot reference an existing block device with additional options or a new filename")
}

// shape lists the drivers down the first children.
func shape(n *block.Node) string {
	s := n.Driver().Name
	if c := n.Children(); len(c) > 0 {
		s += " < " + shape(c[0].Node())
	}
	return s
}

func TestG4ExplicitOptionsAreKeptApart(t *testing.T) {
	g, f := namedGraph(t, map[string]*blocktest.Store{"x": imgFile("base", "img"), "base": imgFile("", "")})
	f.locked["x"] = true
	n := openedText(t, g, "x", "auto-read-only=on,cache.direct=on,node-name=top")
	file, base := n.Child("file").Node(), n.Backing().Node()
	for _, c := range []struct {
		n                                       *block.Node
		explicitRO, effectiveRO, explicitDirect bool
	}{{n, false, true, true}, {file, false, true, false}, {base, false, true, false}} {
		explicit, eff := c.n.ExplicitConfig(), c.n.Config()
		if explicit.ReadOnly != c.explicitRO || eff.ReadOnly != c.effectiveRO || explicit.Cache.Direct != c.explicitDirect || !eff.Cache.Direct {
			t.Errorf("%s: explicit %+v, effective %+v", c.n.Name(), explicit, eff)
		}
		if explicit.Driver != c.n.Driver().Name || explicit.Options == nil || explicit.Filename != "" {
			t.Errorf("%s: what was found out is not in the explicit options: %+v", c.n.Name(), explicit)
		}
	}
	if explicit := file.ExplicitConfig(); explicit.Options.(*fileOptions).Filename != "x" || explicit.Given != 0 {
		t.Errorf("file: explicit %+v", explicit)
	}
}

func TestG5JSONNames(t *testing.T) {
	g, _ := namedGraph(t, map[string]*blocktest.Store{"x": imgFile("", ""), "y": imgFile("", ""), "json:{}": imgFile("", "")})
	for _, c := range []struct{ name, text, want string }{
		{"json:", "", "Could not parse the JSON options: unexpected EOF"},
		{"json:{", "", "Could not parse the JSON options: unexpected EOF"},
		{"json:[]", "", "Invalid JSON object given"},
		{"json:1", "", "Invalid JSON object given"},
		{`json:{"driver":"img"}`, "", `A block device must be specified for "file"`},
		{`json:{"driver":"img","foo":1,"file":{"filename":"x"}}`, "", "Block format 'img' does not support the option 'foo'"},
		{"", "img,file.filename=json:[]", "Invalid JSON object given"},
		// Not for other children, and not where a driver takes the name.
		{"", `many,children.0.driver=img,children.0.file.filename=x,children.1.filename=json:{"driver":"file"}`, "Could not open './json:{\"driver\":\"file\"}': no such file or directory"},
		{"", "file,filename=json:{", "Could not open 'json:{': no such file or directory"},
	} {
		n, err := openText(g, c.name, c.text)
		if err == nil {
			release(t, g, n)
		}
		wantText(t, c.name+" "+c.text, err, c.want)
	}
	file := func(n *block.Node) string { return n.Child("file").Node().ExactFilename() }
	for _, c := range []struct{ name, text, want string }{
		{`json:{"driver":"img","file":{"driver":"file","filename":"x"}}`, "", "x"},
		{`json:{"driver":"img","file.driver":"file","file.filename":"x"}`, "", "x"},
		{`json:{"filename":"x"}`, "", "x"},
		{`json:{"filename":"json:{\"filename\":\"x\"}"}`, "", "x"},
		{`json:{"driver":"foo","file":{"filename":"x"}}`, "driver=img", "x"}, // what is given directly counts
		{`json:{"driver":"img","file":{"filename":"y"}}`, "file.filename=x", "x"},
		{`json:{"driver":"img","file":{"filename":"x","locking":"off"}}`, "file.locking=on", "x"},
		{"", `img,file.filename=json:{"driver":"file",,"filename":"x"}`, "x"},
	} {
		n, err := openText(g, c.name, c.text)
		if err != nil {
			t.Errorf("%s %s: %v", c.name, c.text, err)
			continue
		}
		if got := file(n); got != c.want {
			t.Errorf("%s %s opened '%s'", c.name, c.text, got)
		}
		release(t, g, n)
	}
	n := openedText(t, g, `json:{"driver":"img","read-only":true,"file":{"filename":"x"}}`, "read-only=off")
	if n.ReadOnly() {
		t.Errorf("read-only of json: precedes the option given directly")
	}
}

func TestG6NamesCombine(t *testing.T) {
	for _, c := range []struct{ base, name, want string }{
		{"/a/b/top", "base", "/a/b/base"},
		{"/a/b/top", "../base", "/a/b/../base"},
		{"top", "base", "base"},
		{"dir/top", "file:base", "dir/base"},
		{"/a/top", "/abs/base", "/abs/base"},
		{"/a/top", "file:/abs/base", "/abs/base"},
		{"/a/top", "./x:y", "/a/./x:y"},
		{"/a/top", "x:y", "x:y"},
		{"/a/top", "file:x:y", "/a/x:y"},
		{"top", "file:x:y", "./x:y"},
		{"file:dir/top", "base", "dir/base"},
		{"/a/top", "", ""},
		{"/a/top", "file:", ""},
		{"", "base", "base"},
	} {
		if got := block.CombineNames(c.base, c.name); got != c.want {
			t.Errorf("'%s' in '%s' is '%s', want '%s'", c.name, c.base, got, c.want)
		}
	}
}

func TestG6BackingNamesAreRelativeToTheImage(t *testing.T) {
	top := imgFile("base", "img")
	g, _ := namedGraph(t, map[string]*blocktest.Store{
		"/a/top": top, "/a/base": imgFile("file:../b/low", "raw"), "/a/../b/low": blocktest.NewStore(4096), "base": imgFile("", ""), "file:base": nil,
	})
	// Through any number of nodes down to the file.
	for _, text := range []string{"file.filename=/a/top", "img,file.driver=pass,file.file.driver=raw,file.file.file.filename=/a/top"} {
		n, err := openText(g, "", text)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		var names []string
		for b := n.Backing(); b != nil; b = b.Node().Backing() {
			names = append(names, b.Node().ExactFilename())
		}
		if got := strings.Join(names, " "); got != "/a/base /a/../b/low" {
			t.Errorf("%s: backing files %s", text, got)
		}
		release(t, g, n)
	}
	memory := block.Config{Driver: "img", Children: map[string]*block.Config{"file": blocktest.MemoryConfig(top)}}
	_, err := g.Open(ctx, &memory)
	wantText(t, "relative to nothing", err, "Could not open backing file: Cannot use relative backing file names for 'base': Cannot generate a base directory for memory nodes")
}

func TestG7FileNameToProtocol(t *testing.T) {
	g, f := namedGraph(t, map[string]*blocktest.Store{})
	for name, want := range map[string]struct{ driver, filename string }{
		"x": {"file", "x"}, "/x": {"file", "/x"}, "./x:y": {"file", "./x:y"}, "d/x:y": {"file", "d/x:y"},
		"file:x": {"file", "x"}, "file:/x": {"file", "/x"}, "file:x:y": {"file", "./x:y"}, "file:file:x": {"file", "./file:x"},
		"/dev/x": {"device", "/dev/x"}, "x:dev/y": {"device", "x:dev/y"}, // looking goes first
		"device:/x": {"device", "/x"}, "memory://": {"memory", ""},
	} {
		f.stores[want.filename] = blocktest.NewStore(512)
		c, err := g.ProtocolConfig(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		filename := ""
		if o, ok := c.Options.(*fileOptions); ok {
			filename = o.Filename
		}
		if c.Driver != want.driver || filename != want.filename {
			t.Errorf("%s: driver %s, file name %s", name, c.Driver, filename)
		}
		if want.driver == "memory" {
			continue
		}
		n := openedText(t, g, name, "driver=raw")
		if got := n.Child("file").Node(); got.Driver().Name != want.driver || got.ExactFilename() != want.filename {
			t.Errorf("%s: opened by %s, file name %s", name, got.Driver().Name, got.ExactFilename())
		}
	}
	for name, want := range map[string]string{
		"nbd://x": "Unknown protocol 'nbd' (a file of this name is './nbd://x')",
		"img:x":   "Unknown protocol 'img' (a file of this name is './img:x')", // a format is no protocol
		":x":      "Unknown protocol '' (a file of this name is './:x')",
		"file:":   "The 'file' block driver requires a file name",
	} {
		_, err := openText(g, name, "")
		wantText(t, name, err, want)
	}
}

func TestG8FormatIsProbed(t *testing.T) {
	img := imgFile("", "")
	g, f := namedGraph(t, map[string]*blocktest.Store{"img": img, "plain": blocktest.NewStore(4096), "empty": blocktest.NewStore(0), "short": blocktest.StoreOf([]byte("IMG|"))})
	for name, want := range map[string]string{"img": "img", "plain": "raw", "empty": "raw"} {
		n := openedText(t, g, name, "")
		if got := n.Driver().Name; got != want || !n.Config().Probed {
			t.Errorf("%s: format %s, probed %t", name, got, n.Config().Probed)
		}
	}
	_, err := openText(g, "short", "")
	wantText(t, "a header alone", err, "Image is not in img format")
	n := openedText(t, g, "img", "driver=raw")
	if n.Driver().Name != "raw" || n.Config().Probed {
		t.Errorf("a stated format was probed")
	}
	// A user of the file who shares nothing is not disturbed by the probe, which takes no permission.
	f.stores["used"] = imgFile("", "")
	file := openedText(t, g, "", "file,filename=used,node-name=used")
	r := attached(t, file, "somebody", rd|wr, 0)
	_, err = openText(g, "", "file=used")
	wantError(t, err, block.ErrBusy, "Permission conflict on node 'used'", r.User()) // of the image, once its format is known
}

func TestG9WhichChildrenAreProbed(t *testing.T) {
	g, _ := namedGraph(t, map[string]*blocktest.Store{"x": imgFile("y", ""), "y": imgFile("", ""), "z": imgFile("", "")})
	for text, want := range map[string]string{
		"img,file.filename=z":                                   "img < file",               // the file of a format never is
		"raw,file.filename=z":                                   "raw < file",               //
		"pass,file.filename=z":                                  "pass < img < file",        // a filter's child is where the filter is
		"pass,file.driver=pass,file.file.filename=z":            "pass < pass < img < file", //
		"raw,file.driver=pass,file.file.filename=z":             "raw < pass < file",        //
		"many,children.0.filename=z":                            "many < img < file",        // data of no format is
		"raw,file.driver=many,file.children.0.filename=z":       "raw < many < img < file",  //
		"many,children.0.driver=raw,children.0.file.filename=z": "many < raw < file",        //
	} {
		n, err := openText(g, "", text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := shape(n); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
		release(t, g, n)
	}
	// A backing file that the configuration names is.
	n := openedText(t, g, "x", "backing.file.filename=y")
	if b := n.Backing().Node(); b.Driver().Name != "img" {
		t.Errorf("backing node of driver %s", b.Driver().Name)
	}
}

func TestG9Inheritance(t *testing.T) {
	g, _ := namedGraph(t, map[string]*blocktest.Store{"x": imgFile("", ""), "y": imgFile("", "")})
	for _, c := range []struct{ parent, child, want string }{
		// of the parent, of the child, what the file and the backing node are: read-only, auto, direct, no-flush, force-share, unmap
		{"", "", "file rw unmap, backing ro unmap"},
		{"cache.direct=on,cache.no-flush=on", "", "file rw direct no-flush unmap, backing ro direct no-flush unmap"},
		{"cache.direct=on,cache.no-flush=on", "cache.direct=off", "file rw no-flush unmap, backing ro no-flush unmap"},
		{"", "cache.direct=on", "file rw direct unmap, backing ro direct unmap"},
		{"read-only=on", "", "file ro unmap, backing ro unmap"},
		{"read-only=on", "read-only=off", "file rw unmap, backing rw unmap"},
		{"", "read-only=on", ""},
		{"auto-read-only=on", "", "file rw auto unmap, backing ro unmap"},
		{"auto-read-only=on", "auto-read-only=off", "file rw unmap, backing ro unmap"},
		{"read-only=on,force-share=on", "", "file ro force-share unmap, backing ro force-share unmap"},
		{"read-only=on,force-share=on", "force-share=off", "file ro unmap, backing ro unmap"},
		{"discard=unmap", "", "file rw unmap, backing ro unmap"},
		{"", "discard=ignore", "file rw, backing ro"},
		{"detect-zeroes=on", "", "file rw unmap, backing ro unmap"}, // not inherited
	} {
		text := "img,node-name=n,file.filename=x,backing.driver=img,backing.file.filename=y"
		if c.parent != "" {
			text += "," + c.parent
		}
		if c.child != "" {
			text += ",file." + c.child + ",backing." + c.child
		}
		n, err := openText(g, "", text)
		if c.want == "" {
			wantText(t, text, err, "Block node '"+lastAuto(err)+"' is read-only")
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		var got []string
		for _, e := range n.Children() {
			got = append(got, e.Name()+" "+settings(e.Node().Config()))
		}
		if s := strings.Join(got, ", "); s != c.want {
			t.Errorf("%s:\n got %s\nwant %s", text, s, c.want)
		}
		// What is below the backing node inherits from it.
		if b := n.Backing().Node(); settings(b.Child("file").Node().Config()) != settings(b.Config()) && c.child != "discard=ignore" {
			t.Errorf("%s: the file of the backing node is %s", text, settings(b.Child("file").Node().Config()))
		}
		release(t, g, n)
	}
}

// settings writes what is inherited.
func settings(c *block.Config) string {
	s := "rw"
	if c.ReadOnly {
		s = "ro"
	}
	for _, o := range []struct {
		on   bool
		name string
	}{{c.AutoReadOnly, "auto"}, {c.Cache.Direct, "direct"}, {c.Cache.NoFlush, "no-flush"}, {c.ForceShare, "force-share"}, {c.Unmap, "unmap"}} {
		if o.on {
			s += " " + o.name
		}
	}
	return s
}

// lastAuto is the made-up node name in an error.
func lastAuto(err error) string {
	if err == nil {
		return ""
	}
	_, rest, _ := strings.Cut(err.Error(), "'")
	name, _, _ := strings.Cut(rest, "'")
	return name
}
