package keeper

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"berth.dev/guest/internal/channel"
	"berth.dev/guest/internal/qmp"
	"berth.dev/guest/internal/wire"
)

// machine plays QEMU and the guest in it: the sockets of both, and an agent behind a real serial port's protocol.
type machine struct {
	t   testing.TB
	dir string

	listeners map[string]*wire.Listener
	consoles  chan *wire.Socket
	serials   chan *wire.Socket
	monitors  chan *wire.Socket
	conns     chan *wire.Conn
	clocks    chan int64
	attend    func(s *wire.Socket) // what the agent does with a client

	mu   sync.Mutex
	open []io.Closer
}

// startMachine makes QEMU's sockets and starts a guest whose agent opens the port.
func startMachine(t testing.TB) *machine {
	t.Helper()
	m := &machine{
		t: t, dir: t.TempDir(), listeners: map[string]*wire.Listener{},
		consoles: make(chan *wire.Socket, 8), serials: make(chan *wire.Socket, 8), monitors: make(chan *wire.Socket, 8),
		conns: make(chan *wire.Conn, 64), clocks: make(chan int64, 64),
		attend: func(s *wire.Socket) { _, _ = io.Copy(s, s); s.Close() },
	}
	for _, name := range []string{qemuChannel, qemuConsole, qemuSerial, qemuMonitor, "agent.sock"} {
		listener, err := wire.Listen(&syscall.SockaddrUnix{Name: m.dir + "/" + name})
		if err != nil {
			t.Fatal(err)
		}
		m.listeners[name] = listener
	}
	for name, to := range map[string]chan *wire.Socket{qemuConsole: m.consoles, qemuSerial: m.serials, qemuMonitor: m.monitors} {
		go func() {
			for {
				socket, err := m.accept(name)
				if err != nil {
					return
				}
				to <- socket
			}
		}()
	}
	t.Cleanup(m.end)
	return m
}

func (m *machine) accept(name string) (*wire.Socket, error) {
	socket, err := m.listeners[name].Accept()
	if err == nil {
		m.keep(socket)
	}
	return socket, err
}

// channel takes the keeper's connection to the serial port, and its line of synchronisation, which wants its echo.
func (m *machine) channel() (*wire.Socket, []byte) {
	m.t.Helper()
	socket, err := m.accept(qemuChannel)
	if err != nil {
		m.t.Fatal(err)
	}
	_ = socket.SetReadDeadline(time.Now().Add(soon))
	line := make([]byte, len("\nberth-channel 1 \n")+32)
	if _, err := io.ReadFull(socket, line); err != nil {
		m.t.Fatal(err)
	}
	_ = socket.SetReadDeadline(time.Time{})
	return socket, line
}

func (m *machine) keep(it io.Closer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.open = append(m.open, it)
}

