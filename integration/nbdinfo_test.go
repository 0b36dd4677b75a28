package integration

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// An exportInfo is an export as nbdinfo --json shows it.
type exportInfo struct {
	Name         string   `json:"export-name"`
	Description  string   `json:"description"`
	Size         int64    `json:"export-size"`
	Contexts     []string `json:"contexts"`
	ReadOnly     bool     `json:"is_read_only"`
	Rotational   bool     `json:"is_rotational"`
	Cache        bool     `json:"can_cache"`
	DF           bool     `json:"can_df"`
	FastZero     bool     `json:"can_fast_zero"`
	Flush        bool     `json:"can_flush"`
	FUA          bool     `json:"can_fua"`
	MultiConn    bool     `json:"can_multi_conn"`
	Trim         bool     `json:"can_trim"`
	Zero         bool     `json:"can_zero"`
	MinBlock     int64    `json:"block_size_minimum"`
	PreferBlock  int64    `json:"block_size_preferred"`
	MaximumBlock int64    `json:"block_size_maximum"`
}

type serverInfo struct {
	Protocol   string       `json:"protocol"`
	TLS        bool         `json:"TLS"`
	Structured bool         `json:"structured"`
	Exports    []exportInfo `json:"exports"`
}

func TestNbdinfoShowsTheExport(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	raw := patchyFile(t, filepath.Join(dir, "raw"), 1, 9*mib+12345)
	for format, path := range map[string]string{"raw": raw, "qcow2": convert(t, raw, "qcow2", filepath.Join(dir, "qcow2"))} {
		t.Run(format, func(t *testing.T) {
			// qemu-img rounds what it makes of an odd size up.
			size := map[string]int64{"raw": 9*mib + 12345, "qcow2": 9*mib + 12800}[format]
			s := start(t, "--format", format, "--name", "disk", "--description", "a disk of mine", path)
			uri := unixURI(s.socket, "disk")
			if got := run(t, "nbdinfo", "--size", uri); got != fmt.Sprintln(size) {
				t.Errorf("--size: %s, expected %d", got, size)
			}
			info := decode[serverInfo](t, run(t, "nbdinfo", "--json", uri))
			if info.Protocol != "newstyle-fixed" || info.TLS || !info.Structured || len(info.Exports) != 1 {
				t.Errorf("%+v", info)
			}
			e := info.Exports[0]
			if e.PreferBlock < 4096 || e.PreferBlock > e.MaximumBlock {
				t.Errorf("preferred block size %d", e.PreferBlock)
			}
			e.PreferBlock = 0
			want := exportInfo{Name: "disk", Description: "a disk of mine", Size: size, Contexts: []string{"base:allocation"},
				Rotational: e.Rotational, Cache: true, DF: true, FastZero: true, Flush: true, FUA: true, MultiConn: true,
				Trim: true, Zero: true, MinBlock: 1, MaximumBlock: 32 * mib}
			if fmt.Sprint(e) != fmt.Sprint(want) {
				t.Errorf("nbdinfo --json shows\n%+v, expected\n%+v", e, want)
			}
			for _, can := range []string{"cache", "connect", "df", "fast-zero", "flush", "fua", "multi-conn", "read", "structured-reply", "trim", "write", "zero"} {
				if r := try(t, "nbdinfo", "--can", can, uri); r.code != 0 {
					t.Errorf("--can %s: exit status %d %s", can, r.code, r.stderr)
				}
			}
			for _, is := range []string{"read-only", "tls"} {
				if r := try(t, "nbdinfo", "--is", is, uri); r.code != 2 {
					t.Errorf("--is %s: exit status %d %s", is, r.code, r.stderr)
				}
			}
			list := decode[serverInfo](t, run(t, "nbdinfo", "--list", "--json", s.uri()))
			if len(list.Exports) != 1 || list.Exports[0].Name != "disk" || list.Exports[0].Description != "a disk of mine" || list.Exports[0].Size != size {
				t.Errorf("--list shows %+v", list)
			}
			// The only export answers to "" too, and to no other name.
			if got := run(t, "nbdinfo", "--size", s.uri()); got != fmt.Sprintln(size) {
				t.Errorf("--size of the default export: %s", got)
			}
			if r := try(t, "nbdinfo", "--size", unixURI(s.socket, "other")); r.code != 1 {
				t.Errorf("an unknown export: exit status %d %s", r.code, r.stdout)
			}
		})
	}
}

