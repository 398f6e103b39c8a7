package exec

import (
	"maps"
	"syscall"
	"testing"
)

func TestSignalNames(t *testing.T) {
	for name, number := range signals {
		if got := signalName(number); got != name {
			t.Errorf("%s is called %s", name, got)
		}
	}
	for name, want := range map[string]syscall.Signal{"34": 34, "64": 64, "9": 9, "POLL": 29, "IOT": 6} {
		if got, ok := signalNumber(name); !ok || got != want {
			t.Errorf("%s: %d", name, got)
		}
	}
	for _, name := range []string{"", "SIGTERM", "term", "0", "65", "-1", "+9", "RTMIN", "9 ", "4294967305"} {
		if got, ok := signalNumber(name); ok {
			t.Errorf("%q passes as %d", name, got)
		}
	}
	if signalName(64) != "64" || signalName(33) != "33" {
		t.Error(signalName(64), signalName(33))
	}
}

func TestEnvironmentFile(t *testing.T) {
	text := "# comment\nA=1\n export B=\"two words\" \nC='x\n=bad\nD E=3\nnothing\nF=a=b\n\xff=1\nG=\x00\nH=''\n"
	want := map[string]string{"A": "1", "B": "two words", "C": "'x", "F": "a=b", "\xff": "1", "H": ""}
	if got := maps.Collect(parseEnvironmentFile(text)); !maps.Equal(got, want) {
		t.Errorf("%q", got)
	}
}
