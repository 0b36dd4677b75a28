package export

import (
	"bytes"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"github.com/nbdserve/nbdserve/block/blocktest"
)

func TestGreetingIsMagicsAndTwoFlags_1_2(t *testing.T) {
	c := newRig(t, setup{}).connect()
	want := be.AppendUint16([]byte("NBDMAGICIHAVEOPT"), 3)
	if got := c.read(18); !bytes.Equal(got, want) {
		t.Fatalf("greeting %x, want %x", got, want)
	}
}

func TestUnknownClientFlagEndsTheConnection_3(t *testing.T) {
	for _, flags := range []uint32{4, 0x80, 1 << 31, 7} {
		c := newRig(t, setup{}).connect()
		c.greet(flags)
		c.expectEnd()
	}
}

func TestExportNameReplyHasZeroesUnlessAgreed_4_5_22(t *testing.T) {
	for _, test := range []struct {
		flags uint32
		size  int
	}{{0, 134}, {1, 134}, {2, 10}, {3, 10}} {
		c := newRig(t, setup{}).connect()
		c.greet(test.flags)
		c.send(optionBytes(optExportName, []byte("disk")))
		b := c.read(test.size)
		if be.Uint64(b) != 1<<20 || !bytes.Equal(b[10:], make([]byte, test.size-10)) {
			t.Fatalf("flags %d: reply %x", test.flags, b)
		}
		d := newRig(t, setup{}).connect()
		d.greet(3)
		infos := d.option(optGo, infoData("disk"))
		if got := be.Uint16(infos[0].data[10:]); got != be.Uint16(b[8:]) {
			t.Fatalf("GO says flags %#x, EXPORT_NAME %#x", got, be.Uint16(b[8:]))
		}
		if r := c.do(cmdRead, 0, 100, 5000); !bytes.Equal(r.data, pattern(100, 5000)) {
			t.Fatalf("wrong data")
		}
	}
}

func TestOptionsByteByByteAndAllAtOnceGiveTheSame_9(t *testing.T) {
	all := bytes.Join([][]byte{
		be.AppendUint32(nil, 3), optionBytes(optList, nil), optionBytes(optStructuredReply, nil),
		optionBytes(optInfo, infoData("disk", infoName, infoBlockSize)), optionBytes(99, []byte("xyz")), optionBytes(optAbort, nil),
	}, nil)
	run := func(send func(net.Conn) error) []byte {
		c := newRig(t, setup{}).connect()
		sent := make(chan error, 1)
		go func() { sent <- send(c.nc) }()
		var got bytes.Buffer
		if _, err := got.ReadFrom(c.nc); err != nil {
			t.Fatal(err)
		}
		must(t, <-sent)
		return got.Bytes()
	}
	once := run(func(nc net.Conn) error { _, err := nc.Write(all); return err })
	slowly := run(func(nc net.Conn) error {
		for i := range all {
			if _, err := nc.Write(all[i : i+1]); err != nil {
				return err
			}
		}
		return nil
	})
	if len(once) < 200 || !bytes.Equal(once, slowly) {
		t.Fatalf("answers differ: %d and %d bytes", len(once), len(slowly))
	}
}

func TestSilentClientIsDroppedAfterTheHandshakeTimeout_10(t *testing.T) {
	r := newRig(t, setup{options: Options{HandshakeTimeout: 30 * time.Millisecond}})
	for _, say := range [][]byte{nil, {0, 0}, {0, 0, 0, 3}, append([]byte{0, 0, 0, 3}, "IHAVEOPT\x00"...)} {
		c := r.connect()
		c.read(18)
		c.send(say)
		c.expectEnd()
	}
	r.waitServed(4)
	if st := r.s.Stats(); st.Handshakes != 0 || st.Failed != 4 {
		t.Fatalf("stats %+v", st)
	}
}

