package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"berth.dev/guest/internal/wire"
)

const soon = 10 * time.Second

// TestMain lets this test's own binary be the agent.
func TestMain(m *testing.M) {
	if os.Getenv("BERTH_AGENT_UNDER_TEST") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func agent(t *testing.T, arguments ...string) *exec.Cmd {
	t.Helper()
	path := os.Getenv("BERTH_AGENT") // another build of it, to be measured
	if path == "" {
		own, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		path = own
	}
	program := exec.Command(path, arguments...)
	program.Env = append(os.Environ(), "BERTH_AGENT_UNDER_TEST=1")
	return program
}

// startServe starts `agent serve` as a machine would that has become its init; it returns its process and socket.
func startServe(t *testing.T) (*exec.Cmd, string) {
	t.Helper()
	return startServeAwaiting(t, nil) // /dev/null
}

// startServeAwaiting starts `agent serve` with a standard input that tells what became of process 1.
func startServeAwaiting(t *testing.T, init io.Reader) (*exec.Cmd, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.sock")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	listening := os.NewFile(uintptr(fd), path)
	defer listening.Close()
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 100); err != nil {
		t.Fatal(err)
	}
	program := agent(t, "serve")
	// As a host may start it that wants it to outlive a shortage of memory, only the other way round: that needs no rights.
	program.Args = append([]string{"sh", "-c", `echo 500 >/proc/self/oom_score_adj; exec "$@"`, "sh", program.Path}, program.Args[1:]...)
	program.Path = "/bin/sh"
	program.Stdin = init
	program.ExtraFiles = []*os.File{listening} // descriptor 3
	if err := program.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = program.Process.Kill(); _ = program.Wait() })
	return program, path
}

func connect(t *testing.T, path string) *wire.Conn {
	t.Helper()
	socket, err := wire.DialUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	conn := wire.NewConn(socket, wire.Options{Side: wire.Host, Version: "test", Role: "client"})
	t.Cleanup(conn.Close)
	return conn
}

func output(t *testing.T, conn *wire.Conn, argv ...string) (string, wire.Exit) {
	t.Helper()
	request := wire.Exec{Type: wire.TypeExec, CwdOptional: true}
	for _, argument := range argv {
		request.Argv = append(request.Argv, []byte(argument))
	}
	stream, err := conn.Open(request)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	_, _ = stream.WriteTo(wire.Stdout, &out)
	exit := wire.Exit{}
	for exit.Type != wire.TypeExit {
		message, err := stream.ReadMessage(soon)
		if err != nil || message.Decode(&exit) != nil || message.Type == wire.TypeError {
			t.Fatalf("%s %v", message.Raw, err)
		}
	}
	return out.String(), exit
}

func TestServe(t *testing.T) {
	program, path := startServe(t)
	conn := connect(t, path)
	hello, err := conn.WaitHello(soon)
	if err != nil || hello.Version != "dev" {
		t.Fatal(hello, err)
	}
	// The listening socket is the agent's alone, and so is its environment.
	out, exit := output(t, conn, "sh", "-c", "readlink /proc/self/fd/3; env | grep UNDER_TEST; pwd; umask; exit 3")
	if out != "/root\n0022\n" || exit.Code == nil || *exit.Code != 3 {
		t.Errorf("%q %+v", out, exit)
	}
	out, _ = output(t, conn, "sh", "-c", "while grep -q 500 /proc/$$/oom_score_adj; do sleep 0.01; done; cat /proc/$$/oom_score_adj")
	if out != "0\n" {
		t.Errorf("oom_score_adj %q", out)
	}
	for range 200 {
		if out, _ := output(t, conn, "echo", "x"); out != "x\n" {
			t.Fatalf("%q", out)
		}
	}
	t.Logf("%d KiB resident", resident(t, program.Process.Pid))
	_ = program.Process.Signal(syscall.SIGHUP)
	_ = program.Process.Signal(syscall.SIGINT)
	if out, _ := output(t, connect(t, path), "echo", "still here"); out != "still here\n" {
		t.Errorf("%q", out)
	}
}

func TestServeAnswersNobodyBeforeThereIsAnInit(t *testing.T) {
	for _, becomesInit := range []bool{true, false} {
		waiting, processOne, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer processOne.Close()
		_, path := startServeAwaiting(t, waiting)
		_ = waiting.Close()
		conn := connect(t, path)
		const aWhile = 300 * time.Millisecond
		if hello, err := conn.WaitHello(aWhile); err == nil {
			t.Fatal("it answers before there is an init:", hello)
		}
		if !becomesInit {
			_, _ = processOne.Write([]byte{0})
		}
		_ = processOne.Close()
		conn = connect(t, path)
		within := soon
		if !becomesInit {
			within = aWhile
		}
		if _, err := conn.WaitHello(within); (err == nil) != becomesInit {
			t.Errorf("an init: %t, its hello: %v", becomesInit, err)
		}
	}
}

func TestShutdownTellsHowCommandsEnd(t *testing.T) {
	program, path := startServe(t)
	conn := connect(t, path)
	stream, err := conn.Open(wire.Exec{Type: wire.TypeExec, Argv: []wire.Bytes{[]byte("sleep"), []byte("1000")}})
	if err != nil {
		t.Fatal(err)
	}
	message, err := stream.ReadMessage(soon)
	started := wire.Started{}
	if err != nil || message.Decode(&started) != nil {
		t.Fatal(err)
	}
	// As an init does it: everybody gets the signal.
	_ = program.Process.Signal(syscall.SIGTERM)
	_ = syscall.Kill(started.PID, syscall.SIGTERM)
	exit := wire.Exit{}
	if message, err = stream.ReadMessage(soon); err != nil || message.Decode(&exit) != nil || exit.Signal != "TERM" {
		t.Errorf("%+v %v", exit, err)
	}
	if err := program.Wait(); err != nil {
		t.Error(err)
	}
}

func TestUsage(t *testing.T) {
	for _, arguments := range [][]string{{}, {"nonsense"}} {
		text, err := agent(t, arguments...).CombinedOutput()
		if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 2 || !strings.Contains(string(text), "usage") {
			t.Errorf("%s %v", text, err)
		}
	}
	if text, err := agent(t, "version").Output(); err != nil || string(text) != "dev\n" {
		t.Errorf("%s %v", text, err)
	}
	// Without a listening socket there is nothing to serve.
	if err := agent(t, "serve").Run(); err == nil {
		t.Error("it serves nothing")
	}
}

func resident(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "VmRSS:")
	size, _ := strconv.Atoi(strings.Fields(after)[0])
	return size
}
