package hostdev

import (
	"os"
	"path/filepath"
	"testing"
)

func TestLocksThatStayOnThisHost(t *testing.T) {
	const mounts = `22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
57 22 0:48 / /mnt/a rw,relatime shared:30 - nfs4 host:/a rw,vers=4.2,local_lock=none,addr=192.0.2.1
58 22 0:49 / /mnt/b\040c rw - nfs host:/b rw,vers=3,nolock,local_lock=all,addr=192.0.2.1
59 22 0:50 / /mnt/c rw - nfs host:/c rw,local_lock=posix
60 22 0:51 / /mnt/d rw - nfs host:/d rw,local_lock=flock
garbage
61 22 0:52
`
	for minor, want := range map[uint32]string{
		48: "", 49: "it is on NFS mounted with local_lock=all", 50: "it is on NFS mounted with local_lock=posix", 51: "", 52: "", 53: "",
	} {
		if got := localLock(mounts, 0, minor); got != want {
			t.Errorf("device 0:%d: %q, want %q", minor, got, want)
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{file: "", file + ".none": "", "/dev/null": "it is a device, whose locks hold on this host only"} {
		if got := LocalLocks(path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}
