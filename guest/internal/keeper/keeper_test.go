package keeper

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"berth.dev/guest/internal/wire"
)

const soon = 10 * time.Second

var quick = times{
	console:  soon,
	lock:     200 * time.Millisecond,
	probe:    100 * time.Millisecond,
	grace:    100 * time.Millisecond,
	drain:    time.Second,
	retryMin: 5 * time.Millisecond,
	retryMax: 20 * time.Millisecond,
	ask:      10 * time.Millisecond,
	look:     10 * time.Millisecond,
	breath:   5 * time.Millisecond,
	clock:    10 * time.Millisecond,
	begin:    soon,
	answer:   soon,
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(soon); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// pty gives a new pseudo-terminal's two sides; the second as a path.
func pty(t *testing.T) (*os.File, string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skip("no pseudo-terminals: ", err)
	}
	var number uint32
	var locked int32
	for request, argument := range map[uintptr]unsafe.Pointer{syscall.TIOCSPTLCK: unsafe.Pointer(&locked), syscall.TIOCGPTN: unsafe.Pointer(&number)} {
		if _, err := control(master, request, uintptr(argument)); err != nil {
			t.Fatal(err)
		}
	}
	return master, "/dev/pts/" + strconv.Itoa(int(number))
}

func write(t *testing.T, path, text string) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_WRONLY|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteString(text); err != nil {
		t.Fatal(err)
	}
}

// started is a keeper that runs in this process.
type started struct {
	t      testing.TB
	dir    string
	stop   chan os.Signal
	result chan error
}

func start(t testing.TB, dir string, change func(*Options)) *started {
	t.Helper()
	return startWith(t, dir, quick, change)
}

func startWith(t testing.TB, dir string, times times, change func(*Options)) *started {
	t.Helper()
	options := Options{Dir: dir, Log: dir + "/console.log", ConsoleFD: -1, AgentFD: -1, Version: "test"}
	if change != nil {
		change(&options)
	}
	s := &started{t: t, dir: dir, stop: make(chan os.Signal, 1), result: make(chan error, 1)}
	go func() { s.result <- run(options, times, s.stop) }()
	t.Cleanup(func() {
		select {
		case s.stop <- syscall.SIGTERM:
		default:
		}
		s.ended()
	})
	return s
}

func (s *started) ended() {
	s.t.Helper()
	select {
	case err := <-s.result:
		s.result <- err
		if err != nil {
			s.t.Error(err)
		}
	case <-time.After(soon):
		s.t.Error("the keeper does not end")
	}
}

func (s *started) runs() bool { return len(s.result) == 0 }

func (s *started) logHas(text string) {
	s.t.Helper()
	eventually(s.t, "in the log: "+text, func() bool {
		data, _ := os.ReadFile(s.dir + "/console.log")
		return strings.Contains(string(data), text)
	})
}

// agent is the guest's side of the real protocol over a real socket, with what the keeper asks of it.
type agent struct {
	t        *testing.T
	listener *wire.Listener
	ports    chan []int
	consoles chan *os.File
	conns    chan *wire.Conn
	requests chan string

	mu   sync.Mutex
	open []*wire.Conn
}

