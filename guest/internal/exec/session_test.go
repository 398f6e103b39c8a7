package exec

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"berth.dev/guest/internal/wire"
)

const soon = 10 * time.Second

// agent serves exec requests in this process over a socket pair; host is the client's end.
func agent(t testing.TB, config Config) (host *wire.Conn) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests run commands as other users: run them as root")
	}
	near, far, err := wire.Pair()
	if err != nil {
		t.Fatal(err)
	}
	guest := wire.NewConn(far, wire.Options{Side: wire.Guest, InitState: func() string { return "running" }})
	host = wire.NewConn(near, wire.Options{Side: wire.Host, Role: "client"})
	var sessions sync.WaitGroup
	sessions.Go(func() {
		for {
			stream, err := guest.Accept()
			if err != nil {
				return
			}
			request := &wire.Exec{}
			if err := stream.Request.Decode(request); err != nil {
				t.Error(err)
			}
			stream.Taken()
			sessions.Go(func() { Run(stream, request, config) })
		}
	})
	t.Cleanup(func() { host.Close(); guest.Close(); sessions.Wait() })
	return host
}

var asNobody = Config{User: "nobody"}

func request(argv ...string) *wire.Exec {
	r := &wire.Exec{Type: wire.TypeExec, CwdOptional: true}
	for _, argument := range argv {
		r.Argv = append(r.Argv, []byte(argument))
	}
	return r
}

func in(directory string, r *wire.Exec) *wire.Exec {
	cwd := []byte(directory)
	r.Cwd, r.CwdOptional = &cwd, false
	return r
}

func as(user string, r *wire.Exec) *wire.Exec {
	r.User = &user
	return r
}

// result is what a client has seen of a command.
type result struct {
	stdout, stderr string
	code           int // -1 for a signal or a refusal
	signal         string
	refusal        wire.Error
}

