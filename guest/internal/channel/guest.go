package channel

import (
	"errors"
	"io"
	"os"
	"sync"
	"time"
)

const (
	// answerTime is how long a host that sent a line may take to read the answer.
	answerTime = 5 * time.Second
	// announceTime is how long a new agent tries to tell a host of itself that may not be there.
	announceTime = 100 * time.Millisecond
	// reopenPause keeps a port that is broken for good from being opened in a circle.
	reopenPause = 50 * time.Millisecond
	seekSize    = 4096
)

// ErrHungUp is what a Port's Read says when the host has left. The port is still good: the next Read waits for a host.
var ErrHungUp = errors.New("the host has hung up")

// Serve is the guest's end. It opens the port and calls handle for each connection that the host begins; handle
// returns when the connection has ended, whoever ended it. A port that fails (other than by ErrHungUp) is closed and
// opened again. Serve returns only when it can't be opened.
func Serve(open func() (io.ReadWriteCloser, error), handle func(io.ReadWriteCloser)) error {
	for {
		port, err := open()
		if err != nil {
			return err
		}
		announce(port)
		serve(port, handle)
		_ = port.Close()
		time.Sleep(reopenPause)
	}
}

// announce sends a line that answers nothing. A host that still believes to be connected with the agent before us takes
// it for the error that it is and begins anew; any other drops it.
func announce(port io.ReadWriteCloser) {
	if limited, ok := port.(deadlines); ok {
		_ = limited.SetWriteDeadline(time.Now().Add(announceTime))
		_, _ = port.Write(newNonce().line())
		_ = limited.SetWriteDeadline(time.Time{})
	}
}

// serve makes connections of an open port until it fails.
func serve(port io.ReadWriteCloser, handle func(io.ReadWriteCloser)) {
	var unread []byte
	for {
		nonce, rest, err := seek(port, unread)
		if err == nil {
			unread, err = connect(port, nonce, rest, handle)
		}
		switch {
		case err == ErrHungUp: //nolint:errorlint // and nothing worse
			unread = nil // what came before means nothing any more
		case err != nil:
			return
		}
	}
}

// seek drops unread and what comes after it until a line has come, and returns what is behind it.
func seek(port io.Reader, unread []byte) (nonce, []byte, error) {
	var s seeker
	var buffer [seekSize]byte
	for {
		if used, found := s.feed(unread); found {
			return s.nonce, append([]byte(nil), unread[used:]...), nil
		}
		count, err := port.Read(buffer[:])
		if unread = buffer[:count]; count == 0 && err != nil {
			return nonce{}, nil, err
		}
	}
}

// connect answers a line, lets one connection have the port, and returns what came behind it.
func connect(port io.ReadWriteCloser, nonce nonce, unread []byte, handle func(io.ReadWriteCloser)) ([]byte, error) {
	l := &link{port: port, unread: unread}
	_ = l.SetWriteDeadline(time.Now().Add(answerTime))
	if _, err := port.Write(nonce.line()); err == nil {
		_ = l.SetWriteDeadline(time.Time{})
		handle(l)
	}
	return l.finish()
}

// link is one connection: what lies between two lines. Its owner closes it; the port stays open for the next.
type link struct {
	port             io.ReadWriteCloser
	reading, writing sync.Mutex // held while the port is in use

	// Guarded by reading.
	unread []byte // came already
	frames boundary
	ended  error // why nothing more comes

	mutex  sync.Mutex
	closed bool
}

// deadlines is what a port should have, so that who waits in it can be called back.
type deadlines interface {
	SetReadDeadline(at time.Time) error
	SetWriteDeadline(at time.Time) error
}

// Read gives what belongs to this connection: io.EOF at a line where a frame would begin, and when the host hung up.
func (l *link) Read(data []byte) (int, error) {
	l.reading.Lock()
	defer l.reading.Unlock()
	if l.ended != nil || l.isClosed() {
		return 0, io.EOF
	}
	count, failed := l.receive(data)
	if l.isClosed() { // meanwhile: it may be the next connection's
		l.unread = append(append([]byte(nil), data[:count]...), l.unread...)
		return 0, io.EOF
	}
	own := l.frames.scan(data[:count])
	if own < count {
		l.unread = append(append([]byte(nil), data[own:count]...), l.unread...)
		l.ended = io.EOF
	} else if failed != nil {
		l.ended = failed
	}
	if own == 0 && l.ended != nil {
		return 0, io.EOF
	}
	return own, nil
}

func (l *link) receive(data []byte) (int, error) {
	if len(l.unread) > 0 {
		count := copy(data, l.unread)
		l.unread = l.unread[count:]
		return count, nil
	}
	return l.port.Read(data)
}

// Write writes all of data.
func (l *link) Write(data []byte) (int, error) {
	l.writing.Lock()
	defer l.writing.Unlock()
	if l.isClosed() {
		return 0, os.ErrClosed
	}
	return l.port.Write(data)
}

// SetWriteDeadline ends a Write at a time; the zero time: never.
func (l *link) SetWriteDeadline(at time.Time) error {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	port, ok := l.port.(deadlines)
	if l.closed || !ok {
		return os.ErrNoDeadline
	}
	return port.SetWriteDeadline(at)
}

func (l *link) isClosed() bool { l.mutex.Lock(); defer l.mutex.Unlock(); return l.closed }

// Close calls back who waits in Read or Write. What they had begun to send stays half a frame: the host drops it.
func (l *link) Close() error {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	port, ok := l.port.(deadlines)
	if !ok {
		return l.port.Close()
	}
	past := time.Unix(1, 0)
	return errors.Join(port.SetReadDeadline(past), port.SetWriteDeadline(past))
}

// finish closes the connection, waits until nobody uses the port for it any more, and returns what came behind it. An
// error is the port's: it has to be opened again, unless it is ErrHungUp.
func (l *link) finish() ([]byte, error) {
	_ = l.Close()
	l.writing.Lock()
	defer l.writing.Unlock()
	l.reading.Lock()
	defer l.reading.Unlock()
	port, ok := l.port.(deadlines)
	if !ok {
		return nil, os.ErrClosed
	}
	if err := errors.Join(port.SetReadDeadline(time.Time{}), port.SetWriteDeadline(time.Time{})); err != nil {
		return nil, err
	}
	if l.ended == io.EOF { //nolint:errorlint // our own mark: a line
		return l.unread, nil
	}
	return l.unread, l.ended
}