func serve(t *testing.T, dir string) *agent {
	t.Helper()
	path := dir + "/agent.sock"
	os.Remove(path)
	listener, err := wire.Listen(&syscall.SockaddrUnix{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{
		t: t, listener: listener,
		ports: make(chan []int), consoles: make(chan *os.File, 8), conns: make(chan *wire.Conn, 8), requests: make(chan string, 1024),
	}
	go func() {
		for {
			socket, err := listener.Accept()
			if err != nil {
				return
			}
			conn := wire.NewConn(socket, wire.Options{Side: wire.Guest, Version: "test", InitState: func() string { return "running" }})
			a.mu.Lock()
			a.open = append(a.open, conn)
			a.mu.Unlock()
			go a.answer(conn)
		}
	}()
	t.Cleanup(a.kill)
	return a
}

// kill ends it as SIGKILL would.
func (a *agent) kill() {
	a.listener.Close()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, conn := range a.open {
		conn.Close()
	}
}

func (a *agent) answer(conn *wire.Conn) {
	hello, err := conn.WaitHello(soon)
	if err != nil || hello.Role != "keeper" {
		return
	}
	a.conns <- conn
	for {
		stream, err := conn.Accept()
		if err != nil {
			return
		}
		select {
		case a.requests <- stream.Request.Type:
		default:
		}
		switch stream.Request.Type {
		case wire.TypeListeners:
			go a.tell(stream)
		case wire.TypeDial:
			var dial wire.Dial
			_ = stream.Request.Decode(&dial)
			go a.dial(stream, dial.Port)
		case wire.TypeConsole:
			go a.console(stream)
		}
	}
}

func (a *agent) tell(stream *wire.Stream) {
	for {
		select {
		case ports := <-a.ports:
			_ = stream.Send(wire.Listening{Type: wire.TypeListening, Ports: ports})
		case <-stream.Done():
			return
		}
	}
}

func (a *agent) console(stream *wire.Stream) {
	select {
	case master := <-a.consoles:
		if master == nil {
			_ = stream.Finish(wire.Refusal(wire.CodeInternal, "no"))
			return
		}
		_ = stream.FinishWithFile(wire.Result{Type: wire.TypeResult}, master)
		master.Close()
	case <-stream.Done():
	}
}

// dial connects to the port on 127.0.0.1, which plays the guest here.
func (a *agent) dial(stream *wire.Stream, port int) {
	socket, err := wire.DialTCP(&syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}, soon)
	if err != nil {
		_ = stream.Finish(wire.Refusal(wire.CodeNotFound, err.Error()))
		return
	}
	_ = stream.Send(wire.Started{Type: wire.TypeStarted})
	wire.Relay(stream, wire.Stdin, wire.Stdout, socket)
	_ = stream.Finish(wire.Plain{Type: wire.TypeClosed})
}

// echo turns around what it gets on a socket, and ends when its client does.
func echo(t *testing.T, address syscall.Sockaddr) int {
	t.Helper()
	listener, err := wire.Listen(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(client, client); client.Close() }()
		}
	}()
	port := 0
	_ = listener.Raw().Control(func(fd uintptr) {
		name, _ := syscall.Getsockname(int(fd))
		if inet, ok := name.(*syscall.SockaddrInet4); ok {
			port = inet.Port
		}
	})
	return port
}

func exchange(socket *wire.Socket, text string) (string, error) {
	defer socket.Close()
	_ = socket.SetReadDeadline(time.Now().Add(soon))
	go func() { _, _ = socket.Write([]byte(text)); _ = socket.CloseWrite() }()
	got, err := io.ReadAll(socket)
	return string(got), err
}

var loopback = netip.MustParseAddr("127.88.200.7")

func forwarding(options *Options) { options.Forward = loopback }

func connect(port int) (*wire.Socket, error) {
	return wire.DialTCP(&syscall.SockaddrInet4{Port: port, Addr: loopback.As4()}, soon)
}

func savedPorts(dir string) []portMap {
	var saved struct {
		Schema int
		Ports  []portMap
	}
	data, _ := os.ReadFile(dir + "/ports.json")
	if json.Unmarshal(data, &saved) != nil || saved.Schema != 1 {
		return nil
	}
	return saved.Ports
}

