package main

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

var update = flag.Bool("update", false, "write docs/nbdserve.1 anew")

const (
	manSource = "../../docs/nbdserve.1.in"
	manPage   = "../../docs/nbdserve.1"
)

func TestManPageShowsTheCommandLineAsItIs(t *testing.T) {
	source, err := os.ReadFile(manSource)
	if err != nil {
		t.Fatal(err)
	}
	var synopsis, commands strings.Builder
	for _, c := range leaves("nbdserve", newApp().Commands) {
		fmt.Fprintf(&synopsis, ".B %s\n%s\n.br\n", roff(c.path), roff(strings.TrimSpace("[options] "+c.ArgsUsage)))
		c.write(&commands)
	}
	want := strings.NewReplacer("@SYNOPSIS@\n", synopsis.String(), "@COMMANDS@\n", commands.String()).Replace(string(source))
	if *update {
		if err := os.WriteFile(manPage, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(manPage)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Error("docs/nbdserve.1 is out of date: go test ./cmd/nbdserve -run TestManPage -update")
	}
}

// A leaf is a command that does something.
type leaf struct {
	*cli.Command
	path string
}

func leaves(path string, commands []*cli.Command) []leaf {
	var all []leaf
	for _, c := range commands {
		p := path + " " + c.Name
		if len(c.Subcommands) == 0 {
			all = append(all, leaf{c, p})
		}
		all = append(all, leaves(p, c.Subcommands)...)
	}
	return all
}

func (c leaf) write(b *strings.Builder) {
	fmt.Fprintf(b, ".SS %s %s\n", roff(strings.TrimPrefix(c.path, "nbdserve ")), roff(c.ArgsUsage))
	text := c.Description
	if text == "" {
		text = strings.ToUpper(c.Usage[:1]) + c.Usage[1:] + "."
	}
	for i, paragraph := range strings.Split(text, "\n") {
		if i > 0 {
			b.WriteString(".PP\n")
		}
		b.WriteString(roff(paragraph) + "\n")
	}
	category := ""
	for _, f := range c.Flags {
		if g, ok := f.(cli.CategorizableFlag); ok && g.GetCategory() != category {
			category = g.GetCategory()
			fmt.Fprintf(b, ".PP\n%s:\n", roff(category))
		}
		d := f.(cli.DocGenerationFlag)
		value, usage := unquote(d.GetUsage())
		var names []string
		for _, n := range f.Names() {
			if len(n) == 1 {
				names = append([]string{"-" + n}, names...)
			} else {
				names = append(names, "--"+n)
			}
		}
		fmt.Fprintf(b, ".TP\n.B %s\n", roff(strings.TrimSpace(strings.Join(names, ", ")+" "+value)))
		if v := strings.Trim(d.GetValue(), `"`); takesValue(f) && v != "" && !isList(f) {
			usage += "; default: " + v
		}
		b.WriteString(roff(usage) + "\n")
	}
}

// unquote takes the name of the value, which stands in backquotes, out of a usage text.
func unquote(usage string) (value, text string) {
	before, rest, found := strings.Cut(usage, "`")
	if !found {
		return "", usage
	}
	value, after, _ := strings.Cut(rest, "`")
	return value, before + value + after
}

func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}
