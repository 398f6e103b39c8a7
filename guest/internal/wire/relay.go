package wire

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// bulkBytes is how much must have come out of a pipe before it is made larger, and pipeSize how large: a short
// command pays nothing, and the bytes of pipes that one user may have (64 MiB) last for many bulk ones.
const (
	bulkBytes = 4 << 20
	pipeSize  = 512 << 10
)

// FinishWithFile is Finish with a descriptor going along. The connection must be over a *Socket.
func (s *Stream) FinishWithFile(message any, file *os.File) error {
	socket, ok := s.conn.rw.(*Socket)
	if !ok {
		return errors.New("this connection can't carry a descriptor")
	}
	frame := AppendFrame(nil, s.ID, KindMessage, Encode(message))
	defer s.discard()
	return s.exclusively(func() error {
		err := socket.WriteWithFile(frame, file)
		if err != nil {
			s.conn.fail(err)
		}
		s.conn.forget(s)
		s.end(ErrEnded)
		return err
	})
}

// SendFrom sends what it reads from source until the end of file, without sending that end. It holds no buffer while
// there is nothing to read. One of the errors, or neither: reading failed (also at the source's deadline), or sending.
func (s *Stream) SendFrom(kind Kind, source *Socket) (readErr, sendErr error) {
	want, total := smallBuffer-HeaderSize, 0
	for {
		reserved, err := s.Reserve(kind, want)
		if err != nil {
			return nil, err
		}
		buffer, size, err := source.readFrame(reserved)
		if err != nil {
			_ = s.SendFrame(kind, nil, 0, reserved)
			if err == io.EOF {
				err = nil
			}
			return err, nil
		}
		err = s.SendFrame(kind, buffer.Bytes, size, reserved)
		buffer.Release()
		if err != nil {
			return nil, err
		}
		if want = smallBuffer - HeaderSize; size >= want {
			want = MaxData
		}
		if total < bulkBytes {
			if total += size; total >= bulkBytes {
				source.growPipe()
			}
		}
	}
}

// readFrame reads up to want bytes to where they belong in a frame, into a buffer that is taken when there are some.
func (s *Socket) readFrame(want int) (*Buffer, int, error) {
	var buffer *Buffer
	count, failed := 0, error(nil)
	err := s.raw.Read(func(fd uintptr) bool {
		buffer = getBuffer(HeaderSize + want)
		for {
			count, failed = syscall.Read(int(fd), buffer.Bytes[HeaderSize:HeaderSize+want])
			if failed != syscall.EINTR {
				break
			}
		}
		if failed == syscall.EAGAIN {
			buffer.Release()
			return false
		}
		return true
	})
	if err = firstError(s.explain(err), failed); err == nil && count == 0 {
		err = io.EOF
	}
	if err != nil {
		return nil, 0, err
	}
	return buffer, count, nil
}

// SendReady sends what can be read from a source without waiting at this moment, whatever its deadline: after that,
// who goes on writing into it is not listened to.
func (s *Stream) SendReady(kind Kind, source *Socket) error {
	for left := source.ready(); left > 0; {
		reserved, err := s.Reserve(kind, min(left, MaxData))
		if err != nil {
			return err
		}
		buffer := getBuffer(HeaderSize + reserved)
		size := source.readNow(buffer.Bytes[HeaderSize : HeaderSize+reserved])
		err = s.SendFrame(kind, buffer.Bytes, size, reserved)
		buffer.Release()
		if err != nil || size == 0 {
			return err
		}
		left -= size
	}
	return nil
}

// ready says how many bytes wait to be read.
func (s *Socket) ready() int {
	count := int32(0)
	_ = s.raw.Control(func(fd uintptr) {
		_, _, _ = syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCINQ, uintptr(unsafe.Pointer(&count)))
	})
	return int(count)
}

// readNow reads without waiting; 0 when there is nothing.
func (s *Socket) readNow(data []byte) int {
	count := 0
	_ = s.raw.Control(func(fd uintptr) { count, _ = syscall.Read(int(fd), data) })
	return max(count, 0)
}

// growPipe makes a pipe larger where the system lets us; other sources are left as they are.
func (s *Socket) growPipe() {
	_ = s.raw.Control(func(fd uintptr) {
		_, _, _ = syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_SETPIPE_SZ, pipeSize)
	})
}

// WriteTo writes what arrives of a kind to target until the end of file. When target takes no more, the rest is
// dropped on arrival. One of the errors, or neither: receiving failed, or writing.
func (s *Stream) WriteTo(kind Kind, target io.Writer) (receiveErr, writeErr error) {
	for {
		chunk, err := s.Next(kind)
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return err, nil
		}
		_, err = target.Write(chunk.Data)
		s.Consumed(kind, chunk)
		if err != nil {
			s.StopReading(kind)
			return nil, err
		}
	}
}

// lingering is how long a socket whose stream has ended may take to swallow what had come for it.
const lingering = 5 * time.Second

// Relay joins a stream and a connected socket until both directions have ended or the stream has: in is the kind
// that we receive, out the one we send. It closes the socket; the final message is the caller's.
func Relay(s *Stream, in, out Kind, socket *Socket) {
	finished := make(chan struct{})
	var sender, watcher sync.WaitGroup
	sender.Go(func() {
		if _, err := s.SendFrom(out, socket); err == nil {
			_ = s.CloseWrite(out)
		}
	})
	watcher.Go(func() {
		select {
		case <-s.Done(): // whoever reads the socket is to stop
			_ = socket.shutdown(syscall.SHUT_RD)
			_ = socket.SetWriteDeadline(time.Now().Add(lingering))
		case <-finished:
		}
	})
	switch receiveErr, writeErr := s.WriteTo(in, socket); {
	case receiveErr != nil:
		_ = socket.Hangup()
	case writeErr == nil:
		_ = socket.CloseWrite()
	}
	sender.Wait()
	close(finished)
	watcher.Wait()
	_ = socket.Close()
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
