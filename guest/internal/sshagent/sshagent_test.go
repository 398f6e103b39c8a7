package sshagent

import (
	"errors"
	"io"
	"os"
	"syscall"
	"testing"
	"time"

	"berth.dev/guest/internal/wire"
)

func dial(t *testing.T, path string) *wire.Socket {
	t.Helper()
	client, err := wire.DialUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	_ = client.SetReadDeadline(time.Now().Add(10 * time.Second))
	return client
}

// keeper is the host's end: it turns what it gets around.
func keeper(t *testing.T) Opener {
	t.Helper()
	near, far, err := wire.Pair()
	if err != nil {
		t.Fatal(err)
	}
	host := wire.NewConn(near, wire.Options{Side: wire.Host, Role: "keeper"})
	guest := wire.NewConn(far, wire.Options{Side: wire.Guest, InitState: func() string { return "running" }})
	t.Cleanup(func() { host.Close(); guest.Close() })
	if _, err := guest.WaitHello(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			stream, err := host.Accept()
			if err != nil {
				return
			}
			_ = stream.Send(wire.Started{Type: wire.TypeStarted})
			for {
				chunk, err := stream.Next(wire.Stdout)
				if err != nil {
					break
				}
				_ = stream.Write(wire.Stdin, chunk.Data)
				stream.Consumed(wire.Stdout, chunk)
			}
			_ = stream.CloseWrite(wire.Stdin)
			_ = stream.Finish(wire.Plain{Type: wire.TypeClosed})
		}
	}()
	return guest.Open
}

func TestForward(t *testing.T) {
	path := t.TempDir() + "/s"
	agent := New(path, uint32(os.Geteuid()), uint32(os.Getegid()), keeper(t))
	defer agent.Close()
	if err := agent.Check(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Fatal(info, err)
	}
	client := dial(t, path)
	if _, err := client.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(client); err != nil || string(got) != "hello" {
		t.Fatalf("%q %v", got, err)
	}
}

func TestWithoutKeeper(t *testing.T) {
	path := t.TempDir() + "/s"
	agent := New(path, uint32(os.Geteuid()), uint32(os.Getegid()), func(any) (*wire.Stream, error) { return nil, errors.New("none") })
	defer agent.Close()
	if err := agent.Check(); err != nil {
		t.Fatal(err)
	}
	client := dial(t, path)
	_ = client.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("hung up on before it asked:", err)
	}
	_ = client.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := client.Write([]byte("request")); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(client); err != nil || len(got) != 0 {
		t.Fatalf("%q %v", got, err)
	}
}

func TestSocketIsMadeAgain(t *testing.T) {
	path := t.TempDir() + "/s"
	agent := New(path, uint32(os.Geteuid()), uint32(os.Getegid()), keeper(t))
	defer agent.Close()
	for range 3 {
		if err := agent.Check(); err != nil {
			t.Fatal(err)
		}
		dial(t, path)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	// Somebody else's is replaced, too.
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := agent.Check(); err != nil {
		t.Fatal(err)
	}
	dial(t, path)
	before := agent.inode
	if err := agent.Check(); err != nil || agent.inode != before {
		t.Fatal("made again without need", err)
	}
}

func TestSocketThatCannotBeMade(t *testing.T) {
	agent := New(t.TempDir()+"/none/s", 0, 0, nil)
	if err := agent.Check(); !errors.Is(err, syscall.ENOENT) {
		t.Fatal(err)
	}
	if err := agent.Check(); err != nil {
		t.Fatal("tried again at once", err)
	}
}
