// Package serve is the agent's server: it accepts connections and answers the requests of docs/protocol.md.
//
// It owns the connections and the keepers among them. What it needs to know of the guest it asks through Guest; commands
// are package exec's. main wires it up. Nothing that a client does ends the process.
package serve

import (
	"context"
	"errors"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"

	"berth.dev/guest/internal/exec"
	"berth.dev/guest/internal/wire"
)

const (
	// maxConnections is how many there may be at once, beside a VM's channel; one more is told that the agent is busy.
	maxConnections = 512
	// helloTime is how long a client may take for its first message.
	helloTime = 10 * time.Second
	// idleTime after the last command the memory that bulk bytes took goes back to the system.
	idleTime = 2 * time.Second
)

// Guest is what the server asks about the machine it runs in. guestos implements it. Safe for concurrent use.
type Guest interface {
	InitState() string                   // STATE, without blocking
	WaitInit(ctx context.Context) string // STATE once it is no longer starting, or when ctx ends
	System() string
	PowerOff() error                            // returns when the init has been asked
	Listeners(ctx context.Context) <-chan []int // closed when ctx ends
	NewConsole() (*os.File, error)              // the master
	TwinState() string                          // "ready", "pending", "failed: …"
	WaitReady()                                 // returns when commands may run
}

// Server answers clients. Make it by New.
type Server struct {
	guest   Guest
	version string
	config  exec.Config

	mutex   sync.Mutex
	clients map[*wire.Conn]*client
	keepers []*wire.Conn // the newest last
	active  int          // commands and dialled connections
	idle    *time.Timer
}

// client is what is known of a connection.
type client struct {
	keeper  bool // it has said so in its hello
	channel bool // it is the channel of a VM, not one of those that come through it
}

// New makes a server. config.Twin is filled in.
func New(guest Guest, version string, config exec.Config) *Server {
	config.Twin = guest.TwinState
	s := &Server{guest: guest, version: version, config: config, clients: map[*wire.Conn]*client{}}
	s.idle = time.AfterFunc(time.Hour, s.giveMemoryBack)
	return s
}

// Serve accepts connections until the listener is closed; those that are open go on.
func (s *Server) Serve(listener *wire.Listener) error {
	for {
		socket, err := listener.Accept()
		switch {
		case err == nil:
			s.admit(socket)
		case errors.Is(err, os.ErrClosed):
			return nil
		case isPassing(err):
			time.Sleep(100 * time.Millisecond)
		default:
			return err
		}
	}
}

// isPassing says whether accept may succeed later: a shortage, or an error of the network.
func isPassing(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && errno != syscall.EBADF && errno != syscall.EINVAL && errno != syscall.ENOTSOCK
}

// admit takes a connection over and serves it, unless there are too many.
func (s *Server) admit(rw io.ReadWriteCloser) {
	s.mutex.Lock()
	full := s.isFull()
	if !full {
		conn := s.newConn(rw)
		s.clients[conn] = &client{}
		go s.attend(conn)
	}
	s.mutex.Unlock()
	if full {
		sayBusy(rw)
	}
}

// isFull says whether there are as many connections as there may be. Call it with the mutex.
func (s *Server) isFull() bool {
	count := len(s.clients)
	for _, client := range s.clients {
		if client.channel {
			count--
		}
	}
	return count >= maxConnections
}

func (s *Server) newConn(rw io.ReadWriteCloser) *wire.Conn {
	return wire.NewConn(rw, wire.Options{Side: wire.Guest, Version: s.version, InitState: s.guest.InitState})
}

func sayBusy(rw io.ReadWriteCloser) {
	fatal := wire.Error{Type: wire.TypeFatal, Code: wire.CodeBusy, Message: "too many connections to the agent are open"}
	if limited, ok := rw.(interface{ SetWriteDeadline(time.Time) error }); ok {
		_ = limited.SetWriteDeadline(time.Now().Add(time.Second))
	}
	_, _ = rw.Write(wire.AppendFrame(nil, 0, wire.KindMessage, wire.Encode(fatal)))
	_ = rw.Close()
}

// attend serves one connection until its end.
func (s *Server) attend(conn *wire.Conn) {
	defer s.forget(conn)
	conn.Protect(func() {
		hello, err := conn.WaitHello(helloTime)
		if err != nil {
			conn.Fatal(wire.CodeProtocol, "no hello came")
			return
		}
		if hello.Role == "keeper" {
			s.addKeeper(conn)
		}
		for {
			stream, err := conn.Accept()
			if err != nil {
				return
			}
			go conn.Protect(func() { s.answer(stream) })
		}
	})
}

func (s *Server) addKeeper(conn *wire.Conn) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.clients[conn].keeper = true
	s.keepers = append(s.keepers, conn)
}

func (s *Server) forget(conn *wire.Conn) {
	conn.Close()
	s.mutex.Lock()
	defer s.mutex.Unlock()
	delete(s.clients, conn)
	s.keepers = slices.DeleteFunc(s.keepers, func(keeper *wire.Conn) bool { return keeper == conn })
}

// OpenToKeeper opens a stream to the newest keeper, with a request like wire.Open. It fails when none is connected.
func (s *Server) OpenToKeeper(request any) (*wire.Stream, error) {
	s.mutex.Lock()
	keepers := slices.Clone(s.keepers)
	s.mutex.Unlock()
	for _, keeper := range slices.Backward(keepers) {
		if stream, err := keeper.Open(request); err == nil {
			return stream, nil
		}
	}
	return nil, errors.New("no keeper is connected")
}

// begin counts a command or a dialled connection, and the function it returns its end, so that memory can be given
// back after the last one.
func (s *Server) begin() (end func()) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.active++
	return func() {
		s.mutex.Lock()
		defer s.mutex.Unlock()
		s.active--
		s.idle.Reset(idleTime)
	}
}

func (s *Server) giveMemoryBack() {
	if s.Busy() {
		return // whichever ends last comes back to it
	}
	debug.FreeOSMemory()
}

// Busy says whether a command or a dialled connection is open.
func (s *Server) Busy() bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.active > 0
}
