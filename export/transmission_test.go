package export

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
	"github.com/nbdserve/nbdserve/internal/iostat"
)

// TestBadRequestsAreRefusedAndTheStreamStaysInStep has one bad request a row. After
// each a READ works, so its payload was consumed (111).
func TestBadRequestsAreRefusedAndTheStreamStaysInStep(t *testing.T) {
	const size = 1 << 20
	rows := []struct {
		name        string
		cmd, flags  uint16
		off, length int64
		errno       uint32
	}{
		{"88 unknown command 8", 8, 0, 0, 0, nbdEINVAL},
		{"88 unknown command 65535", 65535, 0, 0, 100, nbdEINVAL},
		{"89 unknown flag on READ", cmdRead, 0x80, 0, 512, nbdEINVAL},
		{"89 unknown flag on WRITE", cmdWrite, 0x8000, 0, 512, nbdEINVAL},
		{"89 DF on WRITE", cmdWrite, flagDF, 0, 512, nbdEINVAL},
		{"89 PAYLOAD_LEN on WRITE", cmdWrite, 1 << 5, 0, 512, nbdEINVAL},
		{"89 REQ_ONE on READ", cmdRead, flagReqOne, 0, 512, nbdEINVAL},
		{"89 NO_HOLE on TRIM", cmdTrim, flagNoHole, 0, 512, nbdEINVAL},
		{"89 FAST_ZERO on WRITE, long", cmdWrite, flagFastZero, 0, 300 << 10, nbdEINVAL},
		{"91 BLOCK_STATUS with nothing selected", cmdBlockStatus, 0, 0, 512, nbdEINVAL},
		{"93 READ that wraps", cmdRead, 0, -512, 1024, nbdEINVAL},
		{"93 READ at the end", cmdRead, 0, size, 1, nbdEINVAL},
		{"93 READ of nothing past the end", cmdRead, 0, size + 1, 0, nbdEINVAL},
		{"93 offset of the greatest number", cmdRead, 0, math.MaxInt64, 1, nbdEINVAL},
		{"93 WRITE that wraps", cmdWrite, 0, -1, 2, nbdENOSPC},
		{"95 READ over the end", cmdRead, 0, size - 511, 512, nbdEINVAL},
		{"108 READ above the maximum", cmdRead, 0, 0, maxPayload + 1, nbdEINVAL},
		{"109 WRITE over the end", cmdWrite, 0, size - 511, 512, nbdENOSPC},
		{"109 long WRITE over the end", cmdWrite, 0, size - 511, 200 << 10, nbdENOSPC},
		{"109 WRITE_ZEROES over the end", cmdWriteZeroes, 0, size - 511, 512, nbdENOSPC},
		{"109 TRIM over the end", cmdTrim, 0, size - 511, 512, nbdEINVAL},
		{"CACHE over the end", cmdCache, 0, size - 511, 512, nbdEINVAL},
		{"116 FLUSH with an offset", cmdFlush, 0, 1, 0, nbdEINVAL},
		{"116 FLUSH with a length", cmdFlush, 0, 0, 1, nbdEINVAL},
	}
	bothKinds(t, func(t *testing.T, structured bool) {
		r := newRig(t, setup{size: size})
		c := r.connect().attach(structured)
		var failed [iostat.NumOps]int64
		for _, row := range rows {
			if int(row.cmd) < len(ops) && !(structured && row.cmd == cmdBlockStatus) {
				failed[ops[row.cmd]]++
			}
			if structured && row.cmd == cmdBlockStatus {
				continue
			}
			var payload []byte
			if row.cmd == cmdWrite {
				payload = make([]byte, row.length)
			}
			r := c.do(row.cmd, row.flags, row.off, row.length, payload...)
			wantErrno(t, row.name, r, row.errno)
			if structured && (len(r.chunks) != 1 || r.chunks[0].typ != chunkError || r.text == "" || len(r.text) > maxString || !utf8.ValidString(r.text)) {
				t.Fatalf("%s: 98, 105: chunks %+v", row.name, r.chunks)
			}
			if r := c.do(cmdRead, 0, 512, 512); !bytes.Equal(r.data, pattern(512, 512)) {
				t.Fatalf("%s: the stream is out of step", row.name)
			}
		}
		snapshot := r.e.Stats()
		for op, n := range failed {
			if f := snapshot.Ops[op]; f.Failed != n || f.InFlight != 0 {
				t.Errorf("%s: %d failed and %d in flight are counted, want %d and 0", iostat.Op(op), f.Failed, f.InFlight, n)
			}
		}
	})
}

