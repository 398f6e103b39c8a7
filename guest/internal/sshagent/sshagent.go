// Package sshagent is the guest's end of the forwarded SSH agent: a socket that the twin may use, every connection to
// which becomes a stream to the keeper on the host. guestos owns it.
package sshagent

import (
	"errors"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"time"

	"berth.dev/guest/internal/wire"
)

const (
	// Path of the socket, to which SSH_AUTH_SOCK points. Directly below /run: an init may mount over /run/berth.
	Path = "/run/berth-ssh-agent.sock"

	maxClients   = 64
	startTimeout = 10 * time.Second
)

// Opener opens a stream to a connected keeper, or fails when there is none.
type Opener func(request any) (*wire.Stream, error)

// Agent listens for the twin. Safe for concurrent use.
type Agent struct {
	path     string
	uid, gid int
	open     Opener
	slots    chan struct{}

	mu       sync.Mutex
	listener *wire.Listener
	inode    uint64
	device   uint64
	tried    time.Time
}

// retryAfter is how soon Check tries again where the socket can't be made, on a read-only /run say.
const retryAfter = 5 * time.Second

// New makes an Agent whose socket belongs to uid and gid; Check makes the socket.
func New(path string, uid, gid uint32, open Opener) *Agent {
	return &Agent{path: path, uid: int(uid), gid: int(gid), open: open, slots: make(chan struct{}, maxClients)}
}

// Check makes the socket if it is not there: the first time, and when the init has mounted its own /run over ours.
// It costs one lstat(2) when all is well, so it may be called before every command.
func (a *Agent) Check() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.listener != nil {
		var stat syscall.Stat_t
		if syscall.Lstat(a.path, &stat) == nil && stat.Ino == a.inode && uint64(stat.Dev) == a.device {
			return nil
		}
		a.listener.Close()
		a.listener = nil
	}
	if time.Since(a.tried) < retryAfter {
		return nil
	}
	err := a.listen()
	if err != nil {
		a.tried = time.Now()
	}
	return err
}

// listen binds aside and renames, so that the socket has its owner from the moment it has its name.
func (a *Agent) listen() error {
	partial := a.path + ".new"
	if err := os.Remove(partial); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	listener, err := wire.Listen(&syscall.SockaddrUnix{Name: partial})
	if err != nil {
		return err
	}
	var stat syscall.Stat_t
	err = os.Chmod(partial, 0o600)
	if err == nil {
		err = os.Lchown(partial, a.uid, a.gid)
	}
	if err == nil {
		err = os.Rename(partial, a.path)
	}
	if err == nil {
		err = syscall.Lstat(a.path, &stat)
	}
	if err != nil {
		os.Remove(partial)
		listener.Close()
		return err
	}
	a.listener, a.inode, a.device = listener, stat.Ino, uint64(stat.Dev)
	go a.accept(listener)
	return nil
}

// Close ends it and takes the socket away.
func (a *Agent) Close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.listener != nil {
		os.Remove(a.path)
		a.listener.Close()
		a.listener = nil
	}
}

func (a *Agent) accept(listener *wire.Listener) {
	for {
		client, err := listener.Accept()
		if err != nil {
			if errors.Is(err, os.ErrClosed) {
				return
			}
			time.Sleep(100 * time.Millisecond) // out of descriptors: it passes
			continue
		}
		select {
		case a.slots <- struct{}{}:
			go a.forward(client)
		default:
			client.Close()
		}
	}
}

// forward carries one client; without a keeper, or an agent on the host, its request finds the end.
func (a *Agent) forward(client *wire.Socket) {
	defer func() { <-a.slots }()
	defer client.Close()
	stream, err := a.open(wire.Open{Type: wire.TypeOpen, Service: "ssh-agent"})
	if err != nil {
		awaitRequest(client)
		return
	}
	message, err := stream.ReadMessage(startTimeout)
	if err == nil && message.Type == wire.TypeStarted {
		wire.Relay(stream, wire.Stdin, wire.Stdout, client)
	} else {
		awaitRequest(client)
	}
	_ = stream.Finish(wire.Plain{Type: wire.TypeClosed}) // in vain when the keeper has said it already
}

// awaitRequest reads what the client asks: were the socket closed before, ssh-add would die of SIGPIPE without a word.
func awaitRequest(client *wire.Socket) {
	_ = client.SetReadDeadline(time.Now().Add(startTimeout))
	_, _ = client.Read(make([]byte, 4096))
}
