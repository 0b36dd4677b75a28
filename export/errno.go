package export

import (
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/nbdserve/nbdserve/block"
)

// Error values of the protocol.
const (
	nbdEPERM     = uint32(1)
	nbdEIO       = uint32(5)
	nbdEINVAL    = uint32(22)
	nbdENOSPC    = uint32(28)
	nbdEOVERFLOW = uint32(75)
	nbdENOTSUP   = uint32(95)
	nbdESHUTDOWN = uint32(108)
)

// errnos says which error value an errno of the graph becomes; what is not listed
// is EIO. ENOMEM and EOVERFLOW are not listed on purpose: the specification wants
// the first never and the second only for requests that are too large.
var errnos = map[syscall.Errno]uint32{
	syscall.EPERM:     nbdEPERM,
	syscall.EACCES:    nbdEPERM,
	syscall.EROFS:     nbdEPERM,
	syscall.EINVAL:    nbdEINVAL,
	syscall.ENOSPC:    nbdENOSPC,
	syscall.EDQUOT:    nbdENOSPC,
	syscall.EFBIG:     nbdENOSPC,
	syscall.ESHUTDOWN: nbdESHUTDOWN,
}

// errnoOf gives the error value for the failure of a request with these flags.
// ENOTSUP is for zero requests only that had to be fast.
func errnoOf(err error, flags uint16) uint32 {
	errno := block.Errno(err)
	if errno == syscall.EOPNOTSUPP && flags&flagFastZero != 0 {
		return nbdENOTSUP
	}
	if v, ok := errnos[errno]; ok {
		return v
	}
	return nbdEIO
}

// maxErrorText keeps error texts short enough for a log line of a client, bytes.
const maxErrorText = 512

// clip makes s fit for display: valid UTF-8, no NUL, at most max bytes.
func clip(s string, max int) string {
	s = strings.ReplaceAll(strings.ToValidUTF8(s, "?"), "\x00", "?")
	if len(s) <= max {
		return s
	}
	s = s[:max-3]
	for !utf8.ValidString(s) {
		s = s[:len(s)-1]
	}
	return s + "..."
}

// clipMiddle is clip for texts whose end counts too, such as who holds a lock on a
// file with a long name.
func clipMiddle(s string, max int) string {
	s = clip(s, len(s))
	if len(s) <= max {
		return s
	}
	tail := s[len(s)-max/2:]
	for !utf8.ValidString(tail) {
		tail = tail[1:]
	}
	return clip(s, max-len(tail)) + tail
}
