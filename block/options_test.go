package block_test

import (
	"math"
	"strings"
	"testing"

	"github.com/nbdserve/nbdserve/block"
)

func TestSizesAreBytesOrPowersOf1024(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "512": 512, "1k": 1 << 10, "1K": 1 << 10, "3M": 3 << 20, "3m": 3 << 20, "10G": 10 << 30, "2T": 2 << 40, "1P": 1 << 50,
		"7E": 7 << 60, "0E": 0, "9223372036854775807": math.MaxInt64, "007": 7,
	} {
		if got, err := block.ParseSize(s); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "k", "-1", "+1", "1.5G", "1kk", "1km", "1 M", " 1", "0x10", "1B", "8E", "9223372036854775808", "99999999999999999999", "1_0", "１"} {
		if got, err := block.ParseSize(s); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", s, got)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"0", "1k", "8E", "7E", "9223372036854775807", "kk", "1km"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := block.ParseSize(s)
		if err == nil && (n < 0 || strings.ContainsAny(s, " -+.")) {
			t.Errorf("ParseSize(%q) = %d", s, n)
		}
	})
}
