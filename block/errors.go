package block

import (
	"errors"
	"fmt"
	"syscall"
)

// Errors of the request path. Each wraps the errno that stands for it, so that
// errors.Is(err, syscall.EPERM) holds as well.
var (
	// ErrRange is returned when a request reaches past the end of the node.
	ErrRange = newError("beyond the end of the node", syscall.EINVAL)
	// ErrNoSpace is returned when a write reaches past the end of a node that
	// its parent may not resize, or when the medium is full.
	ErrNoSpace = newError("no space left", syscall.ENOSPC)
	// ErrReadOnly is returned when a write reaches a node that was opened read-only.
	ErrReadOnly = newError("node is read-only", syscall.EPERM)
	// ErrPermission is returned when an edge does not hold the permission that the request needs.
	ErrPermission = newError("permission not held", syscall.EPERM)
	// ErrInactive is returned for requests to an inactive node.
	ErrInactive = newError("node is inactive", syscall.EPERM)
	// ErrNotSupported is returned when a driver cannot do what was asked, or (with
	// [NoFallback]) cannot do it fast. The seam falls back where it can.
	ErrNotSupported = newError("operation not supported", syscall.EOPNOTSUPP)
	// ErrCorrupt is returned when metadata of an image is invalid, and for each
	// request after fatal corruption was found.
	ErrCorrupt = newError("image is corrupt", syscall.EIO)
	// ErrInvalid is returned for malformed arguments: negative lengths, unknown flags.
	ErrInvalid = newError("invalid argument", syscall.EINVAL)
	// ErrBackingChanged is returned by [Activator.Activate] when the image names another
	// backing file than it did while the node was active last, or was opened.
	ErrBackingChanged = newError("the image has another backing file now", syscall.EBUSY)
	// ErrBusy is returned when something is in use and the call would pull it away.
	ErrBusy = newError("in use", syscall.EBUSY)
	// ErrClosed is returned for calls on a node, root or graph after its Close.
	ErrClosed = newError("closed", syscall.ESHUTDOWN)
)

type errnoError struct {
	text  string
	errno syscall.Errno
}

func newError(text string, errno syscall.Errno) error { return &errnoError{text, errno} }

func (e *errnoError) Error() string { return e.text }
func (e *errnoError) Unwrap() error { return e.errno }

// Errno tells the errno at the end of err's chain, and EIO for an error that has
// none. It is 0 for nil.
func Errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return syscall.EIO
}

// A NodeError says on which node, in which operation and where a request failed.
// The seam makes one at the lowest node that failed; parents pass it on.
type NodeError struct {
	Node   string // node name
	Op     string // "read", "write", "flush", "discard", "zero", "block status"
	Off    int64  // bytes
	Length int64  // bytes
	Err    error
}

func (e *NodeError) Error() string {
	return fmt.Sprintf("%s of %d bytes at offset %d on node '%s': %v", e.Op, e.Length, e.Off, e.Node, e.Err)
}

func (e *NodeError) Unwrap() error { return e.Err }

// A refusal is an error with a text of its own that wraps one of the errors above.
type refusal struct {
	text string
	err  error
}

func (r *refusal) Error() string { return r.text }
func (r *refusal) Unwrap() error { return r.err }

func refuse(err error, format string, args ...any) error {
	return &refusal{fmt.Sprintf(format, args...), err}
}
