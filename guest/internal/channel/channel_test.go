package channel

import (
	"bytes"
	"errors"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"berth.dev/guest/internal/wire"
)

const soon = 10 * time.Second

// guest is the guest's end of a line that is a socket pair: what each connection read up to its end comes by read.
type guest struct {
	t     *testing.T
	host  *wire.Socket
	links chan io.ReadWriteCloser
	read  chan string
}

// portPair gives the two ends of a port; closing the host's ends the port for good.
func portPair(t *testing.T) (port, host *wire.Socket) {
	t.Helper()
	port, host, err := wire.Pair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close(); port.Close() })
	return port, host
}

var errNoMore = errors.New("there is only one port")

func once(port io.ReadWriteCloser) func() (io.ReadWriteCloser, error) {
	return func() (io.ReadWriteCloser, error) {
		defer func() { port = nil }()
		if port == nil {
			return nil, errNoMore
		}
		return port, nil
	}
}

// heard reads the announcement of a guest that has opened its port.
func heard(t *testing.T, host *wire.Socket) {
	t.Helper()
	got := make([]byte, lineSize)
	_ = host.SetReadDeadline(time.Now().Add(soon))
	if _, err := io.ReadFull(host, got); err != nil || !strings.HasPrefix(string(got), prefix) {
		t.Fatalf("%q %v", got, err)
	}
}

func newGuest(t *testing.T) *guest {
	t.Helper()
	port, host := portPair(t)
	g := &guest{t: t, host: host, links: make(chan io.ReadWriteCloser, 16), read: make(chan string, 16)}
	ended := make(chan error)
	go func() {
		ended <- Serve(once(port), func(link io.ReadWriteCloser) {
			g.links <- link
			text, _ := io.ReadAll(link)
			g.read <- string(text)
		})
	}()
	heard(t, host)
	t.Cleanup(func() {
		host.Close()
		if err := <-ended; err != errNoMore { //nolint:errorlint // ours
			t.Error(err)
		}
	})
	return g
}

func (g *guest) send(data ...string) {
	g.t.Helper()
	if _, err := io.WriteString(g.host, strings.Join(data, "")); err != nil {
		g.t.Fatal(err)
	}
}

// gets waits for the next bytes that the host receives.
func (g *guest) gets(want string) {
	g.t.Helper()
	_ = g.host.SetReadDeadline(time.Now().Add(soon))
	got := make([]byte, len(want))
	if _, err := io.ReadFull(g.host, got); err != nil || string(got) != want {
		g.t.Fatalf("%q instead of %q: %v", got, want, err)
	}
}

func (g *guest) connectionRead(want string) {
	g.t.Helper()
	select {
	case got := <-g.read:
		if got != want {
			g.t.Fatalf("the connection read %.200q instead of %.200q", got, want)
		}
	case <-time.After(soon):
		g.t.Fatal("the connection did not end")
	}
}

func (g *guest) link() io.ReadWriteCloser {
	g.t.Helper()
	select {
	case link := <-g.links:
		return link
	case <-time.After(soon):
		g.t.Fatal("no connection")
		return nil
	}
}

func line(digit string) string { return prefix + strings.Repeat(digit, nonceSize) + "\n" }

func frame(stream uint32, kind wire.Kind, payload string) string {
	return string(wire.AppendFrame(nil, stream, kind, []byte(payload)))
}

func TestGuestAnswersAndReads(t *testing.T) {
	g := newGuest(t)
	g.send(line("a"))
	g.gets(line("a"))
	if _, err := g.link().Write([]byte("from the guest")); err != nil {
		t.Error(err)
	}
	g.gets("from the guest")
	first := frame(0, wire.KindMessage, "\nnot a line\n") + frame(1, wire.Stdin, line("b")) + frame(1, wire.Stdin, "")
	g.send(first)
	g.send(line("c")) // the keeper was replaced
	g.connectionRead(first)
	g.gets(line("c"))
	g.send(frame(7, wire.Stdin, "x"), line("d"))
	g.connectionRead(frame(7, wire.Stdin, "x"))
	g.gets(line("d"))
}

func TestGuestFindsLines(t *testing.T) {
	for name, garbage := range map[string]string{
		"nothing":            "",
		"stale frame":        frame(9, wire.Stdin, "\n\nberth-channel 1 \nx"),
		"half a line":        line("a")[:30],
		"a line cut short":   line("a")[:lineSize-2],
		"another version":    strings.Replace(line("a"), " 1 ", " 2 ", 1),
		"upper case":         line("A"),
		"too many digits":    strings.TrimSuffix(line("a"), "\n") + "0\n",
		"newlines":           strings.Repeat("\n", 5000),
		"around the buffer":  strings.Repeat("x", seekSize-10),
		"almost, over again": strings.Repeat("\nberth-channel 1", 1000),
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t)
			g.send(garbage, line("c"))
			g.gets(line("c"))
		})
	}
}

