package wire

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

const soon = 10 * time.Second

// connect makes a host's and a guest's end of one connection.
func connect(t testing.TB) (host, guest *Conn) {
	t.Helper()
	near, far := pair(t)
	near.WantFile()
	host = NewConn(near, Options{Side: Host, Version: "h", Role: "keeper"})
	guest = NewConn(far, Options{Side: Guest, Version: "g", InitState: func() string { return "starting" }})
	t.Cleanup(func() { host.Close(); guest.Close() })
	return host, guest
}

// open opens a stream and returns both ends of it.
func open(t testing.TB, from, to *Conn, request any) (*Stream, *Stream) {
	t.Helper()
	near, err := from.Open(request)
	if err != nil {
		t.Fatal(err)
	}
	far, err := to.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return near, far
}

func TestHello(t *testing.T) {
	host, guest := connect(t)
	hello, err := host.WaitHello(soon)
	if err != nil || hello.Version != "g" || hello.Init != "starting" {
		t.Fatal(hello, err)
	}
	hello, err = guest.WaitHello(soon)
	if err != nil || hello.Version != "h" || hello.Role != "keeper" {
		t.Fatal(hello, err)
	}
}

func TestHelloOfAnotherProtocol(t *testing.T) {
	near, far := pair(t)
	conn := NewConn(near, Options{Side: Guest, InitState: func() string { return "running" }})
	text := Encode(Hello{Type: TypeHello, Protocol: 7, Version: "9", Role: "client"})
	if _, err := far.Write(AppendFrame(nil, 0, KindMessage, text)); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(far)
	if err != nil {
		t.Fatal(err)
	}
	want := "this agent speaks protocol 1, the client 7: restart the machine"
	if !bytes.Contains(answer, []byte(want)) {
		t.Fatalf("%q", answer)
	}
	if _, err := conn.Accept(); err == nil || err.Error() != want {
		t.Fatal(err)
	}
}

