package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// content reads an export, of bytes or more, through a client of its own.
func content(t testing.TB, uri string) string {
	t.Helper()
	out := filepath.Join(tempDir(t), "copy")
	run(t, "nbdcopy", uri, out)
	return out
}

func TestG3ServesAnyGraph(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	disk := patchyFile(t, in("disk"), 31, 8*mib)
	qcow := convert(t, disk, "qcow2", in("disk.qcow2"))
	other := patchyFile(t, in("other"), 32, 8*mib)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", in("top.qcow2"))
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", in("top.qcow2"))
	run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", in("top.qcow2"), in("top.raw"))
	run(t, "qemu-img", "convert", "-O", "raw", fmt.Sprintf(`json:{"driver":"qcow2","file.filename":"%s","backing.driver":"raw","backing.file.filename":"%s"}`, in("top.qcow2"), other), in("rebased.raw"))
	run(t, "qemu-img", "convert", "-O", "raw", fmt.Sprintf(`json:{"driver":"raw","offset":1048576,"size":3145728,"file":{"driver":"file","filename":"%s"}}`, disk), in("part.raw"))
	run(t, "qemu-img", "convert", "-O", "raw", fmt.Sprintf(`json:{"driver":"qcow2","file.filename":"%s","backing":null}`, in("top.qcow2")), in("alone.raw"))

	for what, c := range map[string]struct {
		want string
		args []string
	}{
		"nodes that refer to each other": {in("top.raw"), []string{
			"--blockdev", "driver=file,node-name=f,filename=" + in("top.qcow2"), "--blockdev", "file,node-name=b,read-only=on,filename=" + qcow,
			"--blockdev", "qcow2,node-name=base,file=b,read-only=on", "--blockdev", "qcow2,node-name=top,file=f,backing=base",
			"--export", "node-name=top"}},
		"one node with children": {in("top.raw"), []string{
			"--blockdev", "driver=qcow2,node-name=top,file.driver=file,file.filename=" + in("top.qcow2"), "--export", "nbd,node-name=top,name=x,description=d,id=e"}},
		"JSON": {in("top.raw"), []string{
			"--blockdev", fmt.Sprintf(`{"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "%s"}}`, in("top.qcow2")), "--export", `{"type": "nbd", "node-name": "top"}`}},
		"backing node overridden": {in("rebased.raw"), []string{
			"--blockdev", "qcow2,node-name=top,file.filename=" + in("top.qcow2") + ",backing.driver=raw,backing.file.driver=file,backing.file.filename=" + other, "--export", "node-name=top"}},
		"no backing node": {in("alone.raw"), []string{"--blockdev", fmt.Sprintf(`{"driver":"qcow2","node-name":"top","backing":null,"file":{"driver":"file","filename":"%s"}}`, in("top.qcow2")), "--export", "node-name=top"}},
		"part of a file": {in("part.raw"), []string{
			"--blockdev", "file,node-name=f,filename=" + disk, "--blockdev", "raw,node-name=part,offset=1M,size=3M,file=f", "--export", "node-name=part"}},
		"part of an image":          {in("part.raw"), []string{"--offset", "1M", "--size", "3M", qcow}},
		"options as IMAGE":          {in("rebased.raw"), []string{fmt.Sprintf(`json:{"driver":"qcow2","file":{"filename":"%s"},"backing":{"file":{"filename":"%s"}}}`, in("top.qcow2"), other), "--read-only"}},
		"a name with options":       {in("rebased.raw"), []string{fmt.Sprintf(`json:{"filename":"%s","backing":{"file":{"filename":"%s"}}}`, in("top.qcow2"), other), "--read-only"}},
		"a part, locked while used": {in("part.raw"), []string{"--offset", "1M", "--size", "3M", "--activation=on-connect", qcow}},
		"a protocol and name":       {disk, []string{"file:" + disk, "-f", "raw"}},
		"filters":                   {in("top.raw"), []string{"--throttle", "iops=100000,bps=1G", "--copy-on-read", in("top.qcow2")}},
		"filters as nodes":          {in("top.raw"), []string{"--blockdev", "throttle,node-name=t,iops-total=100000,file.driver=qcow2,file.file.filename=" + in("top.qcow2"), "--export", "node-name=t"}},
	} {
		t.Run(what, func(t *testing.T) {
			identical(t, "raw", c.want, "raw", content(t, start(t, c.args...).uri()))
		})
	}
}

