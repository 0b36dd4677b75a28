package integration

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const errPolicy = 1<<31 | 2 // of an option

// A pair is two servers that offer one image, each while it has a client.
type pair struct {
	t    testing.TB
	args []string

	mu       sync.Mutex
	servers  [2]*server
	pids     [2][]int     // of all that there were
	holder   atomic.Int32 // 1 + the server whose clients we are, as far as we know; 0: of none
	killed   atomic.Bool  // a server was killed, and may not have let go yet
	refusals atomic.Int64
}

// newPair serves disk by two servers.
func newPair(t testing.TB, format, disk string, args ...string) *pair {
	t.Helper()
	p := &pair{t: t, args: append([]string{"--activation", "on-connect", "--format", format, disk}, args...)}
	p.start(0)
	p.start(1)
	return p
}

// start starts one of the servers, whoever has the image.
func (p *pair) start(i int) {
	p.t.Helper()
	s := start(p.t, p.args...)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.servers[i] = s
	p.pids[i] = append(p.pids[i], s.cmd.Process.Pid)
}

func (p *pair) server(i int) *server {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.servers[i]
}

// names tells whether text names a process of server i.
func (p *pair) names(text string, i int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, pid := range p.pids[i] {
		if strings.Contains(text, fmt.Sprintf("process %d ", pid)) {
			return true
		}
	}
	return false
}

// try connects to server i. It returns nil where that has refused, naming the other
// one, as it should while that one has the image.
func (p *pair) try(i int) (*nbdConn, error) {
	c, err := dialNBD(p.server(i).socket)
	if err == nil {
		if h := p.holder.Swap(int32(i + 1)); h != 0 && h != int32(i+1) {
			err = errors.Join(errors.New("two servers have the image"), c.Close())
			return nil, err
		}
		p.killed.Store(false)
		return c, nil
	}
	var refused *optionError
	if !errors.As(err, &refused) {
		return nil, err
	}
	// Of a process that is being killed the system shows no more than its locks.
	ending := p.killed.Load() && strings.Contains(refused.text, "about to end")
	if refused.code != errPolicy || !p.names(refused.text, 1-i) && !ending {
		return nil, fmt.Errorf("the refusal does not name the holder: %w", err)
	}
	p.refusals.Add(1)
	return nil, nil
}

// enter connects to server i as soon as that has the image.
func (p *pair) enter(i int) (*nbdConn, error) {
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if c, err := p.try(i); c != nil || err != nil {
			return c, err
		}
	}
	return nil, fmt.Errorf("server %d has not got the image in %v", i, patience)
}

// An ending is how the clients of a server leave.
type ending int

const (
	endPolitely ending = iota // when all is answered
	endCut                    // in the middle of requests
	endKill                   // with the server
)

// move runs rounds, in each of which the clients of one server write until they leave,
// while one client tries to enter the other server; then that one's clients find what
// was written.
func (p *pair) move(l *ledger, n int, keeps bool, endings ...ending) {
	t := p.t
	t.Helper()
	c, err := p.enter(0)
	if err != nil {
		t.Fatal(err)
	}
	for round := range n {
		side := round % 2
		s := p.server(side)
		type entered struct {
			c   *nbdConn
			err error
		}
		next := make(chan entered, 1)
		go func() {
			c, err := p.enter(1 - side)
			next <- entered{c, err}
		}()
		l.settle(t, c)
		conns := []*nbdConn{c, connect(t, s), connect(t, s), connect(t, s)}
		how := endings[round/2%len(endings)]
		l.loadOver(t, s, conns, uint64(round), 20+rand.Int64N(300), func() {
			p.holder.Store(0)
			switch how {
			case endPolitely:
				l.stop.Store(true)
			case endCut:
				for _, c := range conns {
					c.Close()
				}
			case endKill:
				p.killed.Store(true)
				s.kill()
			}
		})
		if how != endKill || keeps {
			l.flushed(l.mark()) // all that was acknowledged must be there
		}
		if how == endKill {
			p.start(side)
		}
		e := <-next
		if e.err != nil {
			t.Fatalf("round %d: %v\n%s\n%s", round, e.err, p.server(0).stderr, p.server(1).stderr)
		}
		c = e.c
		if t.Failed() {
			t.Fatalf("round %d", round)
		}
	}
	l.settle(t, c)
	p.holder.Store(0)
	c.Close()
	if p.refusals.Load() == 0 {
		t.Error("nobody was refused: the test has tested little")
	}
	t.Logf("%d moves, %d refusals", n, p.refusals.Load())
}