func TestForward(t *testing.T) {
	dir := t.TempDir()
	agent := serve(t, dir)
	keeper := start(t, dir, forwarding)
	port := echo(t, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	agent.ports <- []int{port}
	eventually(t, "the port in ports.json", func() bool {
		return slices.Equal(savedPorts(dir), []portMap{{port, port, "127.88.200.7"}})
	})
	long := strings.Repeat("0123456789abcdef", 1<<18) // 4 MiB: more than the windows
	var others sync.WaitGroup
	for _, text := range []string{"", "hello", long, long} {
		others.Go(func() {
			socket, err := connect(port)
			if err != nil {
				t.Error(err)
				return
			}
			if got, err := exchange(socket, text); err != nil || got != text {
				t.Errorf("%d of %d bytes came back: %v", len(got), len(text), err)
			}
		})
	}
	others.Wait()
	agent.ports <- nil
	eventually(t, "the port closed", func() bool {
		socket, err := connect(port)
		if err == nil {
			socket.Close()
		}
		return err != nil && len(savedPorts(dir)) == 0
	})
	keeper.stop <- syscall.SIGTERM
	keeper.ended()
	if _, err := os.Lstat(dir + "/ports.json"); err == nil {
		t.Error("ports.json was left")
	}
}

func TestForwardToNothing(t *testing.T) {
	dir := t.TempDir()
	agent := serve(t, dir)
	start(t, dir, forwarding)
	port := echo(t, &syscall.SockaddrInet4{Addr: loopback.As4()}) // taken on the host
	agent.ports <- []int{1<<16 + 5, -1, 0, port}
	free := echo(t, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 2}}) // nobody there on 127.0.0.1
	agent.ports <- []int{free, port}
	eventually(t, "one port", func() bool { return slices.Equal(savedPorts(dir), []portMap{{free, free, "127.88.200.7"}}) })
	if socket, err := connect(free); err == nil { // the reset may come that fast
		if got, err := exchange(socket, "x"); got != "" || err == nil {
			t.Errorf("%q %v", got, err)
		}
	}
}

func TestServerThatClosesFirst(t *testing.T) {
	dir := t.TempDir()
	agent := serve(t, dir)
	start(t, dir, forwarding)
	listener, err := wire.Listen(&syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	port := 0
	_ = listener.Raw().Control(func(fd uintptr) {
		name, _ := syscall.Getsockname(int(fd))
		port = name.(*syscall.SockaddrInet4).Port
	})
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = client.Write([]byte("bye"))
			client.Close()
		}
	}()
	agent.ports <- []int{port}
	eventually(t, "the port", func() bool { return len(savedPorts(dir)) == 1 })
	socket, err := connect(port)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	_ = socket.SetReadDeadline(time.Now().Add(soon))
	if got, err := io.ReadAll(socket); err != nil || string(got) != "bye" {
		t.Errorf("%q %v", got, err)
	}
}

