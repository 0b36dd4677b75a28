package integration

import (
	"path/filepath"
	"testing"
)

// prelude makes the handle h lenient, so that what the protocol forbids is sent as
// it is, and has helpers for the scripts.
const prelude = `
import errno, os, sys, nbd
SIZE = 16 << 20
def handle():
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.add_meta_context("base:allocation")
    return h
def refuses(code, f, *args, **kw):
    try:
        f(*args, **kw)
    except nbd.Error as e:
        if e.errnum != getattr(errno, code):
            raise AssertionError("expected %s: %s" % (code, e))
        return
    raise AssertionError("expected %s, but %s%s succeeded" % (code, f.__name__, args))
h = handle()
path = os.environ["unixsocket"]
`

func nbdsh(t *testing.T, s *server, script string) {
	t.Helper()
	cmd := command(t, "/usr/bin/python3", "-c", prelude+script)
	cmd.Env = append(cmd.Environ(), "unixsocket="+s.socket)
	if r := finish(t, cmd); r.code != 0 {
		t.Errorf("%s%s\n%s", r.stdout, r.stderr, s.stderr)
	}
}

func sixteenMiB(t *testing.T, format string) string {
	t.Helper()
	path := filepath.Join(tempDir(t), format)
	run(t, "qemu-img", "create", "-q", "-f", format, path, "16M")
	return path
}

func TestRequestsThatTheProtocolForbids(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			s := start(t, "--format", format, sixteenMiB(t, format))
			nbdsh(t, s, `
h.connect_unix(path)
assert h.get_size() == SIZE
mark = b"\xa5" * 512
h.pwrite(mark, SIZE - 512)
# past the end
refuses("EINVAL", h.pread, 512, SIZE)
refuses("EINVAL", h.pread, 513, SIZE - 512)
refuses("EINVAL", h.pread, 1, 1 << 62)
refuses("EINVAL", h.pread, 512, (1 << 64) - 512)
refuses("ENOSPC", h.pwrite, mark, SIZE)
refuses("ENOSPC", h.pwrite, mark, SIZE - 511)
refuses("ENOSPC", h.pwrite, mark, (1 << 63) - 512)
refuses("ENOSPC", h.zero, 512, SIZE - 511)
refuses("ENOSPC", h.zero, 4294967295, 0)
refuses("EINVAL", h.trim, 512, SIZE - 511)
refuses("EINVAL", h.cache, 512, SIZE)
refuses("EINVAL", h.block_status, 512, SIZE, lambda *a: 0)
# unknown flags, and flags of other commands
refuses("EINVAL", h.pread, 512, 0, 0x8000)
refuses("EINVAL", h.pwrite, mark, 0, 0x8000)
refuses("EINVAL", h.pwrite, mark, 0, nbd.CMD_FLAG_REQ_ONE)
refuses("EINVAL", h.flush, 0x8000)
refuses("EINVAL", h.trim, 512, 0, 0x8000)
refuses("EINVAL", h.zero, 512, 0, 0x8000)
refuses("EINVAL", h.block_status, 512, 0, lambda *a: 0, 0x8000)
refuses("EINVAL", h.cache, 512, 0, 0x8000)
# too long
refuses("EINVAL", h.pread, 33 << 20, 0)
# the connection goes on, and nothing was changed
assert h.pread(512, SIZE - 512) == mark
assert h.pread(512, 0) == bytes(512)
h.flush()
h.shutdown()
`)
		})
	}
}

func TestZeroLengthRequests(t *testing.T) {
	t.Parallel()
	s := start(t, "--format", "qcow2", sixteenMiB(t, "qcow2"))
	// The protocol leaves their answer open; they must be answered, and change nothing.
	nbdsh(t, s, `
def either(f, *args):
    try:
        f(*args)
    except nbd.Error as e:
        assert e.errnum == errno.EINVAL, e
h.connect_unix(path)
h.pwrite(b"x" * 4096, 0)
for off in 0, 77, SIZE:
    either(h.pread, 0, off)
    either(h.pwrite, b"", off)
    either(h.zero, 0, off)
    either(h.trim, 0, off)
    either(h.cache, 0, off)
    either(h.block_status, 0, off, lambda *a: 0)
assert h.pread(4096, 0) == b"x" * 4096
h.shutdown()
`)
}

