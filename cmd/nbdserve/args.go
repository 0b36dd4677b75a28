package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// arrange brings the command line into the one order that cli parses right: the
// command, its options, "--", its operands. cli itself takes everything behind the
// first operand for operands, so that `serve disk.qcow2 --read-only` would serve
// the disk writable.
func arrange(app *cli.App, args []string) ([]string, error) {
	app.Setup()
	out, rest := []string{app.Name}, args[1:]
	commands, flags := app.Commands, app.Flags
	for len(rest) > 0 {
		c := commandOf(commands, rest[0])
		if c == nil {
			break
		}
		out = append(out, c.Name)
		commands, flags, rest = c.Subcommands, append(c.Flags[:len(c.Flags):len(c.Flags)], cli.HelpFlag), rest[1:]
	}
	options, operands, err := permute(flags, rest)
	if err != nil {
		return nil, fmt.Errorf("%w (see '%s --help')", err, strings.Join(out, " "))
	}
	if slices.Contains(options, "--help") {
		return append(out, "--help"), nil // of the command, whatever else is there
	}
	if len(commands) > 0 && len(options) == 0 {
		if len(operands) == 0 {
			return nil, fmt.Errorf("no command given (see '%s --help')", strings.Join(out, " "))
		}
		hint := ""
		if s := cli.SuggestCommand(commands, operands[0]); s != "" {
			hint = ", d" + strings.TrimPrefix(s, "D") // did you mean ...?
		}
		return nil, fmt.Errorf("unknown command '%s'%s (see '%s --help')", operands[0], hint, strings.Join(out, " "))
	}
	return append(append(append(out, options...), "--"), operands...), nil
}

func commandOf(commands []*cli.Command, name string) *cli.Command {
	for _, c := range commands {
		if c.HasName(name) {
			return c
		}
	}
	return nil
}

// permute splits args into options, written so that each is one argument, and
// operands. Options may stand anywhere before "--", as getopt_long has it:
// --name=value, --name value, -n value, -nvalue, and letters joined as in -rU.
// Options that are unknown, lack a value, have one too many or are given twice
// without being a list are errors.
func permute(flags []cli.Flag, args []string) (options, operands []string, err error) {
	seen := make(map[cli.Flag]bool)
	add := func(f cli.Flag, shown, value string) error {
		if seen[f] && !isList(f) {
			return fmt.Errorf("option %s is given twice", shown)
		}
		seen[f] = true
		name := "--" + f.Names()[0]
		if takesValue(f) {
			name += "=" + value
		}
		options = append(options, name)
		return nil
	}
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		// next takes the following argument as the value of the option shown.
		next := func(shown string) (string, error) {
			if len(args) == 0 {
				return "", fmt.Errorf("option %s needs a value", shown)
			}
			value := args[0]
			args = args[1:]
			return value, nil
		}
		switch {
		case arg == "--":
			return options, append(operands, args...), nil
		case strings.HasPrefix(arg, "--"):
			name, value, attached := strings.Cut(arg[2:], "=")
			f := flagOf(flags, name)
			if f == nil || len(name) == 1 {
				return nil, nil, unknownOption(flags, "--"+name)
			}
			if o, ok := f.(optionalFlag); ok && !attached {
				value = o.bare
			} else if takesValue(f) && !attached {
				if value, err = next("--" + name); err != nil {
					return nil, nil, err
				}
			} else if !takesValue(f) && attached {
				return nil, nil, fmt.Errorf("option --%s takes no value, but got '%s'", name, value)
			}
			if err := add(f, "--"+name, value); err != nil {
				return nil, nil, err
			}
		case len(arg) > 1 && arg[0] == '-':
			for letters := arg[1:]; letters != ""; {
				name := letters[:1]
				letters = letters[1:]
				f := flagOf(flags, name)
				if f == nil {
					return nil, nil, unknownOption(flags, arg)
				}
				value := ""
				if takesValue(f) {
					value, letters = letters, ""
					if value == "" {
						if value, err = next("-" + name); err != nil {
							return nil, nil, err
						}
					}
				}
				if err := add(f, "-"+name, value); err != nil {
					return nil, nil, err
				}
			}
		default:
			operands = append(operands, arg)
		}
	}
	return options, operands, nil
}

func unknownOption(flags []cli.Flag, arg string) error {
	if s := cli.SuggestFlag(flags, strings.TrimLeft(arg, "-"), false); s != "" {
		return fmt.Errorf("unknown option %s, did you mean %s?", arg, s)
	}
	return fmt.Errorf("unknown option %s", arg)
}

func flagOf(flags []cli.Flag, name string) cli.Flag {
	for _, f := range flags {
		for _, n := range f.Names() {
			if n == name {
				return f
			}
		}
	}
	return nil
}

func takesValue(f cli.Flag) bool {
	d, ok := f.(cli.DocGenerationFlag)
	return ok && d.TakesValue()
}

// An optionalFlag is an option that may stand without a value, which is bare then. A
// value is attached to it: --name=value.
type optionalFlag struct {
	*cli.StringFlag
	bare string
}

func isList(f cli.Flag) bool {
	d, ok := f.(cli.DocGenerationSliceFlag)
	return ok && d.IsSliceFlag()
}