// TestOptionReplies has one option a row.
func TestOptionReplies(t *testing.T) {
	long := strings.Repeat("x", maxString)
	for _, test := range []struct {
		name  string
		opt   uint32
		data  []byte
		final uint32
	}{
		{"12 unknown option", 0x7654321, []byte("data"), repErrUnsup},
		{"12 PEEK_EXPORT", 4, nil, repErrUnsup},
		{"14 option longer than is read", 99, make([]byte, maxOption+1), repErrTooBig},
		{"15 name of 4096 bytes", optInfo, infoData(long), repErrUnknown},
		{"15 name of 4097 bytes", optInfo, infoData(long + "x"), repErrInvalid},
		{"15 name with NUL", optInfo, infoData("a\x00b"), repErrInvalid},
		{"15 name that is no UTF-8", optInfo, infoData("\xff"), repErrInvalid},
		{"20 empty name is the only export", optInfo, infoData(""), repAck},
		{"23 ABORT", optAbort, nil, repAck},
		{"24 ABORT with data", optAbort, []byte("data"), repAck},
		{"27 LIST with data", optList, []byte{0}, repErrInvalid},
		{"30 INFO", optInfo, infoData("disk"), repAck},
		{"31 name longer than the option", optInfo, []byte{0, 0, 0, 5, 'd', 'i', 's', 'k', 0, 0}, repErrInvalid},
		{"31 name length 2^32-1", optGo, []byte{255, 255, 255, 255, 0, 0}, repErrInvalid},
		{"31 option too short for anything", optGo, []byte{0, 0, 0, 0, 0}, repErrInvalid},
		{"31 empty option", optInfo, nil, repErrInvalid},
		{"31 fewer requests than told", optInfo, append(infoData("disk")[:8], 0, 2, 0, 0), repErrInvalid},
		{"31 more requests than told", optInfo, append(infoData("disk", 0), 0), repErrInvalid},
		{"31 65535 requests told", optInfo, append(infoData("disk")[:8], 255, 255), repErrInvalid},
		{"32 unknown info types", optInfo, infoData("disk", 77, 4, 65535), repAck},
		{"36 unknown export", optInfo, infoData("none"), repErrUnknown},
		{"36 GO to an unknown export", optGo, infoData("none"), repErrUnknown},
		{"46 STRUCTURED_REPLY", optStructuredReply, nil, repAck},
		{"47 STRUCTURED_REPLY with data", optStructuredReply, []byte{1}, repErrInvalid},
		{"48 LIST_META before structured replies", optListMeta, metaData("disk"), repAck},
		{"52 LIST_META of nothing", optListMeta, nil, repErrInvalid},
		{"52 name longer than the option", optListMeta, []byte{0, 0, 0, 9, 'd', 0, 0, 0, 0}, repErrInvalid},
		{"52 query longer than the option", optListMeta, append(metaData("disk", "base:")[:12], 0, 0, 0, 99, 'b'), repErrInvalid},
		{"52 fewer queries than told", optListMeta, append(metaData("disk")[:8], 0, 0, 0, 1), repErrInvalid},
		{"52 2^32-1 queries told", optListMeta, append(metaData("disk")[:8], 255, 255, 255, 255), repErrInvalid},
		{"52 bytes behind the queries", optListMeta, append(metaData("disk", "base:"), 1), repErrInvalid},
		{"53 unknown namespace", optListMeta, metaData("disk", "x-other:thing"), repAck},
		{"54 query without a colon", optListMeta, metaData("disk", "base"), repAck},
		{"55 SET_META before structured replies", optSetMeta, metaData("disk", baseAllocation), repErrInvalid},
		{"61 LIST_META of an unknown export", optListMeta, metaData("none"), repErrUnknown},
		{"63 STARTTLS without TLS", optStartTLS, nil, repErrPolicy},
		{"63 STARTTLS without TLS, with data", optStartTLS, []byte("x"), repErrPolicy},
		{"141 EXTENDED_HEADERS", 11, nil, repErrUnsup},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newRig(t, setup{}).connect()
			c.greet(3)
			rs := c.option(test.opt, test.data)
			last := rs[len(rs)-1]
			if last.typ != test.final {
				t.Fatalf("reply %#x (%s), want %#x", last.typ, last.data, test.final)
			}
			if last.typ&(1<<31) != 0 && (len(rs) != 1 || len(last.data) == 0 || len(last.data) > maxString) {
				t.Fatalf("%d replies, text %q", len(rs), last.data)
			}
			if test.opt == optAbort {
				c.expectEnd()
				return
			}
			c.structured = test.opt == optStructuredReply && test.final == repAck
			// The stream is in step, and the session goes on (17, 39).
			if typ := c.final(optGo, infoData("disk")); typ != repAck {
				t.Fatalf("GO afterwards: %#x", typ)
			}
			if r := c.do(cmdRead, 0, 0, 512); !bytes.Equal(r.data, pattern(0, 512)) {
				t.Fatalf("wrong data")
			}
		})
	}
}

