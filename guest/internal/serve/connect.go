package serve

import (
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"berth.dev/guest/internal/wire"
)

// Attend serves one connection, and what connections are made through it, until its end. It is for the channel of a
// VM, which belongs to the keeper.
func (s *Server) Attend(channel io.ReadWriteCloser) {
	conn := s.newConn(channel)
	s.mutex.Lock()
	s.clients[conn] = &client{channel: true}
	s.mutex.Unlock()
	s.attend(conn)
}

// connect makes a stream of the keeper's another connection of the protocol, for a client of the host's agent.sock.
func (s *Server) connect(stream *wire.Stream) {
	stream.Taken()
	if !s.isChannel(stream.Conn()) {
		refuse(stream, wire.CodeUnsupported, "connections are made by the keeper of a VM only")
		return
	}
	if !s.hasRoom() {
		refuse(stream, wire.CodeBusy, "too many connections to the agent are open")
		return
	}
	if stream.Send(wire.Started{Type: wire.TypeStarted}) != nil {
		return
	}
	go hearCancel(stream)
	s.admit(&tunnel{stream: stream})
}

func (s *Server) hasRoom() bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return !s.isFull()
}

func (s *Server) isChannel(conn *wire.Conn) bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	client := s.clients[conn]
	return client != nil && client.channel && client.keeper
}

// tunnel is a stream as the byte stream of another connection. It holds no buffer: what comes is read from where the
// outer connection left it, and what goes is put into frames of its own at once. A stalled client stalls the goroutines
// of its connection, by the credit of its stream, and nobody else.
type tunnel struct {
	stream *wire.Stream

	chunk *wire.Chunk // the reader's
	used  int

	mutex    sync.Mutex
	deadline *time.Timer
	closed   bool
}

// Read gives what has come, after waiting for it; io.EOF at the end.
func (t *tunnel) Read(data []byte) (int, error) {
	if t.chunk == nil {
		chunk, err := t.stream.Next(wire.Stdin)
		if err != nil {
			return 0, io.EOF // whatever ended the stream has ended the client
		}
		t.chunk, t.used = chunk, 0
	}
	count := copy(data, t.chunk.Data[t.used:])
	if t.used += count; t.used == len(t.chunk.Data) {
		t.stream.Consumed(wire.Stdin, t.chunk)
		t.chunk = nil
	}
	return count, nil
}

// Write sends all of data, waiting for the client to take it.
func (t *tunnel) Write(data []byte) (int, error) {
	if err := t.stream.Write(wire.Stdout, data); err != nil {
		if errors.Is(err, io.ErrClosedPipe) {
			err = os.ErrDeadlineExceeded
		}
		return 0, err
	}
	return len(data), nil
}

// SetWriteDeadline ends a Write at a time, and with it all writing; the zero time: never.
func (t *tunnel) SetWriteDeadline(at time.Time) error {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	if t.deadline != nil {
		t.deadline.Stop()
		t.deadline = nil
	}
	if !at.IsZero() {
		t.deadline = time.AfterFunc(time.Until(at), func() { t.stream.StopWriting(wire.Stdout) })
	}
	return nil
}

// Close ends the stream.
func (t *tunnel) Close() error {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	if t.closed {
		return nil
	}
	t.closed = true
	if t.deadline != nil {
		t.deadline.Stop()
	}
	t.stream.StopWriting(wire.Stdout) // who waits for credit is called back
	_ = t.stream.CloseWrite(wire.Stdout)
	finish(t.stream, wire.Plain{Type: wire.TypeClosed})
	return nil
}
