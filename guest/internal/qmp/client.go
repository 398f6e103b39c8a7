package qmp

import (
	"errors"
	"io"
	"time"
)

// Socket is what a client needs of a connection.
type Socket interface {
	io.ReadWriteCloser
	SetReadDeadline(at time.Time) error
	SetWriteDeadline(at time.Time) error
}

const (
	readSize = 4096
	// writeTime is how long QEMU may take to read a command.
	writeTime = 10 * time.Second
)

// Client is an open connection. It belongs to one goroutine; closing its socket is what another one may do.
type Client struct {
	socket  Socket
	decoder Decoder
	waiting []Message
	lastID  uint64
}

// Open takes QEMU's greeting and begins. It takes at most timeout; the socket stays the caller's.
func Open(socket Socket, timeout time.Duration) (*Client, error) {
	c := &Client{socket: socket}
	deadline := time.Now().Add(timeout)
	greeting, err := c.Next(deadline)
	if err == nil && !greeting.Greeting {
		err = ErrProtocol
	}
	if err != nil {
		return nil, err
	}
	id, err := c.Send("qmp_capabilities")
	if err != nil {
		return nil, err
	}
	for {
		answer, err := c.Next(deadline)
		switch {
		case err != nil:
			return nil, err
		case answer.ID == id && answer.Return == nil:
			return nil, errors.New("QEMU refused qmp_capabilities")
		case answer.ID == id:
			return c, nil
		}
	}
}

// Send asks for a command without arguments and returns the ID that its answer will have.
func (c *Client) Send(name string) (id uint64, err error) {
	c.lastID++
	_ = c.socket.SetWriteDeadline(time.Now().Add(writeTime))
	_, err = c.socket.Write(Command(name, c.lastID))
	return c.lastID, err
}

// Next waits for the next message, until a time (os.ErrDeadlineExceeded); the zero time: for ever.
func (c *Client) Next(until time.Time) (Message, error) {
	var buffer [readSize]byte
	for len(c.waiting) == 0 {
		_ = c.socket.SetReadDeadline(until)
		count, failed := c.socket.Read(buffer[:])
		var err error
		if c.waiting, err = c.decoder.Feed(buffer[:count]); err == nil && len(c.waiting) == 0 {
			err = failed
		}
		if err != nil {
			return Message{}, err
		}
	}
	message := c.waiting[0]
	c.waiting = c.waiting[1:]
	return message, nil
}
