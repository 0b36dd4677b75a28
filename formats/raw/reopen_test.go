package raw_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/formats/raw"
)

func TestG21WindowMoves(t *testing.T) {
	file, s := memory(100_000, align(1))
	r := opened(t, config(raw.Options{Offset: 1000, Size: 2000}, file))
	reopen := func(o *raw.Options) error {
		c := *r.Node().ExplicitConfig()
		c.Options, c.Children = o, nil
		return r.Node().Graph().Reopen(ctx, block.ReopenRequest{Node: r.Node(), Config: &c})
	}
	same := func(o raw.Options) {
		t.Helper()
		want := window(s.Bytes(), o)
		got := make([]byte, r.Size())
		err := r.Do(ctx, func(ctx context.Context) error { return r.ReadAt(ctx, got, 0) })
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("window %+v: %d bytes, want %d, or others (%v)", o, len(got), len(want), err)
		}
	}
	for _, o := range []raw.Options{{Offset: 5000, Size: 3000}, {Size: 100_000}, {Offset: 99_999}} {
		if err := reopen(&o); err != nil {
			t.Fatal(err)
		}
		same(o)
	}
	last := raw.Options{Offset: 99_999}
	for _, c := range []struct {
		o    raw.Options
		text string
	}{
		{raw.Options{Offset: 1, Size: 100_000}, "has to be smaller or equal to the actual size"},
		{raw.Options{Offset: 100_001}, "cannot be greater than size of the containing file"},
		{raw.Options{Offset: -1, Size: 1}, "cannot be negative"},
		{raw.Options{}, "Cannot change the option 'offset'"},
	} {
		if err := reopen(&c.o); err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%+v: got %v, want %s", c.o, err, c.text)
		}
		same(last)
	}
}

func TestG22RawFollowsAFileThatChangedWhileInactive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	writeFile(t, path, bytes.Repeat([]byte{1}, 10_000))
	g := newGraph(t)
	n, err := g.Open(ctx, config(raw.Options{Offset: 1000}, fileConfig(path)))
	if err != nil {
		t.Fatal(err)
	}
	var resized atomic.Int32
	r, err := g.AttachRoot(ctx, block.RootConfig{
		User: "export", Node: n, Perm: block.PermConsistentRead | block.PermWrite, Shared: block.PermConsistentRead,
		AllowInactive: func() error { return nil }, OnResize: func() { resized.Add(1) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(r.Detach(ctx), g.Release(ctx, n)); err != nil {
			t.Error(err)
		}
	}()
	if err := g.SetActive(ctx, false, n); err != nil {
		t.Fatal(err)
	}
	writeFile(t, path, bytes.Repeat([]byte{2}, 20_000))
	if size, err := r.PeekSize(ctx); err != nil || size != 19_000 || resized.Load() != 0 {
		t.Errorf("size %d, %v; told %d times", size, err, resized.Load())
	}
	if err := g.SetActive(ctx, true, n); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 19_000)
	err = r.Do(ctx, func(ctx context.Context) error { return r.ReadAt(ctx, p, 0) })
	if err != nil || !bytes.Equal(p, bytes.Repeat([]byte{2}, 19_000)) || r.Size() != 19_000 || resized.Load() != 1 {
		t.Errorf("size %d, told %d times, %v", r.Size(), resized.Load(), err)
	}
	if err := os.Truncate(path, 30_000); err != nil {
		t.Fatal(err)
	}
	if size, err := g.RefreshSize(ctx, n); err != nil || size != 29_000 || r.Size() != 29_000 || resized.Load() != 2 {
		t.Errorf("size %d, root %d, told %d times, %v", size, r.Size(), resized.Load(), err)
	}
}
