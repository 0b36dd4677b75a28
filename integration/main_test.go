package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// programs are what the tests run, and the Debian packages that have them.
var programs = map[string]string{
	"diff": "diffutils", "e2fsck": "e2fsprogs", "fio": "fio", "fstrim": "util-linux", "fusermount3": "fuse3",
	"gcc": "gcc", "losetup": "mount", "mke2fs": "e2fsprogs", "mkfs.xfs": "xfsprogs", "mount": "mount",
	"nbd-client": "nbd-client", "nbdcopy": "libnbd-bin", "nbdfuse": "nbdfuse", "nbdinfo": "libnbd-bin", "nbdkit": "nbdkit", "nbdsh": "python3-libnbd",
	"qemu-img": "qemu-utils", "qemu-io": "qemu-utils", "qemu-nbd": "qemu-utils",
	"setpriv": "util-linux", "sh": "dash", "systemd-socket-activate": "systemd",
	"umount": "mount", "/usr/bin/python3": "python3-libnbd",
}

const sandboxVariable = "NBDSERVE_INTEGRATION_DIR"

var (
	scratch string // folder of this run, removed at its end
	long    = os.Getenv("NBDSERVE_LONG") == "1"
)

// Binaries of nbdserve: raceBinary for all tests but those that measure.
var raceBinary, plainBinary string

func TestMain(m *testing.M) {
	if dir := os.Getenv(sandboxVariable); dir != "" {
		os.Exit(inside(m, dir))
	}
	code, err := supervise()
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		code = 1
	}
	os.Exit(code)
}

// supervise builds nbdserve, runs this test binary again in namespaces of its own,
// and cleans up behind it.
func supervise() (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("these tests mount file systems and need root: run them as root")
	}
	var missing []string
	for program, pkg := range programs {
		if _, err := exec.LookPath(program); err != nil {
			missing = append(missing, fmt.Sprintf("%s (Debian package %s)", program, pkg))
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		return 1, fmt.Errorf("programs are missing: %s", strings.Join(missing, ", "))
	}
	dir, err := os.MkdirTemp("", "nbdserve-it-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, detachLoops(dir), os.RemoveAll(dir)) }()
	if err := os.Chmod(dir, 0o755); err != nil {
		return 1, err
	}
	if err := build(dir); err != nil {
		return 1, err
	}
	runtime.LockOSThread() // Pdeathsig watches the thread that started the child
	// Without its log the go command does not cache the result: it cannot see that it
	// depends on the command's source.
	args := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(arg string) bool { return strings.HasPrefix(arg, "-test.testlogfile=") })
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), sandboxVariable+"="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Unshareflags: syscall.CLONE_NEWNS,
		Cloneflags:   syscall.CLONE_NEWPID,
		Pdeathsig:    syscall.SIGKILL,
	}
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1), nil
	}
	return 0, err
}

func build(dir string) error {
	for _, b := range []struct {
		name, cgo string
		flags     []string
	}{{"nbdserve", "0", nil}, {"nbdserve.race", "1", []string{"-race"}}} {
		args := append([]string{"build", "-o", filepath.Join(dir, b.name)}, b.flags...)
		cmd := exec.Command("go", append(args, "../cmd/nbdserve")...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+b.cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %v\n%s", cmd, err, out)
		}
	}
	return nil
}

// inside runs the tests as the first process of a process namespace.
func inside(m *testing.M, dir string) int {
	if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		fmt.Fprintln(os.Stderr, "integration: mount /proc:", err)
		return 1
	}
	// Python of Debian, and not another, has the nbd module; a session's settings are not ours.
	os.Setenv("PATH", "/usr/bin:/usr/sbin:/bin:/sbin:"+os.Getenv("PATH"))
	for _, name := range []string{sandboxVariable, "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "XDG_RUNTIME_DIR", "RUNTIME_DIRECTORY"} {
		os.Unsetenv(name)
	}
	os.Setenv("LC_ALL", "C")
	os.Setenv("GORACE", "atexit_sleep_ms=0") // else each exit takes a second
	scratch = filepath.Join(dir, "t")
	if err := os.Mkdir(scratch, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		return 1
	}
	plainBinary, raceBinary = filepath.Join(dir, "nbdserve"), filepath.Join(dir, "nbdserve.race")
	code := m.Run()
	if left, err := os.ReadDir(scratch); err != nil || len(left) > 0 {
		fmt.Fprintf(os.Stderr, "integration: tests left folders behind: %v %v\n", left, err)
		code = max(code, 1)
	}
	return code
}

// detachLoops frees loop devices on files in dir: they outlive the namespaces.
func detachLoops(dir string) error {
	var errs []error
	backings, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, path := range backings {
		name, err := os.ReadFile(path)
		if err != nil || !strings.HasPrefix(string(name), dir+"/") {
			continue
		}
		device := "/dev/" + strings.Split(path, "/")[3]
		errs = append(errs, fmt.Errorf("a test left %s on %s", device, strings.TrimSpace(string(name))),
			exec.Command("losetup", "-d", device).Run())
	}
	return errors.Join(errs...)
}