// end is QEMU's: all its sockets close.
func (m *machine) end() {
	for name, listener := range m.listeners {
		if name != "agent.sock" {
			listener.Close()
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, it := range m.open {
		it.Close()
	}
}

// agent runs the guest's end.
func (m *machine) agent() *machine {
	go func() {
		_ = channel.Serve(func() (io.ReadWriteCloser, error) { return m.accept(qemuChannel) }, m.serve)
	}()
	return m
}

func (m *machine) serve(link io.ReadWriteCloser) {
	conn := wire.NewConn(link, wire.Options{Side: wire.Guest, Version: "test", InitState: func() string { return "running" }})
	defer conn.Close()
	if hello, err := conn.WaitHello(soon); err != nil || hello.Role != "keeper" {
		return
	}
	m.conns <- conn
	for {
		stream, err := conn.Accept()
		if err != nil {
			return
		}
		switch stream.Request.Type {
		case wire.TypeConnect:
			go m.connect(stream)
		case wire.TypeClock:
			var clock wire.Clock
			_ = stream.Request.Decode(&clock)
			select {
			case m.clocks <- clock.UnixNanos:
			default:
			}
			_ = stream.Finish(wire.Result{Type: wire.TypeResult})
		}
		stream.Taken()
	}
}

func (m *machine) connect(stream *wire.Stream) {
	ours, theirs, err := wire.Pair()
	if err != nil {
		_ = stream.Finish(wire.Refusal(wire.CodeBusy, err.Error()))
		return
	}
	m.keep(theirs)
	go m.attend(theirs)
	_ = stream.Send(wire.Started{Type: wire.TypeStarted})
	wire.Relay(stream, wire.Stdin, wire.Stdout, ours)
	_ = stream.Finish(wire.Plain{Type: wire.TypeClosed})
}

// keeper starts one on the machine's own agent.sock.
func (m *machine) keeper(change func(*Options)) *started { return m.start(change, quick) }

func (m *machine) keeperWith(change func(*times)) *started {
	times := quick
	change(&times)
	return m.start(nil, times)
}

func (m *machine) start(change func(*Options), times times) *started {
	m.t.Helper()
	fd := -1
	_ = m.listeners["agent.sock"].Raw().Control(func(own uintptr) { fd, _ = syscall.Dup(int(own)) })
	return startWith(m.t, m.dir, times, func(options *Options) {
		options.VM, options.AgentFD = true, fd
		if change != nil {
			change(options)
		}
	})
}

func (m *machine) client() *wire.Socket {
	m.t.Helper()
	client, err := wire.DialUnix(m.dir + "/agent.sock")
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { client.Close() })
	_ = client.SetReadDeadline(time.Now().Add(soon))
	return client
}

// says exchanges one message over an open client.
func (m *machine) says(client *wire.Socket, text string) {
	m.t.Helper()
	go func() { _, _ = client.Write([]byte(text)) }()
	got := make([]byte, len(text))
	if _, err := io.ReadFull(client, got); err != nil || string(got) != text {
		m.t.Errorf("%d bytes came back: %v", len(got), err)
	}
}

func take[T any](t testing.TB, from <-chan T) T {
	t.Helper()
	select {
	case it := <-from:
		return it
	case <-time.After(soon):
		t.Fatal("it never came")
		panic("unreachable")
	}
}

func TestVMClients(t *testing.T) {
	m := startMachine(t)
	early := m.client() // before the keeper and the agent
	keeper := m.keeper(nil)
	m.agent()
	m.says(early, "early")
	long := strings.Repeat("0123456789abcdef", 1<<18) // 4 MiB: more than the windows
	var others sync.WaitGroup
	for _, text := range []string{"", "hello", long, long} {
		client := m.client()
		others.Go(func() {
			if got, err := exchange(client, text); err != nil || got != text {
				t.Errorf("%d of %d bytes came back: %v", len(got), len(text), err)
			}
		})
	}
	others.Wait()
	m.says(early, "late")
	if at := time.Unix(0, take(t, m.clocks)); time.Since(at).Abs() > time.Minute {
		t.Error("the guest's clock was set to", at)
	}
	m.end()
	if rest, err := io.ReadAll(early); err != nil || len(rest) > 0 {
		t.Errorf("%q %v", rest, err)
	}
	keeper.ended()
	keeper.logHas("-- boot ")
}

// A client that reads nothing holds up neither the others nor the machine.
func TestVMClientThatStalls(t *testing.T) {
	m := startMachine(t).agent()
	m.attend = func(s *wire.Socket) {
		first := make([]byte, 1)
		if _, err := s.Read(first); err == nil && first[0] == '!' {
			_, _ = s.Write(make([]byte, 64<<20))
		}
		_, _ = s.Write(first)
		_, _ = io.Copy(s, s)
	}
	m.keeper(nil)
	for range 3 {
		_, _ = m.client().Write([]byte("!"))
	}
	for range 3 {
		m.says(m.client(), "hello")
	}
}

func TestVMClientsBeyondTheLimitWait(t *testing.T) {
	m := startMachine(t).agent()
	m.keeper(nil)
	var all []*wire.Socket
	for range maxClients {
		client := m.client()
		m.says(client, "x")
		all = append(all, client)
	}
	late := m.client()
	_, _ = late.Write([]byte("late"))
	_ = late.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := late.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("one too many was served:", err)
	}
	all[7].Close()
	_ = late.SetReadDeadline(time.Now().Add(soon))
	if _, err := io.ReadFull(late, make([]byte, 4)); err != nil {
		t.Error(err)
	}
}