func TestWrongOptionMagicEndsTheConnection_13(t *testing.T) {
	c := newRig(t, setup{}).connect()
	c.greet(3)
	c.send([]byte("IHAVEOPS"), make([]byte, 8))
	c.expectEnd()
}

func TestHugeOptionEndsTheConnectionWithoutReadingIt_14(t *testing.T) {
	for _, length := range []uint32{maxSkip + 1, 1<<32 - 1} {
		c := newRig(t, setup{}).connect()
		c.greet(3)
		c.send(be.AppendUint32(be.AppendUint32(be.AppendUint64(nil, magicOption), optInfo), length))
		c.expectEnd()
	}
}

func TestLongOptionsAreBoundedInSum_CVE_2017_15119(t *testing.T) {
	c := newRig(t, setup{}).connect()
	c.greet(3)
	for range maxSkip / (1 << 20) {
		if typ := c.final(99, make([]byte, 1<<20)); typ != repErrTooBig {
			t.Fatalf("reply %#x", typ)
		}
	}
	c.send(optionBytes(99, make([]byte, maxOption+1))[:16])
	c.expectEnd()
}

func TestErrorTextQuotesLongNamesShortly_16_CVE_2020_10761(t *testing.T) {
	c := newRig(t, setup{}).connect()
	c.greet(3)
	rs := c.option(optGo, infoData(strings.Repeat("ä", maxString/2)))
	if text := string(rs[0].data); len(rs) != 1 || len(text) > 512 || !strings.Contains(text, "ääää") || !strings.Contains(text, "not present") {
		t.Fatalf("%d replies, text %q", len(rs), text)
	}
}

func TestOptionsAreCounted_18(t *testing.T) {
	c := newRig(t, setup{options: Options{MaxOptions: 10}}).connect()
	c.greet(3)
	for range 10 + 4 {
		c.final(optList, nil)
	}
	c.expectEnd()
}

func TestRefusedExportNameEndsWithoutAByte_19_21(t *testing.T) {
	for _, name := range []string{"none", strings.Repeat("x", 4097), strings.Repeat("x", maxOption+1), "a\x00", "\xff"} {
		c := newRig(t, setup{}).connect()
		c.greet(3)
		c.send(optionBytes(optExportName, []byte(name)))
		c.expectEnd()
	}
}

func TestClientMayCloseRightAfterAbort_25(t *testing.T) {
	r := newRig(t, setup{})
	c := r.connect()
	c.greet(3)
	c.send(optionBytes(optAbort, nil))
	c.nc.Close()
	r.waitServed(1)
	if st := r.s.Stats(); st.Failed != 0 {
		t.Fatalf("counted as a failure: %+v", st)
	}
}

// addExport adds a second export of the same node.
func (r *rig) addExport(name, description string) *Export {
	e, err := r.s.AddExport(soon(r.t), Config{Name: name, Description: description, Graph: r.graph, Node: r.node, ReadOnly: true, ShareRW: true})
	must(r.t, err)
	return e
}

