package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// A full disk below is an error for the client that writes, and nothing worse: what was
// acknowledged stays, and when there is space again writing goes on.
func TestFullDiskBelow(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			dir := ext4(t, "32M")
			ballast := writeFile(t, filepath.Join(dir, "ballast"), make([]byte, 8*mib))
			disk := filepath.Join(dir, "disk")
			run(t, "qemu-img", "create", "-q", "-f", format, disk, "40M")
			s := start(t, "--format", format, disk)
			c := connect(t, s)
			const step = 100 * kib
			written := int64(0)
			var err error
			for ; written+step <= c.size; written += step {
				if err = c.writeAt(noise(uint64(written), step), written); err == nil {
					err = c.flush() // delayed allocation finds out late
				}
				if err != nil {
					break
				}
			}
			if err != requestError(28) {
				t.Fatalf("writing %d bytes to a full disk: %v, expected ENOSPC\n%s", written, err, s.stderr)
			}
			p := make([]byte, step)
			for off := int64(0); off < written; off += step {
				if err := c.readAt(p, off); err != nil || !bytes.Equal(p, noise(uint64(off), step)) {
					t.Fatalf("bytes at %d are not as they were acknowledged: %v", off, err)
				}
			}
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			if err := c.writeAt(noise(uint64(written), step), written); err != nil {
				t.Errorf("writing when there is space again: %v\n%s", err, s.stderr)
			}
			if err := c.flush(); err != nil {
				t.Errorf("flush when there is space again: %v\n%s", err, s.stderr)
			}
			c.Close()
			s.stop()
			if format == "qcow2" {
				afterKill(t, disk)
			}
			s = start(t, "--format", format, disk)
			c = connect(t, s)
			for off := int64(0); off <= written; off += step {
				if err := c.readAt(p, off); err != nil || !bytes.Equal(p, noise(uint64(off), step)) {
					t.Fatalf("bytes at %d are not as they were acknowledged: %v", off, err)
				}
			}
		})
	}
}