// When the channel breaks its clients see their end, and those that come then wait for the next.
func TestVMAgentIsReplaced(t *testing.T) {
	m := startMachine(t).agent()
	keeper := m.keeper(nil)
	client := m.client()
	m.says(client, "x")
	for range 3 {
		take(t, m.conns).Fatal(wire.CodeInternal, "given up")
		if _, err := client.Read(make([]byte, 1)); err != io.EOF { //nolint:errorlint // as Read says it
			t.Error(err)
		}
		client = m.client()
		m.says(client, "y")
	}
	if !keeper.runs() {
		t.Error("it ended")
	}
}

// A keeper that is killed in the middle of everything: the next one finds the agent, whatever half frame there was.
func TestVMKeeperIsReplaced(t *testing.T) {
	m := startMachine(t).agent()
	half := make(chan struct{})
	go func() { // a keeper that leaves half a frame behind
		socket, err := wire.DialUnix(m.dir + "/" + qemuChannel)
		if err != nil {
			t.Error(err)
			return
		}
		stream, err := channel.Dial(socket, soon)
		if err != nil {
			t.Error(err)
			return
		}
		hello := wire.Encode(wire.Hello{Type: wire.TypeHello, Protocol: 1, Role: "keeper"})
		frames := wire.AppendFrame(wire.AppendFrame(nil, 0, wire.KindMessage, hello), 1, wire.KindMessage, []byte(`{"type":"connect"}`))
		frames = append(frames, wire.AppendFrame(nil, 1, wire.Stdin, make([]byte, 10000))[:500]...)
		_, _ = stream.Write(frames)
		take(t, m.conns)
		close(half)
		stream.Close()
	}()
	<-half
	first := m.keeper(nil)
	m.says(m.client(), "x")
	first.stop <- syscall.SIGTERM
	first.ended()
	m.keeper(func(options *Options) { options.Again = true }).logHas("-- console attached again ")
	m.says(m.client(), "y")
}

// An agent that was killed and started again behind the same open port says nothing: QEMU does.
func TestVMPortChanges(t *testing.T) {
	m := startMachine(t).agent()
	m.keeper(nil)
	monitor := greetMonitor(t, m)
	monitor.waitCommand("query-status") // before that QEMU sends no events
	client := m.client()
	m.says(client, "x")
	monitor.event("VSERPORT_CHANGE", `{"open": false, "id": "other"}`)
	monitor.event("VSERPORT_CHANGE", `{"open": true, "id": "agent"}`) // mostly this very agent
	m.says(client, "y")
	monitor.event("VSERPORT_CHANGE", `{"open": false, "id": "agent"}`)
	if _, err := client.Read(make([]byte, 1)); err != io.EOF { //nolint:errorlint // as Read says it
		t.Error(err)
	}
	m.says(m.client(), "z")
}

// An agent that is killed before it has greeted is not waited for.
func TestVMPortClosesBeforeTheGreeting(t *testing.T) {
	m := startMachine(t)
	m.keeper(nil)
	monitor := greetMonitor(t, m)
	monitor.waitCommand("query-status")
	socket, line := m.channel()
	_, _ = socket.Write(line)
	if _, err := socket.Read(line); err != nil { // its hello: it waits for ours
		t.Fatal(err)
	}
	m.agent()
	monitor.event("VSERPORT_CHANGE", `{"open": false, "id": "agent"}`)
	m.says(m.client(), "x")
}

// Where QEMU says nothing, an agent that is not there any more is found out by the client that it does not take.
func TestVMDeadAgent(t *testing.T) {
	m := startMachine(t).agent()
	m.keeperWith(func(times *times) { times.begin, times.answer = 20*time.Millisecond, 20*time.Millisecond })
	m.says(m.client(), "x")
	take(t, m.conns).Close() // nobody is told
	client := m.client()
	if _, err := client.Read(make([]byte, 1)); err != io.EOF { //nolint:errorlint // as Read says it
		t.Error(err)
	}
	m.says(m.client(), "y")
}