func TestPayloadAboveTheMaximumIsConsumed_113(t *testing.T) {
	c := newRig(t, setup{size: 64 << 20}).connect().attach(true)
	r := c.do(cmdWrite, 0, 0, maxPayload+4096, make([]byte, maxPayload+4096)...)
	wantErrno(t, "WRITE", r, nbdEINVAL)
	if r := c.do(cmdRead, 0, 512, 512); !bytes.Equal(r.data, pattern(512, 512)) {
		t.Fatal("out of step")
	}
}

func TestReadOnlyExportRefusesWrites_110(t *testing.T) {
	bothKinds(t, func(t *testing.T, structured bool) {
		c := newRig(t, setup{readOnly: true, config: Config{ReadOnly: true}}).connect().attach(structured)
		wantErrno(t, "WRITE", c.do(cmdWrite, 0, 0, 512, make([]byte, 512)...), nbdEPERM)
		wantErrno(t, "long WRITE", c.do(cmdWrite, flagFUA, 0, 100<<10, make([]byte, 100<<10)...), nbdEPERM)
		wantErrno(t, "TRIM", c.do(cmdTrim, 0, 0, 512), nbdEPERM)
		wantErrno(t, "WRITE_ZEROES", c.do(cmdWriteZeroes, 0, 0, 512), nbdEPERM)
		wantErrno(t, "FLUSH", c.do(cmdFlush, 0, 0, 0), 0)
		if r := c.do(cmdRead, 0, 0, 512); !bytes.Equal(r.data, pattern(0, 512)) {
			t.Fatal("wrong data")
		}
	})
}

func TestReadOnlyNodeIsNotExportedWritable(t *testing.T) {
	r := newRig(t, setup{readOnly: true, config: Config{ReadOnly: true}})
	_, err := r.s.AddExport(soon(t), Config{Name: "w", Graph: r.graph, Node: r.node})
	if err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Fatalf("error %v", err)
	}
	r.addExport("w", "") // the name is free
}

func TestExportNamesAreUniqueAndWritersExclusive(t *testing.T) {
	r := newRig(t, setup{})
	for _, cfg := range []Config{{Name: "disk"}, {Name: "second writer"}, {Name: "a\x00"}, {Name: strings.Repeat("x", 4097)}, {Name: "d", Description: "\xff"}} {
		cfg.Graph, cfg.Node = r.graph, r.node
		if _, err := r.s.AddExport(soon(t), cfg); err == nil {
			t.Errorf("%q was added", cfg.Name)
		}
	}
	if n := len(r.s.Exports()); n != 1 {
		t.Fatalf("%d exports", n)
	}
}

func TestWrongRequestMagicEndsTheConnection_87(t *testing.T) {
	for _, magic := range []uint32{0x12560953, 0x21e41c71, 0x25609514, 0} {
		r := newRig(t, setup{})
		c := r.connect().attach(true)
		c.send(be.AppendUint32(nil, magic), make([]byte, 24))
		c.expectEnd()
		r.waitServed(1)
	}
}

func TestCookiesAreOpaque_83(t *testing.T) {
	c := newRig(t, setup{}).connect().attach(true)
	for _, cookie := range []uint64{0, math.MaxUint64, 0x2560951325609513, 5, 5} {
		c.send(requestBytes(cmdFlush, 0, cookie, 0, 0))
		if r := c.result(dataOf(0)); r.cookie != cookie || r.errno != 0 {
			t.Fatalf("%+v", r)
		}
	}
}

func TestEmptyRequestsSucceed_92(t *testing.T) {
	bothKinds(t, func(t *testing.T, structured bool) {
		c := newRig(t, setup{}).connect().attach(structured)
		for _, cmd := range []uint16{cmdRead, cmdWrite, cmdTrim, cmdWriteZeroes, cmdCache} {
			for _, off := range []int64{0, 777, 1 << 20} {
				wantErrno(t, "empty request", c.do(cmd, 0, off, 0), 0)
			}
		}
		if structured {
			wantErrno(t, "BLOCK_STATUS", c.do(cmdBlockStatus, 0, 0, 0), nbdEINVAL)
		}
	})
}