func TestWaitHelloHasAnEnd(t *testing.T) {
	near, _ := pair(t)
	conn := NewConn(near, Options{Side: Guest})
	defer conn.Close()
	if _, err := conn.WaitHello(20 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
}

func TestMessagesAndEnd(t *testing.T) {
	host, guest := connect(t)
	near, far := open(t, host, guest, Plain{TypeStatus})
	if far.Request.Type != TypeStatus || far.ID != 1 {
		t.Fatal(far.Request, far.ID)
	}
	far.Taken()
	if err := far.Send(Started{TypeStarted, 7}); err != nil {
		t.Fatal(err)
	}
	if err := far.Finish(Result{TypeResult, "running"}); err != nil {
		t.Fatal(err)
	}
	if err := far.Send(Plain{TypeStarted}); err != ErrEnded {
		t.Fatal(err)
	}
	for _, want := range []string{TypeStarted, TypeResult} {
		message, err := near.ReadMessage(soon)
		if err != nil || message.Type != want {
			t.Fatal(message, err)
		}
	}
	if _, err := near.ReadMessage(soon); err != ErrEnded {
		t.Fatal(err)
	}
	nothingStays(t, host)
	nothingStays(t, guest)
}

func nothingStays(t *testing.T, c *Conn) {
	t.Helper()
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if c.pending != 0 || len(c.streams) != 0 {
		t.Fatal("booked bytes of messages and streams stay:", c.pending, len(c.streams))
	}
}

// A message that crosses our end of a stream is dropped and not booked: nobody would ever take it.
func TestMessageAfterOurEnd(t *testing.T) {
	host, guest := connect(t)
	near, _ := open(t, host, guest, Plain{TypeStatus})
	near.Drop()
	text := Encode(Plain{TypeStarted})
	for range 20000 {
		if err := near.receiveMessage(Message{TypeStarted, text}); err != nil {
			t.Fatal(err)
		}
	}
	nothingStays(t, host)
}

// A message that nobody has taken when we end a stream counts as waiting no more, whichever way it was ended.
func TestMessageBeforeOurEnd(t *testing.T) {
	host, guest := connect(t)
	for _, end := range []func(*Stream){(*Stream).Drop, func(s *Stream) { _ = s.Finish(Plain{TypeClosed}) }} {
		near, far := open(t, host, guest, Plain{TypeStatus})
		far.Taken()
		if err := near.receiveMessage(Message{TypeStarted, Encode(Plain{TypeStarted})}); err != nil {
			t.Fatal(err)
		}
		end(near)
		if _, err := near.ReadMessage(soon); err != ErrEnded {
			t.Fatal(err)
		}
		far.Drop()
		nothingStays(t, host)
	}
}

func TestReadMessageHasAnEnd(t *testing.T) {
	host, guest := connect(t)
	near, _ := open(t, host, guest, Plain{TypeStatus})
	if _, err := near.ReadMessage(20 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
}

func TestGuestOpensAndBothEndsRelay(t *testing.T) {
	host, guest := connect(t)
	if _, err := guest.WaitHello(soon); err != nil {
		t.Fatal(err)
	}
	inner, outer := open(t, guest, host, Open{TypeOpen, "ssh-agent"})
	if inner.ID != 2 {
		t.Fatal(inner.ID)
	}
	clientApp, client := pair(t)
	serviceApp, service := pair(t)
	go func() { Relay(inner, Stdin, Stdout, client); _ = inner.Finish(Plain{TypeClosed}) }()
	go func() { Relay(outer, Stdout, Stdin, service); _ = outer.Finish(Plain{TypeClosed}) }()
	sent := bytes.Repeat([]byte("0123456789abcdef"), 300_000) // more than any window
	go func() { _, _ = clientApp.Write(sent); _ = clientApp.CloseWrite() }()
	got, err := io.ReadAll(serviceApp)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatal(len(got), err)
	}
	go func() { _, _ = serviceApp.Write(got); _ = serviceApp.Close() }()
	if back, err := io.ReadAll(clientApp); err != nil || !bytes.Equal(back, sent) {
		t.Fatal(len(back), err)
	}
	for _, stream := range []*Stream{inner, outer} {
		select {
		case <-stream.Done():
		case <-time.After(soon):
			t.Fatal("the stream stays open")
		}
	}
}

func TestRelayEndsWithTheStream(t *testing.T) {
	host, guest := connect(t)
	near, far := open(t, host, guest, Dial{TypeDial, 80})
	app, socket := pair(t)
	ended := make(chan struct{})
	go func() { Relay(far, Stdin, Stdout, socket); close(ended) }()
	_ = near.CloseWrite(Stdin) // one direction is through, the other waits for the application
	if _, err := io.ReadAll(app); err != nil {
		t.Fatal(err)
	}
	_ = near.Finish(Plain{TypeClosed})
	select {
	case <-ended:
	case <-time.After(soon):
		t.Fatal("the relay goes on")
	}
}

func TestStalledStreamStallsNobodyElse(t *testing.T) {
	host, guest := connect(t)
	_, stalled := open(t, host, guest, Plain{TypeExec})
	near, far := open(t, host, guest, Plain{TypeExec})
	blocked := make(chan error, 1)
	go func() { blocked <- stalled.Write(Stdout, make([]byte, 2*Window)) }()
	payload := make([]byte, 5*Window)
	go func() { _ = far.Write(Stdout, payload); _ = far.CloseWrite(Stdout) }()
	var got bytes.Buffer
	if receive, write := near.WriteTo(Stdout, &got); receive != nil || write != nil || got.Len() != len(payload) {
		t.Fatal(got.Len(), receive, write)
	}
	select {
	case err := <-blocked:
		t.Fatal("sent beyond the credit", err)
	default:
	}
	host.Close()
	if err := <-blocked; err == nil {
		t.Fatal("no error when the connection has gone")
	}
}

func TestBytesArriveWhateverTheirSizes(t *testing.T) {
	host, guest := connect(t)
	near, far := open(t, host, guest, Plain{TypeExec})
	sent, got := sha256.New(), sha256.New()
	go func() {
		for i, size := range []int{1, 8191, 8192, 8193, MaxData - 1, MaxData, MaxData + 1, 3 * Window, 2, 65536, 65535} {
			data := bytes.Repeat([]byte{byte(i), 7}, size)
			sent.Write(data)
			_ = near.Write(Stdin, data)
		}
		_ = near.CloseWrite(Stdin)
	}()
	if receive, write := far.WriteTo(Stdin, got); receive != nil || write != nil {
		t.Fatal(receive, write)
	}
	if !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		t.Fatal("other bytes")
	}
}