func TestWriteOf33MiB(t *testing.T) {
	t.Parallel()
	s := start(t, "--format", "raw", sixteenMiB(t, "raw"))
	// More than the maximum of 32 MiB: refused, or the connection is cut; others notice nothing.
	nbdsh(t, s, `
honest = handle()
honest.connect_unix(path)
honest.pwrite(b"h" * 4096, 4096)
h.connect_unix(path)
try:
    h.pwrite(bytes(33 << 20), 0)
    raise AssertionError("a write of 33 MiB succeeded")
except nbd.Error as e:
    pass
assert honest.pread(4096, 4096) == b"h" * 4096
honest.pwrite(bytes(SIZE), 0)
honest.shutdown()
`)
}

func TestReadOnlyExportRefusesChanges(t *testing.T) {
	t.Parallel()
	disk := sixteenMiB(t, "raw")
	s := start(t, "--read-only", "--format", "raw", disk)
	nbdsh(t, s, `
h.connect_unix(path)
refuses("EPERM", h.pwrite, b"x" * 512, 0)
refuses("EPERM", h.pwrite, b"x" * (1 << 20), 0, nbd.CMD_FLAG_FUA)
refuses("EPERM", h.zero, 512, 0)
refuses("EPERM", h.trim, 512, 0)
assert h.pread(512, 0) == bytes(512)
h.flush()
h.shutdown()
`)
}

func TestOldClients(t *testing.T) {
	t.Parallel()
	s := start(t, "--format", "qcow2", sixteenMiB(t, "qcow2"))
	nbdsh(t, s, `
def use(h, n):
    h.connect_unix(path)
    assert h.get_size() == SIZE
    data = bytes([n]) * 70000
    h.pwrite(data, 1234 * n)
    assert h.pread(70000, 1234 * n) == data
    h.zero(70000, 1234 * n)
    assert h.pread(70000, 1234 * n) == bytes(70000)
    refuses("ENOSPC", h.pwrite, b"x", SIZE)
    h.flush()
    h.shutdown()
h.set_handshake_flags(0)                       # neither fixed nor without zeroes
use(h, 1)
h = handle(); h.set_handshake_flags(nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE)
use(h, 2)
h = handle(); h.set_handshake_flags(nbd.HANDSHAKE_FLAG_NO_ZEROES)
use(h, 3)
h = handle(); h.set_request_structured_replies(False)
use(h, 4)
assert not h.get_structured_replies_negotiated()
h = handle()
if hasattr(h, "set_request_block_size"):
    h.set_request_block_size(False)
use(h, 5)
`)
}

func TestDFFlagGivesOneChunk(t *testing.T) {
	t.Parallel()
	disk := sixteenMiB(t, "qcow2")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", "-c", "write -P 2 1M 64k", disk)
	s := start(t, "--format", "qcow2", disk)
	nbdsh(t, s, `
h.connect_unix(path)
def chunks(flags):
    got = []
    data = h.pread_structured(2 << 20, 0, lambda buf, off, status, err: got.append((off, len(buf), status)), flags)
    assert data == b"\1" * 65536 + bytes((1 << 20) - 65536) + b"\2" * 65536 + bytes((1 << 20) - 65536)
    assert sum(n for _, n, _ in got) == 2 << 20, got
    return got
assert len(chunks(nbd.CMD_FLAG_DF)) == 1
assert any(status == nbd.READ_HOLE for _, _, status in chunks(0)), chunks(0)
h.shutdown()
`)
}