func TestFUAGoesWithEveryCommand_90(t *testing.T) {
	c := newRig(t, setup{}).connect().attach(true)
	for _, cmd := range []uint16{cmdRead, cmdWrite, cmdTrim, cmdCache, cmdWriteZeroes, cmdBlockStatus} {
		var payload []byte
		if cmd == cmdWrite {
			payload = make([]byte, 512)
		}
		wantErrno(t, "FUA", c.do(cmd, flagFUA, 0, 512, payload...), 0)
	}
	wantErrno(t, "FLUSH", c.do(cmdFlush, flagFUA, 0, 0), 0)
}

// TestFUAMakesDurable: FUA reaches the disk as a flush where the node cannot do it itself (115).
func TestFUAMakesDurableBeforeTheReply_115(t *testing.T) {
	limits := blocktest.AllFlags
	limits.WriteFlags, limits.ZeroFlags = 0, block.MayUnmap
	for _, row := range []struct {
		name    string
		cmd     uint16
		length  int64
		flushes int
	}{{"WRITE", cmdWrite, 4096, 1}, {"long WRITE", cmdWrite, 3<<20 + 512, 1}, {"WRITE_ZEROES", cmdWriteZeroes, 4096, 1}, {"TRIM", cmdTrim, 4096, 1}} {
		t.Run(row.name, func(t *testing.T) {
			r := newRig(t, setup{size: 8 << 20, limits: limits})
			c := r.connect().attach(true)
			var payload []byte
			if row.cmd == cmdWrite {
				payload = make([]byte, row.length)
			}
			wantErrno(t, "without FUA", c.do(row.cmd, 0, 0, row.length, payload...), 0)
			r.faults.Add(blocktest.Fault{Op: blocktest.OpFlush, Err: errInjected})
			wantErrno(t, "with FUA", c.do(row.cmd, flagFUA, 0, row.length, payload...), nbdEIO)
			if n := r.faults.Fired(); n != row.flushes {
				t.Fatalf("%d flushes", n)
			}
			r.faults.Clear()
		})
	}
}

func TestWriteThroughFlushesEachWrite(t *testing.T) {
	r := newRig(t, setup{limits: block.Limits{RequestAlignment: 1, MemAlignment: 1}, config: Config{WriteThrough: true}})
	c := r.connect().attach(true)
	r.faults.Add(blocktest.Fault{Op: blocktest.OpFlush, Err: errInjected})
	wantErrno(t, "WRITE", c.do(cmdWrite, 0, 0, 512, make([]byte, 512)...), nbdEIO)
	r.faults.Clear()
}

// TestFlushCoversOtherConnections: a failing disk is seen by a flush on any connection (114, 117, 159).
func TestFlushErrorsAreTold_117(t *testing.T) {
	r := newRig(t, setup{})
	c := r.connect().attach(true)
	r.faults.Add(blocktest.Fault{Op: blocktest.OpFlush, Err: errInjected, Times: 2})
	wantErrno(t, "FLUSH", c.do(cmdFlush, 0, 0, 0), nbdEIO)
	wantErrno(t, "FLUSH", c.do(cmdFlush, 0, 0, 0), nbdEIO)
	wantErrno(t, "FLUSH", c.do(cmdFlush, 0, 0, 0), 0)
}

func TestErrorTable_85_86_112_125(t *testing.T) {
	for _, row := range []struct {
		err   error
		flags uint16
		want  uint32
	}{
		{syscall.EPERM, 0, nbdEPERM}, {syscall.EACCES, 0, nbdEPERM}, {syscall.EROFS, 0, nbdEPERM}, {block.ErrReadOnly, 0, nbdEPERM}, {block.ErrInactive, 0, nbdEPERM},
		{syscall.EIO, 0, nbdEIO}, {syscall.ENOMEM, 0, nbdEIO}, {syscall.ETIMEDOUT, 0, nbdEIO}, {errors.New("no errno"), 0, nbdEIO}, {block.ErrCorrupt, 0, nbdEIO},
		{syscall.EINVAL, 0, nbdEINVAL}, {block.ErrRange, 0, nbdEINVAL},
		{syscall.ENOSPC, 0, nbdENOSPC}, {syscall.EDQUOT, 0, nbdENOSPC}, {syscall.EFBIG, 0, nbdENOSPC}, {block.ErrNoSpace, 0, nbdENOSPC},
		{syscall.EOVERFLOW, 0, nbdEIO}, {syscall.EOPNOTSUPP, 0, nbdEIO}, {syscall.EOPNOTSUPP, flagFastZero, nbdENOTSUP}, {syscall.ESHUTDOWN, 0, nbdESHUTDOWN},
	} {
		if got := errnoOf(&block.NodeError{Err: row.err}, row.flags); got != row.want {
			t.Errorf("%v with flags %#x: %d, want %d", row.err, row.flags, got, row.want)
		}
	}
}