// Two servers hand an image to and fro under load: there are never two writers, no
// client reads what is out of date, nothing acknowledged is lost, and who is refused
// hears who has the image.
func TestHandOverUnderLoad(t *testing.T) {
	t.Parallel()
	const size = 3 * mib
	for _, row := range []struct {
		name, format string
		options      []string
		device       bool
		endings      []ending
	}{
		{"qcow2", "qcow2", []string{"-o", "cluster_size=4k"}, false, []ending{endPolitely, endCut}},
		{"qcow2, killed", "qcow2", nil, false, []ending{endKill, endCut}},
		{"raw", "raw", nil, false, []ending{endPolitely, endCut, endKill}},
		{"device", "raw", nil, true, []ending{endCut, endPolitely}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(tempDir(t), "disk")
			run(t, "qemu-img", append(append([]string{"create", "-q", "-f", row.format}, row.options...), file, fmt.Sprint(size))...)
			disk := file
			if row.device {
				disk = loopDevice(t, file, "512")
			}
			p := newPair(t, row.format, disk)
			if warned := strings.Contains(p.server(0).stderr.String(), "other hosts do not see"); warned != row.device {
				t.Errorf("a warning that locks stay on this host: %v", warned)
			}
			p.move(newLedger(size, true), rounds(20, 200), row.format == "raw", row.endings...)
			p.server(0).stop()
			p.server(1).stop()
			switch {
			case row.format == "raw":
			case row.endings[0] == endKill:
				afterKill(t, file)
			default:
				clean(t, file)
			}
		})
	}
}

// Two clients that come at the same moment: one gets the image, or none and both try again.
func TestBothConnectAtOnce(t *testing.T) {
	t.Parallel()
	disk := filepath.Join(tempDir(t), "disk")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", disk, "1M")
	p := newPair(t, "qcow2", disk)
	want, buf := make([]byte, sector), make([]byte, sector)
	wins := [3]int{}
	for round := uint64(1); round <= uint64(rounds(40, 400)); {
		var conns [2]*nbdConn
		var errs [2]error
		var both sync.WaitGroup
		for i := range conns {
			both.Go(func() { conns[i], errs[i] = p.try(i) })
		}
		both.Wait()
		if err := errors.Join(errs[:]...); err != nil || conns[0] != nil && conns[1] != nil {
			t.Fatalf("round %d: %v\n%s\n%s", round, err, p.server(0).stderr, p.server(1).stderr)
		}
		winner := 2
		for i, c := range conns {
			if c == nil {
				continue
			}
			winner = i
			if err := c.readAt(buf, 0); err != nil || string(buf) != string(want) {
				t.Fatalf("round %d: server %d reads %x..., want %x... (%v)", round, i, buf[:16], want[:16], err)
			}
			stamp{seq: round}.put(want, 0)
			if err := c.writeAt(want, 0); err != nil {
				t.Fatal(err)
			}
			p.holder.Store(0)
			c.Close()
			round++
		}
		wins[winner]++
	}
	t.Logf("the first server won %d times, the second %d times, none %d times", wins[0], wins[1], wins[2])
	p.server(0).stop()
	p.server(1).stop()
	clean(t, disk)
}

// The clients that people use move, are refused with a reason, and wait if told to.
func TestRealClientsMoveBetweenServers(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"qcow2", "raw"} {
		t.Run(format, func(t *testing.T) {
			dir := tempDir(t)
			disk := filepath.Join(dir, "disk")
			run(t, "qemu-img", "create", "-q", "-f", format, disk, "16M")
			p := newPair(t, format, disk)
			uris := [2]string{p.server(0).uri(), p.server(1).uri()}
			for i := range 6 {
				pattern := fmt.Sprint(i + 1)
				run(t, "qemu-io", "-f", "raw", "-c", "w -P "+pattern+" 1M 1M", uris[i%2])
				p.server(i%2).stderr.awaitTimes(t, "inactivated", i+1)
				if out := run(t, "qemu-io", "-f", "raw", "-c", "r -P "+pattern+" 1M 1M", uris[1-i%2]); strings.Contains(out, "failed") {
					t.Errorf("move %d: %s", i, out)
				}
				p.server(1-i%2).stderr.awaitTimes(t, "inactivated", i+1)
			}
			copied := filepath.Join(dir, "copy")
			run(t, "nbdcopy", uris[0], copied)
			run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", copied, uris[1])

			c := connect(t, p.server(0))
			if r := try(t, "qemu-io", "-f", "raw", "-c", "r 0 512", uris[1]); r.code == 0 || !p.names(r.stderr, 0) {
				t.Errorf("qemu-io is not told who has the image: status %d, %s", r.code, r.stderr)
			}
			if r := try(t, "nbdinfo", uris[1]); r.code == 0 {
				t.Errorf("nbdinfo of an image that another server has: %s", r.stdout)
			}
			if out := run(t, "nbdinfo", "--list", "--json", uris[1]); !strings.Contains(out, fmt.Sprint(16*mib)) {
				t.Errorf("a list of exports does not tell the size: %s", out)
			}
			refusals := strings.Count(p.server(1).stderr.String(), "client refused")
			waiting := command(t, "qemu-io", "-c", "r -P 0 0 512", "--image-opts",
				"driver=nbd,open-timeout=60,server.type=unix,server.path="+p.server(1).socket)
			said := newOutput()
			waiting.Stdout, waiting.Stderr = said, said
			if err := waiting.Start(); err != nil {
				t.Fatal(err)
			}
			p.server(1).stderr.awaitTimes(t, "client refused", refusals+1)
			c.Close()
			if err := waiting.Wait(); err != nil {
				t.Errorf("qemu-io with open-timeout: %v\n%s", err, said)
			}
			p.server(0).stop()
			p.server(1).stop()
			if format == "qcow2" {
				clean(t, disk)
			}
		})
	}
}

