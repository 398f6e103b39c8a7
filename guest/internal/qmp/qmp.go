// Package qmp speaks QEMU's machine protocol with one QEMU: events come, commands without arguments go.
//
// qmp.go is sans-I/O (bytes in, messages out); client.go carries it over a socket. Package keeper calls it. What QEMU
// says is not trusted (a guest may have taken QEMU over): lines are bounded, and the words in them are only compared.
// Source: QEMU's docs/interop/qmp-spec.rst.
package qmp

import (
	"bytes"
	"encoding/json"
	"errors"
	"strconv"
)

// MaxLine bounds one message. Events and the answers to what is asked here are some hundred bytes.
const MaxLine = 64 << 10

// ErrProtocol is what QEMU would never say. The connection it came by is at its end.
var ErrProtocol = errors.New("this is no QMP")

// Message is one that QEMU sends: the greeting, an event, or the answer to a command.
type Message struct {
	Greeting bool
	Event    string          // its name; empty for all else
	Data     json.RawMessage // of the event
	ID       uint64          // of the answered command; 0 when QEMU did not tell
	Return   json.RawMessage // what the command gave; nil when it failed
	Failure  string          // why it failed
}

// Decode reads an event's data or a command's return value. What is missing keeps its zero value.
func Decode(from json.RawMessage, into any) error {
	if json.Unmarshal(from, into) != nil {
		return ErrProtocol
	}
	return nil
}

// Command makes the line that asks for a command without arguments.
func Command(name string, id uint64) []byte {
	return []byte(`{"execute":` + strconv.Quote(name) + `,"id":` + strconv.FormatUint(id, 10) + "}\n")
}

// Decoder makes messages of bytes. It never holds more than MaxLine of them.
type Decoder struct {
	line []byte // the begun one
	err  error
}

// Feed takes bytes and returns the messages that are whole now. An error is ErrProtocol and final; what came before the
// wrong line is returned with it.
func (d *Decoder) Feed(data []byte) (messages []Message, err error) {
	for d.err == nil && len(data) > 0 {
		piece, rest, whole := bytes.Cut(data, []byte{'\n'})
		if len(d.line)+len(piece) > MaxLine {
			d.line, d.err = nil, ErrProtocol
			break
		}
		d.line = append(d.line, piece...)
		if data = rest; !whole {
			break
		}
		var message Message
		var empty bool
		if message, empty, d.err = parse(d.line); d.err == nil && !empty {
			messages = append(messages, message)
		}
		d.line = d.line[:0]
	}
	return messages, d.err
}

func parse(line []byte) (message Message, empty bool, err error) {
	if line = bytes.TrimSpace(line); len(line) == 0 {
		return message, true, nil
	}
	var said struct {
		QMP    json.RawMessage
		Event  string
		Data   json.RawMessage
		ID     uint64
		Return json.RawMessage
		Error  *struct{ Desc string }
	}
	if line[0] != '{' || json.Unmarshal(line, &said) != nil {
		return message, false, ErrProtocol
	}
	message = Message{Greeting: said.QMP != nil, Event: said.Event, Data: said.Data, ID: said.ID, Return: said.Return}
	if said.Error != nil {
		message.Return, message.Failure = nil, said.Error.Desc
	}
	if !message.Greeting && message.Event == "" && message.Return == nil && said.Error == nil {
		return message, false, ErrProtocol
	}
	return message, false, nil
}
