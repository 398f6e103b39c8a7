package wire

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

// vectors is what tests/vectors/generate.py writes; its docstring says what each list means.
type vectors struct {
	Frames []struct {
		Name, Direction, Hex string
		Stream               uint32
		Kind                 Kind
		PayloadHex           string `json:"payload_hex"`
		Message              map[string]any
	}
	Errors     []struct{ Name, Direction, Hex string }
	Incomplete []struct{ Name, Direction, Hex string }
	Headers    []struct {
		Name, Direction, Hex string
		OK                   bool
	}
	Sequences []struct {
		Name, Direction, Hex string
		Frames               [][3]any
	}
	Connections []struct{ Name, Receiver, Sent, Hex, Verdict string }
}

func loadVectors(t testing.TB) []vectors {
	t.Helper()
	paths, _ := filepath.Glob("../../../tests/vectors/*.json")
	var all []vectors
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var keys map[string]json.RawMessage
		if json.Unmarshal(text, &keys) != nil || keys["frames"] == nil || keys["errors"] == nil {
			continue // vectors of something else
		}
		var found vectors
		if err := json.Unmarshal(text, &found); err != nil {
			t.Fatal(path, err)
		}
		all = append(all, found)
	}
	if len(all) == 0 {
		t.Fatal("no vectors in tests/vectors")
	}
	return all
}