func TestGuestTakesSplitBytes(t *testing.T) {
	g := newGuest(t)
	text := frame(1, wire.Stdin, "ab\ncd") + frame(3, wire.Stdin, "\n")
	for _, c := range []byte("rubbish" + line("a") + text + line("b")) {
		g.send(string([]byte{c}))
	}
	g.gets(line("a") + line("b"))
	g.connectionRead(text)
}

func TestTwoLinesQueued(t *testing.T) {
	g := newGuest(t)
	g.send(line("a"), line("b"), line("c"), frame(0, wire.KindMessage, "hello"))
	g.gets(line("a") + line("b") + line("c"))
	g.connectionRead("")
	g.connectionRead("")
	g.host.Close()
	g.connectionRead(frame(0, wire.KindMessage, "hello"))
}

// A keeper that was killed in mid-frame and replaced so quickly that the guest saw no hang-up: the frame swallows lines
// until it is full, then the protocol is broken, and the next line is found.
func TestLineInTheMiddleOfAFrame(t *testing.T) {
	port, host := portPair(t)
	conns := make(chan *wire.Conn, 8)
	go func() {
		_ = Serve(once(port), func(link io.ReadWriteCloser) {
			conn := wire.NewConn(link, wire.Options{Side: wire.Guest, InitState: func() string { return "running" }})
			conns <- conn
			<-conn.Done()
		})
	}()
	hello := frame(0, wire.KindMessage, string(wire.Encode(wire.Hello{Type: wire.TypeHello, Protocol: 1, Role: "keeper"})))
	request := frame(1, wire.KindMessage, `{"type":"x"}`)
	half := frame(1, wire.Stdin, strings.Repeat("x", 100))[:50]
	_, _ = io.WriteString(host, line("a")+hello+request+half+line("b")+line("c"))
	conn := <-conns
	<-conn.Done()
	var wrong *wire.ProtocolError
	if !errors.As(conn.Err(), &wrong) {
		t.Error(conn.Err())
	}
	stream, err := Dial(host, soon)
	if err != nil {
		t.Fatal(err)
	}
	again := wire.NewConn(stream, wire.Options{Side: wire.Host, Role: "keeper"})
	defer again.Close()
	if _, err := again.WaitHello(soon); err != nil {
		t.Error(err)
	}
}

// Whoever handles a connection may end it in the middle of everything (a protocol error): the next line is found.
func TestGuestClosesFirst(t *testing.T) {
	port, host := portPair(t)
	handled := make(chan io.ReadWriteCloser)
	go func() {
		_ = Serve(once(port), func(link io.ReadWriteCloser) {
			read := make(chan error)
			go func() {
				var data [4]byte
				_, err := link.Read(data[:])
				read <- err
			}()
			handled <- link
			if err := <-read; err != io.EOF { //nolint:errorlint // as Read says it
				t.Error(err)
			}
		})
	}()
	heard(t, host)
	for _, digit := range []string{"1", "2", "3"} {
		_, _ = io.WriteString(host, line(digit))
		link := <-handled
		link.Close()
		got := make([]byte, lineSize)
		if _, err := io.ReadFull(host, got); err != nil || string(got) != line(digit) {
			t.Fatalf("%q %v", got, err)
		}
		if _, err := link.Write([]byte("late")); !errors.Is(err, os.ErrClosed) {
			t.Error("a late write:", err)
		}
	}
}

// A host that reads nothing holds nobody: closing calls the writer back, and the next connection starts clean.
func TestStuckWriterIsCalledBack(t *testing.T) {
	port, host := portPair(t)
	handled := make(chan io.ReadWriteCloser)
	go func() { _ = Serve(once(port), func(link io.ReadWriteCloser) { handled <- link; <-handled }) }()
	_, _ = io.WriteString(host, line("1"))
	link := <-handled
	wrote := make(chan error)
	go func() {
		_, err := link.Write(make([]byte, 16<<20))
		wrote <- err
	}()
	select {
	case err := <-wrote:
		t.Fatal("it did not block:", err)
	case <-time.After(20 * time.Millisecond):
	}
	link.Close()
	if err := <-wrote; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	handled <- nil
	dialled, err := Dial(host, 0) // what was written before is dropped
	if err != nil {
		t.Fatal(err)
	}
	link = <-handled
	go func() { _, _ = link.Write([]byte("clean")) }()
	got := make([]byte, 5)
	if _, err := io.ReadFull(dialled, got); err != nil || string(got) != "clean" {
		t.Errorf("%q %v", got, err)
	}
	handled <- nil
}