func TestListNamesAllExportsWithDescriptions_26(t *testing.T) {
	r := newRig(t, setup{config: Config{ShareRW: true, Description: "the first"}})
	r.addExport("zwei", "the second")
	c := r.connect()
	c.greet(3)
	rs := c.option(optList, nil)
	var got []string
	for _, s := range rs[:len(rs)-1] {
		n := be.Uint32(s.data)
		got = append(got, string(s.data[4:4+n])+"|"+string(s.data[4+n:]))
	}
	if want := "disk|the first zwei|the second"; strings.Join(got, " ") != want {
		t.Fatalf("list %q, want %q", got, want)
	}
}

func TestEmptyNameIsUnknownAmongSeveral_20(t *testing.T) {
	r := newRig(t, setup{config: Config{ShareRW: true}})
	r.addExport("other", "")
	c := r.connect()
	c.greet(3)
	if typ := c.final(optGo, infoData("")); typ != repErrUnknown {
		t.Fatalf("reply %#x", typ)
	}
}

func infoOf(rs []optReply, typ uint16) []byte {
	for _, r := range rs {
		if r.typ == repInfo && be.Uint16(r.data) == typ {
			return r.data[2:]
		}
	}
	return nil
}

func TestInfoItems_30_33_34_35_37(t *testing.T) {
	limits := blocktest.AllFlags
	limits.RequestAlignment, limits.PreferredTransfer = 512, 65536
	r := newRig(t, setup{limits: limits, config: Config{Description: "a disk"}})
	c := r.connect()
	c.greet(3)
	data := infoData("", infoName, infoDescription, infoBlockSize, infoExport)
	rs := c.option(optInfo, data)
	seen := map[uint16]int{}
	for _, x := range rs[:len(rs)-1] {
		seen[be.Uint16(x.data)]++
	}
	for typ, n := range seen {
		if n != 1 {
			t.Errorf("info %d came %d times", typ, n)
		}
	}
	if s := string(infoOf(rs, infoName)); s != "disk" {
		t.Errorf("name %q", s)
	}
	if s := string(infoOf(rs, infoDescription)); s != "a disk" {
		t.Errorf("description %q", s)
	}
	if b := infoOf(rs, infoExport); len(b) != 10 || be.Uint64(b) != 1<<20 {
		t.Errorf("export %x", b)
	}
	b := infoOf(rs, infoBlockSize)
	if len(b) != 12 || be.Uint32(b) != 512 || be.Uint32(b[4:]) != 65536 || be.Uint32(b[8:]) != 32<<20 {
		t.Errorf("block sizes %x", b)
	}
	again := c.option(optGo, data)
	if len(again) != len(rs) {
		t.Fatalf("INFO gave %d replies, GO %d", len(rs), len(again))
	}
	for i := range rs {
		if !bytes.Equal(rs[i].data, again[i].data) || rs[i].typ != again[i].typ {
			t.Errorf("INFO %x, GO %x", rs[i], again[i])
		}
	}
}

func TestInfoHoldsNothing_41(t *testing.T) {
	r := newRig(t, setup{options: Options{MaxClients: 1}})
	for range 3 {
		c := r.connect()
		c.greet(3)
		if typ := c.final(optInfo, infoData("disk")); typ != repAck {
			t.Fatalf("reply %#x", typ)
		}
	}
	if st := r.s.Stats(); st.Clients != 0 || r.e.Stats().Connections != 0 {
		t.Fatalf("%+v", st)
	}
	r.connect().attach(true)
}

func TestBlockSizesAreValid_135_139(t *testing.T) {
	for _, l := range []block.Limits{
		{RequestAlignment: 1}, {RequestAlignment: 512}, {RequestAlignment: 4096}, {RequestAlignment: 65536},
		{RequestAlignment: 1, PreferredTransfer: 3 * 4096}, {RequestAlignment: 512, PreferredTransfer: 1 << 40}, {RequestAlignment: 1, PreferredTransfer: 100},
	} {
		l.MemAlignment = 1
		r := newRig(t, setup{limits: l, direct: true})
		least, preferred, most := r.e.blockSizes()
		if int64(least) != l.RequestAlignment || preferred&(preferred-1) != 0 || preferred < max(512, least) || most < preferred || most < 1<<20 || most > 32<<20 {
			t.Errorf("%+v: %d %d %d", l, least, preferred, most)
		}
	}
}

