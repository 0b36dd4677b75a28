package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

func testFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "format", Aliases: []string{"f"}},
		&cli.BoolFlag{Name: "read-only", Aliases: []string{"r"}},
		&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}},
		&cli.StringSliceFlag{Name: "listen"},
		optionalFlag{&cli.StringFlag{Name: "graph"}, "text"},
	}
}

func TestOptionsMayStandAnywhere(t *testing.T) {
	for _, c := range []struct{ args, options, operands string }{
		{"disk", "", "disk"},
		{"disk --read-only", "--read-only", "disk"},
		{"--read-only disk", "--read-only", "disk"},
		{"-f raw disk -r", "--format=raw --read-only", "disk"},
		{"disk --format raw", "--format=raw", "disk"},
		{"disk --format=raw", "--format=raw", "disk"},
		{"disk --format=", "--format=", "disk"},
		{"disk -fraw", "--format=raw", "disk"},
		{"disk -rqfraw", "--read-only --quiet --format=raw", "disk"},
		{"disk -qf raw", "--quiet --format=raw", "disk"},
		{"disk --format --read-only", "--format=--read-only", "disk"}, // a value may look like an option
		{"--listen unix:a,b --listen tcp:c disk", "--listen=unix:a,b --listen=tcp:c", "disk"},
		{"disk --graph", "--graph=text", "disk"}, // without a value it has one
		{"--graph dot", "--graph=text", "dot"},
		{"--graph=dot disk", "--graph=dot", "disk"},
		{"-- --read-only", "", "--read-only"},
		{"a -- -r --", "", "a -r --"},
		{"-", "", "-"},
		{"a b", "", "a b"},
		{"", "", ""},
	} {
		options, operands, err := permute(testFlags(), strings.Fields(c.args))
		if err != nil {
			t.Errorf("%q: %v", c.args, err)
		}
		if !slices.Equal(options, strings.Fields(c.options)) || !slices.Equal(operands, strings.Fields(c.operands)) {
			t.Errorf("%q: options %q, operands %q, want %q and %q", c.args, options, operands, c.options, c.operands)
		}
	}
}

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	for args, want := range map[string]string{
		"disk --read-onyl":    "unknown option --read-onyl, did you mean --read-only?",
		"disk --fromat=raw":   "unknown option --fromat, did you mean --format?",
		"disk -x":             "unknown option -x",
		"disk -read-only":     "unknown option -read-only, did you mean --read-only?",
		"disk --f raw":        "unknown option --f",
		"disk --format":       "option --format needs a value",
		"disk -f":             "option -f needs a value",
		"disk --read-only=no": "option --read-only takes no value, but got 'no'",
		"-r disk --read-only": "option --read-only is given twice",
		"-f raw -f qcow2":     "option -f is given twice",
		"--graph --graph=dot": "option --graph is given twice",
	} {
		_, _, err := permute(testFlags(), strings.Fields(args))
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: error %v, want %q", args, err, want)
		}
	}
}

// runArgs runs a whole command line that is expected not to serve.
func runArgs(args ...string) (status int, stdout, stderr string) {
	var out, errs strings.Builder
	status = run(append([]string{"nbdserve"}, args...), &out, &errs)
	return status, out.String(), errs.String()
}

