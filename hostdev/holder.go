package hostdev

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A Holder is a process that has a lock on an image.
type Holder struct {
	PID     int
	Command string // name of its program, or ""
}

func (h Holder) String() string {
	switch {
	case h.PID == os.Getpid():
		return fmt.Sprintf("this process (%d)", h.PID)
	case h.Command == "":
		return fmt.Sprintf("process %d", h.PID)
	}
	return fmt.Sprintf("process %d (%s)", h.PID, h.Command)
}

// maxHolders bounds how many processes are named.
const maxHolders = 4

// findHolders looks for those that have a lock on a byte of the file of fd, other
// than by our own descriptors. The kernel tells no process for such locks, but
// shows each in the fdinfo of the descriptors that carry it. Processes that may
// not be looked at are not found.
func findHolders(fd int, own []int, at int64) []Holder {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return nil
	}
	dirs, err := filepath.Glob("/proc/[0-9]*/fdinfo")
	if err != nil {
		return nil
	}
	var found []Holder
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(dir)))
		if err != nil {
			continue
		}
		skip := func(fd int) bool { return pid == os.Getpid() && slices.Contains(own, fd) }
		if !hasLock(dir, &st, at, skip) {
			continue
		}
		comm, _ := os.ReadFile(filepath.Join(filepath.Dir(dir), "comm"))
		found = append(found, Holder{pid, strings.TrimSpace(string(comm))})
		if len(found) == maxHolders {
			break
		}
	}
	return found
}

// hasLock tells whether a descriptor in dir, other than those that skip names, has
// a lock on the byte at of the file st.
func hasLock(dir string, st *unix.Stat_t, at int64, skip func(fd int) bool) bool {
	infos, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	for _, info := range infos {
		b, err := os.ReadFile(filepath.Join(dir, info.Name()))
		if err != nil || !strings.Contains(string(b), "lock:") || !locksByte(string(b), st.Ino, at) {
			continue
		}
		// Inodes are unique on one file system only.
		var other unix.Stat_t
		if unix.Stat(filepath.Join(filepath.Dir(dir), "fd", info.Name()), &other) != nil ||
			other.Dev != st.Dev || other.Ino != st.Ino {
			continue
		}
		if fd, err := strconv.Atoi(info.Name()); err == nil && !skip(fd) {
			return true
		}
	}
	return false
}

// locksByte tells whether fdinfo has a record lock on byte at of inode ino.
func locksByte(fdinfo string, ino uint64, at int64) bool {
	for line := range strings.Lines(fdinfo) {
		if l, ok := parseLock(line); ok && l.ino == ino && l.first <= at && at <= l.last {
			return true
		}
	}
	return false
}

// A lockLine is a record lock as the kernel prints it.
type lockLine struct {
	ino         uint64
	first, last int64 // bytes, both locked
}

// parseLock reads a line such as "lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 100 101".
func parseLock(line string) (lockLine, bool) {
	f := strings.Fields(line)
	if len(f) != 9 || f[0] != "lock:" || f[2] != "OFDLCK" && f[2] != "POSIX" {
		return lockLine{}, false
	}
	dev := strings.Split(f[6], ":")
	if len(dev) != 3 {
		return lockLine{}, false
	}
	ino, err := strconv.ParseUint(dev[2], 10, 64)
	if err != nil {
		return lockLine{}, false
	}
	first, err := strconv.ParseInt(f[7], 10, 64)
	if err != nil || first < 0 {
		return lockLine{}, false
	}
	last := int64(unbounded)
	if f[8] != "EOF" {
		if last, err = strconv.ParseInt(f[8], 10, 64); err != nil || last < first {
			return lockLine{}, false
		}
	}
	return lockLine{ino, first, last}, true
}
