package wire

import (
	"encoding/json"
	"unicode/utf8"
)

// Message is a JSON object whose `type` is known; Decode reads the rest.
type Message struct {
	Type string
	Raw  []byte
}

// The types of messages (docs/protocol.md).
const (
	TypeHello     = "hello"
	TypeFatal     = "fatal"
	TypeExec      = "exec"
	TypeStarted   = "started"
	TypeExit      = "exit"
	TypeError     = "error"
	TypeResize    = "resize"
	TypeSignal    = "signal"
	TypeClose     = "close"
	TypeStatus    = "status"
	TypeResult    = "result"
	TypeWait      = "wait"
	TypePoweroff  = "poweroff"
	TypeDial      = "dial"
	TypeClosed    = "closed"
	TypeListeners = "listeners"
	TypeListening = "listening"
	TypeCancel    = "cancel"
	TypeConsole   = "console"
	TypeClock     = "clock"
	TypeOpen      = "open"
	TypeConnect   = "connect"
)

// The codes of `error` and `fatal`.
const (
	CodeNotFound        = "not_found"
	CodeNotExecutable   = "not_executable"
	CodeInvalidArgument = "invalid_argument"
	CodeInternal        = "internal"
	CodeBusy            = "busy"
	CodeProtocol        = "protocol"
	CodeUnsupported     = "unsupported"
)

// maxReason is how many bytes of a reason in somebody else's words are told on.
const maxReason = 300

// Bytes is a byte string that need not be UTF-8: base64 in JSON.
type Bytes = []byte

// Hello is the first message of each side.
type Hello struct {
	Type     string `json:"type"`
	Protocol int    `json:"protocol"`
	Version  string `json:"version"`
	Role     string `json:"role,omitempty"` // the client's: "client" or "keeper"
	Init     string `json:"init,omitempty"` // the agent's: STATE
}

// Size is a window size.
type Size struct {
	Rows uint16 `json:"rows"`
	Cols uint16 `json:"cols"`
}

// Exec asks for a command to be run.
type Exec struct {
	Type        string  `json:"type"`
	Argv        []Bytes `json:"argv"`
	Shell       bool    `json:"shell"`
	Env         []Bytes `json:"env"`
	Cwd         *Bytes  `json:"cwd"` // nil: the user's home
	CwdOptional bool    `json:"cwdOptional"`
	User        *string `json:"user"` // nil: the twin
	Tty         *Size   `json:"tty"`
	Detach      bool    `json:"detach"`
}

// Started says that it runs.
type Started struct {
	Type string `json:"type"`
	PID  int    `json:"pid,omitempty"`
}

// Exit is the end of a command: by a code or by a signal.
type Exit struct {
	Type   string `json:"type"`
	Code   *int   `json:"code,omitempty"`
	Signal string `json:"signal,omitempty"`
}

// Error refuses a request (TypeError) or ends a connection (TypeFatal).
type Error struct {
	Type    string `json:"type"`
	Code    string `json:"code"`
	Message string `json:"message"`
}

// Refusal makes an `error` message.
func Refusal(code, message string) *Error { return &Error{TypeError, code, message} }

func (e *Error) Error() string { return e.Message }

// Resize tells a new window size.
type Resize struct {
	Type string `json:"type"`
	Size
}

// Signal is to be delivered to the command: a name without SIG, or a decimal number.
type Signal struct {
	Type   string `json:"type"`
	Signal string `json:"signal"`
}

// Close says that the client reads no more of a kind.
type Close struct {
	Type string `json:"type"`
	Kind Kind   `json:"kind"`
}

// Status answers a status request.
type Status struct {
	Type    string  `json:"type"`
	Init    string  `json:"init"`
	System  string  `json:"system"`
	Version string  `json:"version"`
	Twin    string  `json:"twin"`
	Uptime  float64 `json:"uptime"` // seconds since the machine's first process was started
}

// Wait asks for a result when the init has settled.
type Wait struct {
	Type string `json:"type"`
	For  string `json:"for"`
}

// Result answers a request; Init only where the request is about it.
type Result struct {
	Type string `json:"type"`
	Init string `json:"init,omitempty"`
}

// Dial asks for a connection to a TCP port of the guest.
type Dial struct {
	Type string `json:"type"`
	Port int    `json:"port"`
}

// Listening tells the TCP ports that listen.
type Listening struct {
	Type  string `json:"type"`
	Ports []int  `json:"ports"`
}

// Clock sets the guest's clock.
type Clock struct {
	Type      string `json:"type"`
	UnixNanos int64  `json:"unixNanos"`
}

// Open asks the keeper for a service of the host.
type Open struct {
	Type    string `json:"type"`
	Service string `json:"service"`
}

// Plain is a message with nothing but its type.
type Plain struct {
	Type string `json:"type"`
}

// Encode makes the JSON of a message.
func Encode(message any) []byte {
	text, err := json.Marshal(message)
	if err != nil {
		panic(err) // every message is one of the structs above
	}
	return text
}

// Decode reads the members of a message. What has a wrong type is a *ProtocolError.
func (m Message) Decode(into any) error {
	if err := json.Unmarshal(m.Raw, into); err != nil {
		// The words may hold what the peer said, at any length, and are told back to it.
		return broken("a malformed '" + m.Type + "': " + clip(err.Error(), maxReason))
	}
	return nil
}

// ParseMessage checks that text is a JSON object (UTF-8, at most MaxDepth levels) with a string `type`.
// The message keeps text.
func ParseMessage(text []byte) (Message, error) {
	if len(text) == 0 {
		return Message{}, broken("an empty message")
	}
	if !utf8.Valid(text) {
		return Message{}, broken("a message that is not UTF-8")
	}
	if tooDeep(text) {
		return Message{}, broken("a message that is nested too deep")
	}
	// A map, because the names of members are matched exactly in it.
	var members map[string]json.RawMessage
	if err := json.Unmarshal(text, &members); err != nil || members == nil {
		return Message{}, broken("a message that is no JSON object")
	}
	var name *string
	if err := json.Unmarshal(members["type"], &name); err != nil || name == nil {
		return Message{}, broken("a message without a type")
	}
	return Message{Type: *name, Raw: text}, nil
}

// tooDeep counts brackets outside of strings; whether they match is the parser's business.
func tooDeep(text []byte) bool {
	depth, quoted := 0, false
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			if depth++; depth > MaxDepth {
				return true
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return false
}

// isFinal says whether a message ends its stream, whichever side sends it.
func isFinal(name string) bool {
	return name == TypeExit || name == TypeError || name == TypeResult || name == TypeClosed
}

// canOpen says whether a message may open a stream: all that is not about an open one. What the receiver does not
// know it refuses with an `error`, so that a newer peer learns of it.
func canOpen(name string) bool {
	switch name {
	case TypeHello, TypeFatal, TypeStarted, TypeExit, TypeError, TypeResize, TypeSignal, TypeClose, TypeResult,
		TypeClosed, TypeListening, TypeCancel:
		return false
	}
	return true
}