func TestStopReadingKeepsThePeerGoing(t *testing.T) {
	host, guest := connect(t)
	near, far := open(t, host, guest, Plain{TypeExec})
	far.StopReading(Stdin)
	if err := near.Write(Stdin, make([]byte, 10*Window)); err != nil {
		t.Fatal(err)
	}
}

// A peer that floods what nobody reads, and takes none of the credit for it, comes to the end of its own.
func TestFloodOfWhatNobodyReadsIsBounded(t *testing.T) {
	near, far := pair(t)
	host := NewConn(near, Options{Side: Host, Role: "keeper"})
	defer host.Close()
	stream, err := host.Open(Plain{TypeConnect})
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = stream.Write(Stdin, make([]byte, Window)) }() // more than the socket takes: our writer is stuck
	stream.StopReading(Stdout)
	_, _ = far.Write(AppendFrame(nil, 0, KindMessage, Encode(Hello{Type: TypeHello, Protocol: 1})))
	frame := AppendFrame(nil, 1, Stdout, make([]byte, MaxData))
	for end := time.Now().Add(soon); host.Err() == nil; { // credit flows until our writer is stuck
		if time.Now().After(end) {
			t.Fatal("it takes everything, and keeps what it owes for it")
		}
		_, _ = far.Write(frame)
	}
	var wrong *ProtocolError
	if !errors.As(host.Err(), &wrong) {
		t.Fatal(host.Err())
	}
}

// Frames of any size cost at most twice the window in memory, also when they come one by one.
func TestWaitingDataIsBounded(t *testing.T) {
	for _, sizes := range [][]int{{1}, {4097}, {8193}, {8193, 253961}, {65538}, {100000}, {131077}, {MaxData}} {
		host, guest := connect(t)
		stream, _ := open(t, host, guest, Plain{TypeConnect})
		decoder := NewDecoder(ToHost)
		for left, i := Window, 0; left > 0; i++ {
			size := min(left, sizes[i%len(sizes)])
			left -= size
			if err := stream.receiveData(decoder, feed(t, decoder, AppendFrame(nil, 1, Stdout, make([]byte, size)))); err != nil {
				t.Fatal(err)
			}
		}
		held := 0
		for _, chunk := range stream.data[Stdout].chunks {
			held += len(chunk.buffer.Bytes)
		}
		if held > 2*Window+2*bigBuffer {
			t.Error("a window in frames of", sizes, "bytes takes", held)
		}
	}
}

// feed gives a decoder the bytes of one frame, and returns that.
func feed(t *testing.T, decoder *Decoder, data []byte) Frame {
	t.Helper()
	for len(data) > 0 {
		data = data[decoder.Feed(data):]
		frame, ok, err := decoder.Next()
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			return frame
		}
	}
	t.Fatal("no frame")
	panic("unreachable")
}

func TestDataBeyondTheCreditIsRefused(t *testing.T) {
	near, far := pair(t)
	conn := NewConn(near, Options{Side: Guest, InitState: func() string { return "running" }})
	frames := AppendFrame(nil, 0, KindMessage, Encode(Hello{TypeHello, 1, "t", "client", ""}))
	frames = AppendFrame(frames, 1, KindMessage, Encode(Plain{TypeExec}))
	go func() { _, _ = io.Copy(io.Discard, far) }()
	go func() {
		_, _ = far.Write(frames)
		for range 5 {
			_, _ = far.Write(AppendFrame(nil, 1, Stdin, make([]byte, MaxData)))
		}
	}()
	select {
	case <-conn.Done():
	case <-time.After(soon):
		t.Fatal("no end")
	}
	var wrong *ProtocolError
	if !errors.As(conn.Err(), &wrong) {
		t.Fatal(conn.Err())
	}
}

