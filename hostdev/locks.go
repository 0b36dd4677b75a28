package hostdev

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/nbdserve/nbdserve/block"
	"golang.org/x/sys/unix"
)

// Where the locks of QEMU lie in a file (rule G36): a byte for each permission
// that is held, and one for each that is not shared.
const (
	permBase    = 100
	unshareBase = 200
)

var permNames = [...]string{"consistent read", "write", "write unchanged", "resize"}

// locks are the open file description locks of one node.
//
// All are read locks, so that they never exclude each other: a user locks what it
// needs, and then tests whether a write lock would be refused on the bytes that
// say the opposite. Two that start together can therefore refuse each other,
// which is why one tries again.
type locks struct {
	fd       int   // shares the open file description of the node's data
	own      []int // all descriptors that do
	filename string
	mode     Locking
	log      *slog.Logger
	// What stands and what is locked. They differ only between CheckPerm and its end.
	standing, locked lockBits
}

type lockBits struct{ perm, unshared block.Perm }

func (a lockBits) or(b lockBits) lockBits {
	return lockBits{a.perm | b.perm, a.unshared | b.unshared}
}

func (a lockBits) minus(b lockBits) lockBits {
	return lockBits{a.perm &^ b.perm, a.unshared &^ b.unshared}
}

// each calls f for each byte to lock until f fails.
func (a lockBits) each(f func(at int64) error) error {
	for i := range permNames {
		if a.perm&(1<<i) != 0 {
			if err := f(permBase + int64(i)); err != nil {
				return err
			}
		}
	}
	for i := range permNames {
		if a.unshared&(1<<i) != 0 {
			if err := f(unshareBase + int64(i)); err != nil {
				return err
			}
		}
	}
	return nil
}

// A LockError says that another user of the image, by its locks, forbids what was asked.
type LockError struct {
	Filename string
	Lock     string // `"write" lock`, or `shared "write" lock` if it is our not sharing that is forbidden
	Holders  []Holder

	at int64 // byte of the lock
}

func (e *LockError) Error() string {
	s := fmt.Sprintf("Failed to get %s: Is another process using the image [%s]?", e.Lock, e.Filename)
	if len(e.Holders) == 0 {
		return s + " Who uses it cannot be seen from here: it may be on another host or in a container, or about to end."
	}
	var who []string
	for _, h := range e.Holders {
		who = append(who, h.String())
	}
	return s + " It is in use by " + strings.Join(who, ", ") + "."
}

func (e *LockError) Unwrap() error { return block.ErrBusy }

// newLocks takes no lock. It returns nil, having warned, where there are none and mode lets that pass.
func newLocks(fd int, filename string, mode Locking, log *slog.Logger) (*locks, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("a descriptor for the locks of '%s': %w", filename, err)
	}
	l := &locks{fd: dup, own: []int{fd, dup}, filename: filename, mode: mode, log: log}
	if _, err := l.conflict(permBase); err != nil {
		if err := l.missing(err); err != nil {
			return nil, errors.Join(err, l.close())
		}
	}
	return l, nil
}

// missing handles the answer of a file system that has no locks.
func (l *locks) missing(err error) error {
	if l.mode == LockingOn {
		return fmt.Errorf("'%s' cannot be locked, as locking=on demands: %w", l.filename, err)
	}
	if l.mode != LockingOff {
		l.log.Warn("image cannot be locked: other processes may use it at the same time", "file", l.filename, "error", err)
	}
	l.mode = LockingOff
	return nil
}

func (l *locks) close() error {
	if err := unix.Close(l.fd); err != nil {
		return fmt.Errorf("close of '%s': %w", l.filename, err)
	}
	return nil
}

const (
	lockTries   = 8
	lockLooks   = 8                     // for holders, after the last try
	lockBackoff = 25 * time.Millisecond // between two tries, at most
)