func TestSeveralExports(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	a, b := patchyFile(t, filepath.Join(dir, "a"), 1, mib), patchyFile(t, filepath.Join(dir, "b"), 2, 2*mib)
	s := start(t, "--print-uri", "--blockdev", "file,node-name=a,filename="+a, "--blockdev", "file,node-name=b,filename="+b, "--export", "node-name=a,writable=on", "--export", "node-name=b,name=second one")
	if got := s.stdout.lines(2); strings.Join(got, " ") != unixURI(s.socket, "a")+" "+unixURI(s.socket, "second%20one") {
		t.Errorf("URIs: %q", got)
	}
	identical(t, "raw", a, "raw", content(t, unixURI(s.socket, "a")))
	identical(t, "raw", b, "raw", content(t, unixURI(s.socket, "second%20one")))
	list := decode[struct {
		Exports []struct {
			Name       string `json:"export-name"`
			Size       int64  `json:"export-size"`
			IsReadOnly bool   `json:"is_read_only"`
		}
	}](t, run(t, "nbdinfo", "--json", "--list", s.uri()))
	if fmt.Sprint(list.Exports) != fmt.Sprintf("[{a %d false} {second one %d true}]", mib, 2*mib) {
		t.Errorf("exports: %v", list.Exports)
	}
	if r := try(t, "nbdinfo", s.uri()); r.code == 0 {
		t.Error("the name \"\" stands for one of two exports")
	}
}

func TestGraphsThatAreRefused(t *testing.T) {
	t.Parallel()
	disk := writeFile(t, filepath.Join(tempDir(t), "disk"), make([]byte, mib))
	node := func(more string) []string {
		return []string{"--blockdev", "driver=raw,node-name=n,file.driver=file,file.filename=" + disk + more, "--export", "node-name=n"}
	}
	for text, args := range map[string][]string{
		"--blockdev node-name=n: Block format 'raw' does not support the option 'foo'":   node(",foo=1"),
		"--blockdev node-name=n: Block protocol 'file' doesn't support the option 'foo'": node(",file.foo=1"),
		"--blockdev: 'node-name' must be specified for the root node":                    {"--blockdev", "raw,file.filename=" + disk, "--export", "node-name=n"},
		"--blockdev node-name=n: Unknown driver 'vmdk'":                                  {"--blockdev", "vmdk,node-name=n", "--export", "node-name=n"},
		"--blockdev node-name=n: Cannot find device='later' nor node-name='later'":       {"--blockdev", "raw,node-name=n,file=later", "--export", "node-name=n"},
		"Could not parse the JSON options: unexpected EOF":                               {"--blockdev", "{", "--export", "node-name=n"},
		"--export: Failed to find node with node-name='m'":                               append(node(""), "--export", "node-name=m"),
		"Parameter 'node-name' is missing":                                               {"--export", "name=x"},
		"Parameter 'type' does not accept value 'fuse'":                                  {"--export", "fuse,node-name=x"},
		"Invalid parameter 'iothread'":                                                   {"--export", "node-name=x,iothread=i"},
		"Duplicate nodes with node-name='n'":                                             append(node(""), node("")[:2]...),
		"NBD server already has export named 'n'":                                        append(node(",read-only=on"), "--export", "node-name=n"),
		"Device name 'n' conflicts with an existing node name":                           append(node(""), "--export", "node-name=n,id=n,name=x"),
		"IMAGE and --export exclude each other":                                          append(node(""), disk),
		"--read-only is about IMAGE; with --export, say it in --blockdev or --export":    append(node(""), "--read-only"),
		"no IMAGE given":                                                           node("")[:2],
		"Driver 'raw' is not whitelisted":                                          append(node(""), "--allow-drivers", "file"),
		"Driver 'file' can only be used for read-only devices":                     append(node(""), "--allow-drivers=raw", "--allow-drivers-read-only=file,qcow2"),
		"Unknown driver 'foo'":                                                     append(node(""), "--allow-drivers", "foo"),
		"force-share=on can only be used with read-only images":                    node(",force-share=on"),
		"Unknown protocol 'nbd'":                                                   {"nbd://localhost"},
		"Can't specify 'file' and 'filename' options at the same time":             {"json:{\"filename\":\"x\",\"file\":\"y\"}"},
		"Invalid JSON object given":                                                {"json:[]"},
		"Could not parse the JSON options":                                         {"json:{]"},
		"--throttle: Parameter 'bps-total' expects a size":                         {"--throttle", "bps=x", disk, "-f", "raw"},
		"--throttle: Block format 'throttle' does not support the option 'colour'": {"--throttle", "colour=1", disk, "-f", "raw"},
	} {
		refusedToServe(t, args, text)
	}
	refusedToServe(t, append(node(",read-only=on")[:2], "--export", "node-name=n,writable=on"), "node 'n' is read-only and cannot be exported writable")
	for _, args := range [][]string{node(",read-only=on"), node("")} {
		s := start(t, append(args, "--allow-drivers=raw,file")...)
		run(t, "nbdinfo", s.uri())
		s.stop()
	}
}

