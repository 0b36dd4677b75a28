package export

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"golang.org/x/sys/unix"
)

// patience is how long tests wait for what must happen.
const patience = 20 * time.Second

func soon(t blocktest.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// must fails the test on an error.
func must(t blocktest.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%v", err)
	}
}

// A rig is a server with one export, "disk", of a memory node.
type rig struct {
	t      blocktest.TB
	store  *blocktest.Store
	gate   *blocktest.Gate
	faults *blocktest.Faults
	graph  *block.Graph
	node   *block.Node
	s      *Server
	e      *Export
	served chan struct{} // one element for each connection that has ended
	conns  int
}

type setup struct {
	size    int64
	limits  block.Limits
	options Options
	config  Config
	// direct leaves the slow and the fault node out, so that reads can be answered inline.
	direct   bool
	readOnly bool
	above    func(*block.Config) *block.Config // nil: nothing is put on top
	graph    *block.Graph                      // nil: a new one that is watched for leaks
}

// newRig serves size bytes of pattern data.
func newRig(t blocktest.TB, u setup) *rig {
	t.Helper()
	if u.size == 0 {
		u.size = 1 << 20
	}
	if u.limits == (block.Limits{}) {
		u.limits = blocktest.AllFlags
	}
	r := &rig{t: t, store: blocktest.NewStore(u.size), gate: blocktest.NewGate(), faults: new(blocktest.Faults),
		graph: u.graph, served: make(chan struct{}, 1000)}
	if r.graph == nil {
		r.graph = blocktest.NewGraph(t)
	}
	r.store.Write(pattern(0, min(u.size, 1<<20)), 0)
	cfg := &block.Config{Driver: "memory", Unmap: true, Options: &blocktest.MemoryOptions{Store: r.store, Limits: u.limits}}
	if !u.direct {
		cfg = blocktest.SlowConfig(r.gate, blocktest.FaultConfig(r.faults, cfg))
		cfg.Unmap = true
	}
	if u.above != nil {
		cfg = u.above(cfg)
	}
	cfg.ReadOnly = u.readOnly
	var err error
	r.node, err = r.graph.Open(context.Background(), cfg)
	must(t, err)
	setDefault(&u.options.CloseTimeout, 50*time.Millisecond)
	r.s = NewServer(u.options)
	u.config.Graph, u.config.Node = r.graph, r.node
	if u.config.Name == "" {
		u.config.Name = "disk"
	}
	r.e, err = r.s.AddExport(context.Background(), u.config)
	must(t, err)
	t.Cleanup(r.end)
	return r
}

// end shuts the server down and closes the node.
func (r *rig) end() {
	r.gate.ReleaseAll()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := r.s.Shutdown(ctx); err != nil && !errors.Is(err, errInjected) {
		r.t.Errorf("shutdown: %v", err)
	}
	if ctx.Err() != nil {
		r.t.Errorf("shutdown took all of %v", patience)
	}
	if err := r.graph.Release(context.Background(), r.node); err != nil && !errors.Is(err, errInjected) {
		r.t.Errorf("%v", err)
	}
	if n := r.s.Stats().Clients; n != 0 {
		r.t.Errorf("%d clients left", n)
	}
	if r.s.pool.free != r.s.opt.Memory {
		r.t.Errorf("%d bytes of the pool are missing", r.s.opt.Memory-r.s.pool.free)
	}
}

var errInjected = unix.EIO

// pattern is n bytes that tell where they belong, never zero.
func pattern(off, n int64) []byte {
	b := make([]byte, n)
	for i := range b {
		at := off + int64(i)
		b[i] = byte(at%251+at/4096%4) | 1
	}
	return b
}

// socketpair gives two ends of a unix stream socket.
func socketpair(t blocktest.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	ends := [2]net.Conn{}
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		ends[i], err = net.FileConn(f)
		must(t, err)
		f.Close()
	}
	return ends[0], ends[1]
}

// A client speaks the protocol as the test tells it, right or wrong.
type client struct {
	t          blocktest.TB
	nc         net.Conn
	structured bool
}

// connect starts a connection over a socket pair.
func (r *rig) connect() *client {
	a, b := socketpair(r.t)
	return r.connectOver(a, b)
}

// connectOver serves one end and returns a client at the other.
func (r *rig) connectOver(server, end net.Conn) *client {
	r.conns++
	go func() {
		r.s.ServeConn(server)
		r.served <- struct{}{}
	}()
	must(r.t, end.SetDeadline(time.Now().Add(patience)))
	c := &client{t: r.t, nc: end}
	r.t.Cleanup(func() { end.Close() })
	return c
}

