package main

import (
	"math"
	"os"
	"strings"
	"testing"
)

func writeFile(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestSizesAreBytesOrPowersOf1024(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "512": 512, "1k": 1 << 10, "1K": 1 << 10, "3M": 3 << 20, "3m": 3 << 20, "10G": 10 << 30, "2T": 2 << 40, "1P": 1 << 50,
		"7E": 7 << 60, "0E": 0, "9223372036854775807": math.MaxInt64, "007": 7,
	} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "k", "-1", "+1", "1.5G", "1kk", "1km", "1 M", " 1", "0x10", "1B", "8E", "9223372036854775808", "99999999999999999999", "1_0", "１"} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("parseSize(%q) = %d, want an error", s, got)
		}
	}
}

func TestSizesForPeopleAreThoseOfQemuImg(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 512: "512 B", 1000: "0.977 KiB", 1024: "1 KiB", 200704: "196 KiB", 1 << 30: "1 GiB", 5 << 29: "2.5 GiB", 1 << 40: "1 TiB", math.MaxInt64: "8 EiB",
	} {
		if got := formatSize(n); got != want {
			t.Errorf("formatSize(%d) = %q, want %q", n, got, want)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"0", "1k", "8E", "7E", "9223372036854775807", "kk", "1km"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseSize(s)
		if err == nil && (n < 0 || strings.ContainsAny(s, " -+.")) {
			t.Errorf("parseSize(%q) = %d", s, n)
		}
	})
}
