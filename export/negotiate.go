package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"
)

const (
	// maxOption is the longest option that is looked at, in bytes. Longer ones are
	// skipped and refused.
	maxOption = 64 << 10
	// maxSkip bounds what is skipped of a connection, in bytes. No honest client gets there.
	maxSkip = 4 << 20
)

// A negotiation is the state of a connection before transmission. It follows the
// fixed newstyle of the protocol, and honours the options of clients that did not
// say they know it.
type negotiation struct {
	c        *conn
	deadline time.Time
	noZeroes bool
	options  int // still allowed
	skip     int // bytes of too long options still allowed
	out      []byte

	structured bool
	// meta is the export whose base:allocation was selected, or nil.
	meta *Export
	// held is the export that was selected last, which the connection has a lease of; or nil.
	held *Export
}

// errDone ends a negotiation in which nothing went wrong.
var errDone = errors.New("negotiation ended by the client")

// negotiate runs the handshake. It returns the export that the client has entered,
// or nil when the connection is to be closed.
func (c *conn) negotiate() *Export {
	n := &negotiation{c: c, options: c.s.opt.MaxOptions + 4*len(c.s.Exports()), skip: maxSkip}
	if err := n.until(time.Now().Add(c.s.opt.HandshakeTimeout)); err != nil {
		return nil
	}
	e, err := n.run()
	if e == nil {
		n.letGo()
	}
	if err != nil {
		c.reportNegotiation(err)
		return nil
	}
	return e
}

// until sets the deadline.
func (n *negotiation) until(t time.Time) error {
	n.deadline = t
	if err := n.c.nc.SetDeadline(t); err != nil {
		return err
	}
	if n.c.t.aborted() {
		n.c.t.abort() // the deadline has undone it
	}
	if n.c.s.isStopping() {
		n.c.stop()
	}
	return nil
}

// onBehalf runs f, which works for the client and may take long: that is not the
// client's time.
func (n *negotiation) onBehalf(f func(ctx context.Context) error) error {
	n.c.awaiting.Store(true)
	began := time.Now()
	err := f(n.c.here)
	n.c.awaiting.Store(false)
	n.until(n.deadline.Add(time.Since(began))) // if that fails, so will the answer
	return err
}

// hold activates e for the connection, which selects it. The export that it selected before is let go.
func (n *negotiation) hold(e *Export) *refusal {
	if n.held == e {
		return nil
	}
	if err := n.onBehalf(e.lease); err != nil {
		return notActive(e, err)
	}
	n.letGo()
	n.held = e
	return nil
}

// letGo gives the lease back.
func (n *negotiation) letGo() {
	if n.held != nil {
		n.held.release()
		n.held = nil
	}
}

// notActive refuses an export that cannot be activated, or looked at. The code is
// the same for all causes, the text tells them. A policy forbids what is asked now:
// the export is there (so no ERR_UNKNOWN), and the option is supported (so neither
// ERR_UNSUP nor ERR_PLATFORM, upon which clients try another way).
func notActive(e *Export, err error) *refusal {
	if errors.Is(err, ErrStopped) {
		return &refusal{repErrShutdown, ErrStopped.Error()}
	}
	return &refusal{repErrPolicy, fmt.Sprintf("export %q cannot be used now: %v", clip(e.name, 80), err)}
}

// reportNegotiation logs why a negotiation failed. A peer that goes away is no news.
func (c *conn) reportNegotiation(err error) {
	if errors.Is(err, errDone) || goneAway(err) {
		return
	}
	c.s.failed.Add(1)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("not finished in %v: %w", c.s.opt.HandshakeTimeout, err)
	}
	c.log.Info("negotiation failed", "err", err)
}

func (n *negotiation) run() (*Export, error) {
	if err := n.greet(); err != nil {
		return nil, err
	}
	for ; n.options > 0; n.options-- {
		e, err := n.option()
		if e != nil || err != nil {
			return e, err
		}
	}
	return nil, errors.New("too many options")
}