func TestBothEnds(t *testing.T) {
	g := newGuest(t)
	g.send("stale bytes, " + frame(3, wire.Stdin, "x")[:5])
	for range 3 {
		host, err := Dial(g.host, soon)
		if err != nil {
			t.Fatal(err)
		}
		guestEnd := g.link()
		if _, err := guestEnd.Write([]byte("stale words of the guest")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(host, frame(1, wire.Stdin, "hi")); err != nil {
			t.Fatal(err)
		}
	}
	g.connectionRead(frame(1, wire.Stdin, "hi"))
	g.connectionRead(frame(1, wire.Stdin, "hi"))
}

func TestHostReadsWhatFollowsTheAnswer(t *testing.T) {
	port, host := portPair(t)
	go func() {
		answer := make([]byte, lineSize)
		_, _ = io.ReadFull(port, answer)
		_, _ = port.Write([]byte("stale\n" + line("f") + string(answer) + "\nfresh"))
	}()
	stream, err := Dial(host, soon)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 6)
	for at := range got { // in small pieces
		if _, err := stream.Read(got[at : at+1]); err != nil {
			t.Fatal(err)
		}
	}
	if string(got) != "\nfresh" {
		t.Errorf("%q", got)
	}
}

func TestHostIsNotAnswered(t *testing.T) {
	_, host := portPair(t)
	if _, err := Dial(host, 5*time.Millisecond); err != ErrNoAnswer { //nolint:errorlint // as it is
		t.Error(err)
	}
	port, host := portPair(t)
	port.Close()
	if _, err := Dial(host, soon); err == nil {
		t.Error("nobody is there, and it answered")
	}
}