func TestEveryMistakeIsOneLineAndStatus1(t *testing.T) {
	dir := t.TempDir()
	disk := dir + "/disk.raw"
	writeFile(t, disk, make([]byte, 1<<20))
	serve := func(args ...string) []string { return append([]string{"serve", disk}, args...) }
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "no command given (see 'nbdserve --help')"},
		{[]string{"srve", disk}, "unknown command 'srve', did you mean \"serve\"? (see 'nbdserve --help')"},
		{[]string{"--verson"}, "unknown option --verson, did you mean --version?"},
		{[]string{"image"}, "no command given (see 'nbdserve image --help')"},
		{[]string{"image", "inof"}, "unknown command 'inof', did you mean \"info\"?"},
		{[]string{"serve"}, "no IMAGE given (see 'nbdserve serve --help')"},
		{[]string{"serve", ""}, "IMAGE is empty"},
		{serve("other"), "one IMAGE is expected, but got 2"},
		{serve("--read-onyl"), "unknown option --read-onyl, did you mean --read-only? (see 'nbdserve serve --help')"},
		{serve("--format", "vmdk"), "--format 'vmdk' is not one of qcow2, raw"},
		{serve("--cache", "none2"), "--cache 'none2' is not one of writeback, none, writethrough, directsync, unsafe"},
		{serve("--discard", "on"), "--discard 'on' is not one of unmap, ignore"},
		{serve("--detect-zeroes", "maybe"), "--detect-zeroes 'maybe' is not one of off, on, unmap"},
		{serve("--detect-zeroes=unmap", "--discard=ignore"), "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"},
		{serve("--offset", "1x"), "--offset: '1x' is not a size"},
		{serve("--offset", "-1"), "--offset: '-1' is not a size"},
		{serve("--size", "9E"), "--size: size '9E' is too large"},
		{serve("--size", "0"), "--size must be more than 0"},
		{serve("--format=raw", "--offset", "2M"), "Offset (2097152) cannot be greater than size of the containing file (1048576)"},
		{serve("--format=raw", "--offset", "1M", "--size", "512"), "The sum of offset (1048576) and size (512) has to be smaller or equal to the actual size of the containing file (1048576)"},
		{serve("--max-clients", "-1"), "--max-clients '-1' is not a number of clients"},
		{serve("--name", strings.Repeat("x", 4097)), "export name of 4097 bytes is too long: at most 4096 are allowed"},
		{serve("--name", "a\xff"), `export name "a\xff" is not UTF-8`},
		{serve("--description", strings.Repeat("x", 4097)), "export description of 4097 bytes is too long"},
		{serve("--listen", "disk.sock"), "--listen 'disk.sock' is neither unix:PATH nor tcp:HOST:PORT"},
		{serve("--listen", "unix:"), "--listen 'unix:' names no socket"},
		{serve("--listen", "unix:/"+strings.Repeat("x", 107)), "UNIX socket path '/" + strings.Repeat("x", 107) + "' is too long: 108 bytes, at most 107 are allowed"},
		{serve("--listen", "tcp:localhost:70000"), "--listen 'tcp:localhost:70000': port '70000' is not a number from 0 to 65535"},
		{serve("--listen", "tcp:[::1"), "--listen 'tcp:[::1' is not tcp:HOST:PORT"},
		{serve("--listen", "unix:"+disk), "cannot listen on unix:" + disk + ": a file that is not a socket is there; remove it or choose another path"},
		{serve("--listen", "unix:"+dir+"/none/s"), "cannot listen on unix:" + dir + "/none/s: no such file or directory"},
		{serve("--metrics", "9420"), "--metrics '9420' is not HOST:PORT"},
		{serve("--log-level", "loud"), "--log-level 'loud' is not one of debug, info, warn, error"},
		{serve("--log-format", "xml"), "--log-format 'xml' is not one of text, json"},
		{serve("--once", "--run", "true"), "--once and --run exclude each other"},
		{serve("--run", ""), "--run needs a command"},
		{serve("--activation", "never"), "--activation 'never' is not one of always, on-connect"},
		{serve("--activation=on-connect", "--activation-linger", "5"), "--activation-linger '5' is not a duration such as 30s"},
		{serve("--activation=on-connect", "--activation-linger", "-5s"), "--activation-linger '-5s' is not a duration such as 30s"},
		{serve("--activation-linger", "5s"), "--activation-linger needs --activation on-connect"},
		{serve("--activation=on-connect", "--snapshot"), "a temporary snapshot and --activation on-connect exclude each other"},
		{serve("--format", "qcow2"), disk + ": "},
		{[]string{"serve", dir + "/none"}, "Could not open '" + dir + "/none': no such file or directory"},
		{[]string{"serve", dir}, "'file' driver requires '" + dir + "' to be a regular file"},
		{[]string{"version", "now"}, "version takes no argument, but got 'now'"},
		{[]string{"image", "info"}, "no IMAGE given"},
		{[]string{"image", "info", "--output=xml", disk}, "--output 'xml' is not one of human, json"},
		{[]string{"image", "create"}, "no PATH given"},
		{[]string{"image", "create", dir + "/n"}, "Image creation needs a size parameter"},
		{[]string{"image", "create", dir + "/n", "1Q"}, "'1Q' is not a size"},
		{[]string{"image", "create", dir + "/n", "1M", "2M"}, "PATH and SIZE are expected"},
		{[]string{"image", "create", "-b", disk, dir + "/n"}, "format raw has no backing files; choose --format qcow2"},
		{[]string{"image", "create", "-f", "qcow2", "-b", disk, dir + "/n"}, "Backing file specified without backing format; state it with -F raw or -F qcow2"},
		{[]string{"image", "create", "-f", "qcow2", "-F", "raw", dir + "/n", "1M"}, "--backing-format is given without --backing"},
		{[]string{"image", "create", "-f", "qcow2", "-b", "", dir + "/n", "1M"}, "Expected backing file name, got empty string"},
		{[]string{"image", "create", "-f", "qcow2", "-b", "none", "-F", "raw", dir + "/n"}, "Could not open backing image: Could not open '" + dir + "/none'"},
		{[]string{"image", "create", "-f", "qcow2", "-b", disk, "-F", "raw", disk}, "'" + disk + "' is part of the backing chain of the image that would replace it"},
		{[]string{"image", "create", "-f", "qcow2", "-o", "colour=red", dir + "/n", "1M"}, "format qcow2 has no option 'colour'; it has cluster_size, compat, compression_type, refcount_bits"},
		{[]string{"image", "create", "-f", "qcow2", "-o", "compat=2", dir + "/n", "1M"}, "-o compat=2: option compat is one of 1.1, 0.10"},
	} {
		status, stdout, stderr := runArgs(c.args...)
		if status != 1 || stdout != "" || strings.Count(stderr, "\n") != 1 || !strings.HasPrefix(stderr, "nbdserve: ") {
			// A raw disk that was probed warns before it fails.
			if lines := strings.Split(strings.TrimSuffix(stderr, "\n"), "\n"); len(lines) != 2 || !strings.Contains(lines[0], "probing guessed raw") || status != 1 {
				t.Errorf("%q: status %d, standard output %q, standard error %q", c.args, status, stdout, stderr)
			}
		}
		if !strings.Contains(stderr, "nbdserve: "+c.want) {
			t.Errorf("%q: standard error %q, want %q", c.args, stderr, "nbdserve: "+c.want)
		}
	}
}

func TestHelpNamesEveryOption(t *testing.T) {
	for _, l := range leaves("nbdserve", newApp().Commands) {
		args := append(strings.Fields(l.path)[1:], "some.img", "--help")
		status, stdout, stderr := runArgs(args...)
		if status != 0 || stderr != "" {
			t.Errorf("%q: status %d, standard error %q", args, status, stderr)
		}
		for _, f := range l.Flags {
			if !strings.Contains(stdout, "--"+f.Names()[0]) {
				t.Errorf("the help of %s does not name --%s", l.path, f.Names()[0])
			}
		}
	}
}