func (n *negotiation) greet() error {
	b := be.AppendUint64(nil, magicServer)
	b = be.AppendUint64(b, magicOption)
	b = be.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	if _, err := n.c.nc.Write(b); err != nil {
		return err
	}
	var flags [4]byte
	if _, err := io.ReadFull(n.c.nc, flags[:]); err != nil {
		return err
	}
	f := be.Uint32(flags[:])
	if f&^uint32(flagFixedNewstyle|flagNoZeroes) != 0 {
		return fmt.Errorf("unknown client flags %#x", f)
	}
	n.noZeroes = f&uint32(flagNoZeroes) != 0
	return nil
}

// option reads one option in full and answers it. It returns the export when the
// client has entered transmission.
func (n *negotiation) option() (*Export, error) {
	var head [16]byte
	if _, err := io.ReadFull(n.c.nc, head[:]); err != nil {
		return nil, err
	}
	if magic := be.Uint64(head[:]); magic != magicOption {
		return nil, fmt.Errorf("option magic is %#x", magic)
	}
	opt, length := be.Uint32(head[8:]), be.Uint32(head[12:])
	if length > maxOption {
		if opt == optExportName || int64(length) > int64(n.skip) {
			return nil, fmt.Errorf("option %d has %d bytes", opt, length)
		}
		n.skip -= int(length)
		if _, err := io.CopyN(io.Discard, n.c.nc, int64(length)); err != nil {
			return nil, err
		}
		if opt == optSetMeta {
			n.unselect()
		}
		n.fail(opt, repErrTooBig, fmt.Sprintf("option %d has %d bytes; at most %d are read", opt, length, maxOption))
		return nil, n.send()
	}
	data := make([]byte, length)
	if _, err := io.ReadFull(n.c.nc, data); err != nil {
		return nil, err
	}
	return n.answer(opt, data)
}

func (n *negotiation) answer(opt uint32, data []byte) (*Export, error) {
	if n.c.s.isStopping() && opt != optAbort {
		if opt == optExportName {
			return nil, ErrStopped
		}
		n.fail(opt, repErrShutdown, ErrStopped.Error())
		return nil, n.send()
	}
	switch opt {
	case optExportName:
		return n.exportName(data)
	case optAbort:
		n.reply(opt, repAck, nil)
		if err := n.send(); err != nil {
			return nil, errDone // the client need not wait for the answer
		}
		return nil, errDone
	case optInfo, optGo:
		return n.infoOrGo(opt, data)
	case optList:
		n.list(data)
	case optStartTLS:
		n.fail(opt, repErrPolicy, "TLS not configured")
	case optStructuredReply:
		if len(data) > 0 {
			n.fail(opt, repErrInvalid, "the option takes no data")
			break
		}
		n.structured = true
		n.reply(opt, repAck, nil)
	case optListMeta, optSetMeta:
		n.metaContext(opt, data)
	default:
		n.fail(opt, repErrUnsup, fmt.Sprintf("unsupported option %d", opt))
	}
	return nil, n.send()
}

// reply appends one reply to what send sends.
func (n *negotiation) reply(opt, typ uint32, data []byte) {
	n.out = be.AppendUint64(n.out, magicOptionReply)
	n.out = be.AppendUint32(n.out, opt)
	n.out = be.AppendUint32(n.out, typ)
	n.out = be.AppendUint32(n.out, uint32(len(data)))
	n.out = append(n.out, data...)
}

func (n *negotiation) fail(opt, typ uint32, text string) {
	n.reply(opt, typ, []byte(clipMiddle(text, maxErrorText)))
}

func (n *negotiation) send() error {
	_, err := n.c.nc.Write(n.out)
	n.out = n.out[:0]
	return err
}

