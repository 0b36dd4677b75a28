package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// watchParent returns a channel that is closed when the parent process ends.
//
// PR_SET_PDEATHSIG would speak when the thread that started us ends, which in a
// parent with threads may be long before the process does; a pidfd tells of the process.
func watchParent() (<-chan struct{}, error) {
	parent := os.Getppid()
	fd, err := unix.PidfdOpen(parent, 0)
	if err == nil && os.Getppid() != parent {
		err = errors.Join(unix.ESRCH, unix.Close(fd))
	}
	gone := make(chan struct{})
	switch {
	case errors.Is(err, unix.ESRCH): // before we could look
		close(gone)
		return gone, nil
	case err != nil:
		return nil, fmt.Errorf("--exit-with-parent: cannot watch parent process %d (Linux 5.3 or later is needed): %w", parent, err)
	}
	go func() { // ends with the process, as the parent may outlive us
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			if n, err := unix.Poll(fds, -1); n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
				break
			}
		}
		close(gone)
	}()
	return gone, nil
}
