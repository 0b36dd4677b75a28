// Command nbdload keeps requests of one connection in flight and counts the answers.
// It costs far less of a processor than fio's nbd engine, which is busy before a quick
// server is: it takes all answers that have arrived with one call, and sends all
// requests that may follow with another.
//
//	nbdload [-depth 16] [-bs 4096] [-write] [-secs 1] unix:PATH|tcp:HOST:PORT
//
// It prints requests a second.
package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"time"
)

var be = binary.BigEndian

func main() {
	depth := flag.Int("depth", 16, "requests in flight")
	bs := flag.Int("bs", 4096, "bytes of a request")
	write := flag.Bool("write", false, "write instead of reading")
	secs := flag.Float64("secs", 1, "seconds")
	flag.Parse()
	rate, err := load(flag.Arg(0), *depth, *bs, *write, time.Duration(*secs*float64(time.Second)))
	if err != nil {
		fmt.Fprintln(os.Stderr, "nbdload:", err)
		os.Exit(1)
	}
	fmt.Printf("%.0f\n", rate)
}

func load(address string, depth, bs int, write bool, d time.Duration) (rate float64, err error) {
	network, where, ok := strings.Cut(address, ":")
	if !ok {
		return 0, fmt.Errorf("'%s' is not unix:PATH or tcp:HOST:PORT", address)
	}
	nc, err := net.Dial(network, where)
	if err != nil {
		return 0, err
	}
	defer nc.Close()
	r := bufio.NewReaderSize(nc, 1<<20)
	size, err := negotiate(nc, r)
	if err != nil {
		return 0, fmt.Errorf("negotiation: %w", err)
	}
	blocks := size / int64(bs)
	if blocks == 0 {
		return 0, fmt.Errorf("the export has %d bytes, less than one request", size)
	}
	var out []byte
	payload := make([]byte, bs)
	for i := range payload {
		payload[i] = byte(rand.Uint32())
	}
	ask := func() {
		command := uint32(0)
		if write {
			command = 1
		}
		out = be.AppendUint32(out, 0x25609513)
		out = be.AppendUint32(out, command)
		out = be.AppendUint64(out, 7)
		out = be.AppendUint64(out, uint64(rand.Int64N(blocks)*int64(bs)))
		out = be.AppendUint32(out, uint32(bs))
		if write {
			out = append(out, payload...)
		}
	}
	for range depth {
		ask()
	}
	answered := 0
	for began := time.Now(); ; {
		if _, err := nc.Write(out); err != nil {
			return 0, err
		}
		out = out[:0]
		for first := true; first || r.Buffered() >= 16; first = false {
			if err := answer(r); err != nil {
				return 0, err
			}
			answered++
			ask()
		}
		if took := time.Since(began); took >= d {
			return float64(answered) / took.Seconds(), nil
		}
	}
}

// negotiate asks for structured replies and the default export, and returns its size.
func negotiate(w io.Writer, r *bufio.Reader) (size int64, err error) {
	greeting := make([]byte, 18)
	if _, err := io.ReadFull(r, greeting); err != nil {
		return 0, err
	}
	option := func(out []byte, code uint32, data ...byte) []byte {
		out = append(out, "IHAVEOPT"...)
		out = be.AppendUint32(be.AppendUint32(out, code), uint32(len(data)))
		return append(out, data...)
	}
	out := be.AppendUint32(nil, 3)
	out = option(out, 8)
	out = option(out, 7, 0, 0, 0, 0, 0, 0) // NBD_OPT_GO, name ""
	if _, err := w.Write(out); err != nil {
		return 0, err
	}
	for acks := 0; acks < 2; {
		head := make([]byte, 20)
		if _, err := io.ReadFull(r, head); err != nil {
			return 0, err
		}
		data := make([]byte, be.Uint32(head[16:]))
		if _, err := io.ReadFull(r, data); err != nil {
			return 0, err
		}
		switch kind := be.Uint32(head[12:]); {
		case kind == 1:
			acks++
		case kind>>31 != 0:
			return 0, fmt.Errorf("option %d was refused: %#x %s", be.Uint32(head[8:]), kind, data)
		case len(data) == 12 && be.Uint16(data) == 0:
			size = int64(be.Uint64(data[2:]))
		}
	}
	return size, nil
}

// answer takes one whole answer.
func answer(r *bufio.Reader) error {
	for {
		head, err := r.Peek(16)
		if err != nil {
			return err
		}
		switch magic := be.Uint32(head); magic {
		case 0x67446698:
			if errno := be.Uint32(head[4:]); errno != 0 {
				return fmt.Errorf("error %d", errno)
			}
			_, err := r.Discard(16)
			return err
		case 0x668e33ef:
			head, err := r.Peek(20)
			if err != nil {
				return err
			}
			flags, kind, length := be.Uint16(head[4:]), be.Uint16(head[6:]), be.Uint32(head[16:])
			if kind>>15 != 0 {
				return errors.New("an error chunk came")
			}
			if _, err := r.Discard(20 + int(length)); err != nil {
				return err
			}
			if flags&1 != 0 {
				return nil
			}
		default:
			return fmt.Errorf("reply magic is %#x", magic)
		}
	}
}
