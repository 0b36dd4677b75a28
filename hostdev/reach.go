package hostdev

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// LocalLocks tells why locks on the file or device at path do not reach the other
// hosts that may use it; "" if they do, as far as is known.
func LocalLocks(path string) string {
	var st unix.Stat_t
	if retry(func() error { return unix.Stat(path, &st) }) != nil {
		return ""
	}
	if kindOf(&st) != regularFile {
		return "it is a device, whose locks hold on this host only"
	}
	var fs unix.Statfs_t
	if retry(func() error { return unix.Statfs(path, &fs) }) != nil || fs.Type != unix.NFS_SUPER_MAGIC {
		return ""
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	return localLock(string(mounts), unix.Major(st.Dev), unix.Minor(st.Dev))
}

// localLock looks at the options of the mount of a device in /proc/self/mountinfo,
// that of NFS, for local_lock (see nfs(5)); ours are locks of the kind "posix".
func localLock(mountinfo string, major, minor uint32) string {
	device := fmt.Sprintf("%d:%d", major, minor)
	for line := range strings.Lines(mountinfo) {
		about, options, found := strings.Cut(line, " - ")
		fields := strings.Fields(about)
		if !found || len(fields) < 3 || fields[2] != device {
			continue
		}
		for option := range strings.FieldsFuncSeq(options, func(r rune) bool { return r == ' ' || r == ',' || r == '\n' }) {
			if option == "local_lock=all" || option == "local_lock=posix" {
				return "it is on NFS mounted with " + option
			}
		}
	}
	return ""
}
