package hostdev

import (
	"os"
	"strings"
	"testing"
)

func TestG20TemporaryFileHasNoName(t *testing.T) {
	dir := t.TempDir()
	for tmpdir, want := range map[string]string{dir: dir, "": "/var/tmp", "/tmp": "/var/tmp"} {
		t.Setenv("TMPDIR", tmpdir)
		f, err := NewTemporary()
		if err != nil {
			t.Fatal(err)
		}
		if path, err := os.Readlink(f.Filename()); err != nil || !strings.HasPrefix(path, want+"/vl.") || !strings.HasSuffix(path, " (deleted)") {
			t.Errorf("TMPDIR='%s': the file is %s (%v)", tmpdir, path, err)
		}
		g := newGraph(t)
		c, err := g.ProtocolConfig(f.Filename())
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // it can be opened again, as a reopen does
			n, err := g.Open(ctx, c)
			if err != nil {
				t.Fatal(err)
			}
			if err := g.Release(ctx, n); err != nil {
				t.Error(err)
			}
		}
		name := f.Filename()
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(name); err == nil {
			t.Errorf("TMPDIR='%s': the file is still open", tmpdir)
		}
	}
	t.Setenv("TMPDIR", dir+"/none")
	if _, err := NewTemporary(); err == nil || !strings.Contains(err.Error(), "Could not get temporary filename") {
		t.Errorf("without a folder: %v", err)
	}
}