func TestDiskErrorsReachTheClientWithText_105(t *testing.T) {
	for _, row := range []struct {
		op    blocktest.Op
		cmd   uint16
		err   error
		errno uint32
	}{
		{blocktest.OpWrite, cmdWrite, syscall.ENOSPC, nbdENOSPC}, {blocktest.OpWrite, cmdWrite, syscall.EIO, nbdEIO},
		{blocktest.OpZero, cmdWriteZeroes, syscall.EIO, nbdEIO}, {blocktest.OpDiscard, cmdTrim, syscall.EIO, nbdEIO},
		{blocktest.OpPrefetch, cmdCache, syscall.EIO, nbdEIO}, {blocktest.OpStatus, cmdBlockStatus, syscall.EIO, nbdEIO},
		{blocktest.OpRead, cmdRead, syscall.EIO, nbdEIO},
	} {
		r := newRig(t, setup{})
		c := r.connect().attach(true)
		r.faults.Add(blocktest.Fault{Op: row.op, Err: row.err})
		var payload []byte
		if row.cmd == cmdWrite {
			payload = make([]byte, 4096)
		}
		res := c.do(row.cmd, 0, 4096, 4096, payload...)
		wantErrno(t, row.op.String(), res, row.errno)
		if !strings.Contains(res.text, "injected fault") {
			t.Errorf("%s: text %q", row.op, res.text)
		}
		if f := r.e.Stats().Ops[ops[row.cmd]]; f.Failed != 1 || f.InFlight != 0 {
			t.Errorf("%s: figures %+v", row.op, f)
		}
	}
}

func TestReadsOfAllSizesAndPlaces(t *testing.T) {
	for _, direct := range []bool{false, true} {
		bothKinds(t, func(t *testing.T, structured bool) {
			r := newRig(t, setup{size: 36 << 20, direct: direct})
			c := r.connect().attach(structured)
			all := r.store.Bytes()
			for _, length := range []int64{1, 511, 4096, 65535, 65536, 65537, 1 << 20, 1<<20 + 1, 3<<20 - 5, maxPayload} {
				for _, off := range []int64{0, 1, 4095, 1<<20 - 3000, 2 << 20} {
					if length > 1<<20 && off != 4095 {
						continue
					}
					if res := c.do(cmdRead, 0, off, length); res.errno != 0 || !bytes.Equal(res.data, all[off:off+length]) {
						t.Fatalf("READ of %d at %d: error %d or wrong data", length, off, res.errno)
					}
				}
			}
		})
	}
}

func TestHolesAreSentAsHoles_101(t *testing.T) {
	for _, direct := range []bool{false, true} {
		r := newRig(t, setup{size: 4 << 20, direct: direct})
		c := r.connect().attach(true)
		res := c.do(cmdRead, 0, 2<<20, 1<<20)
		if len(res.chunks) != 1 || res.chunks[0].typ != chunkOffsetHole {
			t.Fatalf("chunks of a hole: %d of type %d", len(res.chunks), res.chunks[0].typ)
		}
		res = c.do(cmdRead, 0, 512<<10, 1<<20)
		if len(res.chunks) != 2 || res.chunks[0].typ != chunkOffsetData || res.chunks[1].typ != chunkOffsetHole {
			t.Fatalf("chunks of data and a hole: %+v", len(res.chunks))
		}
		if direct {
			if res := c.do(cmdRead, 0, 2<<20, 4096); res.chunks[0].typ != chunkOffsetHole {
				t.Fatalf("inline hole: %+v", res.chunks)
			}
		}
	}
}

func TestDontFragment_106(t *testing.T) {
	for _, direct := range []bool{false, true} {
		r := newRig(t, setup{size: 64 << 20, direct: direct})
		c := r.connect().attach(true)
		for _, length := range []int64{1, 65536, 2 << 20, maxPayload} {
			off := int64(1<<20) - 1
			res := c.do(cmdRead, flagDF, off, length)
			if len(res.chunks) != 1 || res.chunks[0].typ != chunkOffsetData || !bytes.Equal(res.data, r.store.Bytes()[off:off+length]) {
				t.Fatalf("DF of %d: %d chunks", length, len(res.chunks))
			}
		}
		wantErrno(t, "DF above the maximum", c.do(cmdRead, flagDF, 0, maxPayload+1), nbdEOVERFLOW)
	}
	c := newRig(t, setup{}).connect().attach(false)
	wantErrno(t, "DF with simple replies", c.do(cmdRead, flagDF, 0, 512), nbdEINVAL)
}

