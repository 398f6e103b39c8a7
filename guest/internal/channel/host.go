package channel

import (
	"errors"
	"io"
	"os"
	"time"

	"berth.dev/guest/internal/wire"
)

// maxStale is how much is dropped while the answer has not come. What an agent still had to send to the keeper before
// is far less; a guest that floods costs no more than this in each attempt.
const maxStale = 16 << 20

// The errors of Dial, besides those of the socket.
var (
	ErrNoAnswer = errors.New("the guest does not answer")
	ErrFlood    = errors.New("the guest sends something else")
)

// Wait says how long attempt number n, from 0 on, waits for its answer (docs/protocol.md).
func Wait(n int) time.Duration { return min(time.Second<<min(n, 3), 5*time.Second) }

// Dial is the host's end. It makes one attempt on a fresh connection to the port's socket: it writes a line and drops
// what comes until it comes back. What it returns is the socket, at the beginning of a connection.
//
// Without an answer the caller closes the socket and comes again with another, after a moment. That hang-up gets a
// guest out of the middle of a frame which it would otherwise go on filling with our lines.
func Dial(socket *wire.Socket, wait time.Duration) (io.ReadWriteCloser, error) {
	if wait > 0 {
		_ = socket.SetReadDeadline(time.Now().Add(wait))
		_ = socket.SetWriteDeadline(time.Now().Add(wait))
	}
	own := newNonce()
	unread, err := exchange(socket, own)
	if err != nil {
		return nil, err
	}
	_ = socket.SetReadDeadline(time.Time{})
	_ = socket.SetWriteDeadline(time.Time{})
	return &dialled{Socket: socket, unread: unread}, nil
}

func exchange(socket *wire.Socket, own nonce) (unread []byte, err error) {
	if _, err := socket.Write(own.line()); err != nil {
		return nil, explain(err)
	}
	var s seeker
	buffer := make([]byte, seekSize)
	for total := 0; total < maxStale; {
		count, err := socket.Read(buffer)
		if total += count; err != nil {
			return nil, explain(err)
		}
		for rest := buffer[:count]; len(rest) > 0; {
			used, found := s.feed(rest)
			rest = rest[used:]
			if found && s.nonce == own {
				return append(unread, rest...), nil
			}
		}
	}
	return nil, ErrFlood
}

func explain(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ErrNoAnswer
	}
	return err
}

// dialled is the socket with what came right behind the answer.
type dialled struct {
	*wire.Socket
	unread []byte
}

// Read reads.
func (d *dialled) Read(data []byte) (int, error) {
	if len(d.unread) > 0 {
		count := copy(data, d.unread)
		d.unread = d.unread[count:]
		return count, nil
	}
	return d.Socket.Read(data)
}
