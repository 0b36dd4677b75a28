package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/formats/qcow2"
)

func imageInfoCommand() *cli.Command {
	return &cli.Command{
		Name:            "info",
		Usage:           "describe a disk image",
		ArgsUsage:       "IMAGE",
		Description:     "Prints what qemu-img info prints, by the same names in JSON. Nothing is written; backing files are not opened.",
		HideHelpCommand: true,
		Flags:           lookFlags(),
		Action: func(c *cli.Context) error {
			l, err := parseLook(c)
			if err != nil {
				return err
			}
			info, err := l.info(c)
			if err != nil {
				return err
			}
			if l.json {
				return writeJSON(c.App.Writer, info)
			}
			return info.write(c.App.Writer)
		},
	}
}

// imageInfo is the output of image info, by the names of qemu-img info.
type imageInfo struct {
	VirtualSize    int64                `json:"virtual-size"`
	Filename       string               `json:"filename"`
	ClusterSize    int64                `json:"cluster-size,omitempty"`
	Format         string               `json:"format"`
	ActualSize     int64                `json:"actual-size"`
	Backing        string               `json:"backing-filename,omitempty"`
	FullBacking    string               `json:"full-backing-filename,omitempty"`
	BackingFormat  string               `json:"backing-filename-format,omitempty"`
	Encrypted      bool                 `json:"encrypted,omitempty"`
	Snapshots      []qcow2.SnapshotInfo `json:"snapshots,omitempty"`
	FormatSpecific *formatSpecific      `json:"format-specific,omitempty"`
	Dirty          bool                 `json:"dirty-flag"`
}

type formatSpecific struct {
	Type string      `json:"type"`
	Data *qcow2.Info `json:"data"`
}

func (l *look) info(c *cli.Context) (*imageInfo, error) {
	info := &imageInfo{Filename: l.path}
	err := l.file(c, func(ctx context.Context, file *block.Root) (err error) {
		info.Format = l.format
		if info.ActualSize, err = file.Node().AllocatedSize(); err != nil {
			return err
		}
		switch l.format {
		case "qcow2":
			return info.qcow2(ctx, file)
		default:
			info.VirtualSize = file.Node().Size()
			return nil
		}
	})
	return info, err
}

func (i *imageInfo) qcow2(ctx context.Context, file *block.Root) error {
	h, err := qcow2.ParseHeader(ctx, file, file.Node().Size())
	if err != nil {
		return fmt.Errorf("%s: %w", i.Filename, err)
	}
	data, err := qcow2.Inspect(ctx, file, h)
	if err != nil {
		return fmt.Errorf("%s: %w", i.Filename, err)
	}
	snapshots, err := qcow2.ReadSnapshots(ctx, file, h)
	if err != nil {
		return fmt.Errorf("%s: %w", i.Filename, err)
	}
	for _, s := range snapshots {
		i.Snapshots = append(i.Snapshots, s.Info())
	}
	i.VirtualSize, i.ClusterSize, i.Dirty = h.Size, h.ClusterSize(), h.Dirty()
	i.Encrypted = data.Encrypt != nil
	i.Backing, i.BackingFormat = h.BackingFile, h.BackingFormat
	i.FullBacking = block.CombineNames(i.Filename, h.BackingFile)
	i.FormatSpecific = &formatSpecific{"qcow2", data}
	return nil
}

// write prints for people.
func (i *imageInfo) write(w io.Writer) error {
	p := &printer{w: w}
	p.f("image: %s\nfile format: %s\nvirtual size: %s (%d bytes)\ndisk size: %s\n", i.Filename, i.Format, formatSize(i.VirtualSize), i.VirtualSize, formatSize(i.ActualSize))
	if i.Encrypted {
		p.f("encrypted: yes\n")
	}
	if i.ClusterSize != 0 {
		p.f("cluster_size: %d\n", i.ClusterSize)
	}
	if i.Dirty {
		p.f("cleanly shut down: no\n")
	}
	if i.Backing != "" {
		p.f("backing file: %s", i.Backing)
		if i.FullBacking != i.Backing {
			p.f(" (actual path: %s)", i.FullBacking)
		}
		p.f("\n")
	}
	if i.BackingFormat != "" {
		p.f("backing file format: %s\n", i.BackingFormat)
	}
	if len(i.Snapshots) > 0 && p.err == nil {
		p.f("Snapshot list:\n")
		t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
		fmt.Fprintln(t, "ID\tTAG\tVM SIZE\tDATE\tVM CLOCK")
		for _, s := range i.Snapshots {
			clock := time.Duration(s.VMClockSec)*time.Second + time.Duration(s.VMClockNsec)
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", s.ID, s.Name, formatSize(int64(min(s.VMStateSize, 1<<62))),
				time.Unix(int64(s.DateSec), 0).Format(time.DateTime), clock.Truncate(time.Millisecond))
		}
		p.err = t.Flush()
	}
	if f := i.FormatSpecific; f != nil {
		d := f.Data
		p.f("Format specific information:\n    compat: %s\n    compression type: %s\n", d.Compat, d.CompressionType)
		p.flag("lazy refcounts", d.LazyRefcounts)
		p.f("    refcount bits: %d\n", d.RefcountBits)
		p.flag("corrupt", d.Corrupt)
		p.flag("extended l2", d.ExtendedL2)
		if d.Encrypt != nil {
			p.f("    encrypt format: %s\n", d.Encrypt.Format)
		}
		if d.DataFile != "" {
			p.f("    data file: %s\n    data file raw: %t\n", d.DataFile, d.DataFileRaw)
		}
		for _, b := range d.Bitmaps {
			p.f("    bitmap: %s, granularity %d, flags %v\n", b.Name, b.Granularity, b.Flags)
		}
	}
	return p.err
}

// A printer prints until the first error.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) f(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}

// flag prints what only some versions of the format have.
func (p *printer) flag(name string, v *bool) {
	if v != nil {
		p.f("    %s: %t\n", name, *v)
	}
}
