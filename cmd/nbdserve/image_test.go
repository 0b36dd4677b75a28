package main

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// must runs a command of ours that is to succeed, and returns its output.
func must(t *testing.T, args ...string) string {
	t.Helper()
	status, stdout, stderr := runArgs(args...)
	if status != 0 {
		t.Fatalf("%q: status %d, %s", args, status, stderr)
	}
	return stdout
}

// tool runs another program that is to succeed, and returns its output.
func tool(t *testing.T, args ...string) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%q: %v, %s%s", args, err, out, &stderr)
	}
	return string(out)
}

func decode(t *testing.T, text string) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}

// sameJSON compares ours with qemu-img's, but for fields that newer or older versions of it have.
func sameJSON(t *testing.T, ours, theirs string, except ...string) {
	t.Helper()
	a, b := decode(t, ours), decode(t, theirs)
	for _, k := range except {
		delete(a, k)
		delete(b, k)
	}
	x, err := json.Marshal(a) // with sorted keys
	if err != nil {
		t.Fatal(err)
	}
	y, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	if string(x) != string(y) {
		t.Errorf("ours:   %s\ntheirs: %s", x, y)
	}
}

func TestInfoHasTheShapeOfQemuImg(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	tool(t, "qemu-img", "create", "-q", "-f", "raw", path("plain.raw"), "1000k")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", path("base.qcow2"), "10M")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path("top.qcow2"))
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", path("old.qcow2"), "10M")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd,lazy_refcounts=on,refcount_bits=1", path("odd.qcow2"), "10M")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", path("snap.qcow2"), "10M")
	tool(t, "qemu-img", "snapshot", "-c", "one", path("snap.qcow2"))
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", path("sub.qcow2"), "10M")
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		p := path(e.Name())
		sameJSON(t, must(t, "image", "info", "--output=json", p), tool(t, "qemu-img", "info", "--output=json", p))
	}
	human := must(t, "image", "info", path("top.qcow2"))
	if want := tool(t, "qemu-img", "info", path("top.qcow2")); human != want {
		t.Errorf("ours:\n%s\ntheirs:\n%s", human, want)
	}
	if human := must(t, "image", "info", path("snap.qcow2")); !strings.Contains(human, "Snapshot list:\nID") || !strings.Contains(human, "one") {
		t.Errorf("no list of snapshots:\n%s", human)
	}
}

func TestCreatedImagesAreWhatQemuImgMakes(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir+"/base.raw", bytes.Repeat([]byte{1}, 3<<20))
	for _, args := range [][]string{
		{"-f", "raw", "disk", "1000k"},
		{"-f", "raw", "-o", "preallocation=full", "disk", "64k"},
		{"disk", "1M"},
		{"-f", "qcow2", "disk", "10G"},
		{"-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", "disk", "1M"},
		{"-f", "qcow2", "-o", "compat=0.10", "-o", "cluster_size=2M", "disk", "1T"},
		{"-f", "qcow2", "-o", "compression_type=zstd", "disk", "0"},
		{"-f", "qcow2", "-b", "base.raw", "-F", "raw", "disk"},
		{"-f", "qcow2", "-F", "raw", "-b", dir + "/base.raw", "disk", "7M"},
	} {
		ours, theirs := slices.Clone(args), slices.Clone(args)
		at := slices.Index(args, "disk")
		ours[at], theirs[at] = dir+"/ours", dir+"/theirs"
		if out := must(t, append([]string{"image", "create"}, ours...)...); !strings.Contains(out, "Created '"+dir+"/ours'") {
			t.Errorf("%q prints %q", args, out)
		}
		tool(t, append([]string{"qemu-img", "create"}, theirs...)...)
		sameJSON(t, tool(t, "qemu-img", "info", "--output=json", dir+"/ours"), tool(t, "qemu-img", "info", "--output=json", dir+"/theirs"), "filename", "actual-size")
		for _, name := range []string{"ours", "theirs"} {
			if err := os.Remove(dir + "/" + name); err != nil {
				t.Fatal(err)
			}
		}
	}
	if out := must(t, "image", "create", "--quiet", dir+"/q", "1M"); out != "" {
		t.Errorf("--quiet prints %q", out)
	}
}

