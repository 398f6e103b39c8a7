package wire

import (
	"errors"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"time"
)

// ErrClosed is the end of a connection that we closed ourselves.
var ErrClosed = errors.New("connection closed")

// maxName is how many bytes of a name that we don't know are told back.
const maxName = 40

// fatalDeadline is how long a peer that broke the protocol is given to take the reason, and ours is waited for.
const fatalDeadline = time.Second

// Options of a connection.
type Options struct {
	Side       Side
	Version    string        // told in hello
	Role       string        // the host's: "client" or "keeper"
	InitState  func() string // the guest's: STATE for its hello; must not block
	MaxStreams int           // that the peer may have open; 0: MaxStreams
}

// Conn carries the protocol over a byte stream. One goroutine reads; whoever sends writes whole frames under a lock,
// so a stalled stream (it waits for credit outside of the lock) stalls nobody else. Memory is bounded by the windows
// of the open streams and by what maxPending says of messages that nobody has taken yet.
type Conn struct {
	options Options
	rw      io.ReadWriteCloser
	writing sync.Mutex
	broken  error // of the first write that failed: what follows would be garbage. Guarded by writing

	mutex    sync.Mutex
	changed  sync.Cond
	streams  map[uint32]*Stream
	opened   []*Stream // by the peer, not accepted yet
	lastPeer uint32
	nextOwn  uint64
	foreign  int // open streams that the peer opened
	pending  int // bytes of messages that were received and not taken
	hello    *Hello
	err      error
	done     chan struct{}
}

// maxPending bounds the messages of a connection that nobody has taken; a request beyond it is refused as busy.
func (c *Conn) maxPending() int { return 4 * c.options.Side.incoming().maxMessage() }

// NewConn starts the protocol on rw and owns it from now on. The host's side says hello at once.
func NewConn(rw io.ReadWriteCloser, options Options) *Conn {
	if options.MaxStreams == 0 {
		options.MaxStreams = MaxStreams
	}
	c := &Conn{options: options, rw: rw, streams: map[uint32]*Stream{}, nextOwn: 2, done: make(chan struct{})}
	c.changed.L = &c.mutex
	if options.Side == Host {
		c.nextOwn = 1
		hello := Hello{Type: TypeHello, Protocol: ProtocolVersion, Version: options.Version, Role: options.Role}
		// The peer may be slow to read, and the caller has not even got the Conn yet.
		c.writing.Lock()
		go func() {
			defer c.writing.Unlock()
			c.writeLocked(AppendFrame(nil, 0, KindMessage, Encode(hello)))
		}()
	}
	go c.Protect(c.read)
	return c
}

// WaitHello returns the peer's hello, after at most timeout (0: no limit), or why there will be none.
func (c *Conn) WaitHello(timeout time.Duration) (Hello, error) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	expired := wakeAfter(&c.changed, timeout)
	defer expired.stop()
	for c.hello == nil && c.err == nil {
		if expired.is() {
			return Hello{}, errDeadline
		}
		c.changed.Wait()
	}
	if c.hello == nil {
		return Hello{}, c.err
	}
	return *c.hello, nil
}

// Open opens a stream by sending a request.
func (c *Conn) Open(request any) (*Stream, error) {
	text := Encode(request)
	c.writing.Lock() // ids must go out in order
	defer c.writing.Unlock()
	c.mutex.Lock()
	if c.err == nil && (len(c.streams)-c.foreign >= MaxStreams || c.nextOwn > 1<<32-1) {
		c.mutex.Unlock()
		return nil, Refusal(CodeBusy, "too many streams are open in this connection")
	}
	if c.err != nil {
		defer c.mutex.Unlock()
		return nil, c.err
	}
	stream := newStream(c, uint32(c.nextOwn))
	c.nextOwn += 2
	c.streams[stream.ID] = stream
	c.mutex.Unlock()
	if err := c.writeLocked(AppendFrame(nil, stream.ID, KindMessage, text)); err != nil {
		stream.Drop()
		return nil, err
	}
	return stream, nil
}

// Accept waits for the next stream that the peer opens; its Request says what for.
func (c *Conn) Accept() (*Stream, error) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	for len(c.opened) == 0 && c.err == nil {
		c.changed.Wait()
	}
	if c.err != nil {
		return nil, c.err
	}
	stream := c.opened[0]
	c.opened = c.opened[1:]
	return stream, nil
}

