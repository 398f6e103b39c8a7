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
	for name, want := range map[string]syscall.Signal{"RTMIN": 34, "RTMIN+1": 35, "RTMAX": 64, "RTMAX-1": 63} {
		if got, ok := signalNumber(name); !ok || got != want {
			t.Errorf("%s: %d", name, got)
		}
	}
	for _, name := range []string{"", "SIGTERM", "term", "9", "RTMIN+", "RTMIN+99", "RTMIN1", "RTMAX+1", "RTMIN-1"} {
		if got, ok := signalNumber(name); ok {
			t.Errorf("%q passes as %d", name, got)
		}
	}
	if signalName(64) != "RTMIN+30" || signalName(33) != "33" {
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
