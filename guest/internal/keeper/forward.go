package keeper

import (
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"berth.dev/guest/internal/files"
	"berth.dev/guest/internal/memory"
	"berth.dev/guest/internal/wire"
)

const (
	maxPorts       = 1024
	maxConnections = 256
	// lowPortShift is added to ports that the user may not bind on the host: 80 becomes 8080.
	lowPortShift = 8000
	// listPause is how soon one list of ports is followed after another. An agent looks once a second; what one that
	// does not stop says meanwhile waits, and in the end costs it the connection.
	listPause = 100 * time.Millisecond
	// retryPorts is how long a port that is taken on the host is left alone.
	retryPorts  = 5 * time.Second
	dialTimeout = 15 * time.Second
)

// portMap is one forwarded port, as ports.json tells it.
type portMap struct {
	Guest   int    `json:"guest"`
	Host    int    `json:"host"`
	Address string `json:"address"`
}

// planPorts says which host port each of the guest's ports gets. Below lowest it is moved up, unless the guest has a
// port there itself: that one is real and keeps its number, the low one stays without.
func planPorts(guest []int, lowest int) map[int]int {
	real := map[int]bool{}
	for _, port := range guest[:min(len(guest), maxPorts)] {
		if 0 < port && port <= 65535 {
			real[port] = true
		}
	}
	plan := make(map[int]int, len(real))
	for port := range real {
		host := port
		if port < lowest {
			if host += lowPortShift; real[host] || host < lowest {
				continue
			}
		}
		plan[port] = host
	}
	return plan
}

// lowestPort that the user may bind. Source: ip(7), ip_unprivileged_port_start.
func lowestPort() int {
	if os.Geteuid() == 0 {
		return 1
	}
	data, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		return 1024
	}
	lowest, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return 1024
	}
	return lowest
}

// forwarder listens on one loopback address for the ports that listen in the guest. Safe for concurrent use.
type forwarder struct {
	address netip.Addr
	file    string // ports.json
	lowest  int
	slots   chan struct{} // one per connection
	idle    *time.Timer   // runs when there are none

	mu     sync.Mutex
	conn   *wire.Conn
	wanted []int
	closed bool
	open   map[int]*forward // by guest port
}

type forward struct {
	host     int
	listener *wire.Listener
}

func newForwarder(address netip.Addr, file string) *forwarder {
	return &forwarder{
		address: address,
		file:    file,
		lowest:  lowestPort(),
		slots:   make(chan struct{}, maxConnections),
		idle:    time.AfterFunc(settleAfter, memory.GiveBack),
		open:    map[int]*forward{},
	}
}

// follow forwards what conn's agent says to listen, until the connection ends; then nothing is forwarded.
func (f *forwarder) follow(conn *wire.Conn) {
	f.set(conn, nil)
	defer f.set(nil, nil)
	stream, err := ask(conn, wire.Plain{Type: wire.TypeListeners})
	if err != nil {
		return
	}
	for timeout := time.Duration(0); ; {
		message, err := stream.ReadMessage(timeout)
		timeout = 0
		switch {
		case err == nil && message.Type == wire.TypeListening:
			var listening wire.Listening
			if message.Decode(&listening) != nil {
				conn.Close()
				return
			}
			if !f.set(conn, listening.Ports) {
				timeout = retryPorts
			}
			select {
			case <-time.After(listPause):
			case <-conn.Done():
			}
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !f.apply() {
				timeout = retryPorts
			}
		default: // the end of the stream, or an agent that can't say: nothing more will come
			<-conn.Done()
			return
		}
	}
}

func (f *forwarder) set(conn *wire.Conn, ports []int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conn, f.wanted = conn, ports
	return f.applyLocked()
}

func (f *forwarder) apply() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applyLocked()
}

// applyLocked makes the open ports those of the plan and tells whether all of them could be bound.
func (f *forwarder) applyLocked() bool {
	if f.closed {
		return true
	}
	plan := planPorts(f.wanted, f.lowest)
	changed, complete := false, true
	for guest, old := range f.open { // first, so that a real port finds its number free
		if host, wanted := plan[guest]; !wanted || host != old.host {
			old.listener.Close()
			delete(f.open, guest)
			changed = true
		}
	}
	for guest, host := range plan {
		if f.open[guest] != nil {
			continue
		}
		listener, err := wire.Listen(&syscall.SockaddrInet4{Port: host, Addr: f.address.As4()})
		if err != nil {
			complete = false // the host has something on it itself
			continue
		}
		f.open[guest] = &forward{host, listener}
		changed = true
		go f.accept(listener, guest)
	}
	if changed || !exists(f.file) {
		f.save()
	}
	return complete
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

func (f *forwarder) save() {
	list := make([]portMap, 0, len(f.open))
	for guest, forward := range f.open {
		list = append(list, portMap{guest, forward.host, f.address.String()})
	}
	slices.SortFunc(list, func(a, b portMap) int { return a.Guest - b.Guest })
	text, err := json.Marshal(struct {
		Schema int       `json:"schema"`
		Ports  []portMap `json:"ports"`
	}{1, list})
	if err == nil {
		_ = files.Write(f.file, append(text, '\n'), files.Attr{Mode: 0o600, UID: os.Geteuid(), GID: os.Getegid()})
	}
}

// close ends all forwarding for good and takes the list away.
func (f *forwarder) close() {
	f.set(nil, nil)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	f.idle.Stop()
	os.Remove(f.file)
}

func (f *forwarder) accept(listener *wire.Listener, port int) {
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
		case f.slots <- struct{}{}:
			go f.carry(client, port)
		default:
			reset(client)
		}
	}
}

func (f *forwarder) carry(client *wire.Socket, port int) {
	defer func() {
		if <-f.slots; len(f.slots) == 0 {
			f.idle.Reset(settleAfter)
		}
	}()
	f.mu.Lock()
	conn := f.conn
	f.mu.Unlock()
	stream := dial(conn, port)
	if stream == nil {
		reset(client)
		return
	}
	relay(stream, client)
}

// dial gives an open stream to a port of the guest, or nil.
func dial(conn *wire.Conn, port int) *wire.Stream {
	if conn == nil {
		return nil
	}
	stream, err := conn.Open(wire.Dial{Type: wire.TypeDial, Port: port})
	if err != nil {
		return nil
	}
	message, err := stream.ReadMessage(dialTimeout)
	if err != nil || message.Type != wire.TypeStarted {
		_ = stream.Finish(wire.Plain{Type: wire.TypeClosed})
		return nil
	}
	return stream
}

// ask opens a stream for a request that is answered by messages: data on it is nobody's.
func ask(conn *wire.Conn, request any) (*wire.Stream, error) {
	stream, err := conn.Open(request)
	if err == nil {
		stream.StopReading(wire.Stdout)
		stream.StopReading(wire.Stderr)
	}
	return stream, err
}

// relay joins a stream and a socket of the host until both are at their ends. What it carries has no errors of its own.
func relay(stream *wire.Stream, socket *wire.Socket) {
	stream.StopReading(wire.Stderr)
	wire.Relay(stream, wire.Stdout, wire.Stdin, socket)
	_ = stream.Finish(wire.Plain{Type: wire.TypeClosed}) // in vain when the guest has said it already
}

// reset closes a client's connection so that it sees it refused, not answered with nothing.
func reset(client io.Closer) {
	if socket, ok := client.(*wire.Socket); ok {
		_ = socket.Raw().Control(func(fd uintptr) {
			_ = syscall.SetsockoptLinger(int(fd), syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1})
		})
	}
	client.Close()
}