func TestNegotiationStepByStep(t *testing.T) {
	t.Parallel()
	s := start(t, "--format", "qcow2", "--name", "disk", "--description", "words", sixteenMiB(t, "qcow2"))
	nbdsh(t, s, `
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(path)
seen = []
assert h.opt_list(lambda name, text: seen.append((name, text))) == 1
assert seen == [("disk", "words")], seen
h.set_export_name("disk")
h.opt_info()
assert h.get_size() == SIZE and not h.is_read_only()
h.set_export_name("nothing")
refuses("ENOENT", h.opt_info)
refuses("ENOENT", h.opt_go)
h.set_export_name("disk")
contexts = []
h.opt_list_meta_context(contexts.append)
assert "base:allocation" in contexts, contexts
h.add_meta_context("base:allocation")
h.add_meta_context("nobody:knows")
h.opt_go()
assert h.can_meta_context("base:allocation") and not h.can_meta_context("nobody:knows")
assert h.pread(512, 0) == bytes(512)
h.shutdown()
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(path)
h.opt_abort()
`)
}

// A client that is gone leaves nothing half done, and others notice nothing.
func TestClientsThatVanish(t *testing.T) {
	t.Parallel()
	s := start(t, "--format", "qcow2", sixteenMiB(t, "qcow2"))
	nbdsh(t, s, `
honest = handle()
honest.connect_unix(path)
honest.pwrite(b"h" * 4096, 0)
for i in range(20):
    if os.fork() == 0:
        h = handle()
        h.connect_unix(path)
        for n in range(100):
            h.aio_pread(nbd.Buffer(65536), 65536 * n)
            h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"v" * 65536)), 65536 * (n + 10))
        os._exit(0)
for i in range(20):
    os.wait()
    assert honest.pread(4096, 0) == b"h" * 4096
for block in range(10, 110):
    data = honest.pread(65536, 65536 * block)
    assert data in (bytes(65536), b"v" * 65536), block
honest.shutdown()
`)
}

// FLUSH on one connection covers writes that were answered on another, and each sees what the other wrote.
func TestConnectionsSeeEachOther(t *testing.T) {
	t.Parallel()
	s := start(t, "--format", "qcow2", sixteenMiB(t, "qcow2"))
	nbdsh(t, s, `
other = handle()
h.connect_unix(path); other.connect_unix(path)
assert h.can_multi_conn() and other.can_multi_conn()
for i in range(1, 200):
    data = bytes([i]) * 3000
    h.pwrite(data, i * 5000)
    assert other.pread(3000, i * 5000) == data
    other.zero(100, i * 5000)
    assert h.pread(3000, i * 5000) == bytes(100) + data[100:]
    other.flush()
h.shutdown(); other.shutdown()
`)
}

func TestAllocationFollowsWrites(t *testing.T) {
	t.Parallel()
	s := start(t, "--format", "qcow2", sixteenMiB(t, "qcow2"))
	nbdsh(t, s, `
h.connect_unix(path)
def status(n, off, flags=0):
    got = []
    h.block_status(n, off, lambda context, o, entries, err: got.extend(entries), flags)
    return list(zip(got[::2], got[1::2]))
HOLE, ZERO = nbd.STATE_HOLE, nbd.STATE_ZERO
assert status(SIZE, 0) == [(SIZE, HOLE | ZERO)]
h.pwrite(b"x" * 65536, 1 << 20)
assert status(SIZE, 0) == [(1 << 20, HOLE | ZERO), (65536, 0), (SIZE - (1 << 20) - 65536, HOLE | ZERO)]
one = status(SIZE - 100, 100, nbd.CMD_FLAG_REQ_ONE)
assert len(one) == 1 and one[0] == ((1 << 20) - 100, HOLE | ZERO), one
h.zero(65536, 1 << 20, nbd.CMD_FLAG_NO_HOLE)
assert status(65536, 1 << 20) == [(65536, ZERO)], status(65536, 1 << 20)
h.trim(SIZE, 0)
assert all(flags & ZERO for _, flags in status(SIZE, 0))
h.shutdown()
`)
}
