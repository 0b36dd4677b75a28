package export

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

// fuzzServer is one server for all inputs of a fuzz target. Its graph is not watched
// for goroutines: the fuzzing engine's would count.
func fuzzServer(f *testing.F) *rig {
	graph := block.NewGraph(slog.New(slog.DiscardHandler), blocktest.Memory(f))
	f.Cleanup(func() { must(f, graph.Close(context.Background())) })
	return newRig(f, setup{graph: graph, size: 1 << 20, limits: block.Limits{RequestAlignment: 512, MemAlignment: 1}, direct: true,
		options: Options{HandshakeTimeout: 5 * time.Second, CloseTimeout: 5 * time.Second, Memory: 40 << 20}})
}

// talk sends input, closes the sending side and returns all that the server said.
func (r *rig) talk(t *testing.T, input []byte) []byte {
	a, b := socketpair(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.s.ServeConn(a)
	}()
	defer b.Close()
	must(t, b.SetDeadline(time.Now().Add(patience)))
	go func() {
		b.Write(input)
		b.(interface{ CloseWrite() error }).CloseWrite()
	}()
	said, err := io.ReadAll(b)
	if err != nil && len(said) == 0 {
		t.Fatalf("the server said nothing and did not close: %v", err)
	}
	b.Close()
	<-done
	if n := r.inFlight(); n != 0 || r.s.Stats().Clients != 0 {
		t.Fatalf("%d requests, %d clients left", n, r.s.Stats().Clients)
	}
	return said
}

func optionSeeds() [][]byte {
	seeds := [][]byte{
		optionBytes(optExportName, []byte("disk")), optionBytes(optAbort, nil), optionBytes(optList, nil), optionBytes(optList, []byte("x")),
		optionBytes(optStartTLS, nil), optionBytes(optInfo, infoData("disk", 0, 1, 2, 3)), optionBytes(optInfo, infoData("none")), optionBytes(optGo, infoData("", 3)),
		optionBytes(optStructuredReply, nil), optionBytes(optListMeta, metaData("disk")), optionBytes(optListMeta, metaData("disk", "base:", "x:y")),
		optionBytes(optSetMeta, metaData("disk", baseAllocation)), optionBytes(11, nil), optionBytes(4, []byte("abc")), optionBytes(99, make([]byte, maxOption+1)),
	}
	return append(seeds, bytes.Join([][]byte{seeds[8], seeds[11], seeds[5], seeds[7]}, nil))
}

// FuzzNegotiation: whatever comes, the server answers in whole replies and ends.
func FuzzNegotiation(f *testing.F) {
	for _, flags := range []uint32{3, 0, 0x80} {
		for _, s := range optionSeeds() {
			f.Add(append(be.AppendUint32(nil, flags), s...))
		}
	}
	r := fuzzServer(f)
	f.Fuzz(func(t *testing.T, input []byte) {
		said := r.talk(t, input)
		if len(said) < 18 || string(said[:16]) != "NBDMAGICIHAVEOPT" {
			t.Fatalf("greeting %x", said)
		}
		for said = said[18:]; len(said) >= 20 && be.Uint64(said) == magicOptionReply; {
			n := be.Uint32(said[16:])
			if uint64(len(said)-20) < uint64(n) {
				t.Fatalf("a reply of %d bytes ends after %d", n, len(said)-20)
			}
			said = said[20+n:]
		}
	})
}

// FuzzTransmission: whatever comes after GO, the server answers each request once in whole replies, and ends.
func FuzzTransmission(f *testing.F) {
	write := requestBytes(cmdWrite, flagFUA, 5, 4096, 512, pattern(0, 512)...)
	for _, seed := range [][]byte{
		requestBytes(cmdRead, 0, 1, 0, 4096), requestBytes(cmdRead, flagDF, 1, 512, 100), requestBytes(cmdRead, 0, 1, 1<<20, 1), requestBytes(cmdRead, 0, 1, 0, 0),
		write, write[:40], requestBytes(cmdWrite, 0, 1, 0, 100<<10, make([]byte, 100<<10)...), requestBytes(cmdWrite, 0x80, 1, 0, 8, make([]byte, 8)...),
		requestBytes(cmdDisc, 0, 0, 0, 0), requestBytes(cmdFlush, 0, 1, 0, 0), requestBytes(cmdTrim, flagFUA, 1, 0, 4096), requestBytes(cmdCache, 0, 1, 0, 4096),
		requestBytes(cmdWriteZeroes, flagNoHole, 1, 0, 4096), requestBytes(cmdWriteZeroes, flagFastZero, 1, 0, 1<<20), requestBytes(cmdBlockStatus, flagReqOne, 1, 0, 1<<20),
		requestBytes(cmdBlockStatus, 0, 1, 0, 1<<20), requestBytes(8, 0, 1, 0, 0), {0x12, 0x56, 0x09, 0x53},
		bytes.Join([][]byte{write, requestBytes(cmdRead, 0, 2, 4096, 65536), requestBytes(cmdFlush, 0, 3, 0, 0)}, nil),
	} {
		for kind := range byte(4) {
			f.Add(kind, seed)
		}
	}
	r := fuzzServer(f)
	f.Fuzz(func(t *testing.T, kind byte, input []byte) {
		structured := kind&1 != 0
		hello := be.AppendUint32(nil, 3)
		if structured {
			hello = append(hello, optionBytes(optStructuredReply, nil)...)
			hello = append(hello, optionBytes(optSetMeta, metaData("disk", baseAllocation))...)
		}
		infos := []uint16{infoBlockSize}
		if kind&2 != 0 {
			infos = nil
		}
		hello = append(hello, optionBytes(optGo, infoData("disk", infos...))...)
		said := r.talk(t, append(hello, input...))[18:]
		for len(said) >= 20 && be.Uint64(said) == magicOptionReply {
			said = said[20+be.Uint32(said[16:]):]
		}
		checkReplies(t, said, input, structured)
		if r.e.Stats().Connections != 0 || r.s.pool.free != r.s.opt.Memory {
			t.Fatal("something is left of the connection")
		}
	})
}

// checkReplies takes replies apart. With simple replies, lengths come from the requests in input.
func checkReplies(t *testing.T, said, input []byte, structured bool) {
	if !structured {
		return
	}
	for len(said) > 0 {
		head := simpleSize
		if be.Uint32(said) == magicStructuredReply && len(said) >= chunkSize {
			head = chunkSize + int(be.Uint32(said[16:]))
		} else if be.Uint32(said) != magicSimpleReply {
			t.Fatalf("reply magic %x for input %x", said[:4], input)
		}
		if len(said) < head {
			t.Fatalf("a reply of %d bytes ends after %d", head, len(said))
		}
		said = said[head:]
	}
}

// TestSeedsReachEveryReplyKind keeps the seeds of the fuzz targets complete.
func TestSeedsReachEveryReplyKind(t *testing.T) {
	r := newRig(t, setup{})
	seen := map[uint32]bool{}
	for _, s := range optionSeeds() {
		said := r.talk(t, append(be.AppendUint32(nil, 3), s...))[18:]
		for len(said) >= 20 && be.Uint64(said) == magicOptionReply {
			seen[be.Uint32(said[12:])] = true
			said = said[20+be.Uint32(said[16:]):]
		}
	}
	for _, typ := range []uint32{repAck, repServer, repInfo, repMetaContext, repErrUnsup, repErrPolicy, repErrInvalid, repErrUnknown, repErrTooBig} {
		if !seen[typ] {
			t.Errorf("no seed brings reply %#x", typ)
		}
	}
}
