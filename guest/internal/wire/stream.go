package wire

import (
	"errors"
	"io"
	"os"
	"sync"
	"time"
)

// ErrEnded is what a stream says after its final message.
var ErrEnded = errors.New("the stream has ended")

var errDeadline = os.ErrDeadlineExceeded

// Stream is one request and what belongs to it. Its methods may be called by several goroutines, but each kind has one
// reader and one writer.
type Stream struct {
	ID      uint32
	Request Message // what the peer opened it with; empty when we did

	conn    *Conn
	foreign bool // opened by the peer
	charged int  // bytes of the request that count as pending

	mutex    sync.Mutex
	changed  sync.Cond
	flow     Flow
	stopped  [4]bool // nothing more is sent of a kind
	data     [4]queue
	messages []Message
	err      error // why it ended; nil while it is open
	done     chan struct{}
}

// queue holds what was received of one kind: at most a window.
type queue struct {
	chunks []*Chunk
	end    bool // the end of file was received
	closed bool // our reader is gone: what comes is dropped
	owing  bool // credit for what was dropped is on its way
}

// Chunk is a piece of what was received. Give it back by Stream.Consumed.
type Chunk struct {
	Data   []byte
	buffer *Buffer
	lent   bool // a reader has it: nothing may be appended
}

func newStream(c *Conn, id uint32) *Stream {
	s := &Stream{ID: id, conn: c, flow: NewFlow(c.options.Side), done: make(chan struct{})}
	s.changed.L = &s.mutex
	return s
}

// Done is closed when the stream has ended, by either side's final message or with the connection.
func (s *Stream) Done() <-chan struct{} { return s.done }

// Err says why the stream ended: ErrEnded after a final message, else as Conn.Err; nil while it is open.
func (s *Stream) Err() error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.err
}

// Conn returns the connection that the stream belongs to.
func (s *Stream) Conn() *Conn { return s.conn }

// Taken says that the request is dealt with and its memory no longer held.
func (s *Stream) Taken() {
	s.conn.charge(-s.charged)
	s.charged, s.Request.Raw = 0, nil
}

// Send sends a message that is not the last one.
func (s *Stream) Send(message any) error { return s.send(Encode(message), false, nil) }

// Finish sends the final message and ends the stream: what the peer said and nobody took is dropped.
func (s *Stream) Finish(message any) error { return s.send(Encode(message), true, nil) }

// FinishWithEnds is Finish with the ends of file of kinds before it, in one write.
func (s *Stream) FinishWithEnds(message any, kinds ...Kind) error {
	var frames []byte
	for _, kind := range kinds {
		frames = AppendFrame(frames, s.ID, kind, nil)
	}
	return s.send(Encode(message), true, frames)
}

func (s *Stream) send(text []byte, final bool, frames []byte) error {
	frames = AppendFrame(frames, s.ID, KindMessage, text)
	if final {
		defer s.discard()
	}
	return s.exclusively(func() error {
		err := s.conn.writeLocked(frames)
		if final {
			s.conn.forget(s)
			s.end(ErrEnded)
		}
		return err
	})
}

// exclusively runs write as the only writer of the connection, unless the stream has ended.
func (s *Stream) exclusively(write func() error) error {
	s.conn.writing.Lock()
	defer s.conn.writing.Unlock()
	if err := s.Err(); err != nil {
		return err
	}
	return write()
}

// Drop ends our side of the stream without a message: what still arrives for it is dropped.
func (s *Stream) Drop() {
	s.conn.forget(s)
	s.end(ErrEnded)
	s.discard()
}

// discard lets go of what the peer said before our end and nobody took: it counts as waiting no more.
func (s *Stream) discard() {
	s.mutex.Lock()
	waiting := 0
	for _, message := range s.messages {
		waiting += len(message.Raw)
	}
	s.messages = nil
	s.mutex.Unlock()
	s.conn.charge(-waiting)
}

func (s *Stream) end(err error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.err == nil {
		s.err = err
		close(s.done)
		s.changed.Broadcast()
	}
}