func TestTooManyStreamsAreRefused(t *testing.T) {
	near, far := pair(t)
	guest := NewConn(far, Options{Side: Guest, MaxStreams: 3, InitState: func() string { return "" }})
	host := NewConn(near, Options{Side: Host, Role: "client"})
	defer guest.Close()
	defer host.Close()
	var streams []*Stream
	for range 4 {
		stream, err := host.Open(Plain{TypeStatus})
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, stream)
	}
	message, err := streams[3].ReadMessage(soon)
	refusal := Error{}
	if err != nil || message.Decode(&refusal) != nil || refusal.Code != CodeBusy {
		t.Fatal(message, err)
	}
	first, _ := guest.Accept()
	_ = first.Finish(Plain{TypeResult})
	again, _ := host.Open(Plain{TypeStatus})
	for range 3 {
		if first, err = guest.Accept(); err != nil {
			t.Fatal(err)
		}
	}
	if first.ID != again.ID {
		t.Fatal("the freed place is not given")
	}
}

func TestMessagesThatNobodyTakesAreBounded(t *testing.T) {
	host, guest := connect(t)
	near, _ := open(t, host, guest, Plain{TypeExec})
	for guest.Err() == nil {
		if near.Send(Signal{TypeSignal, string(make([]byte, 1<<20))}) != nil {
			break
		}
	}
	<-guest.Done()
	var wrong *ProtocolError
	if !errors.As(guest.Err(), &wrong) {
		t.Fatal(guest.Err())
	}
}

func TestDescriptorComesAlong(t *testing.T) {
	host, guest := connect(t)
	near, far := open(t, host, guest, Plain{TypeConsole})
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := far.FinishWithFile(Plain{TypeResult}, writer); err != nil {
		t.Fatal(err)
	}
	_ = writer.Close()
	if message, err := near.ReadMessage(soon); err != nil || message.Type != TypeResult {
		t.Fatal(message, err)
	}
	file := host.rw.(*Socket).TakeFile()
	if file == nil {
		t.Fatal("no descriptor")
	}
	_, _ = file.Write([]byte("through"))
	_ = file.Close()
	if got, _ := io.ReadAll(reader); string(got) != "through" {
		t.Fatalf("%q", got)
	}
}

func TestListenAndDial(t *testing.T) {
	listener, err := Listen(&syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	var address syscall.Sockaddr
	_ = listener.Raw().Control(func(fd uintptr) { address, _ = syscall.Getsockname(int(fd)) })
	go func() {
		client, err := listener.Accept()
		if err == nil {
			_, _ = client.Write([]byte("hello"))
			_ = client.Close()
		}
	}()
	socket, err := DialTCP(address, soon)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	if got, err := io.ReadAll(socket); string(got) != "hello" {
		t.Fatalf("%q %v", got, err)
	}
	_ = listener.Close()
	if _, err := DialTCP(address, soon); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatal(err)
	}
	if _, err := listener.Accept(); !errors.Is(err, os.ErrClosed) {
		t.Fatal(err)
	}
	if _, err := NewListener(0); err == nil {
		t.Fatal("descriptor 0 passes for a listening socket")
	}
}

func TestManyStreamsAtOnce(t *testing.T) {
	host, guest := connect(t)
	go func() {
		for {
			stream, err := guest.Accept()
			if err != nil {
				return
			}
			go func() {
				for range 50 {
					_ = stream.Write(Stdout, make([]byte, 30_000))
				}
				_ = stream.FinishWithEnds(Plain{TypeResult}, Stdout, Stderr)
			}()
		}
	}()
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			stream, err := host.Open(Plain{TypeExec})
			if err != nil {
				t.Error(err)
				return
			}
			var got bytes.Buffer
			if receive, _ := stream.WriteTo(Stdout, &got); receive != nil || got.Len() != 1_500_000 {
				t.Error(got.Len(), receive)
			}
		})
	}
	all.Wait()
}