// Done is closed when the connection has ended; Err then says why.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err says why the connection ended: io.EOF for a peer that closed it, ErrClosed, *ProtocolError, *Error (the peer's
// fatal) or what the system said; nil while it is open.
func (c *Conn) Err() error {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return c.err
}

// Close ends the connection and all its streams.
func (c *Conn) Close() { c.fail(ErrClosed) }

// Fatal tells the peer why, if it listens, and ends the connection.
func (c *Conn) Fatal(code, message string) {
	c.sendFatal(code, message)
	c.fail(&Error{TypeFatal, code, message})
}

func (c *Conn) sendFatal(code, message string) {
	// A writer that holds the lock is stuck or in the middle of a frame: then nothing can be told.
	limited, ok := c.rw.(interface{ SetWriteDeadline(time.Time) error })
	if !ok || !c.writing.TryLock() {
		return
	}
	defer c.writing.Unlock()
	_ = limited.SetWriteDeadline(time.Now().Add(fatalDeadline))
	text := Encode(Error{TypeFatal, code, message})
	_, _ = c.rw.Write(AppendFrame(nil, 0, KindMessage, text))
}

func (c *Conn) fail(err error) {
	c.mutex.Lock()
	if c.err != nil {
		c.mutex.Unlock()
		return
	}
	c.err = err
	streams := c.streams
	c.streams, c.opened = nil, nil
	c.changed.Broadcast()
	c.mutex.Unlock()
	close(c.done)
	_ = c.rw.Close()
	for _, stream := range streams {
		stream.end(err)
	}
}

// Protect runs work for this connection: a panic in it ends the connection, not the process.
func (c *Conn) Protect(work func()) {
	defer func() {
		if cause := recover(); cause != nil {
			report(cause)
			c.fail(&Error{TypeFatal, CodeInternal, "the connection was given up: this is a bug"})
		}
	}()
	work()
}

// report says what a programmer needs to know, where somebody may see it.
func report(cause any) {
	text := "berth-agent: panic: "
	switch cause := cause.(type) {
	case error:
		text += cause.Error()
	case string:
		text += cause
	}
	_, _ = os.Stderr.WriteString(text + "\n" + string(debug.Stack()))
}

// write sends whole frames.
func (c *Conn) write(frames []byte) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	return c.writeLocked(frames)
}

func (c *Conn) writeLocked(frames []byte) error {
	if c.broken == nil {
		if _, c.broken = c.rw.Write(frames); c.broken != nil {
			// A peer that has closed has mostly said why before: let the reader come to it.
			time.AfterFunc(fatalDeadline, func() { c.fail(c.broken) })
		}
	}
	return c.broken
}

func (c *Conn) read() {
	err := c.readFrames(NewDecoder(c.options.Side.incoming()))
	var wrong *ProtocolError
	if errors.As(err, &wrong) {
		c.sendFatal(CodeProtocol, wrong.Text)
	}
	c.fail(err)
}

func (c *Conn) readFrames(decoder *Decoder) error {
	for {
		count, err := c.rw.Read(decoder.Space())
		decoder.Advance(count)
		for {
			frame, ok, err := decoder.Next()
			if err == nil && ok {
				err = c.handle(decoder, frame)
			}
			if err != nil {
				return err
			}
			if !ok {
				break
			}
		}
		if err != nil {
			return err
		}
	}
}

func (c *Conn) handle(decoder *Decoder, frame Frame) error {
	if c.hello == nil || frame.Stream == 0 {
		return c.handleConnection(frame)
	}
	stream, err := c.find(frame)
	if err != nil || stream == nil {
		return err
	}
	switch frame.Kind {
	case KindMessage:
		return stream.receiveMessage(frame.Message)
	case KindCredit:
		return stream.receiveCredit(frame.CreditPayload())
	}
	return stream.receiveData(decoder, frame)
}

