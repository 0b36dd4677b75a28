package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// suffixes are the units of sizes, each 1024 times the one before.
const suffixes = "KMGTPE"

// parseSize reads a size in bytes: digits and at most one of the suffixes k, M, G,
// T, P and E (powers of 1024, either case).
func parseSize(s string) (int64, error) {
	digits := strings.TrimRight(s, suffixes+strings.ToLower(suffixes))
	suffix := s[len(digits):]
	shift := 0
	if len(suffix) == 1 {
		shift = 10 * (1 + strings.Index(suffixes, strings.ToUpper(suffix)))
	}
	if digits == "" || shift == 0 && suffix != "" || strings.Trim(digits, "0123456789") != "" {
		return 0, fmt.Errorf("'%s' is not a size: digits are expected, then nothing or one of k, M, G, T, P, E (powers of 1024)", s)
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("size '%s' is too large: the maximum is 8E - 1", s)
	}
	return n << shift, nil
}

// formatSize writes a number of bytes for people, as qemu-img does: three digits and a unit.
func formatSize(n int64) string {
	value, unit := float64(n), "B"
	for i := 0; value >= 1000 && i < len(suffixes); i++ {
		value /= 1024
		unit = suffixes[i:i+1] + "iB"
	}
	return strconv.FormatFloat(value, 'g', 3, 64) + " " + unit
}