func (n *negotiation) list(data []byte) {
	if len(data) > 0 {
		n.fail(optList, repErrInvalid, "the option takes no data")
		return
	}
	for _, e := range n.c.s.Exports() {
		d := be.AppendUint32(nil, uint32(len(e.name)))
		d = append(d, e.name...)
		n.reply(optList, repServer, append(d, e.description...))
	}
	n.reply(optList, repAck, nil)
}

// exportName ends in transmission or closes the connection: the option has no error reply.
func (n *negotiation) exportName(data []byte) (*Export, error) {
	if err := checkString("export name", string(data)); err != nil {
		return nil, err
	}
	e := n.c.s.export(string(data))
	if e == nil {
		return nil, errors.New(unknownExport(string(data)))
	}
	if r := n.enter(e, false); r != nil {
		return nil, errors.New(r.text)
	}
	b := be.AppendUint64(nil, uint64(n.c.size))
	b = be.AppendUint16(b, e.flags(n.structured))
	if !n.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	n.out = b
	return n.begin(e)
}

func unknownExport(name string) string {
	return fmt.Sprintf("export %q is not present", clip(name, 80))
}

// infoOrGo answers NBD_OPT_INFO and NBD_OPT_GO.
func (n *negotiation) infoOrGo(opt uint32, data []byte) (*Export, error) {
	name, wanted, err := parseInfo(data)
	if err == nil {
		err = checkString("export name", name)
	}
	if err != nil {
		n.fail(opt, repErrInvalid, err.Error())
		return nil, n.send()
	}
	e := n.c.s.export(name)
	if e == nil {
		n.fail(opt, repErrUnknown, unknownExport(name))
		return nil, n.send()
	}
	var size int64
	var r *refusal
	if opt == optGo {
		// Nothing is said before the client has its place.
		r = n.enter(e, slices.Contains(wanted, infoBlockSize))
		size = n.c.size
	} else {
		size, r = n.ask(e)
	}
	if r != nil {
		n.fail(opt, r.reply, r.text)
		return nil, n.send()
	}
	d := be.AppendUint16(nil, infoExport)
	d = be.AppendUint64(d, uint64(size))
	n.reply(opt, repInfo, be.AppendUint16(d, e.flags(n.structured)))
	if slices.Contains(wanted, infoName) {
		n.reply(opt, repInfo, append(be.AppendUint16(nil, infoName), e.name...))
	}
	if slices.Contains(wanted, infoDescription) && e.description != "" {
		n.reply(opt, repInfo, append(be.AppendUint16(nil, infoDescription), e.description...))
	}
	if slices.Contains(wanted, infoBlockSize) {
		least, preferred, most := e.blockSizes()
		d := be.AppendUint16(nil, infoBlockSize)
		d = be.AppendUint32(d, least)
		d = be.AppendUint32(d, preferred)
		n.reply(opt, repInfo, be.AppendUint32(d, most))
	}
	n.reply(opt, repAck, nil)
	if opt == optGo {
		return n.begin(e)
	}
	return nil, n.send()
}

// enter makes the connection a client of e.
func (n *negotiation) enter(e *Export, toldSizes bool) *refusal {
	r := n.c.s.full() // nothing is activated for a client that has no place
	if r == nil {
		r = n.hold(e)
	}
	if r == nil {
		r = n.c.s.admit(n.c, e)
	}
	if r != nil {
		return n.refused(e, r)
	}
	n.held = nil // transmission has the lease now
	n.c.begin(e, n.structured, n.structured && n.meta == e, toldSizes)
	return nil
}

// refused tells the log of a refusal.
func (n *negotiation) refused(e *Export, r *refusal) *refusal {
	n.c.log.Warn("client refused", "export", e.name, "why", r.text)
	return r
}

// ask is what NBD_OPT_INFO needs to know of e.
func (n *negotiation) ask(e *Export) (size int64, r *refusal) {
	err := n.onBehalf(func(ctx context.Context) (err error) {
		size, err = e.size(ctx)
		return err
	})
	if err != nil {
		return 0, notActive(e, err)
	}
	return size, nil
}

