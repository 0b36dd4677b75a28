package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
)

const sector = 512

// A stamp is what a sector holds: number 0 is what it held at first, zeroed sectors have none.
type stamp struct {
	seq    uint64
	zeroed bool
}

// put fills p with the sector's contents of a stamp. In each sector stand its own
// number and that of the write, and all of it depends on both.
func (st stamp) put(p []byte, n int64) {
	if st.zeroed {
		clear(p)
		return
	}
	binary.LittleEndian.PutUint64(p, uint64(n))
	binary.LittleEndian.PutUint64(p[8:], st.seq)
	x := uint64(n)*0x9e3779b97f4a7c15 ^ st.seq
	for i := 16; i < sector; i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p[i:], x)
	}
}

// written is one write to a sector.
type written struct {
	stamp
	acked bool
}

// A ledger knows what each sector of a disk may hold.
type ledger struct {
	mu      sync.Mutex
	sectors [][]written // oldest first; what is before the last flushed write is dropped
	seq     uint64
	flushes int

	acked, until atomic.Int64  // writes so far, and how many are enough
	due, enough  chan struct{} // hold a value when a flush is due, when there are enough
	stop         atomic.Bool   // the writers end in order
}

// flushInterval is how many writes are acknowledged between two flushes: enough that a
// write that is made durable by FUA alone often meets the kill.
const flushInterval = 50

// newLedger is of a disk that holds zeroes, or stamps with number 0.
func newLedger(size int64, zeroed bool) *ledger {
	l := &ledger{sectors: make([][]written, size/sector), due: make(chan struct{}, 1), enough: make(chan struct{}, 1)}
	for i := range l.sectors {
		l.sectors[i] = []written{{stamp{zeroed: zeroed}, true}}
	}
	return l
}

func (l *ledger) issue(off, n int64, zeroed bool) stamp {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seq++
	st := stamp{l.seq, zeroed}
	for i := off / sector; i < (off+n)/sector; i++ {
		l.sectors[i] = append(l.sectors[i], written{stamp: st})
	}
	return st
}

// answer notes that the write with stamp st is acknowledged; with durable also that it is safe.
func (l *ledger) answer(off, n int64, st stamp, durable bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := off / sector; i < (off+n)/sector; i++ {
		for k := range l.sectors[i] {
			if w := &l.sectors[i][k]; w.stamp == st {
				w.acked = true
				if durable {
					l.sectors[i] = l.sectors[i][k:]
				}
				break
			}
		}
	}
	count := l.acked.Add(1)
	if count%flushInterval == 0 {
		select {
		case l.due <- struct{}{}:
		default:
		}
	}
	if count == l.until.Load() {
		l.enough <- struct{}{}
	}
}

// mark returns for each sector the last acknowledged write: a FLUSH that is sent later makes it durable.
func (l *ledger) mark() []stamp {
	l.mu.Lock()
	defer l.mu.Unlock()
	marks := make([]stamp, len(l.sectors))
	for i, ws := range l.sectors {
		for _, w := range ws {
			if w.acked {
				marks[i] = w.stamp
			}
		}
	}
	return marks
}

func (l *ledger) flushed(marks []stamp) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flushes++
	for i, ws := range l.sectors {
		for k := range ws {
			if ws[k].stamp == marks[i] {
				l.sectors[i] = ws[k:]
				break
			}
		}
	}
}

// settle reads the whole disk and demands of each sector one of the contents that it
// may have. What it has is then what is known.
func (l *ledger) settle(t testing.TB, c *nbdConn) {
	t.Helper()
	buf, want := make([]byte, mib), make([]byte, sector)
	bad := 0
	for off := int64(0); off < c.size; off += mib {
		n := min(mib, c.size-off)
		if err := c.readAt(buf[:n], off); err != nil {
			t.Fatalf("read %d bytes at %d: %v", n, off, err)
		}
		for at := int64(0); at < n; at += sector {
			i := (off + at) / sector
			found := false
			for _, w := range l.sectors[i] {
				if w.put(want, i); string(want) == string(buf[at:at+sector]) {
					l.sectors[i] = []written{{w.stamp, true}}
					found = true
					break
				}
			}
			if !found {
				if bad++; bad <= 5 {
					t.Errorf("sector %d holds %x..., none of %+v", i, buf[at:at+32], l.sectors[i])
				}
			}
		}
	}
	if bad > 0 {
		t.Fatalf("%d of %d sectors are wrong", bad, len(l.sectors))
	}
}