// An inactive export is no obstacle to anybody, and what it tells is true now.
func TestInactiveExportLeavesTheImageAlone(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"qcow2", "raw"} {
		disk := filepath.Join(tempDir(t), "disk")
		run(t, "qemu-img", "create", "-q", "-f", format, disk, "16M")
		s := start(t, "--activation", "on-connect", "--format", format, disk, "--metrics", "127.0.0.1:0")
		size := func() string {
			t.Helper()
			type export struct {
				Size int64 `json:"export-size"`
			}
			list := decode[struct{ Exports []export }](t, run(t, "nbdinfo", "--list", "--json", s.uri()))
			if len(list.Exports) != 1 {
				t.Fatalf("%d exports", len(list.Exports))
			}
			return fmt.Sprint(list.Exports[0].Size)
		}
		for _, mib := range []int64{16, 20, 24} {
			// qemu-img takes the image for itself alone.
			run(t, "qemu-img", "resize", "-q", "-f", format, disk, fmt.Sprint(mib<<20))
			if got := size(); got != fmt.Sprint(mib<<20) {
				t.Errorf("%s: the size is told as %s, not %d", format, got, mib<<20)
			}
			run(t, "qemu-io", "-f", format, "-c", fmt.Sprintf("w -P 7 %dM 64k", mib-1), disk)
			if out := run(t, "qemu-io", "-f", "raw", "-c", fmt.Sprintf("r -P 7 %dM 64k", mib-1), s.uri()); strings.Contains(out, "failed") {
				t.Errorf("%s: %s", format, out)
			}
			s.stderr.awaitTimes(t, "inactivated", int(mib/4-3))
		}
		address := metricsOf(t, s)
		if code, text := get(t, address+"/readyz"); code != http.StatusOK {
			t.Errorf("/readyz of an inactive export: %d %s", code, text)
		}
		if f := scrape(t, address); f[`nbdserve_export_active{export=""}`] != 0 || f[`nbdserve_export_activations_total{export="",result="ok"}`] != 3 {
			t.Errorf("active %v, %v activations", f[`nbdserve_export_active{export=""}`], f[`nbdserve_export_activations_total{export="",result="ok"}`])
		}
		s.stop()
	}
}

// A server that ends with its last client has let the image go.
func TestOnceWithActivationOnConnect(t *testing.T) {
	t.Parallel()
	disk := newImage(t)
	s := start(t, "--activation", "on-connect", "--once", "--format", "qcow2", disk)
	c := connect(t, s)
	if err := c.writeAt(noise(1, mib), 0); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if code := s.wait(); code != 0 {
		t.Errorf("exit status %d\n%s", code, s.stderr)
	}
	clean(t, disk)
}

// SIGTERM while clients come and go: whatever the export is at, it ends in order.
func TestSIGTERMWhileClientsComeAndGo(t *testing.T) {
	t.Parallel()
	for range rounds(5, 100) {
		disk := newImage(t)
		s := start(t, "--activation", "on-connect", "--format", "qcow2", disk)
		var clients sync.WaitGroup
		var entered atomic.Int64
		for i := range 4 {
			clients.Go(func() {
				for {
					c, err := dialNBD(s.socket)
					if err != nil {
						return // the server ends
					}
					c.writeAt(noise(uint64(i), sector), int64(i)*mib) // it may end now as well
					c.Close()
					entered.Add(1)
				}
			})
		}
		for entered.Load() < 20 {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Duration(rand.Int64N(int64(20 * time.Millisecond))))
		s.stop()
		clients.Wait()
		clean(t, disk)
		if err := os.Remove(disk); err != nil {
			t.Error(err)
		}
	}
}
