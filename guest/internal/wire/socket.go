package wire

import (
	"errors"
	"io"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Socket is a connected stream socket (or a pipe, or a character device) in the runtime's poller: reads and writes
// block a goroutine, not a thread. It is used in place of package net, which costs memory in a process that must be
// small.
type Socket struct {
	file  *os.File
	raw   syscall.RawConn
	mutex sync.Mutex
	fd    int // received and not taken yet; -1 for none
	want  bool

	closed atomic.Bool
}

// sendBuffer is asked for and mostly not had; yet what the system allows everybody (wmem_max) counts twice when it is
// asked for: a whole frame fits in, and the reader is not woken for half of one. Source: socket(7), SO_SNDBUF.
const sendBuffer = 1 << 20

// NewSocket takes over a descriptor.
func NewSocket(fd int) (*Socket, error) {
	if err := syscall.SetNonblock(fd, true); err != nil {
		_ = syscall.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	syscall.CloseOnExec(fd)
	// Fails for what is no socket.
	_ = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_SNDBUF, sendBuffer)
	file := os.NewFile(uintptr(fd), "socket")
	raw, err := file.SyscallConn()
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	return &Socket{file: file, raw: raw, fd: -1}, nil
}

// Read reads; see WantFile.
func (s *Socket) Read(data []byte) (int, error) {
	if !s.want {
		return s.file.Read(data)
	}
	return s.readWithFile(data)
}

// Write writes all of data.
func (s *Socket) Write(data []byte) (int, error) { return s.file.Write(data) }

// Close closes it; who waits in Read or Write gets os.ErrClosed.
func (s *Socket) Close() error {
	s.closed.Store(true)
	if file := s.TakeFile(); file != nil {
		_ = file.Close()
	}
	return s.file.Close()
}

// explain gives what a RawConn says about a closed file the name that it has elsewhere.
func (s *Socket) explain(err error) error {
	if err != nil && s.closed.Load() {
		return os.ErrClosed
	}
	return err
}

// CloseWrite sends the end of file.
func (s *Socket) CloseWrite() error { return s.shutdown(syscall.SHUT_WR) }

// Hangup ends both directions: who waits in Read gets io.EOF. It still must be closed.
func (s *Socket) Hangup() error { return s.shutdown(syscall.SHUT_RDWR) }

func (s *Socket) shutdown(how int) error {
	var failed error
	if err := s.raw.Control(func(fd uintptr) { failed = syscall.Shutdown(int(fd), how) }); err != nil {
		return err
	}
	return failed
}

// SetReadDeadline ends a Read at a time; the zero time: never.
func (s *Socket) SetReadDeadline(at time.Time) error { return s.file.SetReadDeadline(at) }

// SetWriteDeadline ends a Write at a time; the zero time: never.
func (s *Socket) SetWriteDeadline(at time.Time) error { return s.file.SetWriteDeadline(at) }

// Raw gives access to the descriptor.
func (s *Socket) Raw() syscall.RawConn { return s.raw }

// WriteWithFile writes data (not empty), a descriptor going with its first byte (SCM_RIGHTS).
func (s *Socket) WriteWithFile(data []byte, file *os.File) error {
	source, err := file.SyscallConn()
	if err != nil {
		return err
	}
	sent := 0
	var sendErr, waitErr error
	err = source.Control(func(fd uintptr) {
		rights := syscall.UnixRights(int(fd))
		waitErr = s.raw.Write(func(own uintptr) bool {
			sent, sendErr = syscall.SendmsgN(int(own), data, rights, nil, syscall.MSG_NOSIGNAL)
			return sendErr != syscall.EAGAIN && sendErr != syscall.EINTR
		})
	})
	if err = firstError(err, s.explain(waitErr), sendErr); err == nil && sent < len(data) {
		_, err = s.file.Write(data[sent:])
	}
	return err
}

// WantFile makes Read accept a descriptor that comes along; say so before the Conn is made. Without it the kernel
// closes what comes.
func (s *Socket) WantFile() { s.want = true }

// TakeFile returns the descriptor that came last, or nil. It has come before the message it was sent with.
func (s *Socket) TakeFile() *os.File {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.fd < 0 {
		return nil
	}
	fd := s.fd
	s.fd = -1
	return os.NewFile(uintptr(fd), "received")
}

func (s *Socket) readWithFile(data []byte) (int, error) {
	if len(data) == 0 {
		return 0, nil
	}
	control := make([]byte, syscall.CmsgSpace(4*4))
	count, size := 0, 0
	var failed error
	err := s.raw.Read(func(fd uintptr) bool {
		count, size, _, _, failed = syscall.Recvmsg(int(fd), data, control, syscall.MSG_CMSG_CLOEXEC)
		return failed != syscall.EAGAIN && failed != syscall.EINTR
	})
	if err = firstError(s.explain(err), failed); err != nil {
		return 0, err
	}
	s.keep(control[:size])
	if count == 0 {
		return 0, io.EOF
	}
	return count, nil
}

// keep takes the last descriptor of a control message and closes the others.
func (s *Socket) keep(control []byte) {
	messages, _ := syscall.ParseSocketControlMessage(control)
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for i := range messages {
		fds, _ := syscall.ParseUnixRights(&messages[i])
		for _, fd := range fds {
			if s.fd >= 0 {
				_ = syscall.Close(s.fd)
			}
			s.fd = fd
		}
	}
}

// Pair makes two connected unix sockets.
func Pair() (*Socket, *Socket, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	first, err := NewSocket(fds[0])
	if err != nil {
		_ = syscall.Close(fds[1])
		return nil, nil, err
	}
	second, err := NewSocket(fds[1])
	if err != nil {
		_ = first.Close()
		return nil, nil, err
	}
	return first, second, nil
}

// Listener accepts connections on a listening socket of any family.
type Listener struct{ socket *Socket }

// NewListener takes over a descriptor that listens already.
func NewListener(fd int) (*Listener, error) {
	listening, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN)
	if err == nil && listening == 0 {
		err = syscall.EINVAL
	}
	if err != nil {
		return nil, errors.New("descriptor " + strconv.Itoa(fd) + " is no listening socket: " + err.Error())
	}
	socket, err := NewSocket(fd)
	if err != nil {
		return nil, err
	}
	return &Listener{socket}, nil
}

