package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/nbdserve/nbdserve/block"
)

// version is set by the linker (-X main.version=...).
var version string

// buildVersion is what this build calls itself: what the linker was told, else what
// `go install module@version` recorded.
func buildVersion() string {
	info, ok := debug.ReadBuildInfo()
	if version == "" && ok && info.Main.Version != "(devel)" {
		return cmp.Or(strings.TrimPrefix(info.Main.Version, "v"), "devel")
	}
	return cmp.Or(version, "devel")
}

// buildRevision is the commit that the build was made from, "" for unknown.
func buildRevision() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return ""
}

// features are what a client or a script may look for before it relies on it.
var features = []string{
	"base:allocation", "block-size-info", "cache", "fast-zero", "fua", "metrics", "multi-conn",
	"sd-notify", "socket-activation", "structured-replies", "tcp", "trim", "unix", "write-zeroes",
}

type versionInfo struct {
	Version   string   `json:"version"`
	Revision  string   `json:"revision,omitempty"`
	GoVersion string   `json:"go-version"`
	Platform  string   `json:"platform"`
	Protocols []string `json:"protocols"`
	Formats   []string `json:"formats"`
	Filters   []string `json:"filters"`
	Features  []string `json:"features"`
}

func newVersionInfo() versionInfo {
	g := block.NewGraph(nil, drivers()...)
	return versionInfo{Version: buildVersion(), Revision: buildRevision(), GoVersion: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
		Protocols: g.DriverNames(block.Protocol), Formats: g.DriverNames(block.Format), Filters: g.DriverNames(block.Filter), Features: features}
}

func versionCommand() *cli.Command {
	return &cli.Command{
		Name:            "version",
		Usage:           "print the version, formats, drivers and features",
		HideHelpCommand: true,
		Flags:           []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "print JSON"}},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("version takes no argument, but got '%s'", c.Args().First())
			}
			return newVersionInfo().write(c.App.Writer, c.Bool("json"))
		},
	}
}

func (v versionInfo) write(w io.Writer, asJSON bool) error {
	if asJSON {
		return writeJSON(w, v)
	}
	revision := ""
	if v.Revision != "" {
		revision = " (" + v.Revision + ")"
	}
	_, err := fmt.Fprintf(w, "nbdserve %s%s\n%s %s\nprotocols: %s\nformats: %s\nfilters: %s\nfeatures: %s\n", v.Version, revision, v.GoVersion, v.Platform,
		strings.Join(v.Protocols, " "), strings.Join(v.Formats, " "), cmp.Or(strings.Join(v.Filters, " "), "none"), strings.Join(v.Features, " "))
	return err
}

// writeJSON writes v indented as qemu-img does.
func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "    ")
	return e.Encode(v)
}