// handleConnection takes the messages about the connection itself: the peer's hello, then nothing but fatal.
func (c *Conn) handleConnection(frame Frame) error {
	if frame.Stream != 0 || frame.Kind != KindMessage {
		return broken("a frame before hello")
	}
	switch frame.Message.Type {
	case TypeFatal:
		fatal := &Error{}
		if err := frame.Message.Decode(fatal); err != nil {
			return err
		}
		return fatal
	case TypeHello:
		if c.hello == nil {
			return c.greet(frame.Message)
		}
		return broken("a second hello")
	}
	return broken("'" + clip(frame.Message.Type, maxName) + "' on stream 0")
}

func (c *Conn) greet(message Message) error {
	hello := &Hello{}
	if err := message.Decode(hello); err != nil {
		return err
	}
	if hello.Protocol != ProtocolVersion {
		them, us := strconv.Itoa(hello.Protocol), strconv.Itoa(ProtocolVersion)
		text := "this agent speaks protocol " + us + ", the client " + them + ": restart the machine"
		if c.options.Side == Host {
			text = "the agent speaks protocol " + them + ", this berth " + us + ": restart the machine"
		}
		c.sendFatal(CodeProtocol, text)
		return &Error{TypeFatal, CodeProtocol, text}
	}
	if c.options.Side == Guest {
		if hello.Role != "client" && hello.Role != "keeper" {
			return broken("a hello with the role '" + clip(hello.Role, maxName) + "'")
		}
		answer := Hello{Type: TypeHello, Protocol: ProtocolVersion, Version: c.options.Version, Init: c.options.InitState()}
		_ = c.write(AppendFrame(nil, 0, KindMessage, Encode(answer)))
	}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.hello = hello
	c.changed.Broadcast()
	return nil
}

// find returns the stream that a frame is for: nil when the frame is to be dropped, or was the opening one.
func (c *Conn) find(frame Frame) (*Stream, error) {
	c.mutex.Lock()
	stream := c.streams[frame.Stream]
	fromPeer := (frame.Stream%2 == 1) == (c.options.Side == Guest)
	known := uint64(frame.Stream) < c.nextOwn
	if fromPeer {
		known = frame.Stream <= c.lastPeer
	}
	ended := c.err
	c.mutex.Unlock()
	switch {
	case ended != nil:
		return nil, ended
	case stream != nil && frame.Kind == KindMessage && canOpen(frame.Message.Type):
		return nil, broken("a request on an open stream")
	case stream != nil || known:
		return stream, nil
	case !fromPeer || frame.Kind != KindMessage || !canOpen(frame.Message.Type):
		return nil, broken("a frame for a stream that was never opened")
	}
	return nil, c.admit(frame)
}

// admit books a stream that the peer opens, or refuses it.
func (c *Conn) admit(frame Frame) error {
	if c.book(frame) {
		return nil
	}
	refusal := Encode(Refusal(CodeBusy, "too many streams are open in this connection"))
	_ = c.write(AppendFrame(nil, frame.Stream, KindMessage, refusal))
	return nil
}

func (c *Conn) book(frame Frame) bool {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.lastPeer = frame.Stream
	if c.err != nil {
		return true // it is over anyway
	}
	if c.foreign >= c.options.MaxStreams || c.pending+len(frame.Payload) > c.maxPending() {
		return false
	}
	stream := newStream(c, frame.Stream)
	stream.foreign = true
	stream.Request = frame.Message.copy()
	stream.charged = len(frame.Payload)
	c.pending += stream.charged
	c.foreign++
	c.streams[stream.ID] = stream
	c.opened = append(c.opened, stream)
	c.changed.Broadcast()
	return true
}

// forget takes an ended stream off the table; frames for it are dropped from now on.
func (c *Conn) forget(stream *Stream) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if _, open := c.streams[stream.ID]; open {
		delete(c.streams, stream.ID)
		if stream.foreign {
			c.foreign--
		}
	}
}

// charge books bytes of messages that wait (or, negative, that were taken); false when they would be too many.
func (c *Conn) charge(bytes int) bool {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if bytes > 0 && c.pending+bytes > c.maxPending() {
		return false
	}
	c.pending += bytes
	return true
}

func (m Message) copy() Message { return Message{m.Type, append([]byte(nil), m.Raw...)} }

// clip keeps what a peer said short enough to be told back.
func clip(text string, most int) string { return text[:min(len(text), most)] }