func TestReadOnlyExportSaysSo(t *testing.T) {
	t.Parallel()
	raw := patchyFile(t, filepath.Join(tempDir(t), "raw"), 1, mib)
	before := checksum(t, raw)
	s := start(t, "--format", "raw", raw, "--read-only") // an option behind IMAGE counts
	if r := try(t, "nbdinfo", "--is", "read-only", s.uri()); r.code != 0 {
		t.Errorf("--is read-only: exit status %d %s", r.code, r.stderr)
	}
	for _, can := range []string{"write", "trim", "zero"} {
		if r := try(t, "nbdinfo", "--can", can, s.uri()); r.code != 2 {
			t.Errorf("--can %s: exit status %d %s", can, r.code, r.stderr)
		}
	}
	if r := try(t, "nbdinfo", "--can", "multi-conn", s.uri()); r.code != 0 {
		t.Errorf("--can multi-conn: exit status %d %s", r.code, r.stderr)
	}
	c := connect(t, s)
	if err := c.writeAt(make([]byte, 512), 0); err != requestError(errPermNBD) {
		t.Errorf("write to a read-only export: %v, expected EPERM", err)
	}
	s.stop()
	if checksum(t, raw) != before {
		t.Error("the image has changed")
	}
}

// An extent is a run of equal NBD allocation type.
type extent struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
	Type   int   `json:"type"`
}

type total struct {
	Size int64 `json:"size"`
	Type int   `json:"type"`
}

// qemuMap is the allocation of an image as qemu-img sees it, in NBD's terms. A hole is
// what takes up no space: qemu-img shows zero clusters of qcow2 that do with their offset.
func qemuMap(t testing.TB, format, path string) []extent {
	t.Helper()
	entries := decode[[]struct {
		Start, Length int64
		Zero, Data    bool
		Offset        *int64
	}](t, run(t, "qemu-img", "map", "--output=json", "-f", format, path))
	var m []extent
	for _, e := range entries {
		typ := 0
		if !e.Data && (format == "raw" || e.Offset == nil) {
			typ |= 1
		}
		if e.Zero {
			typ |= 2
		}
		m = append(m, extent{e.Start, e.Length, typ})
	}
	return merged(m)
}

func merged(m []extent) []extent {
	var out []extent
	for _, e := range m {
		if n := len(out); n > 0 && out[n-1].Type == e.Type && out[n-1].Offset+out[n-1].Length == e.Offset {
			out[n-1].Length += e.Length
		} else {
			out = append(out, e)
		}
	}
	return out
}

func TestMapAgreesWithQemu(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	raw := patchyFile(t, filepath.Join(dir, "raw"), 5, 40*mib)
	qcow2 := convert(t, raw, "qcow2", filepath.Join(dir, "qcow2"))
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -z 1M 1M", "-c", "write -z -u 4M 1M", "-c", "discard 6M 1M", qcow2)
	overlay := filepath.Join(dir, "overlay")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", overlay, "48M")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write 3M 64k", "-c", "write -z 8M 1M", "-c", "write 45M 1M", overlay)
	empty := filepath.Join(dir, "empty")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", empty, "5G")
	for _, image := range []struct{ format, path string }{{"raw", raw}, {"qcow2", qcow2}, {"qcow2", overlay}, {"qcow2", empty}} {
		t.Run(filepath.Base(image.path), func(t *testing.T) {
			want := qemuMap(t, image.format, image.path)
			s := start(t, "--read-only", "--format", image.format, image.path)
			got := merged(decode[[]extent](t, run(t, "nbdinfo", "--map", "--json", s.uri())))
			if !slices.Equal(got, want) {
				t.Errorf("nbdinfo --map shows\n%v, qemu-img map\n%v", got, want)
			}
			if got := qemuMap(t, "raw", s.uri()); !slices.Equal(got, want) {
				t.Errorf("qemu-img map over NBD shows\n%v, of the file\n%v", got, want)
			}
			sums := map[int]int64{}
			for _, e := range want {
				sums[e.Type] += e.Length
			}
			totals := decode[[]total](t, run(t, "nbdinfo", "--map", "--totals", "--json", s.uri()))
			if len(totals) != len(sums) {
				t.Errorf("--totals shows %v, expected %v", totals, sums)
			}
			for _, total := range totals {
				if sums[total.Type] != total.Size {
					t.Errorf("--totals shows %v, expected %v", totals, sums)
				}
			}
		})
	}
}

func TestExportNameOfEveryKind(t *testing.T) {
	t.Parallel()
	raw := patchyFile(t, filepath.Join(tempDir(t), "raw"), 1, mib)
	for _, name := range []string{"/abs/path", "with space", "ümläut-€", "50%", strings.Repeat("n", 4096)} {
		s := start(t, "--read-only", "--format", "raw", "--name", name, "--print-uri", raw)
		uri := s.stdout.lines(1)[0]
		info := decode[serverInfo](t, run(t, "nbdinfo", "--json", uri))
		if len(info.Exports) != 1 || info.Exports[0].Name != name && len(name) < 100 {
			t.Errorf("%s shows %+v", uri, info)
		}
		s.stop()
	}
}
