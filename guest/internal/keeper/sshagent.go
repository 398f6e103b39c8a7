package keeper

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"berth.dev/guest/internal/wire"
)

const (
	// maxServices is how many streams the guest may have open towards us, and how many we serve at once.
	maxServices = 64
	maxPath     = 4096
)

// services is what the guest may have of the host: its SSH agent.
type services struct {
	pathFile string        // says where that listens
	places   chan struct{} // one per stream that is being answered, of whatever connection
}

func newServices(directory string) *services {
	return &services{filepath.Join(directory, "ssh-agent"), make(chan struct{}, maxServices)}
}

// serve answers the streams that the agent opens, until the connection ends. A stream that the guest has ended itself
// keeps its place until we are done with it: the host's SSH agent may be slow.
func (s *services) serve(conn *wire.Conn) {
	for {
		stream, err := conn.Accept()
		if err != nil {
			return
		}
		select {
		case s.places <- struct{}{}:
		case <-conn.Done():
			return
		}
		go func() {
			defer func() { <-s.places }()
			answer(stream, s.pathFile)
		}()
	}
}

func answer(stream *wire.Stream, pathFile string) {
	var open wire.Open
	err := stream.Request.Decode(&open)
	kind := stream.Request.Type
	stream.Taken()
	if err != nil || kind != wire.TypeOpen || open.Service != "ssh-agent" {
		_ = stream.Finish(wire.Refusal(wire.CodeUnsupported, "this keeper has no such service"))
		return
	}
	socket, err := dialSSHAgent(pathFile)
	if err != nil {
		_ = stream.Finish(wire.Refusal(wire.CodeNotFound, "the host has no SSH agent: "+err.Error()))
		return
	}
	if stream.Send(wire.Started{Type: wire.TypeStarted}) != nil {
		socket.Close()
		return
	}
	// Seen from here the host still sends Stdin and receives Stdout (docs/protocol.md).
	relay(stream, socket)
}

// dialSSHAgent reads the path anew each time: the user may log in again and get another agent.
func dialSSHAgent(pathFile string) (*wire.Socket, error) {
	file, err := os.OpenFile(pathFile, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, errors.New("none was forwarded")
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxPath))
	path := strings.TrimSuffix(string(text), "\n")
	if err != nil || !filepath.IsAbs(path) {
		return nil, errors.New("none was forwarded")
	}
	return wire.DialUnix(path)
}
