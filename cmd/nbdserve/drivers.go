package main

import (
	"context"
	"errors"
	"log/slog"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/filter/blkdebug"
	"github.com/nbdserve/nbdserve/block/filter/blkverify"
	"github.com/nbdserve/nbdserve/block/filter/copyonread"
	"github.com/nbdserve/nbdserve/block/filter/delay"
	"github.com/nbdserve/nbdserve/block/filter/null"
	"github.com/nbdserve/nbdserve/block/filter/quorum"
	"github.com/nbdserve/nbdserve/block/filter/throttle"
	"github.com/nbdserve/nbdserve/formats/qcow2"
	"github.com/nbdserve/nbdserve/formats/raw"
	"github.com/nbdserve/nbdserve/hostdev"
)

// drivers is the registry: all that nbdserve can open. A new driver is added here
// and nowhere else.
func drivers() []*block.Driver {
	formats := []*block.Driver{
		qcow2.Driver(qcow2.Host{Identity: hostdev.Identity}),
	}
	all := append(formats,
		raw.Driver(func(head []byte) string { return block.NewGraph(nil, formats...).ProbeFormat(head) }),
		hostdev.FileDriver(),
		hostdev.DeviceDriver(),
		throttle.Driver(new(throttle.Groups)),
		copyonread.Driver(),
		blkdebug.Driver(),
		blkverify.Driver(),
		delay.Driver(),
		quorum.Driver(),
	)
	return append(all, null.Drivers()...)
}

// newGraph returns a graph that can open all that nbdserve can.
func newGraph(log *slog.Logger) *block.Graph {
	g := block.NewGraph(log, drivers()...)
	g.TemporaryOverlays(temporaryOverlay)
	return g
}

// temporaryOverlay makes the image that snapshot=on writes to.
func temporaryOverlay(ctx context.Context, g *block.Graph, size int64) (_ block.Overlay, err error) {
	storage, err := hostdev.NewTemporary()
	if err != nil {
		return block.Overlay{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, storage.Close())
		}
	}()
	file, err := g.ProtocolConfig(storage.Filename())
	if err != nil {
		return block.Overlay{}, err
	}
	rc := block.RootConfig{User: "temporary overlay", Perm: block.PermConsistentRead | block.PermWrite | block.PermResize}
	err = withRoot(ctx, g, file, rc, func(ctx context.Context, r *block.Root) error {
		return qcow2.Create(ctx, r, qcow2.CreateOptions{Size: size})
	})
	cfg := &block.Config{Driver: "qcow2", Children: map[string]*block.Config{"file": file}}
	return block.Overlay{Config: cfg, Storage: storage}, err
}

// withRoot opens a node, runs f on a root above it as one request, and closes the
// node again. rc.Node is filled in.
func withRoot(ctx context.Context, g *block.Graph, cfg *block.Config, rc block.RootConfig, f func(context.Context, *block.Root) error) (err error) {
	n, err := g.Open(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.Release(ctx, n)) }()
	rc.Node = n
	r, err := g.AttachRoot(ctx, rc)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Detach(ctx)) }()
	return r.Do(ctx, func(ctx context.Context) error { return f(ctx, r) })
}