func unhex(t testing.TB, text string) []byte {
	t.Helper()
	data, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func directions(name string) []Direction {
	switch name {
	case "to_guest":
		return []Direction{ToGuest}
	case "to_host":
		return []Direction{ToHost}
	}
	return []Direction{ToGuest, ToHost}
}

// decode feeds data in pieces of step bytes and copies what comes out.
func decode(decoder *Decoder, data []byte, step int) ([]Frame, error) {
	var frames []Frame
	for {
		frame, ok, err := decoder.Next()
		if err != nil {
			return frames, err
		}
		if ok {
			frame.Payload = bytes.Clone(frame.Payload)
			frames = append(frames, frame)
			continue
		}
		if len(data) == 0 {
			return frames, nil
		}
		data = data[decoder.Feed(data[:min(step, len(data))]):]
	}
}

var steps = []int{1, 2, 3, 7, 9, 10, 1000, 1 << 30}

func TestVectorFrames(t *testing.T) {
	for _, v := range loadVectors(t) {
		for _, f := range v.Frames {
			data := unhex(t, f.Hex)
			for _, direction := range directions(f.Direction) {
				for _, step := range steps {
					frames, err := decode(NewDecoder(direction), data, step)
					if err != nil || len(frames) != 1 {
						t.Fatalf("%s: %d frames, %v", f.Name, len(frames), err)
					}
					got := frames[0]
					if got.Stream != f.Stream || got.Kind != f.Kind {
						t.Fatalf("%s: stream %d kind %d", f.Name, got.Stream, got.Kind)
					}
					if !bytes.Equal(AppendFrame(nil, got.Stream, got.Kind, got.Payload), data) {
						t.Fatalf("%s: encodes to something else", f.Name)
					}
					if f.Message == nil && hex.EncodeToString(got.Payload) != f.PayloadHex {
						t.Fatalf("%s: payload %x", f.Name, got.Payload)
					}
					var message map[string]any
					if f.Message != nil && (json.Unmarshal(got.Payload, &message) != nil || !reflect.DeepEqual(message, f.Message)) {
						t.Fatalf("%s: message %s", f.Name, got.Payload)
					}
				}
			}
		}
	}
}

func TestVectorErrors(t *testing.T) {
	for _, v := range loadVectors(t) {
		for _, e := range v.Errors {
			for _, direction := range directions(e.Direction) {
				for _, step := range steps {
					var wrong *ProtocolError
					if _, err := decode(NewDecoder(direction), unhex(t, e.Hex), step); !errors.As(err, &wrong) {
						t.Fatalf("%s, %s: %v", e.Name, e.Direction, err)
					}
				}
			}
		}
	}
}

func TestVectorIncompleteAndHeaders(t *testing.T) {
	for _, v := range loadVectors(t) {
		for _, e := range v.Incomplete {
			frames, err := decode(NewDecoder(directions(e.Direction)[0]), unhex(t, e.Hex), 1)
			if len(frames) != 0 || err != nil {
				t.Fatalf("%s: %d frames, %v", e.Name, len(frames), err)
			}
		}
		for _, h := range v.Headers {
			_, err := decode(NewDecoder(directions(h.Direction)[0]), unhex(t, h.Hex), 9)
			if (err == nil) != h.OK {
				t.Fatalf("%s: %v", h.Name, err)
			}
		}
	}
}

func TestVectorSequences(t *testing.T) {
	for _, v := range loadVectors(t) {
		for _, s := range v.Sequences {
			for step := 1; step < 30; step++ {
				frames, err := decode(NewDecoder(directions(s.Direction)[0]), unhex(t, s.Hex), step)
				if err != nil || len(frames) != len(s.Frames) {
					t.Fatalf("%s: %d frames, %v", s.Name, len(frames), err)
				}
				for i, want := range s.Frames {
					got := frames[i]
					if float64(got.Stream) != want[0] || float64(got.Kind) != want[1] || hex.EncodeToString(got.Payload) != want[2] {
						t.Fatalf("%s: frame %d is %v, not %v", s.Name, i, got, want)
					}
				}
			}
		}
	}
}

func TestVectorConnections(t *testing.T) {
	for _, v := range loadVectors(t) {
		for _, c := range v.Connections {
			t.Run(c.Receiver+" "+c.Name, func(t *testing.T) {
				near, far := pair(t)
				options := Options{Side: Guest, Version: "test", InitState: func() string { return "running" }}
				if c.Receiver == "host" {
					options = Options{Side: Host, Version: "test", Role: "client"}
				}
				conn := NewConn(near, options)
				defer conn.Close()
				for _, frame := range sentRequests(t, c.Sent) {
					if _, err := conn.Open(json.RawMessage(frame.Payload)); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := far.Write(unhex(t, c.Hex)); err != nil {
					t.Fatal(err)
				}
				_ = far.CloseWrite()
				select {
				case <-conn.Done():
				case <-time.After(5 * time.Second):
					t.Fatal("no end")
				}
				var wrong *ProtocolError
				if errors.As(conn.Err(), &wrong) != (c.Verdict == "error") {
					t.Fatalf("%v", conn.Err())
				}
				if wrong != nil {
					expectFatal(t, far, options.Side)
				}
			})
		}
	}
}

// sentRequests returns the requests among the frames that the receiver is to have sent; hello it says by itself.
func sentRequests(t *testing.T, text string) []Frame {
	t.Helper()
	frames, err := decode(NewDecoder(ToGuest), unhex(t, text), 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	var found []Frame
	for _, frame := range frames {
		if frame.Stream != 0 {
			found = append(found, frame)
		}
	}
	return found
}

// expectFatal checks that the last thing that comes out is a fatal message.
func expectFatal(t *testing.T, far *Socket, side Side) {
	t.Helper()
	direction := ToHost
	if side == Host {
		direction = ToGuest
	}
	_ = far.SetReadDeadline(time.Now().Add(5 * time.Second))
	decoder, last := NewDecoder(direction), Frame{}
	for {
		count, err := far.Read(decoder.Space())
		decoder.Advance(count)
		for {
			frame, ok, err := decoder.Next()
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				break
			}
			last = frame
		}
		if err != nil {
			break
		}
	}
	if last.Stream != 0 || last.Message.Type != TypeFatal {
		t.Fatalf("the last frame is %+v", last)
	}
}

func pair(t testing.TB) (*Socket, *Socket) {
	t.Helper()
	near, far, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close(); _ = far.Close() })
	return near, far
}

func FuzzDecoder(f *testing.F) {
	for _, v := range loadVectors(f) {
		for _, frame := range v.Frames {
			f.Add(unhex(f, frame.Hex), 3)
		}
		for _, e := range v.Errors {
			f.Add(unhex(f, e.Hex), 1)
		}
		for _, c := range v.Connections {
			f.Add(unhex(f, c.Hex), 11)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, step int) {
		step = max(1, min(step, 1<<20))
		for _, direction := range []Direction{ToGuest, ToHost} {
			whole, wholeErr := decode(NewDecoder(direction), data, 1<<30)
			split, splitErr := decode(NewDecoder(direction), data, step)
			if (wholeErr == nil) != (splitErr == nil) || len(whole) != len(split) {
				t.Fatalf("%d frames, %v; split %d, %v", len(whole), wholeErr, len(split), splitErr)
			}
			var encoded []byte
			for i := range whole {
				if !bytes.Equal(whole[i].Payload, split[i].Payload) {
					t.Fatal("splitting changes a frame")
				}
				encoded = AppendFrame(encoded, whole[i].Stream, whole[i].Kind, whole[i].Payload)
			}
			if !bytes.HasPrefix(data, encoded) {
				t.Fatal("frames do not encode to what they were made of")
			}
		}
	})
}
