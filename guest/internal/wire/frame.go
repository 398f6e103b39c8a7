// Package wire is the agent protocol of docs/protocol.md, version 1.
//
// It owns frames, messages and flow control. frame.go, message.go and flow.go are sans-I/O (bytes in, values out);
// conn.go carries them over any io.ReadWriteCloser for either side; socket.go is the little that is needed of sockets.
// serve, exec and keeper may call it; it calls nothing of the agent's.
package wire

import (
	"encoding/binary"
	"strconv"
)

// The numbers of docs/protocol.md.
const (
	ProtocolVersion   = 1
	HeaderSize        = 9
	MaxData           = 262144  // bytes in a data frame
	MaxMessageToGuest = 4194304 // bytes in a message: argv may be long
	MaxMessageToHost  = 65536
	Window            = 1048576 // bytes of credit that a sender starts with, per stream and kind
	MaxStreams        = 1024    // open at once in one connection
	MaxDepth          = 32      // levels of JSON
	creditSize        = 5
)

// Kind says what the payload of a frame is.
type Kind uint8

// The kinds of docs/protocol.md. On every stream the host sends Stdin, and the guest Stdout and Stderr.
const (
	KindMessage Kind = iota
	Stdin
	Stdout
	Stderr
	KindCredit
)

func (k Kind) isData() bool { return Stdin <= k && k <= Stderr }

// Direction is where the bytes of a decoder are going.
type Direction uint8

// The two directions; each has its own longest message.
const (
	ToGuest Direction = iota
	ToHost
)

func (d Direction) maxMessage() int {
	if d == ToGuest {
		return MaxMessageToGuest
	}
	return MaxMessageToHost
}

// ProtocolError says which rule of the protocol was broken. The connection it came by is at its end.
type ProtocolError struct{ Text string }

func (e *ProtocolError) Error() string { return "protocol error: " + e.Text }

func broken(text string) error { return &ProtocolError{text} }

// Frame is one frame. Payload belongs to the decoder and is valid until its next call; so does the Message, which is
// set for KindMessage.
type Frame struct {
	Stream  uint32
	Kind    Kind
	Payload []byte
	Message Message
}

// CreditPayload reads the payload of a CREDIT frame, which the decoder has checked.
func (f Frame) CreditPayload() (Kind, uint32) {
	return Kind(f.Payload[0]), binary.BigEndian.Uint32(f.Payload[1:])
}

// PutHeader writes the header of a frame whose payload has size bytes into the first HeaderSize bytes of dst.
func PutHeader(dst []byte, stream uint32, kind Kind, size int) {
	binary.BigEndian.PutUint32(dst, uint32(size))
	binary.BigEndian.PutUint32(dst[4:], stream)
	dst[8] = byte(kind)
}

// AppendFrame appends a whole frame. The caller keeps within the limits.
func AppendFrame(dst []byte, stream uint32, kind Kind, payload []byte) []byte {
	var header [HeaderSize]byte
	PutHeader(header[:], stream, kind, len(payload))
	return append(append(dst, header[:]...), payload...)
}

// AppendCredit appends a CREDIT frame.
func AppendCredit(dst []byte, stream uint32, kind Kind, count uint32) []byte {
	payload := [creditSize]byte{byte(kind)}
	binary.BigEndian.PutUint32(payload[1:], count)
	return AppendFrame(dst, stream, KindCredit, payload[:])
}

// Decoder makes frames of bytes. It never holds more than one frame and what one read brought after it.
type Decoder struct {
	direction  Direction
	buffer     *Buffer
	start, end int  // the bytes of buffer that are not decoded yet
	bulk       bool // the last frame needed more than a small buffer
	err        error
}

// NewDecoder makes a decoder for the bytes that go one way.
func NewDecoder(direction Direction) *Decoder {
	return &Decoder{direction: direction, buffer: getBuffer(smallBuffer)}
}

// Feed takes bytes; call Next until it has no more frames, then Feed again. It takes at most what Space offers and
// says how many.
func (d *Decoder) Feed(data []byte) int {
	count := copy(d.Space(), data)
	d.Advance(count)
	return count
}

