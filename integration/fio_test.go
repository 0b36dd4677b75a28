package integration

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// fio runs jobs of fio's nbd engine, which verify what they write.
func fio(t testing.TB, dir string, args ...string) {
	t.Helper()
	cmd := fioCommand(t, dir, args...)
	if r := finish(t, cmd); r.code != 0 {
		t.Errorf("%s: exit status %d\n%s%s", cmd, r.code, r.stdout, r.stderr)
	}
}

func TestFioVerifies(t *testing.T) {
	t.Parallel()
	for network, listen := range listeners {
		for _, format := range []string{"raw", "qcow2"} {
			t.Run(network+"/"+format, func(t *testing.T) {
				dir := tempDir(t)
				disk := filepath.Join(dir, "disk")
				run(t, "qemu-img", "create", "-q", "-f", format, disk, "64M")
				s := start(t, append([]string{"--format", format, "--print-uri", disk}, listen...)...)
				uri := s.stdout.lines(1)[0]
				// Four jobs are four connections; each has a quarter of the disk.
				fio(t, dir, "--name=rw", "--uri="+uri, "--rw=randrw", "--bsrange=512-128k", "--bs_unaligned=0", "--blockalign=512",
					"--numjobs=4", "--size=16m", "--offset_increment=16m", "--iodepth=16", "--io_size=8m", "--norandommap=0")
				fio(t, dir, "--name=sync", "--uri="+uri, "--rw=randwrite", "--bs=4k", "--size=16m", "--iodepth=32", "--fsync=64", "--io_size=4m")
				s.stop()
				if format == "qcow2" {
					clean(t, disk)
				}
			})
		}
	}
}

func TestFioTrims(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	disk := filepath.Join(dir, "disk.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", disk, "32M")
	s := start(t, "--format", "qcow2", disk)
	if r := finish(t, command(t, "fio", "--ioengine=nbd", "--name=t", "--uri="+s.uri(), "--rw=trimwrite", "--bs=64k", "--size=32m",
		"--iodepth=16", "--aux-path="+dir)); r.code != 0 {
		t.Errorf("fio: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	s.stop()
	clean(t, disk)
}

func fioCommand(t testing.TB, dir string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := command(t, "fio", append([]string{"--ioengine=nbd", "--thread", "--verify=crc32c", "--verify_state_save=0",
		"--verify_fatal=1", "--aux-path=" + dir, "--output-format=terse"}, args...)...)
	cmd.Dir = dir
	return cmd
}