func TestAgentComesBack(t *testing.T) {
	dir := t.TempDir()
	first := serve(t, dir)
	keeper := start(t, dir, func(options *Options) { options.PID = os.Getpid(); forwarding(options) })
	port := echo(t, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	first.ports <- []int{port}
	eventually(t, "the port", func() bool { return len(savedPorts(dir)) == 1 })
	first.kill()
	eventually(t, "no port without an agent", func() bool { return savedPorts(dir) != nil && len(savedPorts(dir)) == 0 })
	second := serve(t, dir)
	second.ports <- []int{port}
	eventually(t, "the port again", func() bool { return len(savedPorts(dir)) == 1 })
	if !keeper.runs() {
		t.Error("it ended")
	}
}

func TestSSHAgent(t *testing.T) {
	dir := t.TempDir()
	agent := serve(t, dir)
	start(t, dir, nil)
	conn := <-agent.conns
	ask := func() (*wire.Stream, wire.Message) {
		t.Helper()
		stream, err := conn.Open(wire.Open{Type: wire.TypeOpen, Service: "ssh-agent"})
		if err != nil {
			t.Fatal(err)
		}
		message, err := stream.ReadMessage(soon)
		if err != nil {
			t.Fatal(err)
		}
		return stream, message
	}
	if _, message := ask(); message.Type != wire.TypeError {
		t.Error("none was forwarded, but", message.Type)
	}
	if err := os.WriteFile(dir+"/ssh-agent", []byte(dir+"/dead.sock\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, message := ask(); message.Type != wire.TypeError {
		t.Error("it is dead, but", message.Type)
	}
	echo(t, &syscall.SockaddrUnix{Name: dir + "/real.sock"})
	if err := os.WriteFile(dir+"/ssh-agent", []byte(dir+"/real.sock\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	stream, message := ask()
	if message.Type != wire.TypeStarted {
		t.Fatal(string(message.Raw))
	}
	if err := stream.Write(wire.Stdout, []byte("sign this")); err != nil {
		t.Fatal(err)
	}
	if err := stream.CloseWrite(wire.Stdout); err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	if _, err := stream.WriteTo(wire.Stdin, &got); err != nil || got.String() != "sign this" {
		t.Errorf("%q %v", got.String(), err)
	}
	other, err := conn.Open(wire.Open{Type: wire.TypeOpen, Service: "shell"})
	if err != nil {
		t.Fatal(err)
	}
	if message, err := other.ReadMessage(soon); err != nil || message.Type != wire.TypeError {
		t.Error("it gave a shell")
	}
}

// sendConsole is what crun does: connect, send the master, go.
func sendConsole(t *testing.T, path string, file *os.File) {
	t.Helper()
	socket, err := wire.DialUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	if err := socket.WriteWithFile([]byte("/dev/console"), file); err != nil {
		t.Fatal(err)
	}
}

func consoleSocket(t *testing.T, dir string) (fd int, path string) {
	t.Helper()
	path = dir + "/console.sock"
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 1); err != nil {
		t.Fatal(err)
	}
	return fd, path
}

func TestConsole(t *testing.T) {
	dir := t.TempDir()
	master, slave := pty(t)
	agent := serve(t, dir)
	fd, path := consoleSocket(t, dir)
	keeper := start(t, dir, func(options *Options) { options.ConsoleFD = fd })
	sendConsole(t, path, master)
	master.Close()
	keeper.logHas("-- boot 20")
	// As systemd does: open, write, close; and nobody has it open in between.
	for _, text := range []string{"one", "two"} {
		write(t, slave, text+"\n")
		keeper.logHas(text)
		time.Sleep(20 * time.Millisecond)
	}
	if !keeper.runs() {
		t.Fatal("it ended while the agent lived")
	}
	held, err := os.OpenFile(slave, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	agent.kill()
	time.Sleep(3 * quick.grace)
	if !keeper.runs() {
		t.Fatal("it ended while the machine had its console open")
	}
	if _, err := held.WriteString("last words\n"); err != nil {
		t.Fatal(err)
	}
	held.Close()
	keeper.ended()
	keeper.logHas("last words")
}

// A machine that floods its console costs the host's processors and disk little.
func TestConsoleFlood(t *testing.T) {
	master, path := pty(t)
	log, err := openLog(t.TempDir()+"/log", maxLog)
	if err != nil {
		t.Fatal(err)
	}
	defer log.close()
	console := newConsole(log, make(chan struct{}, 1))
	defer console.close()
	console.attach(master)
	file, err := os.OpenFile(path, os.O_WRONLY|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	written := make(chan int)
	go func() {
		total := 0
		defer func() { written <- total }()
		for {
			count, err := file.Write(bytes.Repeat([]byte("flood "), 1000))
			if total += count; err != nil {
				return
			}
		}
	}()
	time.Sleep(1500 * time.Millisecond)
	console.close()
	file.Close()
	if total := <-written; total > 4*flood {
		t.Errorf("the flood was not slowed: %d bytes", total)
	}
}

func TestConsoleIsAskedFor(t *testing.T) {
	dir := t.TempDir()
	agent := serve(t, dir)
	agent.consoles <- nil // refused: it stays without, and lives
	first := start(t, dir, nil)
	eventually(t, "a request", func() bool { return len(agent.requests) > 0 })
	first.stop <- syscall.SIGTERM
	first.ended()

	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	agent.consoles <- null // what is no terminal is not read
	second := start(t, dir, nil)
	eventually(t, "a request", func() bool { return len(agent.requests) > 1 })
	second.stop <- syscall.SIGTERM
	second.ended()

	master, slave := pty(t)
	agent.consoles <- master
	third := start(t, dir, nil)
	third.logHas("-- console attached again 20")
	eventually(t, "a request", func() bool { return len(agent.requests) > 2 })
	write(t, slave, "hello\n")
	third.logHas("hello")
}

func TestProcessEnds(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir) // an agent that stays does not matter
	master, slave := pty(t)
	fd, path := consoleSocket(t, dir)
	machine := exec.Command("sleep", "60")
	if err := machine.Start(); err != nil {
		t.Fatal(err)
	}
	keeper := start(t, dir, func(options *Options) { options.PID = machine.Process.Pid; options.ConsoleFD = fd })
	sendConsole(t, path, master)
	master.Close()
	write(t, slave, "words\n")
	if !keeper.runs() {
		t.Error("it ended early")
	}
	if err := machine.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = machine.Wait()
	keeper.ended()
	keeper.logHas("words")
}

// The first keeper of a run starts before the machine does and learns of its process from berth's own record.
func TestRecordedProcessEnds(t *testing.T) {
	dir := t.TempDir()
	agent := serve(t, dir)
	master, slave := pty(t)
	fd, path := consoleSocket(t, dir)
	keeper := start(t, dir, func(options *Options) { options.ConsoleFD = fd })
	sendConsole(t, path, master)
	master.Close()
	machine := exec.Command("sleep", "60")
	if err := machine.Start(); err != nil {
		t.Fatal(err)
	}
	record := `{"schema":1,"pid":` + strconv.Itoa(machine.Process.Pid) + `,"startTime":` + strconv.FormatInt(startTime(machine.Process.Pid), 10) + `}`
	if err := os.WriteFile(dir+"/container.json", []byte(record), 0o600); err != nil {
		t.Fatal(err)
	}
	write(t, slave, "words\n")
	keeper.logHas("words")
	agent.kill()
	time.Sleep(3 * quick.grace)
	if !keeper.runs() {
		t.Error("it ended with its agent, though the machine lives")
	}
	if err := machine.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = machine.Wait()
	keeper.ended()
}

func TestRecord(t *testing.T) {
	path := t.TempDir() + "/container.json"
	for _, text := range []string{"", "{", "[]", "{}", `{"pid":-4}`, `{"pid":"x"}`} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if watchRecorded(path) != nil {
			t.Errorf("%s says something", text)
		}
	}
	if err := os.WriteFile(path, []byte(`{"pid":`+strconv.Itoa(os.Getpid())+`,"startTime":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	<-watchRecorded(path) // another process by the same number
}

func TestProcessThatIsNotThere(t *testing.T) {
	machine := exec.Command("true")
	if err := machine.Run(); err != nil {
		t.Fatal(err)
	}
	keeper := start(t, t.TempDir(), func(options *Options) { options.PID = machine.Process.Pid })
	keeper.ended()
}

func TestNoMachineAtAll(t *testing.T) {
	start(t, t.TempDir(), nil).ended()
}

func TestOneKeeper(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir)
	first := start(t, dir, nil)
	eventually(t, "the lock", func() bool {
		text, _ := os.ReadFile(dir + "/keeper.lock")
		return string(text) == strconv.Itoa(os.Getpid())+"\n"
	})
	start(t, dir, nil).ended()
	if !first.runs() {
		t.Error("the first one ended")
	}
}

// A guest may send anything: the keeper drops the connection and connects again.
func TestHostileAgent(t *testing.T) {
	dir := t.TempDir()
	listener, err := wire.Listen(&syscall.SockaddrUnix{Name: dir + "/agent.sock"})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	keeper := start(t, dir, func(options *Options) { options.PID = os.Getpid(); forwarding(options) })
	hello := wire.AppendFrame(nil, 0, wire.KindMessage, wire.Encode(wire.Hello{Type: wire.TypeHello, Protocol: 1}))
	listening := `{"type":"listening","ports":`
	for _, answer := range [][]byte{
		nil,
		[]byte("HTTP/1.1 400 Bad Request\r\n\r\n"),
		wire.AppendFrame(nil, 0, wire.KindMessage, []byte(`{"type":"hello","protocol":9}`)),
		wire.AppendFrame(slices.Clone(hello), 1, wire.KindMessage, []byte(listening+`"x"}`)),
		wire.AppendFrame(slices.Clone(hello), 1, wire.KindMessage, []byte(listening+`[1e99]}`)),
		wire.AppendFrame(slices.Clone(hello), 1, wire.KindMessage, []byte(listening+`[99999,-7,0]}`)),
		wire.AppendFrame(slices.Clone(hello), 1, wire.Stdout, make([]byte, 100)),
		wire.AppendFrame(slices.Clone(hello), 1, wire.KindMessage, []byte(`{"type":"exit"}`)),
		wire.AppendFrame(slices.Clone(hello), 2, wire.KindMessage, []byte(`{"type":"exec","argv":[]}`)),
		wire.AppendFrame(slices.Clone(hello), 2, wire.KindMessage, []byte(`{"type":"open","service":7}`)),
	} {
		socket, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_ = socket.SetReadDeadline(time.Now().Add(soon))
		first := make([]byte, wire.HeaderSize)
		if _, err := io.ReadFull(socket, first); err != nil {
			t.Fatal(err)
		}
		if _, err := socket.Write(answer); err != nil {
			t.Error(err)
		}
		time.Sleep(5 * time.Millisecond)
		socket.Close()
		if !keeper.runs() {
			t.Fatalf("it ended by %.60q", answer)
		}
	}
}

// A guest that opens a stream and ends it, over and over, while the host's SSH agent has no time.
func TestFloodOfServices(t *testing.T) {
	dir := t.TempDir()
	busy, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(busy)
	if err := errors.Join(syscall.Bind(busy, &syscall.SockaddrUnix{Name: dir + "/busy.sock"}), syscall.Listen(busy, 0)); err != nil {
		t.Fatal(err)
	}
	write := os.WriteFile(dir+"/ssh-agent", []byte(dir+"/busy.sock\n"), 0o600)
	listener, err := wire.Listen(&syscall.SockaddrUnix{Name: dir + "/agent.sock"})
	if err := errors.Join(write, err); err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	start(t, dir, nil)
	flood := wire.AppendFrame(nil, 0, wire.KindMessage, wire.Encode(wire.Hello{Type: wire.TypeHello, Protocol: 1}))
	for id := uint32(2); id < 1000; id += 2 {
		flood = wire.AppendFrame(flood, id, wire.KindMessage, wire.Encode(wire.Open{Type: wire.TypeOpen, Service: "ssh-agent"}))
		flood = wire.AppendFrame(flood, id, wire.KindMessage, wire.Encode(wire.Plain{Type: wire.TypeClosed}))
	}
	for range 10 { // another connection is no way round
		socket, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = io.Copy(io.Discard, socket) }()
		_, _ = socket.Write(flood)
		time.Sleep(20 * time.Millisecond)
		socket.Close()
		if count := runtime.NumGoroutine(); count > 3*maxServices {
			t.Fatal("it has", count, "goroutines, most of which hold a thread")
		}
	}
}

// An agent says at most once a second that other ports listen. One that never stops saying so costs the host little.
func TestFloodOfPorts(t *testing.T) {
	dir := t.TempDir()
	agent := serve(t, dir)
	start(t, dir, forwarding)
	began := time.Now()
	const lists = 5
	for i := range lists {
		agent.ports <- []int{30000 + i}
		eventually(t, "the list", func() bool {
			saved := savedPorts(dir)
			return len(saved) == 1 && saved[0].Guest == 30000+i
		})
	}
	if took := time.Since(began); took < (lists-1)*listPause {
		t.Error("all lists were followed after", took)
	}
}

func TestParse(t *testing.T) {
	good := []string{"--dir", "/d", "--log", "/l"}
	options, err := parse(append(good, "--console-fd", "5", "--forward", "127.1.2.3", "--pid=9"))
	if err != nil || options.Dir != "/d" || options.ConsoleFD != 5 || options.PID != 9 || options.Forward.String() != "127.1.2.3" {
		t.Errorf("%+v %v", options, err)
	}
	if options, err := parse(good); err != nil || options.ConsoleFD != -1 || options.Forward.IsValid() {
		t.Errorf("%+v %v", options, err)
	}
	for _, args := range [][]string{
		nil, {"--dir", "d", "--log", "/l"}, {"--dir", "/d"}, append(good, "x"), append(good, "--bogus"), append(good, "--pid", "-1"),
		append(good, "--forward", "10.0.0.1"), append(good, "--forward", "::1"), append(good, "--forward", "x"), append(good, "--console-fd", "0"),
	} {
		if _, err := parse(args); err == nil {
			t.Errorf("accepted: %q", args)
		}
	}
}

func TestPlanPorts(t *testing.T) {
	for name, test := range map[string]struct {
		guest  []int
		lowest int
		want   map[int]int
	}{
		"high":           {[]int{3000, 5432}, 1024, map[int]int{3000: 3000, 5432: 5432}},
		"low":            {[]int{22, 80, 443}, 1024, map[int]int{22: 8022, 80: 8080, 443: 8443}},
		"low, taken":     {[]int{80, 8080}, 1024, map[int]int{8080: 8080}},
		"low, allowed":   {[]int{80}, 80, map[int]int{80: 80}},
		"root":           {[]int{22}, 1, map[int]int{22: 22}},
		"garbage":        {[]int{0, -5, 65536, 1 << 40, 7000}, 1024, map[int]int{7000: 7000}},
		"still too low":  {[]int{22}, 20000, map[int]int{}},
		"more than that": {make([]int, 5000), 1024, map[int]int{}},
	} {
		got := planPorts(test.guest, test.lowest)
		if len(got) != len(test.want) {
			t.Errorf("%s: %v", name, got)
		}
		for port, host := range test.want {
			if got[port] != host {
				t.Errorf("%s: %v", name, got)
			}
		}
	}
}

func TestLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	log, err := openLog(path, 100)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 11, 22, 15, 16, 0, 0, time.FixedZone("x", 3600))
	log.mark("boot", at)
	_, _ = log.Write([]byte("no line end"))
	log.close()
	if log, err = openLog(path, 100); err != nil {
		t.Fatal(err)
	}
	log.mark("boot", at)
	want := "-- boot 2026-11-22T14:16:00Z --\nno line end\n-- boot 2026-11-22T14:16:00Z --\n"
	if got, _ := os.ReadFile(path); string(got) != want {
		t.Errorf("%q", got)
	}
	for range 50 {
		_, _ = log.Write([]byte(strings.Repeat("x", 30)))
	}
	now, _ := os.ReadFile(path)
	before, _ := os.ReadFile(path + ".1")
	if len(now) == 0 || len(now) > 100 || len(before) == 0 || len(before) > 100 {
		t.Errorf("%d and %d bytes", len(now), len(before))
	}
	for _, name := range []string{path, path + ".1"} {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
			t.Error(info, err)
		}
	}
	// Where it can't be turned over it stays bounded all the same.
	if err := os.Remove(path + ".1"); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(path+".1/x", 0o700); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		_, _ = log.Write([]byte(strings.Repeat("x", 30)))
	}
	if info, err := os.Stat(path); err != nil || info.Size() > 100 {
		t.Error(info, err)
	}
	log.close()
	_, _ = log.Write([]byte("after the end"))
}

func TestLogIsNoLink(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(dir+"/target", dir+"/log"); err != nil {
		t.Fatal(err)
	}
	if _, err := openLog(dir+"/log", 100); err == nil {
		t.Error("a link was followed")
	}
	if err := syscall.Mkfifo(dir+"/pipe", 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openLog(dir+"/pipe", 100); err == nil {
		t.Error("a pipe was opened")
	}
}

// What a false agent may send in place of a console is told apart by what the kernel knows of it.
func TestNoConsole(t *testing.T) {
	regular, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []*os.File{regular, null} {
		if _, err := asMaster(file); err == nil {
			t.Errorf("%s was taken for a console", file.Name())
		}
	}
	master, slave := pty(t)
	other, err := os.OpenFile(slave, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := asMaster(other); err == nil {
		t.Error("the other side was taken for a console")
	}
	taken, err := asMaster(master)
	if err != nil {
		t.Fatal(err)
	}
	taken.Close()
}
