package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/export"
)

// serveOptions are the options of serve, checked.
type serveOptions struct {
	source         source
	printGraph     func(*block.View, io.Writer) error // nil: serve
	listen         []address                          // empty: sockets from systemd, else the default
	activation     export.Activation
	linger         time.Duration
	maxClients     int
	once           bool
	run            string // a shell command, "" for none
	exitWithParent bool
	printURI       bool
	metricsAddress string // host:port, "" for none
	log            *slog.Logger
}

const maxText = 4096 // bytes of an export's name or description (NBD)

func serveCommand() *cli.Command {
	const image, export, graph, sockets, life, logs = "Image", "Export", "Block graph", "Sockets", "Life", "Logs and metrics"
	return &cli.Command{
		Name:      "serve",
		Usage:     "serve a disk image or block device",
		ArgsUsage: "IMAGE",
		Description: "Serves the disk in IMAGE, a file or a block device, to NBD clients until it is told to stop.\n" +
			"IMAGE can also be json:{...} with the options of a node. With --export there is no IMAGE: nodes of --blockdev are served.\n" +
			"The sockets appear when the image is open and locked, so a client that finds one can connect.\n" +
			"SIGTERM, SIGINT and SIGHUP finish what clients have asked for and end the server with status 0; a second one cuts.\n" +
			"Sizes are bytes, or numbers with one of the suffixes k, M, G, T, P, E (powers of 1024).",
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "format", Aliases: []string{"f"}, Category: image, Usage: "image `FORMAT`: " + namesOf(formatChoices()) + "; without it the format is probed, and a disk taken for raw keeps clients from writing another format's header"},
			&cli.BoolFlag{Name: "read-only", Aliases: []string{"r"}, Category: image, Usage: "open and export the disk read-only"},
			&cli.StringFlag{Name: "cache", Value: cacheModes[0].name, Category: image, Usage: "host page cache `MODE`: writeback, none (direct I/O), writethrough (each write is durable), directsync (both), unsafe (flushes are ignored)"},
			&cli.StringFlag{Name: "discard", Value: discardModes[0].name, Category: image, Usage: "`MODE` of trim requests: unmap (free the space), ignore"},
			&cli.StringFlag{Name: "detect-zeroes", Value: detectZeroesModes[0].name, Category: image, Usage: "`MODE` of writes that are all zero: off, on (write them as zeroes), unmap (free the space; needs --discard unmap)"},
			&cli.StringFlag{Name: "offset", Category: image, Usage: "serve the disk from this `SIZE` on"},
			&cli.StringFlag{Name: "size", Category: image, Usage: "serve this `SIZE` only; default: up to the end"},
			&cli.BoolFlag{Name: "snapshot", Category: image, Usage: "write to a temporary file, which is lost at the end, and leave the disk as it is"},
			&cli.StringFlag{Name: "throttle", Category: image, Usage: "limit requests: `LIMIT=NUMBER`[,...] with bps, bps-read, bps-write (bytes a second), iops, iops-read, iops-write (requests a second), X-max, X-max-length (bursts), iops-size; or throttle-group=NAME"},
			&cli.BoolFlag{Name: "copy-on-read", Category: image, Usage: "copy what is read from backing files into the disk"},
			&cli.BoolFlag{Name: "share-rw", Category: image, Usage: "let other programs write to the disk meanwhile; they and the clients must agree on who writes where"},

			&cli.StringFlag{Name: "name", Category: export, Usage: "export `NAME`; clients that ask for \"\" get it as well"},
			&cli.StringFlag{Name: "description", Category: export, Usage: "`TEXT` for clients that list exports"},
			&cli.StringFlag{Name: "max-clients", Value: "64", Category: export, Usage: "`NUMBER` of clients served at a time, 0 for no limit"},

			&cli.StringSliceFlag{Name: "blockdev", Category: graph, Usage: "open a node: `OPTIONS` are driver=NAME, node-name=NAME and more with commas between, as QEMU has them, or the same as a JSON object; may be repeated, and later nodes can refer to earlier ones"},
			&cli.StringSliceFlag{Name: "export", Category: graph, Usage: "serve a node instead of IMAGE: `OPTIONS` are node-name=NAME and any of name=NAME, description=TEXT, writable=on|off, writethrough=on|off, share-rw=on|off and id=ID, with commas between; read-only and named after the node unless told else; may be repeated"},
			&cli.StringFlag{Name: "allow-drivers", Category: graph, Usage: "open no nodes of drivers other than those in `LIST`, NAME[,NAME...], and in that of --allow-drivers-read-only"},
			&cli.StringFlag{Name: "allow-drivers-read-only", Category: graph, Usage: "open nodes of the drivers in `LIST`, but only for reading"},
			optionalFlag{&cli.StringFlag{Name: "print-graph", Category: graph, Usage: "open all, print nodes, edges and permissions as `FORMAT` and end; as --print-graph=FORMAT: " + namesOf(graphFormats) + "; without it " + graphFormats[0].name}, graphFormats[0].name},

			&cli.StringSliceFlag{Name: "listen", Category: sockets, Usage: "listen on `ADDRESS`: unix:PATH, or tcp:HOST:PORT (port 10809 if left out, 0 for any free one); may be repeated; default: a socket named after the image in $RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR/nbdserve, /run/nbdserve (root) or $TMPDIR/nbdserve-UID; for --run a private one"},
			&cli.BoolFlag{Name: "print-uri", Category: sockets, Usage: "print the URI of each socket on standard output, one a line, when ready"},

			&cli.StringFlag{Name: "activation", Value: activations[0].name, Category: life, Usage: "lock the image, and keep what is cached of it, `WHEN`: always, on-connect (while there is a client; other servers with the same image may serve it in between)"},
			&cli.StringFlag{Name: "activation-linger", Value: "0s", Category: life, Usage: "with on-connect, keep the image for this `DURATION` after the last client has left, such as 30s or 5m"},
			&cli.BoolFlag{Name: "once", Category: life, Usage: "end when the last client has left"},
			&cli.StringFlag{Name: "run", Category: life, Usage: "when ready run shell `COMMAND` with $uri, $unixsocket, $port and $exportname set, end with it and with its exit status"},
			&cli.BoolFlag{Name: "exit-with-parent", Category: life, Usage: "end when the parent process ends"},

			&cli.StringFlag{Name: "metrics", Category: logs, Usage: "serve /metrics, /healthz and /readyz over HTTP on `HOST:PORT`"},
			&cli.StringFlag{Name: "log-format", Value: logFormats[0].name, Category: logs, Usage: "`FORMAT` of the log on standard error: " + namesOf(logFormats)},
			&cli.StringFlag{Name: "log-level", Value: "info", Category: logs, Usage: "least `LEVEL` that is logged: " + namesOf(logLevels)},
		},
		Action: func(c *cli.Context) error {
			o, err := parseServe(c)
			if err != nil {
				return err
			}
			return o.serve(c.App.Writer)
		},
	}
}