func TestG20SnapshotLeavesNothing(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"raw", "qcow2"} {
		dir, tmp := tempDir(t), tempDir(t)
		source := patchyFile(t, filepath.Join(dir, "source"), 33, 4*mib)
		disk := convert(t, source, format, filepath.Join(dir, "disk"))
		before := checksum(t, disk)
		for _, end := range []func(*server){(*server).stop, (*server).kill} {
			s := startCommandIn(t, tmp, "--snapshot", "--format", format, disk)
			if left, err := os.ReadDir(tmp); err != nil || len(left) != 0 {
				t.Errorf("%s: in the folder for temporary files: %v %v", format, left, err)
			}
			identical(t, "raw", source, "raw", content(t, s.uri()))
			run(t, "qemu-io", "-f", "raw", "-c", "write -P 5 1M 1M", "-c", "flush", s.uri())
			if r := run(t, "qemu-io", "-f", "raw", "-c", "read -P 5 1M 1M", s.uri()); strings.Contains(r, "failed") {
				t.Errorf("%s: what was written does not read: %s", format, r)
			}
			end(s)
			if left, err := os.ReadDir(tmp); err != nil || len(left) != 0 {
				t.Errorf("%s: left in the folder for temporary files: %v %v", format, left, err)
			}
			if checksum(t, disk) != before {
				t.Errorf("%s: the disk has changed", format)
			}
		}
	}
}