func TestPartlyFailedReadTellsWhereAndSendsTheRest_103_104(t *testing.T) {
	r := newRig(t, setup{size: 4 << 20})
	r.store.Write(pattern(0, 4<<20), 0)
	c := r.connect().attach(true)
	bad := []int64{300 << 10, 2<<20 + 8192}
	for _, off := range bad {
		r.faults.Add(blocktest.Fault{Op: blocktest.OpRead, Off: off + 100, Len: 1, Err: syscall.EIO})
	}
	c.send(requestBytes(cmdRead, 0, 9, 1000, 3<<20))
	res := c.result(dataOf(0))
	var told []int64
	for _, k := range res.chunks {
		if k.typ == chunkError {
			t.Fatal("a generic error among those with offsets")
		}
		if k.typ == chunkErrorOffset {
			told = append(told, int64(be.Uint64(k.payload[len(k.payload)-8:])))
		}
	}
	if !slices.Equal(told, bad) {
		t.Fatalf("errors at %v, want %v", told, bad)
	}
	got, want := c.assemble(res, 1000, 3<<20), pattern(1000, 3<<20)
	for _, off := range bad {
		clear(want[off-1000:][:4096])
	}
	if !bytes.Equal(got, want) {
		t.Fatal("the rest is not there")
	}
	wantErrno(t, "READ beside", c.do(cmdRead, 0, 0, 4096), 0)
}

func TestReadThatFailsEverywhereEndsSoon(t *testing.T) {
	r := newRig(t, setup{size: 32 << 20})
	r.store.Write(pattern(0, 32<<20), 0)
	c := r.connect().attach(true)
	r.faults.Add(blocktest.Fault{Op: blocktest.OpRead, Err: syscall.EIO})
	wantErrno(t, "READ", c.do(cmdRead, 0, 0, maxPayload), nbdEIO)
	if n := r.faults.Fired(); n > 2*maxBad {
		t.Fatalf("%d failing reads of the disk", n)
	}
}

func TestFailedReadWithSimpleRepliesHasNoPayload_96(t *testing.T) {
	r := newRig(t, setup{size: 8 << 20})
	c := r.connect().attach(false)
	r.faults.Add(blocktest.Fault{Op: blocktest.OpRead, Off: 3 << 20, Len: 1, Err: syscall.EIO})
	wantErrno(t, "READ", c.do(cmdRead, 0, 0, 4<<20), nbdEIO)
	r.faults.Clear()
	wantErrno(t, "READ", c.do(cmdRead, 0, 0, 4<<20), 0)
}

func TestWritesOfAllSizesAndPlaces(t *testing.T) {
	bothKinds(t, func(t *testing.T, structured bool) {
		r := newRig(t, setup{size: 40 << 20})
		c := r.connect().attach(structured)
		model := r.store.Bytes()
		for i, length := range []int64{1, 512, 4096, 65535, 65536, 65537, rxSize - requestSize, rxSize, 1 << 20, 1<<20 + 1, 5<<20 + 77, maxPayload} {
			for _, off := range []int64{0, 1, 12345, 1 << 20} {
				if length > 1<<20 && off != 12345 {
					continue
				}
				payload := bytes.Repeat([]byte{byte(i*7 + int(off) + 1)}, int(length))
				copy(model[off:], payload)
				wantErrno(t, "WRITE", c.do(cmdWrite, uint16(i%2), off, length, payload...), 0)
			}
			if !bytes.Equal(model, r.store.Bytes()) {
				t.Fatalf("the disk differs after a WRITE of %d", length)
			}
		}
	})
}

