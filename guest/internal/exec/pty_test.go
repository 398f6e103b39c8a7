package exec

import (
	"strings"
	"testing"
	"time"

	"berth.dev/guest/internal/wire"
)

func onTerminal(r *wire.Exec) *wire.Exec {
	r.Tty = &wire.Size{Rows: 24, Cols: 80}
	return r
}

func TestTerminal(t *testing.T) {
	host := agent(t, asNobody)
	got := run(t, host, onTerminal(request("sh", "-c", `tty >/dev/null && stty size; ls -l $(tty) | cut -d' ' -f1,3; echo $TERM; echo >/dev/tty x`)), "")
	expect(t, got, result{stdout: "24 80\r\ncrw--w---- nobody\r\nxterm\r\nx\r\n^D\b\b"[:len(got.stdout)]})
	if !strings.Contains(got.stdout, "24 80\r\ncrw--w---- nobody\r\nxterm\r\nx\r\n") {
		t.Errorf("%q", got.stdout)
	}
}

func TestTerminalResizeAndInterrupt(t *testing.T) {
	host := agent(t, asNobody)
	stream := open(t, host, onTerminal(request("sh", "-c", `trap 'stty size' WINCH; echo ready; while :; do sleep 0.02; done`)))
	waitFor(t, stream, "ready")
	_ = stream.Send(wire.Resize{Type: wire.TypeResize, Size: wire.Size{Rows: 50, Cols: 132}})
	waitFor(t, stream, "50 132")
	_ = stream.Write(wire.Stdin, []byte{3}) // Ctrl-C
	if got := finish(t, stream); got.signal != "INT" {
		t.Errorf("%+v", got)
	}
}

func TestTerminalSignalGoesToTheForeground(t *testing.T) {
	host := agent(t, asNobody)
	r := as("root", onTerminal(request("bash", "--norc", "-i")))
	stream := open(t, host, r)
	_ = stream.Write(wire.Stdin, []byte("PS1=; trap 'echo shell got it' USR1; sh -c 'trap \"echo job got it; exit\" USR1; echo job''ready; while :; do sleep 0.02; done'\n"))
	waitFor(t, stream, "jobready")
	_ = stream.Send(wire.Signal{Type: wire.TypeSignal, Signal: "USR1"})
	waitFor(t, stream, "job got it\r\n")
	_ = stream.Write(wire.Stdin, []byte("exit 9\n"))
	if got := finish(t, stream); got.code != 9 || strings.Contains(got.stdout, "shell got it\r\n") {
		t.Errorf("%+v", got)
	}
}

func TestTerminalEndOfInput(t *testing.T) {
	host := agent(t, asNobody)
	for _, input := range []string{"", "line\n", "no end of line"} {
		got := run(t, host, onTerminal(request("cat")), input)
		if got.code != 0 || !strings.Contains(got.stdout, strings.TrimSpace(input)) {
			t.Errorf("%q: %+v", input, got)
		}
	}
}

func TestTerminalBackgroundDoesNotHoldTheStream(t *testing.T) {
	host := agent(t, asNobody)
	began := time.Now()
	got := finish(t, open(t, host, onTerminal(request("sh", "-c", "trap '' HUP; echo $$; sleep 1000 & echo out; exit 4"))))
	if got.code != 4 || !strings.Contains(got.stdout, "out\r\n") || time.Since(began) > 20*drainTime {
		t.Errorf("%+v after %v", got, time.Since(began))
	}
	group, _, _ := strings.Cut(got.stdout, "\r\n")
	killGroup(t, group)
}

func TestTerminalOfAVanishedClient(t *testing.T) {
	host := agent(t, asNobody)
	stream := open(t, host, onTerminal(request("sh", "-c", "echo $$ ready; exec sleep 1000")))
	message, err := stream.ReadMessage(soon)
	started := wire.Started{}
	if err != nil || message.Decode(&started) != nil {
		t.Fatal(err)
	}
	waitFor(t, stream, "ready")
	host.Close()
	until(t, func() bool { return !exists("/proc/" + itoa(started.PID)) })
}

func TestMuchOutputOnATerminal(t *testing.T) {
	host := agent(t, asNobody)
	got := run(t, host, onTerminal(request("sh", "-c", "seq 1 100000; echo the end")), "")
	if lines := strings.Count(got.stdout, "\r\n"); lines != 100_001 || !strings.Contains(got.stdout, "the end\r\n") || got.code != 0 {
		t.Errorf("%d lines, %d", lines, got.code)
	}
}
