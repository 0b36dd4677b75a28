package main

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/filter/blkdebug"
	"github.com/nbdserve/nbdserve/block/filter/blkverify"
	"github.com/nbdserve/nbdserve/block/filter/copyonread"
	"github.com/nbdserve/nbdserve/block/filter/delay"
	"github.com/nbdserve/nbdserve/block/filter/null"
	"github.com/nbdserve/nbdserve/block/filter/throttle"
	"github.com/nbdserve/nbdserve/formats/qcow2"
	"github.com/nbdserve/nbdserve/formats/raw"
	"github.com/nbdserve/nbdserve/hostdev"
)

// drivers is the registry: all that nbdserve can open. A new driver is added here
// and nowhere else.
func drivers() []*block.Driver {
	formats := []*block.Driver{
		qcow2.Driver(qcow2.Host{FileConfig: fileConfig, FileName: fileName, Identity: identity}),
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
	)
	return append(all, null.Drivers()...)
}

// fileConfig describes the protocol node for a path (rule G7).
func fileConfig(path string) *block.Config {
	return &block.Config{Driver: hostdev.DriverFor(path), Options: &hostdev.Options{Filename: path}}
}

// fileName is the path of a protocol node, "" for others.
func fileName(n *block.Node) string {
	if o, ok := n.Config().Options.(*hostdev.Options); ok {
		return o.Filename
	}
	return ""
}

// identity is the same for all names of a file.
func identity(path string) string {
	if info, err := os.Stat(path); err == nil {
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			return fmt.Sprintf("%d:%d", st.Dev, st.Ino)
		}
	}
	return filepath.Clean(path)
}
