package serve

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"berth.dev/guest/internal/exec"
	"berth.dev/guest/internal/wire"
)

const soon = 10 * time.Second

// fakeGuest is a machine as a test wants it.
type fakeGuest struct {
	ready    chan struct{}
	settled  chan struct{}
	ports    chan []int
	powerOff chan func() error // what each request for it does
}

func newFake() *fakeGuest {
	g := &fakeGuest{ready: make(chan struct{}), settled: make(chan struct{}), ports: make(chan []int, 8)}
	g.powerOff = make(chan func() error, 8)
	close(g.ready)
	return g
}

func (g *fakeGuest) InitState() string { return "starting" }
func (g *fakeGuest) System() string    { return "busybox" }
func (g *fakeGuest) PowerOff() error   { return (<-g.powerOff)() }
func (g *fakeGuest) TwinState() string { return "ready" }
func (g *fakeGuest) WaitReady()        { <-g.ready }

func (g *fakeGuest) WaitInit(ctx context.Context) string {
	select {
	case <-g.settled:
		return "degraded"
	case <-ctx.Done():
		return "starting"
	}
}

func (g *fakeGuest) Listeners(ctx context.Context) <-chan []int {
	out := make(chan []int)
	go func() {
		defer close(out)
		for {
			select {
			case ports := <-g.ports:
				out <- ports
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

func (g *fakeGuest) NewConsole() (*os.File, error) {
	return os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
}

// start runs a server on a socket and returns it with the socket's path.
func start(t *testing.T, guest Guest) (*Server, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.sock")
	listener, err := wire.Listen(&syscall.SockaddrUnix{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	server := New(guest, "1.2.3", exec.Config{User: "root"})
	ended := make(chan error)
	go func() { ended <- server.Serve(listener) }()
	t.Cleanup(func() {
		_ = listener.Close()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		until(t, func() bool { server.mutex.Lock(); defer server.mutex.Unlock(); return len(server.clients) == 0 })
	})
	return server, path
}

func until(t *testing.T, done func() bool) {
	t.Helper()
	for end := time.Now().Add(soon); !done(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not come")
		}
	}
}

func connect(t *testing.T, path, role string) *wire.Conn {
	t.Helper()
	conn, _ := connectSocket(t, path, role)
	return conn
}

func connectSocket(t *testing.T, path, role string) (*wire.Conn, *wire.Socket) {
	t.Helper()
	socket, err := wire.DialUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	socket.WantFile()
	conn := wire.NewConn(socket, wire.Options{Side: wire.Host, Version: "test", Role: role})
	t.Cleanup(conn.Close)
	return conn, socket
}

// ask sends a request and reads its first answer.
func ask(t *testing.T, conn *wire.Conn, request any) (*wire.Stream, wire.Message) {
	t.Helper()
	stream, err := conn.Open(request)
	if err != nil {
		t.Fatal(err)
	}
	return stream, answer(t, stream)
}

func answer(t *testing.T, stream *wire.Stream) wire.Message {
	t.Helper()
	message, err := stream.ReadMessage(soon)
	if err != nil {
		t.Fatal(err)
	}
	return message
}

func decoded[T any](t *testing.T, message wire.Message) T {
	t.Helper()
	var value T
	if err := message.Decode(&value); err != nil {
		t.Fatal(err)
	}
	return value
}

func TestHelloAndStatus(t *testing.T) {
	_, path := start(t, newFake())
	conn := connect(t, path, "client")
	hello, err := conn.WaitHello(soon)
	if err != nil || hello.Version != "1.2.3" || hello.Init != "starting" {
		t.Fatal(hello, err)
	}
	_, message := ask(t, conn, wire.Plain{Type: wire.TypeStatus})
	status := decoded[wire.Status](t, message)
	if status.Uptime <= 0 {
		t.Error(status.Uptime)
	}
	status.Uptime = 0
	want := wire.Status{Type: "result", Init: "starting", System: "busybox", Version: "1.2.3", Twin: "ready"}
	if status != want {
		t.Errorf("%+v", status)
	}
}

func TestUnknownAndMalformedRequests(t *testing.T) {
	_, path := start(t, newFake())
	conn := connect(t, path, "client")
	for _, c := range []struct {
		request any
		code    string
	}{
		{wire.Plain{Type: "from-the-future"}, "unsupported"},
		{map[string]any{"type": "exec", "argv": "true"}, "invalid_argument"},
		{map[string]any{"type": "exec", "argv": []string{"no base64!"}}, "invalid_argument"},
		{map[string]any{"type": "dial", "port": "http"}, "invalid_argument"},
		{map[string]any{"type": "dial", "port": json.Number(strings.Repeat("7", 100_000))}, "invalid_argument"},
		{wire.Dial{Type: wire.TypeDial, Port: 70000}, "invalid_argument"},
		{wire.Wait{Type: wire.TypeWait, For: "godot"}, "invalid_argument"},
	} {
		_, message := ask(t, conn, c.request)
		if refusal := decoded[wire.Error](t, message); message.Type != "error" || refusal.Code != c.code {
			t.Errorf("%v: %+v", c.request, refusal)
		}
	}
	if conn.Err() != nil {
		t.Error(conn.Err())
	}
}

func TestWait(t *testing.T) {
	guest := newFake()
	_, path := start(t, guest)
	conn := connect(t, path, "client")
	given, _ := conn.Open(wire.Wait{Type: wire.TypeWait, For: "init"})
	patient, _ := conn.Open(wire.Wait{Type: wire.TypeWait, For: "init"})
	_ = given.Send(wire.Plain{Type: wire.TypeCancel})
	if message := answer(t, given); message.Type != wire.TypeClosed {
		t.Error(message)
	}
	close(guest.settled)
	if result := decoded[wire.Result](t, answer(t, patient)); result != (wire.Result{Type: "result", Init: "degraded"}) {
		t.Error(result)
	}
}

func TestPowerOffAndItsFailures(t *testing.T) {
	guest := newFake()
	_, path := start(t, guest)
	conn := connect(t, path, "client")
	guest.powerOff <- func() error { return nil }
	if _, message := ask(t, conn, wire.Plain{Type: wire.TypePoweroff}); message.Type != wire.TypeResult {
		t.Error(message)
	}
	guest.powerOff <- func() error { return errors.New("it will not") }
	_, message := ask(t, conn, wire.Plain{Type: wire.TypePoweroff})
	if refusal := decoded[wire.Error](t, message); refusal.Code != "internal" || refusal.Message != "it will not" {
		t.Error(refusal)
	}
	// A bug ends one connection and nothing else.
	other := connect(t, path, "client")
	guest.powerOff <- func() error { panic("a bug that a test has put here") }
	if _, err := conn.Open(wire.Plain{Type: wire.TypePoweroff}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-conn.Done():
	case <-time.After(soon):
		t.Fatal("the connection goes on")
	}
	if _, message := ask(t, other, wire.Plain{Type: wire.TypeStatus}); message.Type != wire.TypeResult {
		t.Error(message)
	}
}

func TestExecWaitsForTheTwin(t *testing.T) {
	guest := newFake()
	guest.ready = make(chan struct{})
	server, path := start(t, guest)
	conn := connect(t, path, "client")
	stream, err := conn.Open(wire.Exec{Type: wire.TypeExec, Argv: []wire.Bytes{[]byte("echo"), []byte("ready")}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.ReadMessage(50 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	impatient := connect(t, path, "client")
	if _, err := impatient.Open(wire.Exec{Type: wire.TypeExec, Argv: []wire.Bytes{[]byte("true")}}); err != nil {
		t.Fatal(err)
	}
	until(t, func() bool { server.mutex.Lock(); defer server.mutex.Unlock(); return server.active == 2 })
	impatient.Close()
	until(t, func() bool { server.mutex.Lock(); defer server.mutex.Unlock(); return server.active == 1 })
	close(guest.ready)
	var out bytes.Buffer
	if _, err := stream.WriteTo(wire.Stdout, &out); err != nil || out.String() != "ready\n" {
		t.Fatal(out.String(), err)
	}
	until(t, func() bool { return !server.Busy() })
}

func TestListeners(t *testing.T) {
	guest := newFake()
	_, path := start(t, guest)
	conn := connect(t, path, "keeper")
	guest.ports <- nil
	guest.ports <- []int{22, 80}
	stream, message := ask(t, conn, wire.Plain{Type: wire.TypeListeners})
	if string(message.Raw) != `{"type":"listening","ports":[]}` {
		t.Errorf("%s", message.Raw)
	}
	if got := decoded[wire.Listening](t, answer(t, stream)); !reflect.DeepEqual(got.Ports, []int{22, 80}) {
		t.Error(got)
	}
	_ = stream.Send(wire.Plain{Type: wire.TypeCancel})
	if message := answer(t, stream); message.Type != wire.TypeClosed {
		t.Error(message)
	}
}

// serveEcho answers each connection with what it says, in capitals.
func serveEcho(t *testing.T, address syscall.Sockaddr) int {
	t.Helper()
	listener, err := wire.Listen(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				text, _ := io.ReadAll(client)
				_, _ = client.Write(bytes.ToUpper(text))
				_ = client.Close()
			}()
		}
	}()
	port := 0
	_ = listener.Raw().Control(func(fd uintptr) {
		switch bound, _ := syscall.Getsockname(int(fd)); bound := bound.(type) {
		case *syscall.SockaddrInet4:
			port = bound.Port
		case *syscall.SockaddrInet6:
			port = bound.Port
		}
	})
	return port
}

func TestDial(t *testing.T) {
	_, path := start(t, newFake())
	conn := connect(t, path, "keeper")
	for name, address := range map[string]syscall.Sockaddr{
		"any address":      &syscall.SockaddrInet4{},
		"loopback":         &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}},
		"IPv6 loopback":    &syscall.SockaddrInet6{Addr: [16]byte{15: 1}},
		"some own address": &syscall.SockaddrInet4{Addr: [4]byte{127, 9, 8, 7}},
	} {
		t.Run(name, func(t *testing.T) {
			stream, message := ask(t, conn, wire.Dial{Type: wire.TypeDial, Port: serveEcho(t, address)})
			if message.Type != wire.TypeStarted {
				t.Fatalf("%s", message.Raw)
			}
			sent := strings.Repeat("some text ", 300_000)
			go func() { _ = stream.Write(wire.Stdin, []byte(sent)); _ = stream.CloseWrite(wire.Stdin) }()
			var got bytes.Buffer
			if receive, _ := stream.WriteTo(wire.Stdout, &got); receive != nil || got.String() != strings.ToUpper(sent) {
				t.Fatal(got.Len(), receive)
			}
			if message := answer(t, stream); message.Type != wire.TypeClosed {
				t.Error(message)
			}
		})
	}
	_, message := ask(t, conn, wire.Dial{Type: wire.TypeDial, Port: 1})
	if refusal := decoded[wire.Error](t, message); refusal.Code != "not_found" || refusal.Message != "nothing listens on port 1" {
		t.Error(refusal)
	}
}

func TestDialIsCancelled(t *testing.T) {
	server, path := start(t, newFake())
	conn := connect(t, path, "keeper")
	port := serveEcho(t, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	for _, word := range []string{wire.TypeCancel, wire.TypeClosed} {
		stream, _ := ask(t, conn, wire.Dial{Type: wire.TypeDial, Port: port})
		_ = stream.Send(wire.Plain{Type: word})
		until(t, func() bool { return !server.Busy() })
	}
}

func TestConsole(t *testing.T) {
	_, path := start(t, newFake())
	conn, socket := connectSocket(t, path, "keeper")
	if _, message := ask(t, conn, wire.Plain{Type: wire.TypeConsole}); message.Type != wire.TypeResult {
		t.Fatalf("%s", message.Raw)
	}
	file := socket.TakeFile()
	if file == nil {
		t.Fatal("no descriptor came along")
	}
	defer file.Close()
	if info, err := file.Stat(); err != nil || info.Mode()&os.ModeCharDevice == 0 {
		t.Error(info, err)
	}
}

func TestKeepers(t *testing.T) {
	server, path := start(t, newFake())
	if _, err := server.OpenToKeeper(wire.Open{Type: wire.TypeOpen, Service: "ssh-agent"}); err == nil {
		t.Fatal("a stream to nobody")
	}
	_ = connect(t, path, "client")
	keepers := []*wire.Conn{connect(t, path, "keeper")}
	count := func(want int) {
		until(t, func() bool { server.mutex.Lock(); defer server.mutex.Unlock(); return len(server.keepers) == want })
	}
	count(1)
	keepers = append(keepers, connect(t, path, "keeper"))
	count(2)
	for left := 2; left > 0; left-- { // the newest first; when it goes, the one before
		stream, err := server.OpenToKeeper(wire.Open{Type: wire.TypeOpen, Service: "ssh-agent"})
		if err != nil {
			t.Fatal(err)
		}
		there, err := keepers[left-1].Accept()
		if err != nil || there.Request.Type != wire.TypeOpen || there.ID != stream.ID {
			t.Fatal(there, err)
		}
		keepers[left-1].Close()
		count(left - 1)
	}
}

func TestGarbageHarmsNobodyElse(t *testing.T) {
	_, path := start(t, newFake())
	conn := connect(t, path, "client")
	seed := rand.New(rand.NewSource(1))
	var all sync.WaitGroup
	for i := range 100 {
		garbage := make([]byte, seed.Intn(4000))
		_, _ = seed.Read(garbage)
		all.Go(func() {
			socket, err := wire.DialUnix(path)
			if err != nil {
				t.Error(err)
				return
			}
			defer socket.Close()
			if i%3 == 0 { // some begin well
				hello := wire.Hello{Type: wire.TypeHello, Protocol: 1, Role: "client"}
				_, _ = socket.Write(wire.AppendFrame(nil, 0, wire.KindMessage, wire.Encode(hello)))
			}
			_, _ = socket.Write(garbage)
			if i%2 == 0 {
				_ = socket.CloseWrite()
				_, _ = io.Copy(io.Discard, socket)
			}
		})
	}
	all.Wait()
	if _, message := ask(t, conn, wire.Plain{Type: wire.TypeStatus}); message.Type != wire.TypeResult {
		t.Error(message)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	server, path := start(t, newFake())
	for range maxConnections {
		socket, err := wire.DialUnix(path)
		if err != nil {
			t.Fatal(err)
		}
		defer socket.Close()
	}
	until(t, func() bool {
		server.mutex.Lock()
		defer server.mutex.Unlock()
		return len(server.clients) == maxConnections
	})
	conn := connect(t, path, "client")
	select {
	case <-conn.Done():
	case <-time.After(soon):
		t.Fatal("one too many is let in")
	}
	var fatal *wire.Error
	if !errors.As(conn.Err(), &fatal) || fatal.Code != wire.CodeBusy {
		t.Fatal(conn.Err())
	}
}

func TestParseAddress(t *testing.T) {
	if got := parseAddress("0100007F", 5).(*syscall.SockaddrInet4); got.Addr != [4]byte{127, 0, 0, 1} || got.Port != 5 {
		t.Error(got)
	}
	want := [16]byte{0x20, 0x01, 0x0d, 0xb8, 15: 1}
	if got := parseAddress("B80D0120000000000000000001000000", 5).(*syscall.SockaddrInet6); got.Addr != want {
		t.Error(got)
	}
	for _, text := range []string{"", "xx", "01", "0100007F00"} {
		if got := parseAddress(text, 5); got != nil {
			t.Error(text, got)
		}
	}
}
