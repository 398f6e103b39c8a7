package qmp

import (
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"berth.dev/guest/internal/wire"
)

const (
	soon     = 10 * time.Second
	greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}` + "\r\n"
	stopped  = `{"timestamp": {"seconds": 1732, "microseconds": 5}, "event": "STOP"}` + "\r\n"
	full     = `{"timestamp": {"seconds": 1732, "microseconds": 5}, "event": "BLOCK_IO_ERROR", "data": {"device": "", "nospace": true}}` + "\r\n"
)

func TestDecode(t *testing.T) {
	text := greeting + "\r\n" + `{"return": {}, "id": 1}` + "\r\n" + stopped + full +
		`{"id": 2, "error": {"class": "GenericError", "desc": "no"}}` + "\n" + `{"return": {"status": "io-error"}}` + "\n"
	for _, step := range []int{1, 2, 7, 100, len(text)} {
		var decoder Decoder
		var all []Message
		for piece := range slices.Chunk([]byte(text), step) {
			messages, err := decoder.Feed(piece)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, messages...)
		}
		if len(all) != 6 || !all[0].Greeting || all[1].ID != 1 || all[1].Return == nil || all[2].Event != "STOP" {
			t.Fatalf("%+v", all)
		}
		var data struct{ Nospace bool }
		if err := Decode(all[3].Data, &data); err != nil || all[3].Event != "BLOCK_IO_ERROR" || !data.Nospace {
			t.Fatalf("%+v %v", all[3], err)
		}
		if all[4].ID != 2 || all[4].Return != nil || all[4].Failure != "no" {
			t.Fatalf("%+v", all[4])
		}
		var status struct{ Status string }
		if err := Decode(all[5].Return, &status); err != nil || status.Status != "io-error" {
			t.Fatalf("%+v %v", all[5], err)
		}
	}
}

func TestDecodeGarbage(t *testing.T) {
	for _, text := range []string{
		"x\n", "[]\n", "{}\n", "null\n", "7\n", "{\n", `{"event": 7}` + "\n", `{"event": ""}` + "\n", `{"id": -1, "return": {}}` + "\n",
		`{"error": "x"}` + "\n", strings.Repeat("x", MaxLine+1), `{"event": "` + strings.Repeat("x", MaxLine) + `"}` + "\n",
		strings.Repeat("[", MaxLine-1) + "\n", strings.Repeat(`{"a":`, 10000) + "\n",
	} {
		var decoder Decoder
		before, err := decoder.Feed([]byte(stopped + text))
		if !errors.Is(err, ErrProtocol) || len(before) != 1 {
			t.Errorf("%.40q: %d messages, %v", text, len(before), err)
		}
		if after, err := decoder.Feed([]byte(stopped)); !errors.Is(err, ErrProtocol) || len(after) != 0 {
			t.Errorf("%.40q: it goes on after the error", text)
		}
	}
}

func pair(t *testing.T) (ours, qemu *wire.Socket) {
	t.Helper()
	ours, qemu, err := wire.Pair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close(); qemu.Close() })
	return ours, qemu
}

func reads(t *testing.T, socket *wire.Socket, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(socket, got); err != nil || string(got) != want {
		t.Errorf("%q %v", got, err)
	}
}

func TestClient(t *testing.T) {
	ours, qemu := pair(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.WriteString(qemu, greeting)
		reads(t, qemu, `{"execute":"qmp_capabilities","id":1}`+"\n")
		_, _ = io.WriteString(qemu, `{"return": {}, "id": 1}`+"\r\n"+stopped+full)
		reads(t, qemu, `{"execute":"cont","id":2}`+"\n")
		_, _ = io.WriteString(qemu, `{"return": {}, "id": 2}`+"\r\n")
	}()
	client, err := Open(ours, soon)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"STOP", "BLOCK_IO_ERROR"} {
		if message, err := client.Next(time.Time{}); err != nil || message.Event != want {
			t.Errorf("%+v %v", message, err)
		}
	}
	if _, err := client.Next(time.Now().Add(time.Millisecond)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	id, err := client.Send("cont")
	if err != nil {
		t.Fatal(err)
	}
	if message, err := client.Next(time.Time{}); err != nil || message.ID != id {
		t.Errorf("%+v %v", message, err)
	}
	<-done
	qemu.Close()
	if _, err := client.Next(time.Time{}); err != io.EOF { //nolint:errorlint // as Next says it
		t.Error(err)
	}
}

func TestOpenWithNoQEMU(t *testing.T) {
	for name, said := range map[string]string{
		"nothing":     "",
		"garbage":     "HTTP/1.1 200\n",
		"no greeting": stopped,
		"refused":     greeting + `{"id": 1, "error": {"desc": "no"}}` + "\n",
	} {
		ours, qemu := pair(t)
		_, _ = io.WriteString(qemu, said)
		_ = qemu.CloseWrite()
		if _, err := Open(ours, soon); err == nil {
			t.Error(name)
		}
	}
	ours, _ := pair(t)
	if _, err := Open(ours, time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
}

// Whatever comes, split however, is decoded alike, and no more than a line of it is held.
func FuzzDecoder(f *testing.F) {
	f.Add([]byte(greeting+stopped+full), uint8(3))
	f.Add([]byte("{}\n"+stopped), uint8(1))
	f.Add([]byte("\n\n{\"return\":null}\n"), uint8(9))
	f.Fuzz(func(t *testing.T, data []byte, step uint8) {
		var whole, split Decoder
		all, failed := whole.Feed(data)
		count := 0
		var err error
		for piece := range slices.Chunk(data, int(step)+1) {
			var messages []Message
			messages, err = split.Feed(piece)
			count += len(messages)
			if len(split.line) > MaxLine {
				t.Fatal(len(split.line))
			}
			if err != nil {
				break
			}
		}
		if count != len(all) || (err == nil) != (failed == nil) {
			t.Fatalf("%d or %d messages, %v or %v", count, len(all), err, failed)
		}
	})
}
