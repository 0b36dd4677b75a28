// Package arch holds the directions in which packages may import each other.
package arch

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/nbdserve/nbdserve"

type pkg struct {
	ImportPath string
	Imports    []string
}

// list returns the packages of the module with the imports of their non-test files.
func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", module+"/...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	var pkgs []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

// A rule says what the packages in a folder may import of this module, and, where
// only is set, of the world beyond the standard library.
type rule struct {
	folder string   // path below the module, or a folder with a trailing slash for all in it
	own    []string // folders of this module
	only   []string // modules of others; nil: no rule
}

var rules = []rule{
	{folder: "block", own: nil, only: []string{"golang.org/x/sys"}},
	{folder: "block/blocktest", own: []string{"block", "block/filter"}},
	{folder: "block/filter", own: []string{"block"}},
	{folder: "block/filter/", own: []string{"block", "block/filter"}},
	{folder: "formats/", own: []string{"block"}},
	{folder: "hostdev", own: []string{"block"}},
	{folder: "export", own: []string{"block", "internal/iostat"}},
	{folder: "metrics", own: []string{"block", "internal/iostat"}},
	{folder: "internal/iostat", own: nil, only: []string{}},
	{folder: "internal/arch", own: nil, only: []string{}},
	{folder: "integration", own: nil},
	{folder: "bench/nbdload", own: nil, only: []string{}},
	{folder: "cmd/nbdserve", own: []string{"block", "block/filter/", "export", "formats/", "hostdev", "metrics", "internal/iostat"}},
}

func in(folder, path string) bool {
	if dir, ok := strings.CutSuffix(folder, "/"); ok {
		return strings.HasPrefix(path, dir+"/")
	}
	return path == folder
}

func ruleOf(path string) *rule {
	for i := range rules {
		if in(rules[i].folder, path) {
			return &rules[i]
		}
	}
	return nil
}

// fault tells what is wrong with from importing to, "" for nothing.
func (r *rule) fault(to string) string {
	if own, ok := strings.CutPrefix(to, module+"/"); ok {
		if !slices.ContainsFunc(r.own, func(f string) bool { return in(f, own) }) {
			return "imports run cmd -> {export, metrics, formats, hostdev, block/filter} -> block, and packages of one tier stay apart"
		}
		return ""
	}
	first, _, _ := strings.Cut(to, "/")
	if r.only == nil || !strings.Contains(first, ".") {
		return ""
	}
	if !slices.ContainsFunc(r.only, func(m string) bool { return to == m || strings.HasPrefix(to, m+"/") }) {
		return "only the standard library and " + strings.Join(r.only, ", ") + " are allowed here"
	}
	return ""
}

func TestImportsRunOneWay(t *testing.T) {
	pkgs := list(t)
	if len(pkgs) < 2 {
		t.Fatalf("go list found %d packages", len(pkgs))
	}
	for _, p := range pkgs {
		path := strings.TrimPrefix(p.ImportPath, module+"/")
		r := ruleOf(path)
		if r == nil {
			t.Errorf("package %s has no rule: add it to the table of this test", path)
			continue
		}
		for _, to := range p.Imports {
			if f := r.fault(to); f != "" {
				t.Errorf("%s imports %s: %s", path, to, f)
			}
		}
	}
}

func TestRulesRefuseWhatTheyForbid(t *testing.T) {
	for _, c := range []struct {
		from, to string
		allowed  bool
	}{
		{"block", "golang.org/x/sys/unix", true},
		{"block", "net/http", true},
		{"block", "golang.org/x/sync/errgroup", false},
		{"block", module + "/hostdev", false},
		{"block", module + "/block/blocktest", false},
		{"formats/qcow2", module + "/block", true},
		{"formats/qcow2", module + "/formats/raw", false},
		{"formats/qcow2", module + "/hostdev", false},
		{"formats/qcow2", "github.com/klauspost/compress/zstd", true},
		{"export", module + "/metrics", false},
		{"metrics", module + "/export", false},
		{"cmd/nbdserve", module + "/formats/qcow2", true},
		{"cmd/nbdserve", module + "/block/blocktest", false},
	} {
		if got := ruleOf(c.from).fault(c.to) == ""; got != c.allowed {
			t.Errorf("%s importing %s: allowed = %v, want %v", c.from, c.to, got, c.allowed)
		}
	}
}