func TestVMConsoles(t *testing.T) {
	m := startMachine(t)
	keeper := m.keeper(nil)
	console, serial := take(t, m.consoles), take(t, m.serials)
	say := func(socket *wire.Socket, text string) {
		t.Helper()
		if _, err := io.WriteString(socket, text); err != nil {
			t.Fatal(err)
		}
	}
	say(serial, "early words\r\n")
	keeper.logHas("early words")
	say(console, "fast words\r\n")
	keeper.logHas("fast words")
	say(serial, "the same again\r\n")
	// The serial port has been read when it is empty; nothing else tells.
	eventually(t, "the serial port read", func() bool { return unread(serial) == 0 })
	console.Close()
	take(t, m.consoles) // connected again
	say(serial, "panic\r\n")
	keeper.logHas("panic")
	say(serial, "last words\r\n")
	m.end()
	keeper.ended()
	text, _ := os.ReadFile(m.dir + "/console.log")
	if strings.Contains(string(text), "again\r") || !strings.HasSuffix(string(text), "last words\r\n") {
		t.Errorf("%q", text)
	}
}

// unread is how much the peer of a socket has not read yet. Source: unix(7), SIOCOUTQ.
func unread(socket *wire.Socket) int {
	var count int32
	_ = socket.Raw().Control(func(fd uintptr) {
		_, _, _ = syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCOUTQ, uintptr(unsafe.Pointer(&count)))
	})
	return int(count)
}