// TestPipelinedRequests sends many requests at once, in one segment and byte by byte.
func TestPipelinedRequests_9_94(t *testing.T) {
	for _, direct := range []bool{false, true} {
		for _, step := range []int{1 << 20, 1000, 1} {
			r := newRig(t, setup{direct: direct})
			c := r.connect().attach(true)
			var all []byte
			const n = 100
			for i := range int64(n) {
				if i%3 == 0 {
					all = append(all, requestBytes(cmdWrite, 0, uint64(i), i*4096, 600, bytes.Repeat([]byte{byte(i)}, 600)...)...)
				} else {
					all = append(all, requestBytes(cmdRead, 0, uint64(i), i*4096, 300)...)
				}
			}
			sent := make(chan error, 1)
			go func() {
				for rest := all; len(rest) > 0; rest = rest[min(step, len(rest)):] {
					if _, err := c.nc.Write(rest[:min(step, len(rest))]); err != nil {
						sent <- err
						return
					}
				}
				sent <- nil
			}()
			seen := map[uint64]bool{}
			for range n {
				res := c.result(dataOf(0))
				off := int64(res.cookie) * 4096
				if seen[res.cookie] || res.errno != 0 || res.cookie%3 != 0 && !bytes.Equal(c.assemble(res, off, 300), pattern(off, 300)) {
					t.Fatalf("reply %d", res.cookie)
				}
				seen[res.cookie] = true
			}
			must(t, <-sent)
			for i := int64(0); i < n; i += 3 {
				if got := r.store.Bytes()[i*4096:][:600]; !bytes.Equal(got, bytes.Repeat([]byte{byte(i)}, 600)) {
					t.Fatalf("write %d is not there", i)
				}
			}
		}
	}
}

func TestFastRequestPassesASlowOne_94(t *testing.T) {
	r := newRig(t, setup{})
	c := r.connect().attach(true)
	r.gate.Hold(blocktest.OpRead)
	c.send(requestBytes(cmdRead, 0, 1, 0, 512))
	must(t, r.gate.WaitHeld(soon(t), 1))
	wantErrno(t, "FLUSH", c.do(cmdFlush, 0, 0, 0), 0)
	wantErrno(t, "WRITE", c.do(cmdWrite, 0, 0, 4, 1, 2, 3, 4), 0)
	r.gate.ReleaseAll()
	if res := c.result(dataOf(0)); res.cookie != 1 {
		t.Fatalf("%+v", res)
	}
}

func TestWriteZeroesFlags_118_119_120_121(t *testing.T) {
	r := newRig(t, setup{size: 8 << 20})
	c := r.connect().attach(true)
	whole := pattern(0, 1<<20)
	allocated := func(off, n int64) bool { ok, l := r.store.Extent(off, n); return ok && l == n }
	wantErrno(t, "may trim", c.do(cmdWriteZeroes, 0, 4096, 8192), 0)
	if allocated(4096, 8192) {
		t.Error("nothing was freed without NO_HOLE")
	}
	wantErrno(t, "NO_HOLE", c.do(cmdWriteZeroes, flagNoHole, 100<<10, 8192), 0)
	if !allocated(100<<10, 8192) {
		t.Error("NO_HOLE made a hole")
	}
	wantErrno(t, "FAST_ZERO", c.do(cmdWriteZeroes, flagFastZero, 200<<10, 1), 0)
	wantErrno(t, "large", c.do(cmdWriteZeroes, flagFUA, 1<<20-7, 7<<20), 0)
	clear(whole[4096:12288])
	clear(whole[100<<10 : 108<<10])
	clear(whole[200<<10 : 200<<10+1])
	clear(whole[1<<20-7:])
	if !bytes.Equal(r.store.Bytes()[:1<<20], whole) {
		t.Error("the disk is not as it should be")
	}

	limits := blocktest.AllFlags
	limits.ZeroFlags = 0
	r = newRig(t, setup{limits: limits})
	c = r.connect().attach(true)
	wantErrno(t, "120 FAST_ZERO that is not fast", c.do(cmdWriteZeroes, flagFastZero, 0, 4096), nbdENOTSUP)
	if !bytes.Equal(r.store.Bytes(), pattern(0, 1<<20)) {
		t.Error("a refused FAST_ZERO changed something")
	}
	wantErrno(t, "121 the same slowly", c.do(cmdWriteZeroes, 0, 0, 4096), 0)
}

func TestLongRequestsWithoutPayload_118_123(t *testing.T) {
	const size = 6 << 30
	r := newRig(t, setup{size: size})
	c := r.connect().attach(true)
	wantErrno(t, "WRITE_ZEROES of 4 GiB-1", c.do(cmdWriteZeroes, 0, 0, 1<<32-1), 0)
	wantErrno(t, "TRIM of 4 GiB-1", c.do(cmdTrim, 0, size-(1<<32-1), 1<<32-1), 0)
	wantErrno(t, "CACHE of 32 MiB", c.do(cmdCache, 0, 0, 32<<20), 0)
	wantErrno(t, "CACHE above the maximum", c.do(cmdCache, 0, 0, 1<<30), nbdEOVERFLOW)
	if r := c.do(cmdBlockStatus, 0, 1, 1<<32-1); r.errno != 0 || be.Uint32(r.chunks[0].payload[4:]) != 1<<32-1 {
		t.Fatalf("BLOCK_STATUS of 4 GiB-1: %+v", r)
	}
}