// check locks what want has beyond what stands, and asks whether others allow that.
func (l *locks) check(want lockBits) error {
	added := want.minus(l.standing)
	if l.mode == LockingOff || added == (lockBits{}) {
		return nil
	}
	for try := 1; ; try++ {
		err := l.take(added)
		if err == nil {
			return nil
		}
		l.restore()
		var held *LockError
		switch {
		case !errors.As(err, &held):
			return l.missing(err)
		case try >= lockTries:
			// It takes long, so it is done late and with nothing locked. If nobody has
			// it, whoever had it has just let go of it, or is being killed.
			held.Holders = findHolders(l.fd, l.own, held.at)
			if len(held.Holders) > 0 || try == lockTries+lockLooks-1 {
				return held
			}
		}
		// The other one may be trying too: whoever comes back first has it.
		time.Sleep(time.Millisecond + rand.N(lockBackoff))
	}
}

// take locks added and tests it against others. On error some of it may be locked.
func (l *locks) take(added lockBits) error {
	l.locked = l.standing.or(added)
	if err := added.each(func(at int64) error { return l.set(unix.F_RDLCK, at) }); err != nil {
		return err
	}
	for i, name := range permNames {
		if added.perm&(1<<i) != 0 {
			if err := l.test(unshareBase+int64(i), `"`+name+`" lock`); err != nil {
				return err
			}
		}
	}
	for i, name := range permNames {
		if added.unshared&(1<<i) != 0 {
			if err := l.test(permBase+int64(i), `shared "`+name+`" lock`); err != nil {
				return err
			}
		}
	}
	return nil
}

// set locks or unlocks one byte.
func (l *locks) set(kind int16, at int64) error {
	lk := unix.Flock_t{Type: kind, Whence: unix.SEEK_SET, Start: at, Len: 1}
	err := retry(func() error { return unix.FcntlFlock(uintptr(l.fd), unix.F_OFD_SETLK, &lk) })
	if err == unix.EAGAIN || err == unix.EACCES {
		return &LockError{Filename: l.filename, at: at, Lock: fmt.Sprintf("a lock on byte %d", at)}
	}
	return err
}

// conflict tells whether somebody else has a lock on a byte.
func (l *locks) conflict(at int64) (bool, error) {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: at, Len: 1}
	err := retry(func() error { return unix.FcntlFlock(uintptr(l.fd), unix.F_OFD_GETLK, &lk) })
	return err == nil && lk.Type != unix.F_UNLCK, err
}

func (l *locks) test(at int64, lock string) error {
	held, err := l.conflict(at)
	if err != nil {
		return err
	}
	if held {
		return &LockError{Filename: l.filename, at: at, Lock: lock}
	}
	return nil
}

// restore unlocks what is locked and does not stand. Unlocking a byte does not fail.
func (l *locks) restore() {
	_ = l.locked.minus(l.standing).each(func(at int64) error { _ = l.set(unix.F_UNLCK, at); return nil })
	l.locked = l.standing
}

// makeLocks gets ready to take locks, where cfg asks for them. lockMu is not held.
func (n *node) makeLocks(cfg *block.Config) error {
	if n.opts.Locking == LockingOff || cfg.NoIO || cfg.ForceShare {
		return nil
	}
	l, err := newLocks(n.fd, n.filename, n.opts.Locking, n.self.Graph().Log())
	n.lockMu.Lock()
	defer n.lockMu.Unlock()
	n.locks = l
	return err
}

// dropLocks gives all locks up.
func (n *node) dropLocks() error {
	n.lockMu.Lock()
	defer n.lockMu.Unlock()
	if n.locks == nil {
		return nil
	}
	err := n.locks.close()
	n.locks = nil
	return err
}

// CheckPerm implements [block.Permitter].
func (n *node) CheckPerm(perm, shared block.Perm) error {
	n.lockMu.Lock()
	defer n.lockMu.Unlock()
	if n.locks == nil {
		return nil
	}
	return n.locks.check(lockBits{perm, block.PermAll &^ shared})
}

// SetPerm implements [block.Permitter].
func (n *node) SetPerm(perm, shared block.Perm) {
	n.lockMu.Lock()
	defer n.lockMu.Unlock()
	if l := n.locks; l != nil {
		l.standing = lockBits{perm, block.PermAll &^ shared}
		l.restore()
	}
}

// AbortPerm implements [block.Permitter].
func (n *node) AbortPerm() {
	n.lockMu.Lock()
	defer n.lockMu.Unlock()
	if n.locks != nil {
		n.locks.restore()
	}
}