// A guest that floods is given up after a bounded number of bytes, which are not kept.
func TestHostIsFlooded(t *testing.T) {
	port, host := portPair(t)
	go func() {
		piece := bytes.Repeat([]byte(line("0")+"\n"), 1000)
		for {
			if _, err := port.Write(piece); err != nil {
				return
			}
		}
	}()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := Dial(host, 0); err != ErrFlood { //nolint:errorlint // as it is
		t.Error(err)
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 1<<20 {
		t.Errorf("%d bytes were allocated", grown)
	}
	host.Close()
}

func TestGuestIsFlooded(t *testing.T) {
	g := newGuest(t)
	piece := strings.Repeat("\nberth-channel 1 0123456789", 40)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 1000 {
		g.send(piece)
	}
	g.send(line("a"))
	g.gets(line("a"))
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 4<<20 {
		t.Errorf("%d bytes were kept", grown)
	}
}

// A port that fails is opened again.
func TestPortIsOpenedAgain(t *testing.T) {
	hosts := make(chan *wire.Socket, 2)
	open := func() (io.ReadWriteCloser, error) {
		port, host := portPair(t)
		hosts <- host
		return port, nil
	}
	go func() { _ = Serve(open, func(link io.ReadWriteCloser) { _, _ = io.ReadAll(link) }) }()
	for range 3 {
		host := <-hosts
		if _, err := Dial(host, soon); err != nil {
			t.Fatal(err)
		}
		host.Close()
	}
}

// hangs is a port whose host may hang up, which a socket can't show.
type hangs struct {
	*wire.Socket
	chunks chan string
	late   bool // its deadline has passed
}

func (h *hangs) SetReadDeadline(at time.Time) error { h.late = !at.IsZero(); return nil }

func (h *hangs) Read(data []byte) (int, error) {
	if h.late {
		return 0, os.ErrDeadlineExceeded
	}
	text, open := <-h.chunks
	switch {
	case !open:
		return 0, io.EOF
	case text == "":
		return 0, ErrHungUp
	}
	return copy(data, text), nil
}

func TestHangUp(t *testing.T) {
	own, host := portPair(t)
	port := &hangs{own, make(chan string, 16), false}
	read := make(chan string, 16)
	ended := make(chan error)
	go func() {
		ended <- Serve(once(port), func(link io.ReadWriteCloser) {
			text, _ := io.ReadAll(link)
			read <- string(text)
		})
	}()
	half := frame(1, wire.Stdin, strings.Repeat("x", 100))[:50]
	for _, chunk := range []string{"", line("a"), half, "", line("b")[:20], "", line("b")[20:], line("c"), ""} {
		port.chunks <- chunk
	}
	close(port.chunks)
	heard(t, host)
	got := make([]byte, 2*lineSize)
	if _, err := io.ReadFull(host, got); err != nil || string(got) != line("a")+line("c") {
		t.Errorf("%q %v", got, err)
	}
	if first, second := <-read, <-read; first != half || second != "" {
		t.Errorf("%q, %q", first, second)
	}
	if err := <-ended; err != errNoMore { //nolint:errorlint // ours
		t.Error(err)
	}
}

func TestWait(t *testing.T) {
	var all []int
	for n := range 6 {
		all = append(all, int(Wait(n)/time.Second))
	}
	if want := []int{1, 2, 4, 5, 5, 5}; !slices.Equal(all, want) {
		t.Error(all)
	}
	if Wait(1000000) != 5*time.Second {
		t.Error(Wait(1000000))
	}
}

// A host that believes to be connected with the agent before learns of the new one.
func TestNewAgentAnnouncesItself(t *testing.T) {
	port, host := portPair(t)
	conn := wire.NewConn(host, wire.Options{Side: wire.Host, Role: "keeper"})
	defer conn.Close()
	hello := wire.Encode(wire.Hello{Type: wire.TypeHello, Protocol: 1})
	_, _ = port.Write(wire.AppendFrame(nil, 0, wire.KindMessage, hello))
	if _, err := conn.WaitHello(soon); err != nil {
		t.Fatal(err)
	}
	go func() { _ = Serve(once(port), func(io.ReadWriteCloser) {}) }()
	<-conn.Done()
	var wrong *wire.ProtocolError
	if !errors.As(conn.Err(), &wrong) {
		t.Error(conn.Err())
	}
}

// Whatever comes, split however: the lines that the sans-I/O part finds are those of the text.
func FuzzLines(f *testing.F) {
	f.Add([]byte(line("a")+"\n"+line("b")), uint8(7))
	f.Add([]byte(frame(1, wire.Stdin, line("a"))+line("b")), uint8(1))
	f.Add([]byte("\n\n\nberth-channel 1 \nberth-channel 1 "+line("c")), uint8(3))
	f.Fuzz(func(t *testing.T, data []byte, step uint8) {
		size := int(step)%64 + 1
		var whole, split seeker
		var linesWhole, linesSplit []string
		collect := func(s *seeker, data []byte, lines *[]string) {
			for len(data) > 0 {
				used, found := s.feed(data)
				if used <= 0 || used > len(data) {
					t.Fatal(used)
				}
				if data = data[used:]; found {
					*lines = append(*lines, string(s.nonce.line()))
				}
			}
		}
		collect(&whole, data, &linesWhole)
		for at := 0; at < len(data); at += size {
			collect(&split, data[at:min(at+size, len(data))], &linesSplit)
		}
		if strings.Join(linesWhole, "|") != strings.Join(linesSplit, "|") {
			t.Fatalf("%q or %q", linesWhole, linesSplit)
		}
		for _, found := range linesWhole {
			if !bytes.Contains(data, []byte(found)) {
				t.Fatalf("%q is not there", found)
			}
		}
	})
}

// Where frames begin does not depend on how the bytes are split either, and a decoder agrees.
func FuzzBoundary(f *testing.F) {
	f.Add([]byte(frame(1, wire.Stdin, line("a"))+line("b")), uint8(1))
	f.Add([]byte(frame(0, wire.KindMessage, `{"type":"x"}`)+"\n"), uint8(5))
	f.Fuzz(func(t *testing.T, data []byte, step uint8) {
		size := int(step)%64 + 1
		var whole, split boundary
		end := whole.scan(data)
		at := 0
		for at < len(data) {
			piece := data[at:min(at+size, len(data))]
			count := split.scan(piece)
			if at += count; count < len(piece) {
				break
			}
		}
		if end != at {
			t.Fatal(end, at)
		}
		if end < len(data) && data[end] != '\n' {
			t.Fatalf("%q", data[end])
		}
	})
}

// Neither end is stopped, blocked or made to grow by what the other sends.
func FuzzEnds(f *testing.F) {
	f.Add([]byte(line("a") + frame(1, wire.Stdin, "x") + line("b")))
	f.Add([]byte("\x00\x00\x00\x05"))
	f.Fuzz(func(t *testing.T, data []byte) {
		port, host := portPair(t)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			serve(port, func(link io.ReadWriteCloser) { _, _ = io.Copy(io.Discard, link) })
		}()
		go func() { _, _ = io.Copy(io.Discard, host) }()
		_, _ = host.Write(data)
		_ = host.CloseWrite()
		<-ended
		hostile, victim := portPair(t)
		_, _ = hostile.Write(data)
		_ = hostile.CloseWrite()
		if _, err := Dial(victim, soon); err == nil {
			t.Fatal("it took this for an answer")
		}
	})
}
