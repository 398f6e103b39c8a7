package serve

import (
	"bytes"
	"math"
	"testing"
	"time"

	"berth.dev/guest/internal/exec"
	"berth.dev/guest/internal/wire"
)

// channelOf serves a channel with a keeper at its other end.
func channelOf(t *testing.T, role string) (*Server, *wire.Conn) {
	t.Helper()
	server := New(newFake(), "1.2.3", exec.Config{User: "root"})
	near, far, err := wire.Pair()
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		server.Attend(far)
	}()
	keeper := wire.NewConn(near, wire.Options{Side: wire.Host, Version: "k", Role: role})
	t.Cleanup(func() {
		keeper.Close()
		<-ended
		until(t, func() bool { server.mutex.Lock(); defer server.mutex.Unlock(); return len(server.clients) == 0 })
	})
	if _, err := keeper.WaitHello(soon); err != nil {
		t.Fatal(err)
	}
	return server, keeper
}

// open asks for a connection and gives the stream and the first answer.
func open(t *testing.T, keeper *wire.Conn) (*wire.Stream, wire.Message) {
	t.Helper()
	stream, err := keeper.Open(wire.Plain{Type: wire.TypeConnect})
	if err != nil {
		t.Fatal(err)
	}
	message, err := stream.ReadMessage(soon)
	if err != nil {
		t.Fatal(err)
	}
	return stream, message
}

// through makes a client whose bytes go through a stream of the keeper's.
func through(t *testing.T, keeper *wire.Conn) (*wire.Conn, *wire.Stream) {
	t.Helper()
	stream, message := open(t, keeper)
	if message.Type != wire.TypeStarted {
		t.Fatalf("%s", message.Raw)
	}
	own, other, err := wire.Pair()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		wire.Relay(stream, wire.Stdout, wire.Stdin, other)
		finish(stream, wire.Plain{Type: wire.TypeClosed})
	}()
	client := wire.NewConn(own, wire.Options{Side: wire.Host, Version: "c", Role: "client"})
	t.Cleanup(client.Close)
	return client, stream
}

func TestConnect(t *testing.T) {
	_, keeper := channelOf(t, "keeper")
	client, stream := through(t, keeper)
	if hello, err := client.WaitHello(soon); err != nil || hello.Version != "1.2.3" {
		t.Fatal(hello, err)
	}
	// More than any window, both ways, through frames of every size.
	request := wire.Exec{Type: wire.TypeExec, Argv: []wire.Bytes{[]byte("cat")}, CwdOptional: true}
	command, err := client.Open(request)
	if err != nil {
		t.Fatal(err)
	}
	sent := bytes.Repeat([]byte("0123456789abcdef"), 5<<16)
	go func() { _ = command.Write(wire.Stdin, sent); _ = command.CloseWrite(wire.Stdin) }()
	var got bytes.Buffer
	if receiveErr, writeErr := command.WriteTo(wire.Stdout, &got); receiveErr != nil || writeErr != nil {
		t.Fatal(receiveErr, writeErr)
	}
	if !bytes.Equal(got.Bytes(), sent) {
		t.Errorf("%d bytes came back of %d", got.Len(), len(sent))
	}
	client.Close()
	select {
	case <-stream.Done(): // the agent has said so
	case <-time.After(soon):
		t.Error("the stream of a client that is gone stays")
	}
	if again, _ := through(t, keeper); again != nil {
		if _, err := again.WaitHello(soon); err != nil {
			t.Error(err)
		}
	}
}

func TestStalledClientStallsNobody(t *testing.T) {
	_, keeper := channelOf(t, "keeper")
	stalled, message := open(t, keeper)
	if message.Type != wire.TypeStarted {
		t.Fatalf("%s", message.Raw)
	}
	// A client that asks for endless bytes and reads none of them.
	hello := wire.Encode(wire.Hello{Type: wire.TypeHello, Protocol: wire.ProtocolVersion, Version: "x", Role: "client"})
	ask := wire.Encode(wire.Exec{Type: wire.TypeExec, Argv: []wire.Bytes{[]byte("cat"), []byte("/dev/zero")}, CwdOptional: true})
	text := wire.AppendFrame(wire.AppendFrame(nil, 0, wire.KindMessage, hello), 1, wire.KindMessage, ask)
	if err := stalled.Write(wire.Stdin, text); err != nil {
		t.Fatal(err)
	}
	client, _ := through(t, keeper)
	for range 20 {
		status, err := client.Open(wire.Plain{Type: wire.TypeStatus})
		if err != nil {
			t.Fatal(err)
		}
		if message, err := status.ReadMessage(soon); err != nil || message.Type != wire.TypeResult {
			t.Fatal(message.Type, err)
		}
	}
}

func TestBrokenClientHarmsNobody(t *testing.T) {
	_, keeper := channelOf(t, "keeper")
	stream, _ := open(t, keeper)
	if err := stream.Write(wire.Stdin, []byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	_, _ = stream.WriteTo(wire.Stdout, &got)
	if !bytes.Contains(got.Bytes(), []byte(`"fatal"`)) {
		t.Errorf("it was not told why: %q", got.Bytes())
	}
	if message, err := stream.ReadMessage(soon); err != nil || message.Type != wire.TypeClosed {
		t.Error(message.Type, err)
	}
	client, _ := through(t, keeper)
	if _, err := client.WaitHello(soon); err != nil {
		t.Error(err)
	}
}

func TestConnectIsTheKeepersOfAChannel(t *testing.T) {
	refused := func(conn *wire.Conn) {
		t.Helper()
		_, message := open(t, conn)
		refusal := wire.Error{}
		if err := message.Decode(&refusal); err != nil || refusal.Code != wire.CodeUnsupported {
			t.Errorf("%s %v", message.Raw, err)
		}
	}
	_, client := channelOf(t, "client")
	refused(client)
	_, keeper := channelOf(t, "keeper")
	inner, _ := through(t, keeper)
	refused(inner) // no connections in connections in connections
	_, path := start(t, newFake())
	refused(connect(t, path, "keeper")) // of a container
}

func TestConnectIsRefusedWhenThereAreTooMany(t *testing.T) {
	server, keeper := channelOf(t, "keeper")
	var streams []*wire.Stream
	for len(streams) < maxConnections { // as many as the keeper carries; the channel itself is none of them
		stream, message := open(t, keeper)
		if message.Type != wire.TypeStarted {
			t.Fatalf("%d: %s", len(streams), message.Raw)
		}
		streams = append(streams, stream)
	}
	until(t, func() bool { return !server.hasRoom() })
	_, message := open(t, keeper)
	refusal := wire.Error{}
	if err := message.Decode(&refusal); err != nil || refusal.Code != wire.CodeBusy {
		t.Errorf("%s %v", message.Raw, err)
	}
	_ = streams[0].CloseWrite(wire.Stdin)
	until(t, server.hasRoom)
}

// Not by a request: it would set the clock of whoever runs the tests.
func TestClockOfNoTime(t *testing.T) {
	for _, nanos := range []int64{0, -1, 1, math.MinInt64} {
		if isPossible(time.Unix(0, nanos)) {
			t.Error(nanos)
		}
	}
	if !isPossible(time.Now()) {
		t.Error("now is not possible")
	}
}

func TestClockIsLeftAloneWhenItIsRight(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for ahead, right := range map[time.Duration]bool{0: true, time.Millisecond: true, -100 * time.Millisecond: true, time.Second: false, -time.Hour: false} {
		if isRight(now.Add(ahead), now) != right {
			t.Errorf("%s ahead", ahead)
		}
	}
}