// parseServe checks the options of serve. Nothing is opened yet.
func parseServe(c *cli.Context) (*serveOptions, error) {
	o := &serveOptions{
		once: c.Bool("once"), run: c.String("run"), exitWithParent: c.Bool("exit-with-parent"),
		printURI: c.Bool("print-uri"), metricsAddress: c.String("metrics"),
	}
	for _, parse := range []func(*cli.Context) error{o.parseLog, o.parseSource, o.parseActivation, o.parseListen} {
		if err := parse(c); err != nil {
			return nil, err
		}
	}
	if c.IsSet("run") && o.run == "" {
		return nil, errors.New("--run needs a command")
	}
	if o.once && o.run != "" {
		return nil, errors.New("--once and --run exclude each other: with --run the server ends with the command")
	}
	return o, nil
}

func (o *serveOptions) parseLog(c *cli.Context) error {
	level, err := choose(c, "log-level", logLevels)
	if err != nil {
		return err
	}
	handler, err := choose(c, "log-format", logFormats)
	if err != nil {
		return err
	}
	o.log = slog.New(handler(c.App.ErrWriter, &slog.HandlerOptions{Level: level}))
	return nil
}

func (o *serveOptions) parseSource(c *cli.Context) (err error) {
	if o.source, err = parseSource(c); err != nil {
		return err
	}
	n, err := strconv.ParseUint(c.String("max-clients"), 10, 31)
	if err != nil {
		return fmt.Errorf("--max-clients '%s' is not a number of clients (0 for no limit)", c.String("max-clients"))
	}
	o.maxClients = int(n)
	if c.IsSet("print-graph") {
		o.printGraph, err = choose(c, "print-graph", graphFormats)
	}
	return err
}

func (o *serveOptions) parseActivation(c *cli.Context) (err error) {
	if o.activation, err = choose(c, "activation", activations); err != nil {
		return err
	}
	given := c.String("activation-linger")
	if o.linger, err = time.ParseDuration(given); err != nil || o.linger < 0 {
		return fmt.Errorf("--activation-linger '%s' is not a duration such as 30s, 5m or 1h30m", given)
	}
	if c.IsSet("activation-linger") && o.activation != export.ActivationOnConnect {
		return errors.New("--activation-linger needs --activation on-connect")
	}
	return nil
}

func (o *serveOptions) parseListen(c *cli.Context) error {
	for _, s := range c.StringSlice("listen") {
		a, err := parseListen(s)
		if err != nil {
			return err
		}
		o.listen = append(o.listen, a)
	}
	if c.IsSet("metrics") {
		if _, port, err := net.SplitHostPort(o.metricsAddress); err != nil || port == "" {
			return fmt.Errorf("--metrics '%s' is not HOST:PORT, such as localhost:9420", o.metricsAddress)
		}
	}
	return nil
}
