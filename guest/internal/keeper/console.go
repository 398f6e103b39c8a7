package keeper

import (
	"errors"
	"io"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"berth.dev/guest/internal/wire"
)

const (
	consoleBuffer = 4096
	// tiocgptpeer opens a pty's other side from its master, whatever mount namespace it lives in.
	// Source: ioctl_tty(2), Linux 4.13; the same number on amd64 and arm64.
	tiocgptpeer = 0x5441
	// hungUpLook is how often a console that nobody holds open is looked at. It happens at a machine's end, and while
	// its agent is gone.
	hungUpLook = 500 * time.Millisecond
)

// console carries one pty's output to the log.
//
// A pty whose other side nobody has open reads as EIO, and an init like systemd opens its console only while it
// writes. So we hold the other side ourselves as long as the agent tells us that the machine lives; when it is gone
// we let go, and EIO then means that there is nothing left to wait for.
type console struct {
	log *consoleLog
	// changed tells the keeper that hungUp or lost has; it holds one.
	changed chan struct{}
	// lost says that there is no pty any more; it holds one.
	lost chan struct{}

	mu     sync.Mutex
	master *os.File
	peer   *os.File
	hold   bool
	hungUp bool
	nudge  chan struct{}
}

func newConsole(log *consoleLog, changed chan struct{}) *console {
	return &console{log: log, changed: changed, lost: make(chan struct{}, 1), hold: true, nudge: make(chan struct{}, 1)}
}

// attach takes a pty's master over and reads it, in place of the one before.
func (c *console) attach(master *os.File) {
	c.mu.Lock()
	c.dropLocked()
	c.master, c.hungUp = master, false
	c.holdLocked()
	c.mu.Unlock()
	go c.pump(master)
}

// keepOpen says whether the machine is known to live.
func (c *console) keepOpen(hold bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hold = hold
	c.holdLocked()
	wake(c.nudge)
}

func (c *console) holdLocked() {
	switch {
	case c.peer != nil && !c.hold:
		c.peer.Close()
		c.peer = nil
	case c.peer == nil && c.hold && c.master != nil:
		fd, err := control(c.master, tiocgptpeer, syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC)
		if err == nil {
			c.peer, c.hungUp = os.NewFile(fd, "console"), false
		}
	}
}

func (c *console) dropLocked() {
	for _, file := range []*os.File{c.peer, c.master} {
		if file != nil {
			file.Close()
		}
	}
	c.master, c.peer = nil, nil
}

func (c *console) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropLocked()
}

// missing: there is no pty to read, and the agent may be asked for one. gone: nothing comes from it any more.
func (c *console) missing() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.master == nil }
func (c *console) gone() bool    { c.mu.Lock(); defer c.mu.Unlock(); return c.master == nil || c.hungUp }

func (c *console) setHungUp(master *os.File, hungUp bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.master != master {
		return false
	}
	if c.hungUp != hungUp {
		c.hungUp = hungUp
		wake(c.changed)
	}
	return true
}

// pump reads until the pty is lost or another one took its place.
func (c *console) pump(master *os.File) {
	buffer := make([]byte, consoleBuffer)
	var pace pace
	for {
		n, err := master.Read(buffer)
		if n > 0 {
			_, _ = c.log.Write(buffer[:n])
		}
		switch {
		case n > 0:
			if !c.setHungUp(master, false) {
				return
			}
			pace.keep(n, nil)
		case errors.Is(err, syscall.EIO):
			if !c.setHungUp(master, true) {
				return
			}
			select {
			case <-c.nudge:
			case <-time.After(hungUpLook):
			}
		case err != nil:
			c.lose(master)
			return
		}
	}
}

func (c *console) lose(master *os.File) {
	c.mu.Lock()
	if c.master == master {
		c.dropLocked()
	}
	c.mu.Unlock()
	wake(c.changed)
	wake(c.lost)
}

// receiveConsole waits on the listening socket fd for the container runtime, which connects once and sends the pty's
// master. Source: OCI runtime-spec's reference implementations, `--console-socket`.
func receiveConsole(fd int, timeout time.Duration) (*os.File, error) {
	listener, err := wire.NewListener(fd)
	if err != nil {
		return nil, err
	}
	timer := time.AfterFunc(timeout, func() { listener.Close() })
	defer timer.Stop()
	defer listener.Close()
	socket, err := listener.Accept()
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	_ = socket.SetReadDeadline(time.Now().Add(timeout))
	socket.WantFile()
	var name [4096]byte
	for {
		_, err := socket.Read(name[:])
		if master := socket.TakeFile(); master != nil {
			return asMaster(master)
		}
		if err == io.EOF {
			err = errors.New("it sent no descriptor")
		}
		if err != nil {
			return nil, err
		}
	}
}

var errNoPty = errors.New("what came as the console is no pseudo-terminal")

// asMaster checks that a descriptor which came from elsewhere is a pty's master, and makes reads of it wait in the
// runtime's poller. It takes the file over.
func asMaster(file *os.File) (*os.File, error) {
	defer file.Close()
	if !isMultiplexer(file) {
		return nil, errNoPty
	}
	var number uint32
	if _, err := control(file, syscall.TIOCGPTN, uintptr(unsafe.Pointer(&number))); err != nil {
		return nil, errNoPty
	}
	fd, err := duplicate(file)
	if err != nil {
		return nil, err
	}
	if err := syscall.SetNonblock(fd, true); err != nil {
		syscall.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "console"), nil
}

// isMultiplexer says whether a file is the device of pty masters, by what the kernel knows of it and without asking its
// file system, which may be the guest's (FUSE), answer anything and never. Source: statx(2), pts(4).
func isMultiplexer(file *os.File) bool {
	const emptyPath, dontSync, typeAndMode = 0x1000, 0x4000, 0x3
	var found struct {
		_            [28]byte
		mode         uint16
		_            [98]byte
		major, minor uint32
		_            [120]byte
	}
	number := map[string]uintptr{"amd64": 332, "arm64": 291}[runtime.GOARCH]
	raw, err := file.SyscallConn()
	if err != nil {
		return false
	}
	var errno syscall.Errno
	var empty byte
	err = raw.Control(func(fd uintptr) {
		_, _, errno = syscall.Syscall6(number, fd, uintptr(unsafe.Pointer(&empty)), emptyPath|dontSync, typeAndMode,
			uintptr(unsafe.Pointer(&found)), 0)
	})
	return err == nil && errno == 0 && found.mode&syscall.S_IFMT == syscall.S_IFCHR && found.major == 5 && found.minor == 2
}

func duplicate(file *os.File) (fd int, err error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return -1, err
	}
	errControl := raw.Control(func(old uintptr) {
		number, _, errno := syscall.Syscall(syscall.SYS_FCNTL, old, syscall.F_DUPFD_CLOEXEC, 3)
		if fd = int(number); errno != 0 {
			err = errno
		}
	})
	return fd, errors.Join(err, errControl)
}

// control is ioctl(2).
func control(file *os.File, request, argument uintptr) (result uintptr, err error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return 0, err
	}
	errControl := raw.Control(func(fd uintptr) {
		number, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, request, argument)
		if result = number; errno != 0 {
			err = errno
		}
	})
	return result, errors.Join(err, errControl)
}

// wake puts a token into a channel of one, if there is none.
func wake(channel chan struct{}) {
	select {
	case channel <- struct{}{}:
	default:
	}
}