// ReadMessage waits for the peer's next message, for at most timeout (0: no limit). After the peer's end of the stream it
// still returns those that came before.
func (s *Stream) ReadMessage(timeout time.Duration) (Message, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	expired := wakeAfter(&s.changed, timeout)
	defer expired.stop()
	for len(s.messages) == 0 && s.err == nil {
		if expired.is() {
			return Message{}, errDeadline
		}
		s.changed.Wait()
	}
	if len(s.messages) == 0 {
		return Message{}, s.err
	}
	message := s.messages[0]
	s.messages = s.messages[1:]
	s.conn.charge(-len(message.Raw))
	return message, nil
}

func (s *Stream) receiveMessage(message Message) error {
	if !s.conn.charge(len(message.Raw)) {
		return broken("too many messages that nobody takes")
	}
	s.mutex.Lock()
	ended := s.err != nil
	if !ended {
		s.messages = append(s.messages, message.copy())
		s.changed.Broadcast()
	}
	s.mutex.Unlock()
	if ended { // nobody would take it
		s.conn.charge(-len(message.Raw))
		return nil
	}
	if isFinal(message.Type) {
		s.conn.forget(s)
		s.end(ErrEnded)
	}
	return nil
}

func (s *Stream) receiveCredit(kind Kind, count uint32) error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	err := s.flow.Granted(kind, count)
	s.changed.Broadcast()
	return err
}

func (s *Stream) receiveData(decoder *Decoder, frame Frame) error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if err := s.flow.Received(frame.Kind, len(frame.Payload)); err != nil {
		return err
	}
	queue := &s.data[frame.Kind]
	queue.end = len(frame.Payload) == 0
	if !queue.closed && !queue.end {
		queue.push(decoder, frame.Payload)
	}
	s.changed.Broadcast()
	if queue.closed && !queue.end {
		s.dropped(frame.Kind, len(frame.Payload))
	}
	return nil
}

// dropped gives credit back for what nobody reads, so that the peer comes to its end. Not from here, the connection's
// reader, which must not wait; and one grant after the other: a peer that floods us and takes none of them comes to the
// end of its credit, instead of costing us a goroutine for each. Call it with the stream's lock.
func (s *Stream) dropped(kind Kind, size int) {
	s.flow.Owe(kind, size)
	if s.data[kind].owing {
		return
	}
	if grant := s.flow.Due(kind); grant > 0 {
		s.data[kind].owing = true
		go s.grantDropped(kind, grant)
	}
}

func (s *Stream) grantDropped(kind Kind, grant uint32) {
	for grant > 0 {
		s.grant(kind, grant)
		s.mutex.Lock()
		grant = s.flow.Due(kind)
		s.data[kind].owing = grant > 0
		s.mutex.Unlock()
	}
}

// push keeps a payload: in the last chunk's room, in the buffer that it came in, or in a new one.
func (q *queue) push(decoder *Decoder, payload []byte) {
	if count := len(q.chunks); count > 0 {
		last := q.chunks[count-1]
		if !last.lent && cap(last.Data)-len(last.Data) >= len(payload) {
			last.Data = append(last.Data, payload...)
			return
		}
	}
	if buffer := decoder.steal(payload); buffer != nil {
		q.chunks = append(q.chunks, &Chunk{Data: payload, buffer: buffer})
		return
	}
	buffer := getBuffer(len(payload))
	q.chunks = append(q.chunks, &Chunk{Data: append(buffer.Bytes[:0], payload...), buffer: buffer})
}

// Next waits for bytes of a kind and returns a chunk of them, which must go back by Consumed before Next is called
// again. io.EOF after the end of file; Err's word when the stream or the connection ended before.
func (s *Stream) Next(kind Kind) (*Chunk, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	queue := &s.data[kind]
	for len(queue.chunks) == 0 {
		switch {
		case queue.end || queue.closed:
			return nil, io.EOF
		case s.err != nil:
			return nil, s.err
		}
		s.changed.Wait()
	}
	chunk := queue.chunks[0]
	chunk.lent = true
	return chunk, nil
}