type extent struct{ length, state uint32 }

// status asks for the extents of a range and checks the form of the answer.
func (c *client) status(flags uint16, off, length int64) []extent {
	c.t.Helper()
	r := c.do(cmdBlockStatus, flags, off, length)
	wantErrno(c.t, "BLOCK_STATUS", r, 0)
	if len(r.chunks) != 1 || r.chunks[0].typ != chunkBlockStatus {
		c.t.Fatalf("chunks %+v", r.chunks)
	}
	p := r.chunks[0].payload
	if len(p) < 12 || (len(p)-4)%8 != 0 || be.Uint32(p) != contextID {
		c.t.Fatalf("status chunk of %d bytes", len(p))
	}
	var list []extent
	sum := int64(0)
	for p = p[4:]; len(p) > 0; p = p[8:] {
		x := extent{be.Uint32(p), be.Uint32(p[4:])}
		if x.length == 0 || x.state > 3 || x.state == stateHole || len(list) > 0 && list[len(list)-1].state == x.state {
			c.t.Fatalf("126, 130: extent %+v after %v", x, list)
		}
		sum += int64(x.length)
		list = append(list, x)
	}
	if sum > length {
		c.t.Fatalf("127: %d bytes are told, %d were asked for", sum, length)
	}
	return list
}

func TestBlockStatus_126_127_128_130_132_133(t *testing.T) {
	r := newRig(t, setup{size: 4 << 20})
	c := r.connect().attach(true)
	wantErrno(t, "hole", c.do(cmdWriteZeroes, 0, 64<<10, 64<<10), 0)
	if got, want := c.status(0, 0, 4<<20), []extent{{64 << 10, 0}, {64 << 10, 3}, {896 << 10, 0}, {3 << 20, 3}}; !slices.Equal(got, want) {
		t.Fatalf("extents %v, want %v", got, want)
	}
	if got, want := c.status(flagReqOne, 1000, 4<<20-1000), []extent{{64<<10 - 1000, 0}}; !slices.Equal(got, want) {
		t.Fatalf("128: extents %v, want %v", got, want)
	}
	if got, want := c.status(0, 100<<10, 1), []extent{{1, 3}}; !slices.Equal(got, want) {
		t.Fatalf("extents %v, want %v", got, want)
	}
	wantErrno(t, "131 beyond the end", c.do(cmdBlockStatus, 0, 4<<20, 1), nbdEINVAL)
	// What an error cuts short is an answer; its rest is not.
	r.faults.Add(blocktest.Fault{Op: blocktest.OpStatus, Skip: 1, Err: syscall.EIO})
	if got, want := c.status(0, 0, 4<<20), []extent{{64 << 10, 0}}; !slices.Equal(got, want) {
		t.Fatalf("extents %v, want %v", got, want)
	}
	wantErrno(t, "failing status", c.do(cmdBlockStatus, 0, 64<<10, 4096), nbdEIO)
}

func TestBlockStatusWalkCoversEachByteOnce_129_133(t *testing.T) {
	r := newRig(t, setup{size: 64 << 20})
	for off := int64(0); off < 64<<20; off += 8192 {
		r.store.Write([]byte{1}, off)
	}
	c := r.connect().attach(true)
	for _, step := range []int64{64 << 20, 12345, 1 << 20} {
		for off := int64(0); off < min(64<<20, step*50); {
			for _, x := range c.status(0, off, min(step, 64<<20-off)) {
				ok, n := r.store.Extent(off, int64(x.length))
				if zero := x.state == 3; zero == ok && n != 0 {
					t.Fatalf("extent at %d: state %d", off, x.state)
				}
				off += int64(x.length)
			}
		}
	}
}

func TestStateNeverTellsAHoleThatIsNotZero(t *testing.T) {
	for f := range block.StatusFlags(64) {
		s := stateOf(f)
		if s&^3 != 0 || s == stateHole || (s&stateZero != 0) != (f&block.StatusZero != 0) || s&stateHole != 0 && f&block.StatusData != 0 {
			t.Errorf("flags %#x: state %d", f, s)
		}
	}
}