// startCommandIn serves with another folder for temporary files.
func startCommandIn(t testing.TB, tmp string, args ...string) *server {
	t.Helper()
	socket := filepath.Join(tempDir(t), "s")
	cmd := command(t, raceBinary, append([]string{"serve", "--listen", "unix:" + socket}, args...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	return startCommand(t, cmd, socket)
}

func TestG3ForceShareLooksAtADiskInUse(t *testing.T) {
	t.Parallel()
	disk := newImage(t)
	holder := start(t, "--format", "qcow2", disk)
	look := []string{"--blockdev", "driver=qcow2,node-name=n,read-only=on,file.driver=file,file.filename=" + disk, "--export", "node-name=n"}
	refusedToServe(t, look, "Is another process using the image", fmt.Sprintf("%d", holder.cmd.Process.Pid))
	look[1] += ",force-share=on"
	s := start(t, look...)
	if got := run(t, "nbdinfo", "--size", s.uri()); got != fmt.Sprintln(16*mib) {
		t.Errorf("size %s", got)
	}
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 5 1M 1M", holder.uri()) // the holder is not disturbed
}

func TestG3AutoReadOnlyAndG7Devices(t *testing.T) {
	t.Parallel()
	file := patchyFile(t, filepath.Join(tempDir(t), "disk"), 34, 4*mib)
	dev := strings.TrimSpace(run(t, "losetup", "-r", "-f", "--show", file))
	t.Cleanup(func() { run(t, "losetup", "-d", dev) })
	refusedToServe(t, []string{dev, "-f", "raw"}, "the device is read-only")
	s := start(t, `json:{"driver":"raw","auto-read-only":true,"file":{"filename":"`+dev+`"}}`)
	identical(t, "raw", file, "raw", content(t, s.uri()))
	if r := try(t, "nbdinfo", "--is", "read-only", s.uri()); r.code != 0 {
		t.Errorf("the export is not read-only: %v", r)
	}
	// An image that can only be read, in a file that could be written.
	bitmap := newImage(t)
	run(t, "qemu-img", "bitmap", "--add", bitmap, "b0")
	auto := `json:{"driver":"qcow2","auto-read-only":true,"file":{"filename":"` + bitmap + `"}}`
	if r := try(t, "nbdinfo", "--is", "read-only", start(t, auto).uri()); r.code != 0 {
		t.Errorf("the export of an image with a bitmap is not read-only: %v", r)
	}
	graph := run(t, raceBinary, "serve", "--print-graph", "--read-only", "-f", "raw", dev)
	if !strings.Contains(graph, "file: host_device, 4 MiB, read-only, "+dev) {
		t.Errorf("the device is not opened as one:\n%s", graph)
	}
}

func TestPrintGraph(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(dir, "base"), "16M")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", filepath.Join(dir, "top"))
	top, base := filepath.Join(dir, "top"), filepath.Join(dir, "base")
	size := func(path string) int64 {
		var st syscall.Stat_t
		if err := syscall.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Size
	}
	args := []string{"serve", "--name", "disk0", "--throttle", "iops=100", top, "--print-graph"}
	want := fmt.Sprintf(`export 'disk0': 0 in flight
└─ root (filtered+primary): needs consistent read, write; shares consistent read, write unchanged
   throttle: throttle, 16 MiB, read-write
   └─ file (filtered+primary): needs consistent read, write; shares consistent read, write unchanged
      disk: qcow2, 16 MiB, read-write, %[1]s
      ├─ file (data+metadata+primary): needs consistent read, write, resize; shares consistent read, write unchanged
      │  file: file, %[3]d bytes, read-write, %[1]s
      └─ backing (cow): needs consistent read; shares consistent read, write unchanged
         #block0: qcow2, 16 MiB, read-only, %[2]s
         └─ file (data+metadata+primary): needs consistent read; shares consistent read, write unchanged
            #block1: file, %[4]d bytes, read-only, %[2]s
`, top, base, size(top), size(base))
	for range 2 { // nothing is locked or left afterwards
		r := try(t, raceBinary, args...)
		if r.code != 0 || r.stderr != "" || r.stdout != want {
			t.Errorf("exit status %d, standard error %s, standard output\n%s\nwant\n%s", r.code, r.stderr, r.stdout, want)
		}
	}
	args[len(args)-1] += "=dot"
	if dot := run(t, raceBinary, args...); !strings.HasPrefix(dot, "digraph block {\n") || strings.Count(dot, "->") != 5 || !strings.HasSuffix(dot, "}\n") {
		t.Errorf("for Graphviz:\n%s", dot)
	}
	args[len(args)-1] = "--print-graph=json"
	graph := decode[struct {
		Nodes []struct{ Type, Name, Driver, Filename string }
		Edges []struct {
			Parent, Child int
			Perm          []string
			Shared        []string `json:"shared-perm"`
		}
	}](t, run(t, raceBinary, args...))
	if len(graph.Nodes) != 6 || len(graph.Edges) != 5 || graph.Nodes[3].Filename != top || graph.Edges[0].Parent != 1 || len(graph.Edges[0].Perm) != 2 {
		t.Errorf("JSON: %+v", graph)
	}
	refused(t, []string{"serve", top, "--print-graph=svg"}, "--print-graph 'svg' is not one of text, dot, json")
	// The file name of a node opens it again.
	name := graph.Nodes[5].Filename
	if !strings.HasPrefix(name, `json:{"driver":"throttle"`) {
		t.Fatalf("the throttle node is called %s", name)
	}
	if r := run(t, raceBinary, "serve", "--print-graph", name); !strings.Contains(r, "disk: throttle, 16 MiB, read-write") {
		t.Errorf("%s opens\n%s", name, r)
	}
}