// waitServed waits until n connections have ended.
func (r *rig) waitServed(n int) {
	r.t.Helper()
	for range n {
		select {
		case <-r.served:
		case <-soon(r.t).Done():
			r.t.Fatalf("a connection did not end")
		}
	}
}

func (c *client) send(parts ...[]byte) {
	c.t.Helper()
	_, err := c.nc.Write(bytes.Join(parts, nil))
	must(c.t, err)
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(c.nc, b)
	must(c.t, err)
	return b
}

// expectEnd fails unless the server closes the connection without sending more.
func (c *client) expectEnd() {
	c.t.Helper()
	rest, err := io.ReadAll(c.nc)
	if err != nil && !errors.Is(err, unix.ECONNRESET) {
		c.t.Fatalf("the server did not close: %v", err)
	}
	if len(rest) > 0 {
		c.t.Fatalf("%d bytes before the end: %x", len(rest), rest)
	}
}

func (c *client) greet(flags uint32) {
	c.t.Helper()
	b := c.read(18)
	if be.Uint64(b) != magicServer || be.Uint64(b[8:]) != magicOption {
		c.t.Fatalf("greeting %x", b)
	}
	c.send(be.AppendUint32(nil, flags))
}

type optReply struct {
	opt, typ uint32
	data     []byte
}

func optionBytes(opt uint32, data []byte) []byte {
	b := be.AppendUint64(nil, magicOption)
	b = be.AppendUint32(b, opt)
	b = be.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func (c *client) optReply() optReply {
	c.t.Helper()
	h := c.read(20)
	if be.Uint64(h) != magicOptionReply {
		c.t.Fatalf("option reply magic in %x", h)
	}
	return optReply{be.Uint32(h[8:]), be.Uint32(h[12:]), c.read(int(be.Uint32(h[16:])))}
}

// option sends an option and returns its replies up to the final one.
func (c *client) option(opt uint32, data []byte) []optReply {
	c.t.Helper()
	c.send(optionBytes(opt, data))
	return c.optReplies(opt)
}

func (c *client) optReplies(opt uint32) []optReply {
	c.t.Helper()
	var rs []optReply
	for {
		r := c.optReply()
		if r.opt != opt {
			c.t.Fatalf("reply to option %d when %d was sent", r.opt, opt)
		}
		rs = append(rs, r)
		if r.typ == repAck || r.typ&(1<<31) != 0 {
			return rs
		}
	}
}

// final is the last of the replies of an option.
func (c *client) final(opt uint32, data []byte) uint32 {
	c.t.Helper()
	rs := c.option(opt, data)
	return rs[len(rs)-1].typ
}

func infoData(name string, infos ...uint16) []byte {
	b := be.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = be.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = be.AppendUint16(b, i)
	}
	return b
}

func metaData(name string, queries ...string) []byte {
	b := be.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = be.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = be.AppendUint32(b, uint32(len(q)))
		b = append(b, q...)
	}
	return b
}

// attach negotiates as a modern client, or as one of simple replies.
func (c *client) attach(structured bool, infos ...uint16) *client {
	c.t.Helper()
	c.greet(3)
	if structured {
		c.structured = true
		for _, o := range []struct {
			opt  uint32
			data []byte
		}{{optStructuredReply, nil}, {optSetMeta, metaData("disk", baseAllocation)}} {
			if typ := c.final(o.opt, o.data); typ != repAck {
				c.t.Fatalf("option %d: reply %#x", o.opt, typ)
			}
		}
	}
	if typ := c.final(optGo, infoData("disk", infos...)); typ != repAck {
		c.t.Fatalf("GO: reply %#x", typ)
	}
	return c
}

func requestBytes(cmd, flags uint16, cookie uint64, off, length int64, payload ...byte) []byte {
	b := be.AppendUint32(nil, magicRequest)
	b = be.AppendUint16(b, flags)
	b = be.AppendUint16(b, cmd)
	b = be.AppendUint64(b, cookie)
	b = be.AppendUint64(b, uint64(off))
	b = be.AppendUint32(b, uint32(length))
	return append(b, payload...)
}

type chunk struct {
	flags, typ uint16
	payload    []byte
}

// A result is a whole reply.
type result struct {
	cookie uint64
	errno  uint32 // the first, 0 for none
	text   string
	chunks []chunk // none of a simple reply
	data   []byte
}