func open(t testing.TB, host *wire.Conn, r *wire.Exec) *wire.Stream {
	t.Helper()
	stream, err := host.Open(r)
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// finish reads a stream to its end.
func finish(t testing.TB, stream *wire.Stream) result {
	t.Helper()
	got := result{code: -1}
	var outputs sync.WaitGroup
	read := func(kind wire.Kind, into *string) {
		var buffer bytes.Buffer
		_, _ = stream.WriteTo(kind, &buffer)
		*into = buffer.String()
	}
	outputs.Go(func() { read(wire.Stdout, &got.stdout) })
	outputs.Go(func() { read(wire.Stderr, &got.stderr) })
	for {
		message, err := stream.ReadMessage(soon)
		if err != nil {
			t.Error("no final message: ", err)
			break
		}
		if message.Type == wire.TypeStarted {
			continue
		}
		var exit wire.Exit
		if message.Type == wire.TypeError {
			_ = message.Decode(&got.refusal)
		} else if err := message.Decode(&exit); err != nil || message.Type != wire.TypeExit {
			t.Error(message, err)
		}
		if exit.Code != nil {
			got.code = *exit.Code
		}
		got.signal = exit.Signal
		break
	}
	outputs.Wait()
	return got
}

func run(t testing.TB, host *wire.Conn, r *wire.Exec, stdin string) result {
	t.Helper()
	stream := open(t, host, r)
	go func() {
		if stream.Write(wire.Stdin, []byte(stdin)) == nil {
			_ = stream.CloseWrite(wire.Stdin)
		}
	}()
	return finish(t, stream)
}

func expect(t *testing.T, got, want result) {
	t.Helper()
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestOutputsAndStatus(t *testing.T) {
	host := agent(t, asNobody)
	got := run(t, host, request("sh", "-c", "cat; echo out; echo err >&2; exit 42"), "in\n")
	expect(t, got, result{stdout: "in\nout\n", stderr: "err\n", code: 42})
	expect(t, run(t, host, request("true"), ""), result{})
}

func TestArgumentsAreKept(t *testing.T) {
	host := agent(t, asNobody)
	odd := []string{"a b", "", "$HOME", "*", "new\nline", "it's", "\xff\xfe", "äö", "\\", strings.Repeat("x", 131071)}
	got := run(t, host, request(append([]string{"printf", "%s|"}, odd...)...), "")
	expect(t, got, result{stdout: strings.Join(odd, "|") + "|"})
}

func TestArgumentsThatAreTooLong(t *testing.T) {
	host := agent(t, asNobody)
	got := run(t, host, request("true", strings.Repeat("x", 131072)), "")
	if got.refusal.Code != wire.CodeNotExecutable || !strings.Contains(got.refusal.Message, "too long") {
		t.Errorf("%+v", got)
	}
}

func TestWhoItRunsAs(t *testing.T) {
	host := agent(t, asNobody)
	for who, want := range map[string]string{
		"nobody": "65534:65534:65534", "nobody:root": "65534:0:0", "4711:4712": "4711:4712:4712", "root": "0:0:0",
	} {
		got := run(t, host, as(who, request("sh", "-c", "echo $(id -u):$(id -g):$(id -G)")), "")
		expect(t, got, result{stdout: want + "\n"})
	}
	got := run(t, host, as("nosuchuser", request("true")), "")
	expect(t, got, result{code: -1, refusal: wire.Error{Type: "error", Code: "invalid_argument", Message: "user 'nosuchuser' not found"}})
}

func TestItHasNothingOfTheAgents(t *testing.T) {
	host := agent(t, asNobody)
	t.Setenv("OF_THE_AGENT", "1")
	closeInherited(t)
	got := run(t, host, request("sh", "-c", `env | grep -c OF_THE_AGENT; ls /proc/$$/fd; umask
		grep -E '^(SigIgn|SigBlk|CapEff):' /proc/$$/status | tr -s '\t\n' ' '; cut -d' ' -f5,6 /proc/$$/stat; echo $$`), "")
	lines := strings.Split(strings.TrimSpace(got.stdout), "\n")
	if len(lines) < 3 {
		t.Fatalf("%+v", got)
	}
	group := lines[len(lines)-1] + " " + lines[len(lines)-1] // its own process group and session
	want := "0\n0\n1\n2\n0022\n"                             // no pipe to ls: the shell itself would have its ends for a moment
	if !strings.HasPrefix(got.stdout, want) || !strings.HasSuffix(lines[len(lines)-2], group) || !strings.Contains(got.stdout, "CapEff: 0000000000000000") {
		t.Errorf("%q", got.stdout)
	}
	if !strings.Contains(got.stdout, "SigBlk: 0000000000000000") {
		t.Errorf("%q", got.stdout)
	}
}

func TestLimitOfOpenFilesIsTheAgentsOwn(t *testing.T) {
	// Go raises its own soft limit; a command must not see that.
	host := agent(t, asNobody)
	want := run(t, host, request("sh", "-c", "ulimit -Sn"), "").stdout
	parent, err := os.ReadFile("/proc/" + itoa(os.Getppid()) + "/limits")
	if err != nil {
		return // process 1 of a namespace: nobody is there to compare with
	}
	if fields := strings.Fields(string(parent[bytes.Index(parent, []byte("Max open files")):])); fields[3] != strings.TrimSpace(want) {
		t.Errorf("%q, the agent's parent %v", want, fields[3])
	}
}

func TestNotFoundAndNotExecutable(t *testing.T) {
	host := agent(t, asNobody)
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		_ = os.Chmod(path, mode)
		return path
	}
	open700 := filepath.Join(dir, "closed")
	_ = os.Mkdir(open700, 0o700)
	_ = os.Chmod(dir, 0o755)
	_ = os.Chmod(filepath.Dir(dir), 0o755)
	inside := filepath.Join(open700, "program")
	_ = os.WriteFile(inside, []byte("#!/bin/sh\n"), 0o755)
	for name, c := range map[string]struct {
		program, code string
		says          string
	}{
		"missing":            {"no-such-command", "not_found", "'no-such-command' was not found"},
		"missing path":       {dir + "/none", "not_found", "was not found"},
		"empty":              {"", "not_found", "'' was not found"},
		"directory":          {dir, "not_executable", "it is a directory"},
		"no x":               {write("plain", "x", 0o644), "not_executable", "permission denied"},
		"root only":          {write("secret", "#!/bin/sh\n", 0o700), "not_executable", "permission denied"},
		"closed directory":   {inside, "not_executable", "permission denied"},
		"below a file":       {"/etc/passwd/x", "not_executable", "not a directory"},
		"device":             {"/dev/null", "not_executable", "permission denied"},
		"no interpreter":     {write("bad", "#!/no/such/interpreter\n", 0o755), "not_found", "interpreter"},
		"binary garbage":     {write("garbage", "\x00\x01\x02\x03", 0o755), "not_executable", "exec format error"},
		"a name too long":    {strings.Repeat("n", 300_000), "not_found", "nnn"},
		"a path too long":    {"/" + strings.Repeat("n", 300_000), "not_executable", "nnn"},
		"a NUL":              {"tr\x00ue", "invalid_argument", "NUL"},
		"only in the sticky": {"tmp", "not_found", "'tmp' was not found"},
	} {
		t.Run(name, func(t *testing.T) {
			got := run(t, host, request(c.program), "")
			if got.refusal.Code != c.code || !strings.Contains(got.refusal.Message, c.says) {
				t.Errorf("%+v", got.refusal)
			}
		})
	}
	// Found further down the PATH, though an earlier one may not be executed.
	r := request("plain")
	r.Env = [][]byte{[]byte("PATH=" + open700 + ":/nonexistent:" + dir)}
	if got := run(t, host, r, ""); got.refusal.Code != "not_executable" {
		t.Errorf("%+v", got.refusal)
	}
	other := filepath.Join(dir, "other")
	_ = os.Mkdir(other, 0o755)
	_ = os.WriteFile(filepath.Join(other, "plain"), []byte("echo from the shell $1"), 0o755) // no #!: execvp's rule
	r = request("plain", "arg")
	r.Env = [][]byte{[]byte("PATH=" + dir + ":" + other + ":/bin")}
	expect(t, run(t, host, r, ""), result{stdout: "from the shell arg\n"})
	expect(t, run(t, host, in(other, request("./plain", "2")), ""), result{stdout: "from the shell 2\n"})
}

func TestWorkingDirectory(t *testing.T) {
	host := agent(t, Config{User: "nobody", Env: []string{"FROM=boot"}})
	closed := t.TempDir()
	_ = os.Chmod(closed, 0o700)
	link := filepath.Join("/tmp", "berth-exec-link-"+itoa(os.Getpid()))
	if err := os.Symlink("/usr/bin", link); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(link)
	expect(t, run(t, host, in("/usr", request("pwd")), ""), result{stdout: "/usr\n"})
	expect(t, run(t, host, in(link, request("sh", "-c", "pwd; pwd -P")), ""), result{stdout: link + "\n/usr/bin\n"})
	for directory, says := range map[string]string{closed: "permission denied", "/none": "no such file", "tmp": "not absolute"} {
		got := run(t, host, in(directory, request("pwd")), "")
		if got.refusal.Code != "invalid_argument" || !strings.Contains(got.refusal.Message, says) {
			t.Errorf("%+v", got.refusal)
		}
	}
	optional := in("/none", request("pwd"))
	optional.CwdOptional = true
	expect(t, run(t, host, optional, ""), result{stdout: "/\n"}) // nobody's home does not exist
	expect(t, run(t, host, as("root", request("pwd")), ""), result{stdout: "/root\n"})
}

func TestEnvironment(t *testing.T) {
	host := agent(t, Config{User: "nobody", Env: []string{"BOOT=1", "BOTH=boot"}})
	r := request("sh", "-c", `echo $USER $LOGNAME $HOME $SHELL $BOOT $BOTH "$ODD"; echo ${TERM-none}`)
	r.Env = [][]byte{[]byte("BOTH=request"), []byte("ODD=a=\xff b")}
	got := run(t, host, r, "")
	if !strings.HasPrefix(got.stdout, "nobody nobody /nonexistent /") || !strings.Contains(got.stdout, " 1 request a=\xff b\nnone\n") {
		t.Errorf("%q", got.stdout)
	}
	r.Env = [][]byte{[]byte("novalue")}
	if got := run(t, host, r, ""); got.refusal.Code != "invalid_argument" {
		t.Errorf("%+v", got)
	}
}

func TestLoginShellAndLines(t *testing.T) {
	host := agent(t, asNobody)
	r := as("root", request("echo", "$0", "*", "|", "cat; shopt -q login_shell && echo login"))
	r.Shell = true
	r.Cwd, r.CwdOptional = in("/var/empty-or-not", r).Cwd, true
	got := run(t, host, in("/proc/self/task", r), "")
	if got.code != 0 || !strings.HasSuffix(got.stdout, "\nlogin\n") {
		t.Errorf("%+v", got)
	}
	got = run(t, host, as("root", request()), "echo $0; exit 3\n")
	expect(t, got, result{stdout: "-bash\n", code: 3})
}

func TestSignals(t *testing.T) {
	host := agent(t, asNobody)
	stream := open(t, host, request("sh", "-c", "sleep 1000 & echo ready; wait"))
	waitFor(t, stream, "ready")
	_ = stream.Send(wire.Signal{Type: wire.TypeSignal, Signal: "NOSUCH"})
	_ = stream.Send(wire.Signal{Type: wire.TypeSignal, Signal: "TERM"})
	if got := finish(t, stream); got.signal != "TERM" || got.code != -1 {
		t.Errorf("%+v", got)
	}
	for _, name := range []string{"KILL", "ABRT", "34", "64", "USR1"} {
		stream := open(t, host, request("sleep", "1000"))
		if _, err := stream.ReadMessage(soon); err != nil {
			t.Fatal(err)
		}
		_ = stream.Send(wire.Signal{Type: wire.TypeSignal, Signal: name})
		if got := finish(t, stream); got.signal != name {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// waitFor reads stdout until a word has come.
func waitFor(t testing.TB, stream *wire.Stream, word string) {
	t.Helper()
	var seen strings.Builder
	for !strings.Contains(seen.String(), word) {
		chunk, err := stream.Next(wire.Stdout)
		if err != nil {
			t.Fatalf("%v after %q", err, seen.String())
		}
		seen.Write(chunk.Data)
		stream.Consumed(wire.Stdout, chunk)
	}
}

func TestBackgroundProcessDoesNotHoldTheStream(t *testing.T) {
	host := agent(t, asNobody)
	stream := open(t, host, request("sh", "-c", "echo $$; sleep 1000 & head -c 100000 /dev/zero; exit 7"))
	began := time.Now()
	got := finish(t, stream)
	if took := time.Since(began); got.code != 7 || took < drainTime || took > 20*drainTime || len(got.stdout) < 100_000 {
		t.Errorf("%d bytes, %d, %v", len(got.stdout), got.code, took)
	}
	group, _, _ := strings.Cut(got.stdout, "\n")
	killGroup(t, group)
	// One that never stops talking does not hold it either.
	got = finish(t, open(t, host, request("sh", "-c", "echo $$; yes & exit 8")))
	if got.code != 8 {
		t.Errorf("%+v", got.code)
	}
	group, _, _ = strings.Cut(got.stdout, "\n")
	killGroup(t, group)
}

func killGroup(t testing.TB, text string) {
	t.Helper()
	group := atoi(text)
	if group < 2 {
		t.Fatalf("no group %q", text)
	}
	_ = syscall.Kill(-group, syscall.SIGKILL)
}

func TestSlowReaderGetsAllOfIt(t *testing.T) {
	host := agent(t, asNobody)
	stream := open(t, host, request("sh", "-c", "head -c 3000000 /dev/zero; sleep 1000 & exit 0"))
	if _, err := stream.ReadMessage(soon); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * drainTime) // the window is full, the command waits in write; nobody reads yet
	got := finish(t, stream)
	if len(got.stdout) != 3_000_000 || got.code != 0 {
		t.Errorf("%d bytes, %+v", len(got.stdout), got.code)
	}
	_ = exterminate(t, "sleep", "1000")
}

func TestClosedOutputIsABrokenPipe(t *testing.T) {
	host := agent(t, asNobody)
	stream := open(t, host, request("yes"))
	waitFor(t, stream, "y")
	_ = stream.Send(wire.Close{Type: wire.TypeClose, Kind: wire.Stdout})
	stream.StopReading(wire.Stdout)
	if got := finish(t, stream); got.signal != "PIPE" {
		t.Errorf("%+v", got)
	}
	// Also when nothing more can be sent because nobody gives credit.
	stream = open(t, host, request("yes"))
	time.Sleep(50 * time.Millisecond)
	_ = stream.Send(wire.Close{Type: wire.TypeClose, Kind: wire.Stdout})
	for {
		message, err := stream.ReadMessage(soon)
		if err != nil {
			t.Fatal(err)
		}
		if message.Type == wire.TypeExit {
			break
		}
	}
}

func TestInputThatNobodyReads(t *testing.T) {
	host := agent(t, asNobody)
	got := run(t, host, request("sh", "-c", "exec <&-; sleep 0.1; echo done"), strings.Repeat("x", 5<<20))
	expect(t, got, result{stdout: "done\n"})
}

func TestDetached(t *testing.T) {
	host := agent(t, asNobody)
	mark := filepath.Join(t.TempDir(), "mark")
	r := as("root", request("sh", "-c", "ls -l /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2 > "+mark+"; sleep 0.05; echo end >> "+mark))
	r.Detach = true
	stream := open(t, host, r)
	message, err := stream.ReadMessage(soon)
	started := wire.Started{}
	if err != nil || message.Type != wire.TypeStarted || message.Decode(&started) != nil || started.PID < 2 {
		t.Fatal(message, err)
	}
	stream.Drop()
	host.Close()
	until(t, func() bool {
		text, _ := os.ReadFile(mark)
		return strings.Count(string(text), "/dev/null") >= 2 && strings.HasSuffix(string(text), "end\n")
	})
	until(t, func() bool { return syscall.Kill(started.PID, 0) == syscall.ESRCH }) // no zombie
}

func until(t testing.TB, done func() bool) {
	t.Helper()
	for end := time.Now().Add(soon); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not come")
		}
	}
}

func TestVanishedClientHangsUp(t *testing.T) {
	host := agent(t, asNobody)
	mark := filepath.Join(t.TempDir(), "mark")
	stream := open(t, host, as("root", request("sh", "-c", "trap 'echo hup > "+mark+"; exit' HUP; echo ready; while :; do sleep 0.02; done")))
	waitFor(t, stream, "ready")
	host.Close()
	until(t, func() bool { text, _ := os.ReadFile(mark); return string(text) == "hup\n" })
}

func TestVanishedClientKillsInTheEnd(t *testing.T) {
	host := agent(t, asNobody)
	stream := open(t, host, request("sh", "-c", "trap '' HUP; echo ready $$; while :; do sleep 0.1; done"))
	message, err := stream.ReadMessage(soon)
	started := wire.Started{}
	if err != nil || message.Decode(&started) != nil {
		t.Fatal(err)
	}
	waitFor(t, stream, "ready")
	began := time.Now()
	host.Close()
	until(t, func() bool { return syscall.Kill(started.PID, 0) == syscall.ESRCH })
	if took := time.Since(began); took < hangupTime || took > hangupTime+3*time.Second {
		t.Error(took)
	}
	until(t, func() bool { return syscall.Kill(-started.PID, 0) == syscall.ESRCH }) // nobody of the group is left
}

func TestFiftyAtOnce(t *testing.T) {
	host := agent(t, asNobody)
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			got := run(t, host, request("sh", "-c", "cat; echo err >&2; exit 5"), strings.Repeat("data ", 20_000))
			if got.code != 5 || len(got.stdout) != 100_000 || got.stderr != "err\n" {
				t.Errorf("%d bytes, %q, %d", len(got.stdout), got.stderr, got.code)
			}
		})
	}
	all.Wait()
}

func TestNoZombieAndNoDescriptorIsLeft(t *testing.T) {
	host := agent(t, asNobody)
	run(t, host, request("true"), "")
	before := descriptors(t)
	for range 20 {
		run(t, host, request("sh", "-c", "echo x; exit 1"), "abc")
		run(t, host, request("no-such-command"), "")
		run(t, host, request("/etc"), "")
	}
	until(t, func() bool { return descriptors(t) <= before })
	if _, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); err != syscall.ECHILD {
		t.Error("a child is left: ", err)
	}
}

func descriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
