package channel

import (
	"io"
	"os"
	"syscall"
	"time"

	"berth.dev/guest/internal/wire"
)

const (
	// busyTime is how long a port may be held by the agent before us, which is just ending.
	busyTime = 10 * time.Second
	busyLook = 20 * time.Millisecond
)

// Port is an open virtio-serial port of the guest, in the runtime's poller.
type Port struct {
	*wire.Socket
	host bool // one was there at the last Read
}

// OpenPort opens a port's character device. Only one process can have it: while another does, OpenPort waits a little.
func OpenPort(path string) (io.ReadWriteCloser, error) {
	for deadline := time.Now().Add(busyTime); ; time.Sleep(busyLook) {
		fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_NONBLOCK|syscall.O_CLOEXEC|syscall.O_NOCTTY, 0)
		switch {
		case err == nil:
			socket, err := wire.NewSocket(fd)
			if err != nil {
				return nil, err
			}
			return &Port{Socket: socket}, nil
		case err != syscall.EBUSY && err != syscall.EINTR || time.Now().After(deadline):
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

// Read waits for a host and its bytes. ErrHungUp says, once, that the host has left: the device reads as empty then,
// and must not be asked again until the poller sees it change. Not for two at a time.
func (p *Port) Read(data []byte) (count int, err error) {
	var failed error
	err = p.Raw().Read(func(fd uintptr) bool {
		for {
			count, failed = syscall.Read(int(fd), data)
			if failed != syscall.EINTR {
				break
			}
		}
		return failed != syscall.EAGAIN && (failed != nil || count > 0 || p.host)
	})
	switch {
	case err != nil:
		return 0, err
	case failed == nil && count == 0, failed == syscall.EIO && p.host:
		p.host = false
		return 0, ErrHungUp
	case failed != nil:
		return 0, failed
	}
	p.host = true
	return count, nil
}