// write changes the disk until the connection breaks. The sectors [from, to) are its
// own. With fua some writes have that flag.
func (l *ledger) write(c *nbdConn, from, to int64, r *rand.Rand, fua bool) error {
	type sent struct {
		off, n int64
		st     stamp
		fua    bool
	}
	buf := make([]byte, 128*kib)
	for !l.stop.Load() {
		var batch []sent
		// Writes in flight at the same time must not overlap: each has a slice of its own.
		const depth = 8
		slice := (to - from) / depth
		for k := range int64(depth) {
			n := min(1+r.Int64N(64), slice)
			if r.IntN(4) == 0 {
				n = min(128, slice)
			}
			first := from + k*slice + r.Int64N(slice-n+1)
			off, length := first*sector, n*sector
			s := sent{off: off, n: length, fua: fua && r.IntN(32) == 0, st: l.issue(off, length, r.IntN(8) == 0)}
			cmd, flags, payload := uint16(cmdWrite), uint16(0), buf[:length]
			if s.st.zeroed {
				cmd, payload, flags = cmdZeroes, nil, uint16(r.IntN(2))*flagNoHole
			} else {
				for i := range n {
					s.st.put(payload[i*sector:(i+1)*sector], first+i)
				}
			}
			if s.fua {
				flags |= flagFUA
			}
			batch = append(batch, s)
			if err := c.requestAs(uint64(k), cmd, flags, off, int(length), payload); err != nil {
				return err
			}
		}
		if err := c.w.Flush(); err != nil {
			return err
		}
		for range batch {
			cookie, code, err := c.reply()
			if err != nil {
				return err
			}
			if code != 0 || cookie >= depth {
				return fmt.Errorf("answer to request %d: %w", cookie, requestError(code))
			}
			s := batch[cookie]
			l.answer(s.off, s.n, s.st, s.fua)
		}
	}
	return nil
}

// load writes by several connections and flushes by one more until the server is
// gone. After enough acknowledged writes, which may be at any point of a flush, it
// calls end.
func (l *ledger) load(t testing.TB, s *server, seed uint64, enough int64, end func()) {
	t.Helper()
	conns := make([]*nbdConn, 4)
	for i := range conns {
		conns[i] = connect(t, s)
	}
	l.loadOver(t, s, conns, seed, enough, end)
}

// loadOver is load over connections that are there; they are closed in the end.
func (l *ledger) loadOver(t testing.TB, s *server, conns []*nbdConn, seed uint64, enough int64, end func()) {
	t.Helper()
	writers := len(conns) - 1
	l.stop.Store(false)
	l.until.Store(l.acked.Load() + enough)
	// An answer of the server is a failure; the end of the connection is what is waited for.
	demand := func(err error) {
		var answer requestError
		if errors.As(err, &answer) {
			t.Error(err)
		}
	}
	var writing sync.WaitGroup
	share := int64(len(l.sectors) / writers)
	for i := range int64(writers) {
		writing.Go(func() {
			// Only every other time, as FUA writes may make flushes work that do not.
			demand(l.write(conns[i], i*share, (i+1)*share, rand.New(rand.NewPCG(seed, uint64(i))), seed%2 == 1))
		})
	}
	gone, flushing := make(chan struct{}), make(chan struct{})
	go func() { writing.Wait(); close(gone) }()
	go func() {
		defer close(flushing)
		for {
			select {
			case <-gone:
				return
			case <-l.due:
			}
			marks := l.mark()
			if err := conns[writers].flush(); err != nil {
				demand(err)
				return
			}
			l.flushed(marks)
		}
	}()
	select {
	case <-l.enough:
		end()
	case <-gone:
		t.Errorf("the server was gone after %d writes\n%s", l.acked.Load(), s.stderr)
	}
	<-gone
	<-flushing
	for _, c := range conns {
		c.Close()
	}
}

// afterKill demands that an image is usable: at most leaks, and the two checkers agree.
func afterKill(t testing.TB, disk string) {
	t.Helper()
	theirs := try(t, "qemu-img", "check", "-f", "qcow2", disk)
	ours := try(t, raceBinary, "image", "check", "--format", "qcow2", disk)
	if theirs.code != 0 && theirs.code != 3 || ours.code != theirs.code {
		t.Errorf("after kill -9 qemu-img check exits with %d, nbdserve image check with %d\n%s%s%s%s",
			theirs.code, ours.code, theirs.stdout, theirs.stderr, ours.stdout, ours.stderr)
	}
}