func TestTransmissionFlagsTellWhatIsThere_42_43_44(t *testing.T) {
	for _, test := range []struct {
		name                 string
		readOnly, structured bool
		rotational           bool
		want                 uint16
	}{
		{"writable, simple", false, false, false, 0x0d6d},
		{"writable, structured", false, true, false, 0x0ded},
		{"read-only, simple", true, false, false, 0x050f},
		{"read-only, structured, rotational", true, true, true, 0x059f},
	} {
		t.Run(test.name, func(t *testing.T) {
			limits := blocktest.AllFlags
			limits.Rotational = test.rotational
			r := newRig(t, setup{limits: limits, readOnly: test.readOnly, config: Config{ReadOnly: test.readOnly}})
			c := r.connect()
			c.greet(3)
			if test.structured {
				c.final(optStructuredReply, nil)
			}
			rs := c.option(optGo, infoData("disk"))
			if got := be.Uint16(infoOf(rs, infoExport)[8:]); got != test.want {
				t.Fatalf("flags %#x, want %#x", got, test.want)
			}
		})
	}
}

func TestMetaContexts_49_50_51_53_56_57_58(t *testing.T) {
	for _, test := range []struct {
		name    string
		opt     uint32
		queries []string
		found   bool
	}{
		{"49 list of all", optListMeta, nil, true},
		{"50 list by wildcard", optListMeta, []string{"base:"}, true},
		{"list by name", optListMeta, []string{"x-y:z", baseAllocation}, true},
		{"53 list of an unknown leaf", optListMeta, []string{"base:other"}, false},
		{"50 qemu: has none", optListMeta, []string{"qemu:", "qemu:dirty-bitmap:"}, false},
		{"set by name", optSetMeta, []string{baseAllocation}, true},
		{"56 set by wildcard", optSetMeta, []string{"base:"}, false},
		{"57 set nothing", optSetMeta, nil, false},
		{"58 set twice the same", optSetMeta, []string{baseAllocation, baseAllocation}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newRig(t, setup{}).connect()
			c.greet(3)
			c.final(optStructuredReply, nil)
			rs := c.option(test.opt, metaData("disk", test.queries...))
			if rs[len(rs)-1].typ != repAck || (len(rs) == 2) != test.found || len(rs) > 2 {
				t.Fatalf("replies %x", rs)
			}
			if test.found && string(rs[0].data[4:]) != baseAllocation {
				t.Fatalf("context %q", rs[0].data[4:])
			}
			if test.found && test.opt == optListMeta && be.Uint32(rs[0].data) != 0 {
				t.Fatalf("51: id %d in a list", be.Uint32(rs[0].data))
			}
		})
	}
}

// TestSelectedContextDecidesOverBlockStatus: what was set last for the export that is entered counts.
func TestSelectedContextDecidesOverBlockStatus_59_60_131(t *testing.T) {
	for _, test := range []struct {
		name  string
		then  func(c *client)
		errno uint32
	}{
		{"kept", func(*client) {}, 0},
		{"59 replaced by nothing", func(c *client) { c.final(optSetMeta, metaData("disk")) }, nbdEINVAL},
		{"59 a failing SET for an unknown export", func(c *client) { c.final(optSetMeta, metaData("none", baseAllocation)) }, nbdEINVAL},
		{"59 a malformed SET", func(c *client) { c.final(optSetMeta, []byte{1}) }, nbdEINVAL},
		{"59 a SET that is too long", func(c *client) { c.final(optSetMeta, make([]byte, maxOption+1)) }, nbdEINVAL},
		{"60 set for another export", func(c *client) { c.final(optSetMeta, metaData("other", baseAllocation)) }, nbdEINVAL},
		{"INFO between changes nothing", func(c *client) { c.final(optInfo, infoData("other")) }, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, setup{config: Config{ShareRW: true}})
			r.addExport("other", "")
			c := r.connect()
			c.greet(3)
			c.structured = true
			c.final(optStructuredReply, nil)
			c.final(optSetMeta, metaData("disk", baseAllocation))
			test.then(c)
			c.final(optGo, infoData("disk"))
			wantErrno(t, "BLOCK_STATUS", c.do(cmdBlockStatus, 0, 0, 4096), test.errno)
		})
	}
}

