package export

import (
	"encoding/binary"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// Numbers of the NBD protocol, as doc/proto.md names them. Those that go-nbd has come from there.

const (
	magicServer          = protocol.NEGOTIATION_MAGIC_OLDSTYLE // "NBDMAGIC"
	magicOption          = protocol.NEGOTIATION_MAGIC_OPTION   // "IHAVEOPT"
	magicOptionReply     = protocol.NEGOTIATION_MAGIC_REPLY
	magicRequest         = protocol.TRANSMISSION_MAGIC_REQUEST
	magicSimpleReply     = protocol.TRANSMISSION_MAGIC_REPLY
	magicStructuredReply = uint32(0x668e33ef)
)

// Handshake flags, of the server and of the client alike.
const (
	flagFixedNewstyle = protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE
	flagNoZeroes      = uint16(1 << 1)
)

// Transmission flags.
const (
	flagHasFlags        = protocol.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS
	flagReadOnly        = uint16(1 << 1)
	flagSendFlush       = uint16(1 << 2)
	flagSendFUA         = uint16(1 << 3)
	flagRotational      = uint16(1 << 4)
	flagSendTrim        = uint16(1 << 5)
	flagSendWriteZeroes = uint16(1 << 6)
	flagSendDF          = uint16(1 << 7)
	flagCanMultiConn    = protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN
	flagSendCache       = uint16(1 << 10)
	flagSendFastZero    = uint16(1 << 11)
)

const (
	optExportName      = uint32(1)
	optAbort           = protocol.NEGOTIATION_ID_OPTION_ABORT
	optList            = protocol.NEGOTIATION_ID_OPTION_LIST
	optStartTLS        = uint32(5)
	optInfo            = protocol.NEGOTIATION_ID_OPTION_INFO
	optGo              = protocol.NEGOTIATION_ID_OPTION_GO
	optStructuredReply = uint32(8)
	optListMeta        = uint32(9)
	optSetMeta         = uint32(10)
)

const (
	repAck         = protocol.NEGOTIATION_TYPE_REPLY_ACK
	repServer      = protocol.NEGOTIATION_TYPE_REPLY_SERVER
	repInfo        = protocol.NEGOTIATION_TYPE_REPLY_INFO
	repMetaContext = uint32(4)
	repErrUnsup    = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED
	repErrPolicy   = uint32(1<<31 | 2)
	repErrInvalid  = uint32(1<<31 | 3)
	repErrUnknown  = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN
	repErrShutdown = uint32(1<<31 | 7)
	repErrTooBig   = uint32(1<<31 | 9)
)

const (
	infoExport      = protocol.NEGOTIATION_TYPE_INFO_EXPORT
	infoName        = protocol.NEGOTIATION_TYPE_INFO_NAME
	infoDescription = protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION
	infoBlockSize   = protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE
)

const (
	cmdRead        = protocol.TRANSMISSION_TYPE_REQUEST_READ
	cmdWrite       = protocol.TRANSMISSION_TYPE_REQUEST_WRITE
	cmdDisc        = protocol.TRANSMISSION_TYPE_REQUEST_DISC
	cmdFlush       = uint16(3)
	cmdTrim        = uint16(4)
	cmdCache       = uint16(5)
	cmdWriteZeroes = uint16(6)
	cmdBlockStatus = uint16(7)
)

// Command flags.
const (
	flagFUA      = uint16(1 << 0)
	flagNoHole   = uint16(1 << 1)
	flagDF       = uint16(1 << 2)
	flagReqOne   = uint16(1 << 3)
	flagFastZero = uint16(1 << 4)
)

// Structured replies.
const (
	chunkDone        = uint16(1 << 0)
	chunkNone        = uint16(0)
	chunkOffsetData  = uint16(1)
	chunkOffsetHole  = uint16(2)
	chunkBlockStatus = uint16(5)
	chunkError       = uint16(1<<15 | 1)
	chunkErrorOffset = uint16(1<<15 | 2)
)

// States of base:allocation.
const (
	stateHole = uint32(1 << 0)
	stateZero = uint32(1 << 1)
)

const (
	requestSize    = 28 // bytes of a request without its payload
	simpleSize     = 16 // bytes of a simple reply without its payload
	chunkSize      = 20 // bytes of a structured reply chunk without its payload
	dataChunkSize  = chunkSize + 8
	holeChunkSize  = chunkSize + 12
	maxString      = 4096      // bytes of a name, description, query or error text
	maxPayload     = 32 << 20  // bytes of a READ or WRITE; the largest that every client may use
	maxExtents     = 128 << 10 // extents in one answer to BLOCK_STATUS
	contextID      = 1         // of base:allocation
	baseAllocation = "base:allocation"
)

var be = binary.BigEndian

func appendSimple(b []byte, cookie uint64, errno uint32) []byte {
	b = be.AppendUint32(b, magicSimpleReply)
	b = be.AppendUint32(b, errno)
	return be.AppendUint64(b, cookie)
}

func appendChunk(b []byte, flags, typ uint16, cookie uint64, length uint32) []byte {
	b = be.AppendUint32(b, magicStructuredReply)
	b = be.AppendUint16(b, flags)
	b = be.AppendUint16(b, typ)
	b = be.AppendUint64(b, cookie)
	return be.AppendUint32(b, length)
}

// appendData appends the head of a chunk that n bytes of data of offset off follow.
func appendData(b []byte, flags uint16, cookie uint64, off int64, n int) []byte {
	b = appendChunk(b, flags, chunkOffsetData, cookie, uint32(8+n))
	return be.AppendUint64(b, uint64(off))
}

func appendHole(b []byte, flags uint16, cookie uint64, off int64, n int) []byte {
	b = appendChunk(b, flags, chunkOffsetHole, cookie, 12)
	b = be.AppendUint64(b, uint64(off))
	return be.AppendUint32(b, uint32(n))
}

func appendError(b []byte, flags uint16, cookie uint64, errno uint32, text string) []byte {
	b = appendChunk(b, flags, chunkError, cookie, uint32(6+len(text)))
	b = be.AppendUint32(b, errno)
	b = be.AppendUint16(b, uint16(len(text)))
	return append(b, text...)
}

func appendErrorOffset(b []byte, flags uint16, cookie uint64, errno uint32, text string, off int64) []byte {
	b = appendChunk(b, flags, chunkErrorOffset, cookie, uint32(14+len(text)))
	b = be.AppendUint32(b, errno)
	b = be.AppendUint16(b, uint16(len(text)))
	b = append(b, text...)
	return be.AppendUint64(b, uint64(off))
}