// crashDisks are disks of 48 MiB to be killed: an empty one, and one over a base that is full of stamps.
func crashDisks(t testing.TB) map[string]struct {
	path   string
	ledger *ledger
} {
	t.Helper()
	const size = 48 * mib
	dir := tempDir(t)
	fresh, base, overlay := filepath.Join(dir, "fresh"), filepath.Join(dir, "base"), filepath.Join(dir, "overlay")
	small := filepath.Join(dir, "small")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", fresh, "48M")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,refcount_bits=64", small, "48M")
	contents := make([]byte, size)
	for i := int64(0); i < size/sector; i++ {
		stamp{}.put(contents[i*sector:(i+1)*sector], i)
	}
	writeFile(t, base, contents)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay)
	return map[string]struct {
		path   string
		ledger *ledger
	}{
		"fresh":          {fresh, newLedger(size, true)},
		"overlay":        {overlay, newLedger(size, false)},
		"small clusters": {small, newLedger(size, true)},
	}
}

func rounds(short, extended int) int {
	if long {
		return extended
	}
	return short
}

// The second measure of the whole: whatever is going on when the server is killed,
// the image holds all that was acknowledged before the last flush.
func TestKillKeepsWhatWasFlushed(t *testing.T) {
	t.Parallel()
	for name, disk := range crashDisks(t) {
		t.Run(name, func(t *testing.T) {
			for round := range rounds(3, 40) {
				s := start(t, "--format", "qcow2", disk.path)
				disk.ledger.settle(t, connect(t, s))
				enough := 100 + rand.Int64N(1000)
				disk.ledger.load(t, s, uint64(round), enough, s.kill)
				afterKill(t, disk.path)
				// A look at the disk between two kills, without a change to it.
				s = start(t, "--read-only", "--format", "qcow2", disk.path)
				disk.ledger.settle(t, connect(t, s))
				s.stop()
			}
			if disk.ledger.flushes < 3 {
				t.Errorf("only %d flushes were answered", disk.ledger.flushes)
			}
			// After an orderly end nothing is left of it all.
			s := start(t, "--format", "qcow2", disk.path)
			disk.ledger.settle(t, connect(t, s))
			s.stop()
			if r := try(t, "qemu-img", "check", "-f", "qcow2", disk.path); r.code != 0 && r.code != 3 {
				t.Errorf("qemu-img check: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
			}
		})
	}
}

// SIGTERM in the middle of it all ends in order: what was acknowledged is there, flushed or not.
func TestSIGTERMUnderLoad(t *testing.T) {
	t.Parallel()
	for name, disk := range crashDisks(t) {
		t.Run(name, func(t *testing.T) {
			for round := range rounds(2, 20) {
				s := start(t, "--format", "qcow2", disk.path)
				disk.ledger.load(t, s, uint64(round), 500, func() { s.signal(15) })
				if code := s.wait(); code != 0 {
					t.Fatalf("exit status %d\n%s", code, s.stderr)
				}
				s.noSocket()
				s.noRace()
				clean(t, disk.path)
				disk.ledger.flushed(disk.ledger.mark())
				s = start(t, "--read-only", "--format", "qcow2", disk.path)
				disk.ledger.settle(t, connect(t, s))
				s.stop()
			}
		})
	}
}

func TestKillDuringFio(t *testing.T) {
	t.Parallel()
	for _, overlay := range []bool{false, true} {
		t.Run(fmt.Sprintf("overlay %v", overlay), func(t *testing.T) {
			dir := tempDir(t)
			disk := filepath.Join(dir, "disk")
			if overlay {
				base := patchyFile(t, filepath.Join(dir, "base"), 3, 64*mib)
				run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", disk)
			} else {
				run(t, "qemu-img", "create", "-q", "-f", "qcow2", disk, "64M")
			}
			done := func(uri string) []string {
				return []string{"--name=done", "--uri=" + uri, "--rw=randwrite", "--bs=16k", "--size=16m", "--iodepth=16", "--end_fsync=1"}
			}
			for range rounds(2, 20) {
				s := start(t, "--format", "qcow2", disk)
				fio(t, dir, append(done(s.uri()), "--do_verify=0")...)
				cmd := fioCommand(t, dir, "--name=cut", "--uri="+s.uri(), "--rw=randrw", "--bs=4k", "--offset=16m", "--size=48m",
					"--iodepth=16", "--fsync=32", "--status-interval=100ms")
				said := newOutput()
				cmd.Stdout, cmd.Stderr = said, said
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					cmd.Wait() // it fails, or had just ended
					said.end()
				}()
				said.lines(2 + rand.IntN(6)) // fio reports while it works
				s.kill()
				<-ended
				afterKill(t, disk)
				s = start(t, "--format", "qcow2", disk)
				fio(t, dir, append(done(s.uri()), "--verify_only=1")...)
				s.stop()
			}
			if r := try(t, "qemu-img", "check", "-f", "qcow2", disk); r.code != 0 && r.code != 3 {
				t.Errorf("qemu-img check: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
			}
		})
	}
}