// Consumed gives a chunk back, and its credit to the peer.
func (s *Stream) Consumed(kind Kind, chunk *Chunk) {
	size := len(chunk.Data)
	s.mutex.Lock()
	queue := &s.data[kind]
	if len(queue.chunks) > 0 && queue.chunks[0] == chunk {
		queue.chunks[0] = nil
		queue.chunks = queue.chunks[1:]
	}
	s.mutex.Unlock()
	chunk.buffer.Release()
	s.consumed(kind, size)
}

func (s *Stream) consumed(kind Kind, size int) {
	s.mutex.Lock()
	grant := uint32(0)
	if s.err == nil {
		grant = s.flow.Consumed(kind, size)
	}
	s.mutex.Unlock()
	if grant > 0 {
		s.grant(kind, grant)
	}
}

func (s *Stream) grant(kind Kind, count uint32) {
	frame := AppendCredit(nil, s.ID, kind, count)
	_ = s.exclusively(func() error { return s.conn.writeLocked(frame) })
}

// StopReading drops what was received of a kind and what will be; the peer goes on getting credit for it.
func (s *Stream) StopReading(kind Kind) {
	s.mutex.Lock()
	queue := &s.data[kind]
	queue.closed = true
	size := 0
	for _, chunk := range queue.chunks {
		if !chunk.lent { // whoever has it gives it back
			size += len(chunk.Data)
			chunk.buffer.Release()
		}
	}
	queue.chunks = nil
	s.changed.Broadcast()
	s.mutex.Unlock()
	s.consumed(kind, size)
}

// StopWriting makes Reserve of a kind fail with io.ErrClosedPipe: the peer reads no more of it. CloseWrite still works.
func (s *Stream) StopWriting(kind Kind) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.stopped[kind] = true
	s.changed.Broadcast()
}

// Reserve waits for credit of a kind and takes up to want bytes of it, for SendFrame. It fails when the stream ends.
func (s *Stream) Reserve(kind Kind, want int) (int, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for {
		if s.err != nil {
			return 0, s.err
		}
		if s.stopped[kind] {
			return 0, io.ErrClosedPipe
		}
		if count := s.flow.Reserve(kind, min(want, MaxData)); count > 0 {
			return count, nil
		}
		s.changed.Wait()
	}
}

// SendFrame sends size bytes of a kind that lie in frame from HeaderSize on; reserved is what Reserve gave.
// Size 0 sends nothing and gives the reservation back.
func (s *Stream) SendFrame(kind Kind, frame []byte, size, reserved int) error {
	s.mutex.Lock()
	s.flow.Settle(kind, reserved, size)
	if size < reserved {
		s.changed.Broadcast()
	}
	s.mutex.Unlock()
	if size == 0 {
		return nil
	}
	PutHeader(frame, s.ID, kind, size)
	return s.exclusively(func() error { return s.conn.writeLocked(frame[:HeaderSize+size]) })
}

// Write sends all of data, waiting for credit.
func (s *Stream) Write(kind Kind, data []byte) error {
	for len(data) > 0 {
		reserved, err := s.Reserve(kind, len(data))
		if err != nil {
			return err
		}
		buffer := getBuffer(HeaderSize + reserved)
		copy(buffer.Bytes[HeaderSize:], data[:reserved])
		err = s.SendFrame(kind, buffer.Bytes, reserved, reserved)
		buffer.Release()
		if err != nil {
			return err
		}
		data = data[reserved:]
	}
	return nil
}

// CloseWrite sends the end of file of a kind. Once only.
func (s *Stream) CloseWrite(kind Kind) error {
	frame := AppendFrame(nil, s.ID, kind, nil)
	return s.exclusively(func() error { return s.conn.writeLocked(frame) })
}

// alarm wakes those who wait for a condition when its time has come.
type alarm struct {
	timer *time.Timer
	at    time.Time
}

func wakeAfter(cond *sync.Cond, timeout time.Duration) alarm {
	if timeout <= 0 {
		return alarm{}
	}
	wake := func() {
		cond.L.Lock()
		defer cond.L.Unlock()
		cond.Broadcast()
	}
	return alarm{time.AfterFunc(timeout, wake), time.Now().Add(timeout)}
}

func (a alarm) is() bool { return a.timer != nil && !time.Now().Before(a.at) }

func (a alarm) stop() {
	if a.timer != nil {
		a.timer.Stop()
	}
}