// unselect makes the connection have no export selected.
func (n *negotiation) unselect() {
	n.meta = nil
	n.letGo()
}

// begin sends the last answer. If that fails, transmission finds out.
func (n *negotiation) begin(e *Export) (*Export, error) {
	if err := n.send(); err != nil {
		n.c.cut()
	}
	return e, nil
}

// parseInfo takes the data of NBD_OPT_INFO and NBD_OPT_GO apart.
func parseInfo(data []byte) (name string, wanted []uint16, err error) {
	if len(data) < 6 || uint64(be.Uint32(data)) > uint64(len(data)-6) {
		return "", nil, errors.New("the length of the export name does not fit the option")
	}
	end := 4 + int(be.Uint32(data))
	name, data = string(data[4:end]), data[end:]
	if count := int(be.Uint16(data)); len(data) != 2+2*count {
		return "", nil, fmt.Errorf("%d information requests do not fit the option", count)
	}
	for data = data[2:]; len(data) > 0; data = data[2:] {
		wanted = append(wanted, be.Uint16(data))
	}
	return name, wanted, nil
}

// metaTarget is what a metadata context option is about.
func (n *negotiation) metaTarget(set bool, data []byte) (e *Export, queries []string, r *refusal) {
	if set && !n.structured {
		return nil, nil, &refusal{repErrInvalid, "metadata contexts need structured replies; negotiate these first"}
	}
	name, queries, err := parseMeta(data)
	if err == nil {
		err = checkString("export name", name)
	}
	if err != nil {
		return nil, nil, &refusal{repErrInvalid, err.Error()}
	}
	if e = n.c.s.export(name); e == nil {
		return nil, nil, &refusal{repErrUnknown, unknownExport(name)}
	}
	return e, queries, nil
}

// metaContext answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
func (n *negotiation) metaContext(opt uint32, data []byte) {
	set := opt == optSetMeta
	e, queries, r := n.metaTarget(set, data)
	if set {
		n.meta = nil // also when this fails
		if r == nil {
			if r = n.hold(e); r != nil {
				n.refused(e, r)
			}
		}
		if r != nil {
			n.letGo()
		}
	}
	if r != nil {
		n.fail(opt, r.reply, r.text)
		return
	}
	// Other namespaces and names are ignored, as the specification wants.
	match := slices.Contains(queries, baseAllocation)
	id := uint32(contextID)
	if !set {
		match = match || len(queries) == 0 || slices.Contains(queries, "base:")
		id = 0
	}
	if match {
		n.reply(opt, repMetaContext, append(be.AppendUint32(nil, id), baseAllocation...))
		if set {
			n.meta = e
		}
	}
	n.reply(opt, repAck, nil)
}

// parseMeta takes the data of the metadata context options apart.
func parseMeta(data []byte) (name string, queries []string, err error) {
	name, data, ok := cutString(data)
	if !ok || len(data) < 4 {
		return "", nil, errors.New("the length of the export name does not fit the option")
	}
	count := be.Uint32(data)
	data = data[4:]
	if uint64(count) > uint64(len(data)/4) {
		return "", nil, fmt.Errorf("%d queries do not fit the option", count)
	}
	for range count {
		var q string
		if q, data, ok = cutString(data); !ok {
			return "", nil, errors.New("the length of a query does not fit the option")
		}
		queries = append(queries, q)
	}
	if len(data) > 0 {
		return "", nil, fmt.Errorf("%d bytes behind the last query", len(data))
	}
	return name, queries, nil
}

// cutString takes a string with its length in front off data.
func cutString(data []byte) (s string, rest []byte, ok bool) {
	if len(data) < 4 || uint64(be.Uint32(data)) > uint64(len(data)-4) {
		return "", nil, false
	}
	end := 4 + int(be.Uint32(data))
	return string(data[4:end]), data[end:], true
}
