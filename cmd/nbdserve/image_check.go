package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/formats/qcow2"
)

// Exit statuses of image check, which are qemu-img's.
const (
	checkFailed      = 1
	checkCorruptions = 2
	checkLeaks       = 3
	checkNone        = 63 // the format has nothing to check
)

func imageCheckCommand() *cli.Command {
	return &cli.Command{
		Name:      "check",
		Usage:     "check the consistency of a disk image",
		ArgsUsage: "IMAGE",
		Description: "Counts the references to each cluster and compares them with what the image says. Nothing is written.\n" +
			"Exit status: 0 no errors, 1 the check failed, 2 corruptions, 3 leaked clusters only, 63 the format has nothing to check.",
		HideHelpCommand: true,
		Flags:           lookFlags(),
		Action: func(c *cli.Context) error {
			l, err := parseLook(c)
			if err != nil {
				return err
			}
			return l.check(c)
		},
	}
}

// checkInfo is the output of image check, by the names of qemu-img check.
type checkInfo struct {
	*qcow2.CheckResult
	Filename string `json:"filename"`
	Format   string `json:"format"`
}

func (l *look) check(c *cli.Context) error {
	report := func(line string) { fmt.Fprintln(c.App.Writer, line) }
	if l.json {
		report = func(line string) { fmt.Fprintln(c.App.ErrWriter, line) }
	}
	info := checkInfo{Filename: l.path}
	err := l.file(c, func(ctx context.Context, file *block.Root) error {
		if info.Format = l.format; l.format != "qcow2" {
			return &exitError{checkNone, errors.New("This image format does not support checks")}
		}
		h, err := qcow2.ParseHeader(ctx, file, file.Node().Size())
		if err != nil {
			return fmt.Errorf("%s: %w", l.path, err)
		}
		if h.Incompatible&(qcow2.IncompatExtendedL2|qcow2.IncompatDataFile) != 0 {
			return &exitError{checkNone, h.Unsupported(false)}
		}
		info.CheckResult, err = qcow2.Check(ctx, file, h, report)
		return err
	})
	if err != nil {
		return err
	}
	if l.json {
		err = writeJSON(c.App.Writer, info)
	} else {
		err = info.write(c.App.Writer)
	}
	return errors.Join(err, info.status())
}

// status is nil, or carries the exit status; what is wrong has been printed.
func (i *checkInfo) status() error {
	switch {
	case i.CheckErrors > 0:
		return &exitError{code: checkFailed}
	case i.Corruptions > 0:
		return &exitError{code: checkCorruptions}
	case i.Leaks > 0:
		return &exitError{code: checkLeaks}
	}
	return nil
}

// write prints for people.
func (i *checkInfo) write(w io.Writer) error {
	p := &printer{w: w}
	if i.status() == nil {
		p.f("No errors were found on the image.\n")
	}
	if i.Corruptions > 0 {
		p.f("\n%d errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n", i.Corruptions)
	}
	if i.Leaks > 0 {
		p.f("\n%d leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n", i.Leaks)
	}
	if i.CheckErrors > 0 {
		p.f("\n%d internal errors have occurred during the check.\n", i.CheckErrors)
	}
	if i.TotalClusters > 0 && i.AllocatedClusters > 0 {
		p.f("%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n", i.AllocatedClusters, i.TotalClusters,
			percent(i.AllocatedClusters, i.TotalClusters), percent(i.FragmentedClusters, i.AllocatedClusters), percent(i.CompressedClusters, i.AllocatedClusters))
	}
	if i.ImageEndOffset > 0 {
		p.f("Image end offset: %d\n", i.ImageEndOffset)
	}
	return p.err
}

func percent(part, whole int64) float64 { return 100 * float64(part) / float64(whole) }