func TestFailedCreationLeavesThingsAsTheyWere(t *testing.T) {
	dir := t.TempDir()
	if status, _, stderr := runArgs("image", "create", "-f", "qcow2", "-o", "cluster_size=1000", dir+"/new", "1M"); status != 1 || exists(dir+"/new") {
		t.Errorf("status %d, %s; the file exists: %v", status, stderr, exists(dir+"/new"))
	}
	// A disk that is served is not emptied.
	disk := dir + "/disk.qcow2"
	must(t, "image", "create", "-f", "qcow2", disk, "1M")
	p := start(t, command("serve", disk, "--print-uri", "--listen=tcp:localhost:0"))
	p.line()
	for _, format := range []string{"raw", "qcow2"} {
		if status, _, stderr := runArgs("image", "create", "-f", format, disk, "2M"); status != 1 || !strings.Contains(stderr, "lock") {
			t.Errorf("creation over a served disk: status %d, %s", status, stderr)
		}
	}
	p.end()
	if out := must(t, "image", "info", "--output=json", disk); decode(t, out)["virtual-size"] != float64(1<<20) {
		t.Errorf("the disk has changed: %s", out)
	}
}

func TestCheckEndsWithTheStatusOfQemuImg(t *testing.T) {
	dir := t.TempDir()
	good, leaking, broken, raw := dir+"/good", dir+"/leaking", dir+"/broken", dir+"/raw"
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", good, "10M")
	tool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", good)
	data, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	// The refcount block lies in the third cluster. The last cluster is data.
	last := len(data)>>16 - 1
	patch := func(path string, cluster int, refcount byte, extra int) {
		d := append(bytes.Clone(data), make([]byte, extra)...)
		d[2<<16+2*cluster+1] = refcount
		writeFile(t, path, d)
	}
	patch(leaking, last+1, 1, 1<<16)
	patch(broken, last, 0, 0)
	writeFile(t, raw, make([]byte, 4096))
	for _, c := range []struct {
		path   string
		status int
		says   string
	}{
		{good, 0, "No errors were found on the image."},
		{leaking, checkLeaks, "1 leaked clusters were found on the image."},
		{broken, checkCorruptions, "2 errors were found on the image."},
		{raw, checkNone, "This image format does not support checks"},
		{dir + "/none", checkFailed, "no such file"},
	} {
		status, stdout, stderr := runArgs("image", "check", c.path)
		if status != c.status || !strings.Contains(stdout+stderr, c.says) {
			t.Errorf("%s: status %d, want %d: %s%s", c.path, status, c.status, stdout, stderr)
		}
		theirs := exec.Command("qemu-img", "check", "--output=json", c.path)
		out, err := theirs.Output()
		if theirs.ProcessState.ExitCode() != c.status {
			t.Errorf("%s: qemu-img's status is %d (%v), want %d", c.path, theirs.ProcessState.ExitCode(), err, c.status)
		}
		if c.status == checkNone || c.status == checkFailed {
			continue
		}
		status, stdout, stderr = runArgs("image", "check", "--output", "json", c.path)
		if status != c.status {
			t.Errorf("%s: status %d with --output json: %s", c.path, status, stderr)
		}
		sameJSON(t, stdout, string(out))
	}
}

func TestVersionTellsWhatThereIs(t *testing.T) {
	v := decode(t, must(t, "version", "--json"))
	if keys := slices.Sorted(maps.Keys(v)); !slices.Contains(keys, "version") || !slices.Contains(keys, "go-version") {
		t.Errorf("keys: %v", keys)
	}
	for key, want := range map[string]string{"formats": `["qcow2","raw"]`, "protocols": `["file","host_device","null-aio","null-co"]`,
		"filters": `["blkdebug","blkverify","copy-on-read","delay","quorum","throttle"]`} {
		if got, err := json.Marshal(v[key]); err != nil || string(got) != want {
			t.Errorf("%s: %s, %v, want %s", key, got, err, want)
		}
	}
	if text := must(t, "version"); !strings.HasPrefix(text, "nbdserve ") || !strings.Contains(text, "\nformats: qcow2 raw\n") || !strings.Contains(text, "fast-zero") {
		t.Errorf("version: %s", text)
	}
	if text := must(t, "--version"); !strings.HasPrefix(text, "nbdserve version ") {
		t.Errorf("--version: %s", text)
	}
}