// Space returns where the next bytes are to be read into: never empty once Next has said that it has no frame.
// With a frame begun it ends where the frame does, so that the next one starts at the front of the buffer.
func (d *Decoder) Space() []byte {
	if d.start == d.end {
		d.start, d.end = 0, 0
	}
	need := HeaderSize
	if d.end-d.start >= HeaderSize {
		need += int(binary.BigEndian.Uint32(d.buffer.Bytes[d.start:]))
	}
	d.fit(need)
	if d.end-d.start >= HeaderSize && need > smallBuffer {
		return d.buffer.Bytes[d.end : d.start+need]
	}
	return d.buffer.Bytes[d.end:]
}

// Advance says how many bytes were read into Space.
func (d *Decoder) Advance(count int) { d.end += count }

// fit makes the buffer hold a frame of need bytes from start on.
func (d *Decoder) fit(need int) {
	size := len(d.buffer.Bytes)
	switch {
	case need > size:
		d.replace(getBuffer(need))
	case d.start+need > size:
		copy(d.buffer.Bytes, d.buffer.Bytes[d.start:d.end])
		d.start, d.end = 0, d.end-d.start
	case d.start == d.end && size > smallBuffer && (size > bigBuffer || !d.bulk):
		d.replace(getBuffer(smallBuffer)) // what needed the large one has passed
	}
}

func (d *Decoder) replace(buffer *Buffer) {
	d.end = copy(buffer.Bytes, d.buffer.Bytes[d.start:d.end])
	d.start = 0
	d.buffer.Release()
	d.buffer = buffer
}

// steal hands over the buffer that the frame just returned lies in, when nothing follows it and it is mostly filled: what
// waits takes at most twice its size in memory.
func (d *Decoder) steal(payload []byte) *Buffer {
	if len(payload) < bigBuffer/2 || d.start != d.end || len(d.buffer.Bytes) != bigBuffer {
		return nil
	}
	buffer := d.buffer
	d.buffer, d.start, d.end = getBuffer(bigBuffer), 0, 0
	return buffer
}

// Next returns the next frame; ok is false when more bytes are needed. An error is a *ProtocolError and final.
func (d *Decoder) Next() (frame Frame, ok bool, err error) {
	if d.err != nil {
		return Frame{}, false, d.err
	}
	pending := d.buffer.Bytes[d.start:d.end]
	if len(pending) < HeaderSize {
		return Frame{}, false, nil
	}
	size := binary.BigEndian.Uint32(pending)
	frame = Frame{Stream: binary.BigEndian.Uint32(pending[4:]), Kind: Kind(pending[8])}
	if d.err = d.checkHeader(frame, size); d.err != nil {
		return Frame{}, false, d.err
	}
	total := HeaderSize + int(size)
	if len(pending) < total {
		return Frame{}, false, nil
	}
	frame.Payload = pending[HeaderSize:total:total]
	if frame.Message, d.err = checkPayload(frame); d.err != nil {
		return Frame{}, false, d.err
	}
	d.start += total
	d.bulk = total > smallBuffer
	return frame, true, nil
}

func (d *Decoder) checkHeader(frame Frame, size uint32) error {
	switch {
	case frame.Kind > KindCredit:
		return broken("unknown kind " + strconv.Itoa(int(frame.Kind)))
	case frame.Kind == KindMessage && int64(size) > int64(d.direction.maxMessage()):
		return broken("a message of " + strconv.FormatUint(uint64(size), 10) + " bytes")
	case frame.Kind.isData() && size > MaxData:
		return broken("a data frame of " + strconv.FormatUint(uint64(size), 10) + " bytes")
	case frame.Kind == KindCredit && size != creditSize:
		return broken("a credit of " + strconv.FormatUint(uint64(size), 10) + " bytes")
	case frame.Kind != KindMessage && frame.Stream == 0:
		return broken("kind " + strconv.Itoa(int(frame.Kind)) + " on stream 0")
	}
	return nil
}

func checkPayload(frame Frame) (Message, error) {
	switch frame.Kind {
	case KindCredit:
		if kind, count := frame.CreditPayload(); !kind.isData() || count == 0 {
			return Message{}, broken("a credit for nothing")
		}
	case KindMessage:
		return ParseMessage(frame.Payload)
	}
	return Message{}, nil
}
