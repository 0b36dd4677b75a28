package hostdev

import (
	"errors"
	"fmt"
	"os"
)

// A Temporary is an empty regular file without a name: it is gone when the process
// ends, however it ends.
type Temporary struct{ file *os.File }

// NewTemporary makes a file in $TMPDIR, or else in /var/tmp; not in /tmp, which may be
// held in memory (rule G20).
func NewTemporary() (*Temporary, error) {
	dir := os.Getenv("TMPDIR")
	if dir == "" || dir == "/tmp" {
		dir = "/var/tmp"
	}
	f, err := os.CreateTemp(dir, "vl.")
	if err != nil {
		return nil, fmt.Errorf("Could not get temporary filename: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("Could not take the name from a temporary file: %w", err), f.Close())
	}
	return &Temporary{f}, nil
}

// Filename opens the file, until Close.
func (t *Temporary) Filename() string { return fmt.Sprintf("/proc/self/fd/%d", t.file.Fd()) }

// Close gives the file up. What has opened it can use it on.
func (t *Temporary) Close() error { return t.file.Close() }