// Listen binds and listens. An error leaves nothing open.
func Listen(address syscall.Sockaddr) (*Listener, error) {
	fd, err := newSocket(address)
	if err != nil {
		return nil, err
	}
	if _, tcp := address.(*syscall.SockaddrUnix); !tcp {
		_ = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
	}
	if err = syscall.Bind(fd, address); err == nil {
		err = syscall.Listen(fd, syscall.SOMAXCONN)
	}
	if err != nil {
		_ = syscall.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	return NewListener(fd)
}

// Accept waits for the next connection. Errors of a single connection are passed over.
func (l *Listener) Accept() (*Socket, error) {
	for {
		client, failed := -1, error(nil)
		err := l.socket.raw.Read(func(fd uintptr) bool {
			client, _, failed = syscall.Accept4(int(fd), syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC)
			return failed != syscall.EAGAIN
		})
		switch {
		case err != nil:
			return nil, l.socket.explain(err)
		case failed == nil:
			return NewSocket(client)
		case failed != syscall.EINTR && failed != syscall.ECONNABORTED:
			return nil, failed
		}
	}
}

// SetDeadline ends an Accept at a time (os.ErrDeadlineExceeded); the zero time: never.
func (l *Listener) SetDeadline(at time.Time) error { return l.socket.SetReadDeadline(at) }

// Close ends it; who waits in Accept gets os.ErrClosed.
func (l *Listener) Close() error { return l.socket.Close() }

// Raw gives access to the descriptor.
func (l *Listener) Raw() syscall.RawConn { return l.socket.raw }

// DialUnix connects to a unix socket. It waits for at most 5 s for a listener whose queue is full.
func DialUnix(path string) (*Socket, error) {
	address := &syscall.SockaddrUnix{Name: path}
	fd, err := newSocket(address)
	if err != nil {
		return nil, err
	}
	_ = syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_SNDTIMEO, &syscall.Timeval{Sec: 5})
	for {
		if err = syscall.Connect(fd, address); err != syscall.EINTR {
			break
		}
	}
	if err != nil {
		_ = syscall.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	return NewSocket(fd)
}

// DialTCP connects to an address (SockaddrInet4 or 6), for at most timeout.
func DialTCP(address syscall.Sockaddr, timeout time.Duration) (*Socket, error) {
	fd, err := newSocket(address)
	if err != nil {
		return nil, err
	}
	_ = syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
	_ = syscall.SetNonblock(fd, true)
	err = syscall.Connect(fd, address)
	if err != nil && err != syscall.EINPROGRESS && err != syscall.EINTR {
		_ = syscall.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	socket, failed := NewSocket(fd)
	if failed != nil {
		return nil, failed
	}
	if err != nil {
		err = socket.waitConnected(timeout)
	}
	if err != nil {
		_ = socket.Close()
		return nil, os.NewSyscallError("connect", err)
	}
	return socket, nil
}

func (s *Socket) waitConnected(timeout time.Duration) error {
	_ = s.SetWriteDeadline(time.Now().Add(timeout))
	defer func() { _ = s.SetWriteDeadline(time.Time{}) }()
	var failed error
	err := s.raw.Write(func(fd uintptr) bool {
		code, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR)
		if failed = err; err == nil && code != 0 {
			failed = syscall.Errno(code)
		}
		if failed != nil {
			return true
		}
		_, err = syscall.Getpeername(int(fd))
		return err == nil
	})
	return firstError(s.explain(err), failed)
}

func newSocket(address syscall.Sockaddr) (int, error) {
	family := syscall.AF_UNIX
	switch address.(type) {
	case *syscall.SockaddrInet4:
		family = syscall.AF_INET
	case *syscall.SockaddrInet6:
		family = syscall.AF_INET6
	}
	fd, err := syscall.Socket(family, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	return fd, os.NewSyscallError("socket", err)
}
