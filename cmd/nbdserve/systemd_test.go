package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// units copies the units to a folder, with the test binary as the command: systemd
// looks whether it is there.
func units(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"nbdserve@.service", "nbdserve@.socket"} {
		data, err := os.ReadFile("../../systemd/" + name)
		if err != nil {
			t.Fatal(err)
		}
		binary, err := filepath.Abs(os.Args[0])
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, name), []byte(strings.Replace(string(data), "ExecStart=nbdserve ", "ExecStart="+binary+" ", 1)))
	}
	return dir
}

func TestUnitsAreValid(t *testing.T) {
	dir := units(t)
	out, err := exec.Command("systemd-analyze", "verify", "--man=no", dir+"/nbdserve@.service", dir+"/nbdserve@.socket").CombinedOutput()
	if err != nil || len(out) != 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

func TestServiceIsHardened(t *testing.T) {
	// The threshold is in tenths: below 2.0 of 10 is "OK", and few services get there.
	out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--threshold=20", units(t)+"/nbdserve@.service").CombinedOutput()
	if err != nil {
		t.Errorf("systemd-analyze security: %v\n%s", err, out)
	}
}

func TestServiceRunsAsWritten(t *testing.T) {
	data, err := os.ReadFile("../../systemd/nbdserve@.service")
	if err != nil {
		t.Fatal(err)
	}
	var line string
	for l := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(l, "ExecStart=nbdserve "); ok {
			line = strings.TrimSpace(v)
		}
	}
	// As systemd expands it: ${IMAGE} is one word, $OPTIONS is split at spaces.
	disk := makeDisk(t)
	var args []string
	for word := range strings.FieldsSeq(line) {
		switch word {
		case "${IMAGE}":
			args = append(args, disk)
		case "$OPTIONS":
			args = append(args, "--format", "raw", "--print-uri")
		default:
			args = append(args, word)
		}
	}
	dir := t.TempDir()
	cmd := command(args...)
	cmd.Env = append(cmd.Env, "RUNTIME_DIRECTORY="+dir)
	p := start(t, cmd)
	if uri := p.line(); uri != "nbd+unix:///?socket="+dir+"/disk.raw.sock" {
		t.Errorf("URI: %s", uri)
	}
	p.end()
}