// result reads one reply; lengths tells how much data a good simple reply carries.
func (c *client) result(lengths func(cookie uint64) int64) result {
	c.t.Helper()
	var r result
	for {
		magic := be.Uint32(c.read(4))
		if magic == magicSimpleReply {
			h := c.read(12)
			if len(r.chunks) > 0 {
				c.t.Fatalf("a simple reply within a structured one")
			}
			r.errno, r.cookie = be.Uint32(h), be.Uint64(h[4:])
			if r.errno == 0 {
				r.data = c.read(int(lengths(r.cookie)))
			}
			return r
		}
		if magic != magicStructuredReply {
			c.t.Fatalf("reply magic %#x", magic)
		}
		if !c.structured {
			c.t.Fatalf("a structured reply that was not agreed")
		}
		h := c.read(16)
		k := chunk{be.Uint16(h), be.Uint16(h[2:]), c.read(int(be.Uint32(h[12:])))}
		if cookie := be.Uint64(h[4:]); len(r.chunks) > 0 && cookie != r.cookie {
			c.t.Fatalf("chunks of two replies mixed: the test cannot follow")
		}
		r.cookie = be.Uint64(h[4:])
		r.chunks = append(r.chunks, k)
		if k.typ&(1<<15) != 0 && r.errno == 0 {
			r.errno = be.Uint32(k.payload)
			r.text = string(k.payload[6:][:be.Uint16(k.payload[4:])])
		}
		if k.flags&chunkDone != 0 {
			return r
		}
	}
}

func dataOf(n int64) func(uint64) int64 { return func(uint64) int64 { return n } }

// do sends a request and reads its reply, with the data of a READ put together.
func (c *client) do(cmd, flags uint16, off, length int64, payload ...byte) result {
	c.t.Helper()
	c.send(requestBytes(cmd, flags, 77, off, length, payload...))
	n := int64(0)
	if cmd == cmdRead {
		n = length
	}
	r := c.result(dataOf(n))
	if r.cookie != 77 {
		c.t.Fatalf("cookie %d", r.cookie)
	}
	if cmd == cmdRead && c.structured && r.errno == 0 {
		r.data = c.assemble(r, off, length)
	}
	return r
}

// assemble puts a structured READ together and checks its chunks (items 99 to 102).
func (c *client) assemble(r result, off, length int64) []byte {
	c.t.Helper()
	data := make([]byte, length)
	type span struct{ from, to int64 }
	var covered []span
	for i, k := range r.chunks {
		if last := i == len(r.chunks)-1; last != (k.flags&chunkDone != 0) || k.flags&^chunkDone != 0 {
			c.t.Fatalf("chunk %d of %d has flags %#x", i, len(r.chunks), k.flags)
		}
		var at, n int64
		switch k.typ {
		case chunkNone:
			if len(k.payload) != 0 || i != len(r.chunks)-1 {
				c.t.Fatalf("bad NONE chunk")
			}
			continue
		case chunkOffsetData:
			at, n = int64(be.Uint64(k.payload)), int64(len(k.payload)-8)
		case chunkOffsetHole:
			if len(k.payload) != 12 {
				c.t.Fatalf("hole chunk of %d bytes", len(k.payload))
			}
			at, n = int64(be.Uint64(k.payload)), int64(be.Uint32(k.payload[8:]))
		case chunkErrorOffset:
			continue
		default:
			c.t.Fatalf("chunk type %d in a READ", k.typ)
		}
		if n < 1 || at < off || at+n > off+length {
			c.t.Fatalf("chunk of %d bytes at %d for a READ of %d at %d", n, at, length, off)
		}
		covered = append(covered, span{at, at + n})
		if k.typ == chunkOffsetData {
			copy(data[at-off:], k.payload[8:])
		}
	}
	slices.SortFunc(covered, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	end := off
	for _, x := range covered {
		if x.from < end || x.from > end && r.errno == 0 {
			c.t.Fatalf("chunks overlap or leave bytes out between %d and %d", end, x.from)
		}
		end = x.to
	}
	if end != off+length && r.errno == 0 {
		c.t.Fatalf("no chunk for the bytes from %d on", end)
	}
	return data
}

// wantErrno checks the outcome of a request.
func wantErrno(t blocktest.TB, what string, r result, errno uint32) {
	t.Helper()
	if r.errno != errno {
		t.Fatalf("%s: error %d (%s), want %d", what, r.errno, r.text, errno)
	}
}

// bothKinds runs a test with simple and with structured replies.
func bothKinds(t *testing.T, f func(t *testing.T, structured bool)) {
	t.Run("simple replies", func(t *testing.T) { f(t, false) })
	t.Run("structured replies", func(t *testing.T) { f(t, true) })
}