func openQMP(t *testing.T, socket *wire.Socket) *qmp.Client {
	t.Helper()
	client, err := qmp.Open(socket, soon)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// A guest that floods its console costs neither the disk nor its own channel.
func TestVMConsoleFlood(t *testing.T) {
	m := startMachine(t).agent()
	keeper := m.keeper(nil)
	console := take(t, m.consoles)
	sent := make(chan int)
	go func() {
		total := 0
		for {
			count, err := console.Write(bytes.Repeat([]byte("flood "), 10000))
			if total += count; err != nil {
				sent <- total
				return
			}
		}
	}()
	for range 20 {
		m.says(m.client(), "hello")
	}
	m.end()
	keeper.ended()
	// What the socket itself holds is small beside it.
	if total := <-sent; total > 8*flood {
		t.Errorf("the flood was not slowed: %d bytes", total)
	}
}

// fakeMonitor is QEMU's machine protocol.
type fakeMonitor struct {
	t        testing.TB
	socket   *wire.Socket
	commands chan string
	status   chan string
}

func greetMonitor(t testing.TB, m *machine) *fakeMonitor {
	t.Helper()
	f := &fakeMonitor{t: t, socket: take(t, m.monitors), commands: make(chan string, 64), status: make(chan string, 1)}
	f.status <- "running"
	f.say(`{"QMP": {"version": {}, "capabilities": []}}`)
	go f.answer()
	return f
}

func (f *fakeMonitor) say(text string) {
	if _, err := io.WriteString(f.socket, text+"\r\n"); err != nil {
		f.t.Error(err)
	}
}

func (f *fakeMonitor) event(name, data string) {
	f.say(`{"timestamp": {"seconds": 1}, "event": "` + name + `", "data": ` + data + `}`)
}

func (f *fakeMonitor) answer() {
	decoder := json.NewDecoder(f.socket)
	for {
		var command struct {
			Execute string
			ID      json.Number
		}
		if decoder.Decode(&command) != nil {
			return
		}
		result := "{}"
		if command.Execute == "query-status" {
			status := <-f.status
			f.status <- status
			text, _ := json.Marshal(map[string]any{"status": status, "running": status == "running"})
			result = string(text)
		}
		f.say(`{"return": ` + result + `, "id": ` + command.ID.String() + `}`)
		f.commands <- command.Execute
	}
}

func (f *fakeMonitor) setStatus(status string) { <-f.status; f.status <- status }

func (f *fakeMonitor) waitCommand(name string) {
	f.t.Helper()
	for take(f.t, f.commands) != name {
	}
}

func pausedReason(dir string) string {
	var paused struct {
		Schema        int
		Reason, Since string
	}
	text, _ := os.ReadFile(dir + "/paused.json")
	if json.Unmarshal(text, &paused) != nil || paused.Schema != 1 {
		return ""
	}
	if _, err := time.Parse(time.RFC3339, paused.Since); err != nil {
		return err.Error()
	}
	return paused.Reason
}

func TestVMDiskFull(t *testing.T) {
	m := startMachine(t).agent()
	keeper := m.keeper(nil)
	monitor := greetMonitor(t, m)
	take(t, m.clocks)
	monitor.waitCommand("query-status")
	monitor.setStatus("io-error")
	monitor.event("BLOCK_IO_ERROR", `{"device": "", "node-name": "root", "operation": "write", "action": "stop", "nospace": true, "reason": "No space left on device"}`)
	monitor.event("STOP", "{}")
	eventually(t, "paused.json", func() bool { return pausedReason(m.dir) == diskFull })
	keeper.logHas("-- berth: the host's disk is full; the machine is paused until there is space ")
	monitor.waitCommand("cont") // there is space here
	if pausedReason(m.dir) == "" {
		t.Error("it counts as running before QEMU says so")
	}
	monitor.setStatus("running")
	monitor.event("RESUME", "{}")
	eventually(t, "no paused.json", func() bool { return pausedReason(m.dir) == "" })
	keeper.logHas("-- berth: the machine goes on ")
	take(t, m.clocks) // its clock stood still
	monitor.event("SHUTDOWN", `{"guest": true, "reason": "guest-shutdown"}`)
	monitor.event("SHUTDOWN", `{"guest": true, "reason": "\u001b]0;evil"}`)
	monitor.event("GUEST_PANICKED", `{"action": "poweroff"}`)
	keeper.logHas("-- berth: the machine ended (guest-shutdown) ")
	keeper.logHas("-- berth: the machine ended (unknown) ")
	keeper.logHas("-- berth: the guest's kernel panicked ")
}

// A new keeper learns what happened before it came, and cleans up after the one before.
func TestVMPausedBefore(t *testing.T) {
	m := startMachine(t)
	if err := os.WriteFile(m.dir+"/paused.json", []byte(`{"schema":1,"reason":"old","since":"2026-01-01T00:00:00Z"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	keeper := m.keeper(nil)
	first := greetMonitor(t, m)
	eventually(t, "no paused.json", func() bool { return pausedReason(m.dir) == "" })
	first.setStatus("io-error")
	first.socket.Close()
	second := &fakeMonitor{t: t, socket: take(t, m.monitors), commands: first.commands, status: first.status}
	second.say(`{"QMP": {}}`)
	go second.answer()
	eventually(t, "paused.json", func() bool { return pausedReason(m.dir) == diskFailing })
	second.waitCommand("cont")
	m.end()
	keeper.ended()
	if pausedReason(m.dir) != "" {
		t.Error("paused.json was left")
	}
}

// What to do about a disk is decided without QEMU: when to look, and whether to go on.
func TestDiskDecisions(t *testing.T) {
	log, err := openLog(t.TempDir()+"/log", maxLog)
	if err != nil {
		t.Fatal(err)
	}
	defer log.close()
	free := uint64(0)
	m := &monitor{log: log, file: t.TempDir() + "/paused.json", look: time.Second, resumed: func() {}, free: func(string) uint64 { return free }}
	ours, qemu, err := wire.Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer qemu.Close()
	defer ours.Close()
	go func() { _, _ = io.WriteString(qemu, `{"QMP": {}}`+"\n"+`{"return": {}, "id": 1}`+"\n") }()
	client := openQMP(t, ours)
	sentCont := func() bool {
		t.Helper()
		if err := m.tryOn(client); err != nil {
			t.Fatal(err)
		}
		_ = qemu.SetReadDeadline(time.Now().Add(time.Millisecond))
		got := make([]byte, 200)
		count, _ := qemu.Read(got)
		return bytes.Contains(got[:count], []byte(`"cont"`))
	}
	_, _ = qemu.Read(make([]byte, 100)) // qmp_capabilities
	m.pause(true)
	if sentCont() {
		t.Error("it went on without space")
	}
	if free = enoughSpace; !sentCont() {
		t.Error("it did not go on with space")
	}
	var waits []time.Duration
	for range 8 {
		m.goOn()
		m.pause(true)
		waits = append(waits, m.wait/time.Second)
		m.gone = time.Now()
	}
	if want := []time.Duration{2, 4, 8, 16, 32, 60, 60, 60}; !slices.Equal(waits, want) {
		t.Error("a disk that fails at once again is looked at after", waits)
	}
	m.goOn()
	m.gone = time.Now().Add(-time.Hour)
	if m.pause(false); m.wait != time.Second {
		t.Error(m.wait)
	}
	if free = 0; !sentCont() {
		t.Error("an error that is no lack of space does not wait for space")
	}
}

// A guest that says anything but what is right over the channel: the keeper goes on, and so do its other parts.
func TestVMHostileAgent(t *testing.T) {
	m := startMachine(t)
	keeper := m.keeper(nil)
	hello := wire.AppendFrame(nil, 0, wire.KindMessage, wire.Encode(wire.Hello{Type: wire.TypeHello, Protocol: 1}))
	for _, said := range [][]byte{
		nil,
		bytes.Repeat([]byte("garbage\n"), 100),
		hello,
		wire.AppendFrame(slices.Clone(hello), 1, wire.Stdout, make([]byte, 100)),
		wire.AppendFrame(slices.Clone(hello), 7, wire.KindMessage, []byte(`{"type":"started"}`)),
		wire.AppendFrame(slices.Clone(hello), 1, wire.KindMessage, []byte(`{"type":"result"}`)),
		wire.AppendFrame(nil, 0, wire.KindMessage, []byte(`{"type":"hello","protocol":9}`)),
		[]byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
	} {
		socket, line := m.channel()
		_, _ = socket.Write(append(line, said...))
		time.Sleep(5 * time.Millisecond)
		socket.Close()
	}
	m.agent()
	m.says(m.client(), "x")
	if !keeper.runs() {
		t.Error("it ended")
	}
}

// An agent that reads nothing of what a client sends, so that not even a question gets through to it, is given up too.
func TestVMAgentThatReadsNothing(t *testing.T) {
	m := startMachine(t)
	m.keeperWith(func(times *times) { times.begin, times.answer = 20*time.Millisecond, 20*time.Millisecond })
	socket, line := m.channel()
	_, _ = socket.Write(wire.AppendFrame(line, 0, wire.KindMessage, wire.Encode(wire.Hello{Type: wire.TypeHello, Protocol: 1})))
	first := m.client()
	for client := range slices.Values([]*wire.Socket{first, m.client(), m.client(), m.client()}) {
		go func() { _, _ = client.Write(make([]byte, 4<<20)) }() // together more than the sockets on the way take
	}
	if _, err := first.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the client waits for ever")
	}
	m.agent()
	m.says(m.client(), "x")
}

// Nobody reads what a guest sends of kinds that a stream has not: it must not be kept.
func TestVMDataThatNobodyReads(t *testing.T) {
	m := startMachine(t)
	const clients = 30
	sent := make(chan error, 2*clients)
	serve := func(link io.ReadWriteCloser) {
		conn := wire.NewConn(link, wire.Options{Side: wire.Guest, InitState: func() string { return "running" }})
		defer conn.Close()
		for {
			stream, err := conn.Accept()
			if err != nil {
				return
			}
			go func() {
				_ = stream.Send(wire.Started{Type: wire.TypeStarted})
				err := stream.Write(wire.Stderr, make([]byte, 4<<20))
				if stream.Request.Type == wire.TypeConnect {
					sent <- err
				}
			}()
		}
	}
	go func() {
		_ = channel.Serve(func() (io.ReadWriteCloser, error) { return m.accept(qemuChannel) }, serve)
	}()
	m.keeper(func(options *Options) { options.Forward = loopback })
	for range clients {
		m.client()
	}
	for range clients {
		if err := take(t, sent); err != nil {
			t.Fatal(err)
		}
	}
}

// The machine was started again: the new sockets at the same paths are not this keeper's.
func TestVMOtherMachinesSockets(t *testing.T) {
	m := startMachine(t).agent()
	keeper := m.keeper(nil)
	m.says(m.client(), "x")
	for _, name := range []string{qemuChannel, qemuConsole, qemuSerial, qemuMonitor} {
		other, err := wire.Listen(&syscall.SockaddrUnix{Name: m.dir + "/new"})
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if err := os.Rename(m.dir+"/new", m.dir+"/"+name); err != nil {
			t.Fatal(err)
		}
	}
	m.end()
	keeper.ended()
}

func TestVMThatNeverStarted(t *testing.T) {
	m := startMachine(t)
	m.end()
	m.keeper(nil).ended()
}

// Clients over and over leave nothing behind in the connection that carries them.
func TestVMManyClients(t *testing.T) {
	m := startMachine(t).agent()
	m.keeper(nil)
	conn := take(t, m.conns)
	for range 3000 {
		client := m.client()
		_ = client.CloseWrite()
		if _, err := io.ReadAll(client); err != nil {
			t.Fatal(err)
		}
		client.Close()
	}
	if conn.Err() != nil {
		t.Error(conn.Err())
	}
	eventually(t, "no goroutines left", func() bool { return runtime.NumGoroutine() < 100 })
}

func TestHostSlept(t *testing.T) {
	if slept := hostSlept(); slept < -time.Second {
		t.Error(slept)
	}
}

func TestParseVM(t *testing.T) {
	good := []string{"--vm", "--dir", "/d", "--log", "/l", "--agent-fd", "7"}
	options, err := parse(append(good, "--again", "--disk-dir=/x"))
	if err != nil || !options.VM || options.AgentFD != 7 || !options.Again || options.DiskDir != "/x" {
		t.Errorf("%+v %v", options, err)
	}
	for _, args := range [][]string{
		good[:5], append(slices.Clone(good), "--console-fd", "9"), append(slices.Clone(good), "--disk-dir", "x"),
		append(slices.Clone(good), "--agent-fd", "1"), good[1:],
	} {
		if _, err := parse(args); err == nil {
			t.Errorf("accepted: %q", args)
		}
	}
}

func BenchmarkVMBulk(b *testing.B) {
	for name, download := range map[string]bool{"up": false, "down": true} {
		b.Run(name, func(b *testing.B) { benchmarkBulk(b, download) })
	}
}

func benchmarkBulk(b *testing.B, download bool) {
	const piece = 1 << 20
	data := make([]byte, piece)
	m := startMachine(b)
	m.attend = func(s *wire.Socket) {
		defer s.Close()
		if download {
			for range b.N {
				_, _ = s.Write(data)
			}
			return
		}
		_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, s, make([]byte, piece))
	}
	m.agent().keeper(nil)
	client := m.client()
	take(b, m.conns)
	b.SetBytes(piece)
	b.ResetTimer()
	if !download {
		for range b.N {
			_, _ = client.Write(data)
		}
		_ = client.CloseWrite()
	}
	_ = client.SetReadDeadline(time.Time{})
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, client, data); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkVMEcho is one byte there and back through keeper and agent.
func BenchmarkVMEcho(b *testing.B) {
	m := startMachine(b).agent()
	m.keeper(nil)
	client := m.client()
	m.says(client, "x")
	_ = client.SetReadDeadline(time.Time{})
	one := make([]byte, 1)
	for b.Loop() {
		_, _ = client.Write(one)
		_, _ = client.Read(one)
	}
}
