package main

import "strconv"

// formatSize writes a number of bytes for people, as qemu-img does: three digits and a unit.
func formatSize(n int64) string {
	const suffixes = "KMGTPE"
	value, unit := float64(n), "B"
	for i := 0; value >= 1000 && i < len(suffixes); i++ {
		value /= 1024
		unit = suffixes[i:i+1] + "iB"
	}
	return strconv.FormatFloat(value, 'g', 3, 64) + " " + unit
}
