// Command nbdserve serves virtual machine disks over NBD.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v2"
)

func main() { os.Exit(run(os.Args, os.Stdout, os.Stderr)) }

// run is the whole command; it returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	app := newApp()
	app.Writer, app.ErrWriter = stdout, stderr
	args, err := arrange(app, args)
	if err == nil {
		err = app.Run(args)
	}
	var exit *exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if exit.err != nil {
			report(stderr, exit.err)
		}
		return exit.code
	default:
		report(stderr, err)
		return 1
	}
}

// report writes an error as one line.
func report(w io.Writer, err error) {
	fmt.Fprintf(w, "nbdserve: %s\n", strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; "))
}

// An exitError ends the command with a status of its own; err may be nil where all has been said.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// newApp is the command line: what each subcommand is called and takes.
func newApp() *cli.App {
	return &cli.App{
		Name:    "nbdserve",
		Usage:   "serve virtual machine disks over NBD",
		Version: buildVersion(),
		Commands: []*cli.Command{
			serveCommand(),
			{
				Name:            "image",
				Usage:           "create and examine disk images",
				HideHelpCommand: true,
				Subcommands:     []*cli.Command{imageCreateCommand(), imageInfoCommand(), imageCheckCommand()},
			},
			versionCommand(),
		},
		HideHelpCommand:           true,
		DisableSliceFlagSeparator: true,
		OnUsageError:              func(_ *cli.Context, err error, _ bool) error { return err },
		ExitErrHandler:            func(*cli.Context, error) {}, // run judges errors
	}
}