func TestMinimumBlockSizeBindsOnlyWhoWasTold_137_138_140(t *testing.T) {
	limits := blocktest.AllFlags
	limits.RequestAlignment = 4096
	r := newRig(t, setup{limits: limits})
	told := r.connect().attach(true, infoBlockSize)
	for _, row := range []struct{ off, length int64 }{{1, 4096}, {0, 512}, {4096, 4095}, {100, 200}} {
		wantErrno(t, "READ", told.do(cmdRead, 0, row.off, row.length), nbdEINVAL)
		wantErrno(t, "WRITE", told.do(cmdWrite, 0, row.off, row.length, make([]byte, row.length)...), nbdEINVAL)
		wantErrno(t, "TRIM", told.do(cmdTrim, 0, row.off, row.length), nbdEINVAL)
	}
	wantErrno(t, "READ", told.do(cmdRead, 0, 4096, 8192), 0)
	// INFO binds nobody; GO without the request neither.
	free := r.connect()
	free.greet(3)
	free.final(optInfo, infoData("disk", infoBlockSize))
	free.final(optGo, infoData("disk"))
	wantErrno(t, "WRITE", free.do(cmdWrite, 0, 5000, 3, 7, 8, 9), 0)
	want := pattern(0, 1<<20)
	copy(want[5000:], []byte{7, 8, 9})
	if !bytes.Equal(r.store.Bytes(), want) {
		t.Fatal("the disk is not as it should be")
	}
	if res := free.do(cmdRead, 0, 4999, 5); !bytes.Equal(res.data, want[4999:5004]) {
		t.Fatalf("READ %x", res.data)
	}
}

func TestUnalignedEndIsPaddedToTheMinimum_136(t *testing.T) {
	limits := blocktest.AllFlags
	limits.RequestAlignment = 512
	r := newRig(t, setup{size: 1000, limits: limits, direct: true})
	c := r.connect()
	c.greet(3)
	rs := c.option(optGo, infoData("disk", infoBlockSize))
	if size := be.Uint64(infoOf(rs, infoExport)); size != 1024 {
		t.Fatalf("size %d", size)
	}
	if res := c.do(cmdRead, 0, 512, 512); !bytes.Equal(res.data, append(pattern(512, 488), make([]byte, 24)...)) {
		t.Fatalf("the end is not padded with zeroes: error %d, %x", res.errno, res.data)
	}
	wantErrno(t, "WRITE behind the end", c.do(cmdWrite, 0, 512, 512, bytes.Repeat([]byte{1}, 512)...), nbdEPERM)
}

func TestWriteOnOneConnectionIsSeenByTheOther_158_160(t *testing.T) {
	r := newRig(t, setup{})
	a, b := r.connect().attach(true), r.connect().attach(false)
	for i := range int64(20) {
		wantErrno(t, "WRITE", a.do(cmdWrite, 0, i*100, 4, byte(i), 1, 2, 3), 0)
		if res := b.do(cmdRead, 0, i*100, 4); binary.LittleEndian.Uint32(res.data) != uint32(i)|0x03020100 {
			t.Fatalf("READ %x", res.data)
		}
	}
	a.nc.Close()
	r.waitServed(1)
	wantErrno(t, "READ after the other has gone", b.do(cmdRead, 0, 0, 4), 0)
}

func TestManyClientsAtOnce(t *testing.T) {
	r := newRig(t, setup{direct: true})
	done := make(chan bool, 20)
	for i := range 20 {
		c := r.connect().attach(i%2 == 0)
		go func() {
			ok := true
			for j := range int64(50) {
				off := (j*37 + int64(i)*1001) % (1<<20 - 5000)
				c.nc.Write(requestBytes(cmdRead, 0, 77, off, 5000))
				res := c.result(dataOf(5000))
				if c.structured {
					res.data = c.assemble(res, off, 5000)
				}
				ok = ok && bytes.Equal(res.data, pattern(off, 5000))
			}
			done <- ok
		}()
	}
	for range 20 {
		if !<-done {
			t.Error("wrong data")
		}
	}
	f := r.e.Stats().Ops[0]
	if f.OK != 1000 || f.InFlight != 0 || f.Bytes != 5000000 || f.Buckets == ([len(f.Buckets)]int64{}) {
		t.Fatalf("figures %+v", f)
	}
}
