package main

import (
	"math"
	"os"
	"testing"
)

func writeFile(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
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
