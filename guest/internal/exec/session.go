package exec

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"berth.dev/guest/internal/wire"
)

const (
	// drainTime is how long after the command's exit its pipes are read to their end; then only what is there.
	drainTime = 100 * time.Millisecond
	// hangupTime is between the SIGHUP and the SIGKILL for a command whose client has vanished.
	hangupTime = 5 * time.Second
	// endTime is how long an end of file waits for the exit that mostly follows, to go out in one write with it.
	endTime = time.Millisecond
	// maxRefusal is how many bytes of a refusal are told.
	maxRefusal = 1000
)

// session is a running command and its client.
type session struct {
	stream  *wire.Stream
	process *process
	tty     bool
	stdin   *wire.Socket // a tty: the master, for all three
	stdout  *wire.Socket
	stderr  *wire.Socket // nil for a tty

	mutex sync.Mutex
	ended []wire.Kind // ends of file that were not sent yet
}

// Run serves one exec request from the beginning to its final message. It returns when the command's end has been told,
// or when the command is gone whose client has vanished; with a detached one, at once.
func Run(stream *wire.Stream, request *wire.Exec, config Config) {
	c, err := plan(request, config)
	if err != nil {
		refuse(stream, err)
		return
	}
	if c.detach {
		runDetached(stream, c)
		return
	}
	s, err := begin(stream, c)
	if err != nil {
		refuse(stream, err)
		return
	}
	// If this can't be sent the stream has ended, and the session sees to that.
	_ = stream.Send(wire.Started{Type: wire.TypeStarted, PID: s.process.pid})
	s.run()
}

func refuse(stream *wire.Stream, err error) {
	var refusal *wire.Error
	if !errors.As(err, &refusal) {
		refusal = wire.Refusal(wire.CodeInternal, err.Error())
	}
	if len(refusal.Message) > maxRefusal { // a name can be as long as an argument
		refusal.Message = refusal.Message[:maxRefusal] + "…"
	}
	_ = stream.Finish(refusal)
}

func runDetached(stream *wire.Stream, c *command) {
	null, err := syscall.Open("/dev/null", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		refuse(stream, internal("/dev/null", err))
		return
	}
	defer syscall.Close(null)
	process, err := launch(c, [3]int{null, null, null}, false)
	if err != nil {
		refuse(stream, err)
		return
	}
	_ = stream.Finish(wire.Started{Type: wire.TypeStarted, PID: process.pid})
}

// begin starts the command with a terminal or pipes.
func begin(stream *wire.Stream, c *command) (*session, error) {
	if c.tty != nil {
		return beginTerminal(stream, c)
	}
	return beginPipes(stream, c)
}

func beginTerminal(stream *wire.Stream, c *command) (*session, error) {
	master, slave, err := openPty(*c.tty, c.user.UID)
	if err != nil {
		return nil, internal("no pseudo-terminal", err)
	}
	defer syscall.Close(slave)
	socket, err := wire.NewSocket(master)
	if err != nil {
		return nil, internal("no pseudo-terminal", err)
	}
	process, err := launch(c, [3]int{slave, slave, slave}, true)
	if err != nil {
		_ = socket.Close()
		return nil, err
	}
	return &session{stream: stream, process: process, tty: true, stdin: socket, stdout: socket}, nil
}

func beginPipes(stream *wire.Stream, c *command) (*session, error) {
	var pipes pipeSet
	defer pipes.closeTheirs()
	stdin, stdout, stderr := pipes.add(c.user.UID, 1), pipes.add(c.user.UID, 0), pipes.add(c.user.UID, 0)
	if pipes.err != nil {
		pipes.closeOurs()
		return nil, internal("no pipe", pipes.err)
	}
	process, err := launch(c, [3]int(pipes.theirs), false)
	if err != nil {
		pipes.closeOurs()
		return nil, err
	}
	return &session{stream: stream, process: process, stdin: stdin, stdout: stdout, stderr: stderr}, nil
}

// pipeSet collects pipes while they are made: our ends and the command's.
type pipeSet struct {
	ours   []*wire.Socket
	theirs []int
	err    error
}

// add makes a pipe of which our end is ends[own], and returns that.
func (p *pipeSet) add(uid uint32, own int) *wire.Socket {
	if p.err != nil {
		return nil
	}
	var ends [2]int
	if p.err = syscall.Pipe2(ends[:], syscall.O_CLOEXEC); p.err != nil {
		return nil
	}
	// The command may open its own /dev/stdout anew, and that asks whose the pipe is.
	_ = syscall.Fchown(ends[1-own], int(uid), -1)
	p.theirs = append(p.theirs, ends[1-own])
	socket, err := wire.NewSocket(ends[own])
	if p.err = err; err == nil {
		p.ours = append(p.ours, socket)
	}
	return socket
}

func (p *pipeSet) closeTheirs() {
	for _, fd := range p.theirs {
		_ = syscall.Close(fd)
	}
}

func (p *pipeSet) closeOurs() {
	for _, socket := range p.ours {
		_ = socket.Close()
	}
}

// run carries bytes and messages until the end.
func (s *session) run() {
	defer s.close()
	// A panic ends the connection, and that hangs up here.
	protect := s.stream.Conn().Protect
	go protect(s.feed)
	go protect(s.obey)
	var outputs sync.WaitGroup
	outputs.Go(func() { protect(func() { s.carry(wire.Stdout, s.stdout) }) })
	if s.tty {
		s.end(wire.Stderr)
	} else {
		outputs.Go(func() { protect(func() { s.carry(wire.Stderr, s.stderr) }) })
	}
	select {
	case <-s.process.exited:
	case <-s.stream.Done():
		s.hangUp()
		return
	}
	// Somebody in the background may hold the pipes open for as long as they like.
	drained := time.AfterFunc(drainTime, s.stopWaiting)
	defer drained.Stop()
	outputs.Wait()
	_ = s.stream.FinishWithEnds(s.process.message(), s.takeEnds()...)
}