func TestContextSelectedByTheAliasOfTheOnlyExportCounts_20_60(t *testing.T) {
	c := newRig(t, setup{}).connect()
	c.greet(3)
	c.structured = true
	c.final(optStructuredReply, nil)
	c.final(optSetMeta, metaData("", baseAllocation))
	c.final(optGo, infoData("disk"))
	wantErrno(t, "BLOCK_STATUS", c.do(cmdBlockStatus, 0, 0, 4096), 0)
}

func TestExcessClientsAreToldAndPlacesComeBack(t *testing.T) {
	r := newRig(t, setup{options: Options{MaxClients: 2}})
	first := r.connect().attach(true)
	r.connect().attach(false)
	third := r.connect()
	third.greet(3)
	rs := third.option(optGo, infoData("disk"))
	if len(rs) != 1 || rs[0].typ != repErrPolicy || !strings.Contains(string(rs[0].data), "2 clients") {
		t.Fatalf("reply %x", rs)
	}
	old := r.connect()
	old.greet(3)
	old.send(optionBytes(optExportName, []byte("disk")))
	old.expectEnd()
	if st := r.s.Stats(); st.Clients != 2 || st.Refused != 2 {
		t.Fatalf("%+v", st)
	}
	first.send(requestBytes(cmdDisc, 0, 1, 0, 0))
	first.expectEnd()
	// The one that was refused may try again on its connection.
	if typ := third.final(optGo, infoData("disk")); typ != repAck {
		t.Fatalf("reply %#x after a client left", typ)
	}
}

func TestOldestHandshakeGivesWay_10(t *testing.T) {
	r := newRig(t, setup{options: Options{MaxHandshakes: 3}})
	var silent []*client
	for range 3 {
		c := r.connect()
		c.read(18)
		silent = append(silent, c)
	}
	good := r.connect()
	good.attach(true)
	silent[0].expectEnd()
	if r := good.do(cmdRead, 0, 0, 10); len(r.data) != 10 {
		t.Fatalf("%+v", r)
	}
}

func TestCutAtEveryByteOfTheHandshake_CVE_2017_7539(t *testing.T) {
	r := newRig(t, setup{})
	all := bytes.Join([][]byte{
		be.AppendUint32(nil, 3), optionBytes(optStructuredReply, nil), optionBytes(optSetMeta, metaData("disk", baseAllocation)),
		optionBytes(optList, nil), optionBytes(optGo, infoData("disk", infoBlockSize)),
	}, nil)
	for n := range len(all) + 1 {
		c := r.connect()
		c.send(all[:n])
		c.nc.Close()
	}
	r.waitServed(len(all) + 1)
	if st := r.s.Stats(); st.Clients != 0 || st.Handshakes != 0 {
		t.Fatalf("%+v", st)
	}
	r.connect().attach(true)
}

func TestNegotiationOverAPipe(t *testing.T) {
	r := newRig(t, setup{})
	a, b := net.Pipe()
	c := r.connectOver(a, b).attach(true)
	if res := c.do(cmdRead, 0, 4096, 8192); !bytes.Equal(res.data, pattern(4096, 8192)) {
		t.Fatalf("wrong data")
	}
	c.send(requestBytes(cmdDisc, 0, 0, 0, 0))
	c.expectEnd()
}