func (s *session) stopWaiting() {
	now := time.Now()
	_ = s.stdout.SetReadDeadline(now)
	if s.stderr != nil {
		_ = s.stderr.SetReadDeadline(now)
	}
}

// carry sends what the command writes to one of its outputs, and the end of it.
func (s *session) carry(kind wire.Kind, source *wire.Socket) {
	readErr, sendErr := s.stream.SendFrom(kind, source)
	if errors.Is(readErr, os.ErrDeadlineExceeded) {
		sendErr = s.stream.SendReady(kind, source)
	}
	// Other reading errors are ends too: EIO of a terminal that nobody has open, our own Close when the client asked.
	if sendErr != nil && sendErr != io.ErrClosedPipe {
		s.discard(source)
		return
	}
	s.end(kind)
	select {
	case <-s.process.exited:
	case <-time.After(endTime):
		for _, kind := range s.takeEnds() {
			_ = s.stream.CloseWrite(kind)
		}
	}
}

// discard reads on for a client that has vanished, so that the command may do what it does at a SIGHUP in peace and not
// die of a broken pipe before.
func (s *session) discard(source *wire.Socket) {
	_ = source.SetReadDeadline(time.Time{})
	_, _ = io.CopyBuffer(io.Discard, struct{ io.Reader }{source}, make([]byte, 4096))
}

func (s *session) end(kind wire.Kind) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.ended = append(s.ended, kind)
}

func (s *session) takeEnds() []wire.Kind {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	ended := s.ended
	s.ended = nil
	return ended
}

// feed writes the client's input to the command.
func (s *session) feed() {
	target := &lastByte{Writer: s.stdin, last: '\n'}
	receiveErr, writeErr := s.stream.WriteTo(wire.Stdin, target)
	switch {
	case receiveErr != nil || writeErr != nil:
	case s.tty:
		s.typeEndOfFile(target.last == '\n')
		return // the terminal stays
	}
	if !s.tty {
		_ = s.stdin.Close()
	}
}

// typeEndOfFile does what a person at the terminal would do: one Ctrl-D ends a line, one at its beginning the file.
func (s *session) typeEndOfFile(lineBegins bool) {
	var keys []byte
	_ = s.stdin.Raw().Control(func(fd uintptr) { keys = append(keys, endOfFile(fd)) })
	if !lineBegins {
		keys = append(keys, keys...)
	}
	_, _ = s.stdin.Write(keys)
}

type lastByte struct {
	io.Writer
	last byte
}

func (w *lastByte) Write(data []byte) (int, error) {
	if len(data) > 0 {
		w.last = data[len(data)-1]
	}
	return w.Writer.Write(data)
}

// obey does what the client's messages say, until the stream ends.
func (s *session) obey() {
	for {
		message, err := s.stream.ReadMessage(0)
		if err != nil {
			return
		}
		if err := s.handle(message); err != nil {
			s.stream.Conn().Fatal(wire.CodeProtocol, err.Error())
			return
		}
	}
}

func (s *session) handle(message wire.Message) error {
	switch message.Type {
	case wire.TypeResize:
		var resize wire.Resize
		if err := message.Decode(&resize); err != nil {
			return err
		}
		if s.tty {
			_ = s.stdin.Raw().Control(func(fd uintptr) { setSize(fd, resize.Size) })
		}
	case wire.TypeSignal:
		var signal wire.Signal
		if err := message.Decode(&signal); err != nil {
			return err
		}
		if number, known := signalNumber(signal.Signal); known {
			s.signal(number)
		}
	case wire.TypeClose:
		var closing wire.Close
		if err := message.Decode(&closing); err != nil {
			return err
		}
		s.closeOutput(closing.Kind)
	}
	return nil // what a newer client says besides is passed over
}

// signal reaches the foreground group of a terminal, else the command's own.
func (s *session) signal(number syscall.Signal) {
	group := 0
	if s.tty {
		_ = s.stdin.Raw().Control(func(fd uintptr) { group = foreground(fd) })
	}
	if group > 0 {
		_ = syscall.Kill(-group, number)
		return
	}
	s.process.signalGroup(number)
}

// closeOutput is for a client that reads no more: the command meets SIGPIPE, or its terminal hangs up.
func (s *session) closeOutput(kind wire.Kind) {
	source := s.stdout
	if kind == wire.Stderr {
		source = s.stderr
	}
	if (kind != wire.Stdout && kind != wire.Stderr) || source == nil {
		return
	}
	_ = source.Close()
	s.stream.StopWriting(kind)
}

// hangUp is for a client that has vanished: the command is told, as by a modem that lost its carrier, then killed.
func (s *session) hangUp() {
	select {
	case <-s.process.exited:
		return // by itself; only its end could not be told
	default:
	}
	s.process.signalGroup(syscall.SIGHUP)
	s.process.signalGroup(syscall.SIGCONT) // a stopped one would not hear it
	_ = s.stdin.Close()                    // with the master of its terminal gone, the kernel hangs up on all its jobs
	kill := time.NewTimer(hangupTime)
	defer kill.Stop()
	select {
	case <-s.process.exited:
		if s.process.groupIsEmpty() {
			return
		}
		<-kill.C
	case <-kill.C:
	}
	s.process.killGroup()
	<-s.process.exited
}

func (s *session) close() {
	_ = s.stdin.Close()
	_ = s.stdout.Close()
	if s.stderr != nil {
		_ = s.stderr.Close()
	}
}
