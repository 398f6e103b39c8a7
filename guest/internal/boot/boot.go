// Package boot is `agent boot`, the first program of a container's process 1: it reads the boot document, writes the
// files that depend on the machine, makes the twin, starts `agent serve` and becomes the image's init. All of it is
// on the way of every start, so it is to cost milliseconds. It also owns the boot document (docs/protocol.md).
// In a VM package vmboot does what comes before, in the initramfs, and calls Become.
package boot

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"berth.dev/guest/internal/initsys"
)

const (
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// notifyVariable tells `agent serve` which descriptor is the socket behind the init's NOTIFY_SOCKET.
	notifyVariable = "BERTH_NOTIFY_FD"

	exitFailed  = 1
	exitNotInit = 127

	closeRangeCloexec = 4   // Source: linux/close_range.h
	sysCloseRange     = 436 // on every architecture
)

// Main runs the stage; it returns only when there is no init to become, with the exit status.
func Main() int {
	// What the keeper's end would otherwise bring: with a controlling terminal, process 1 gets its SIGHUP.
	leaveTerminal()
	syscall.Umask(0o022)
	closeOnExec()
	doc, err := Load(DocumentPath)
	if err != nil {
		return fail(exitFailed, err)
	}
	return Become(doc)
}

// Become makes process 1 of a guest whose file systems are in place into its init. It returns only when there is no
// init to become, or when the init that we are for an image without one was told to end, with the exit status.
func Become(doc *Document) int {
	if doc.Hostname != "" {
		// The host has set it already where it may; in a VM nobody has.
		_ = syscall.Sethostname([]byte(doc.Hostname))
	}
	for _, problem := range Prepare("", doc) {
		say(problem)
	}
	init := initsys.Detect("", doc.Init)
	if init.System == initsys.Systemd {
		if err := copyJournalToConsole(""); err != nil {
			say(fmt.Errorf("the journal is not copied to the console: %w", err))
		}
		if doc.VM != nil {
			_ = maskWithoutKmod("") // else one unit fails, and systemctl says so
		}
	}
	notify, name, err := notifySocket()
	if err != nil {
		say(fmt.Errorf("no notify socket: %w", err)) // the state is asked for instead
	}
	waiting, err := startAgent(doc, notify)
	if err != nil {
		return fail(exitFailed, fmt.Errorf("can't start the agent: %w", err))
	}
	if len(doc.Init) == 0 {
		syscall.Close(waiting)
		return beInit()
	}
	status := becomeInit(doc, init, name)
	_, _ = syscall.Write(waiting, []byte{0})
	return status
}

// becomeInit returns only if it failed.
func becomeInit(doc *Document, init *initsys.Init, notifyName string) int {
	inherited, container := os.Environ(), init.ContainerEnv()
	if doc.VM != nil {
		inherited, container = []string{"HOME=/"}, "" // the kernel's, without its TERM=linux and what it did not know
	}
	env := initEnv(inherited, doc.Env, container, notifyName)
	path := lookUp(doc.Init[0], env)
	err := syscall.Exec(path, doc.Init, env)
	if errors.Is(err, syscall.ENOENT) {
		if _, statErr := os.Stat(path); statErr == nil {
			err = errors.New("its interpreter or loader is missing")
		}
	}
	return fail(exitNotInit, fmt.Errorf("can't execute the machine's init %s: %w", path, err))
}

// initEnv makes the init's environment: what the container was started with, what an init needs, the document's.
func initEnv(inherited, own []string, container, notifyName string) []string {
	env := newEnvironment()
	env.set("PATH=" + defaultPath)
	// The console is a log that nobody looks at as a terminal. systemd 256 and later would also wait for a terminal's
	// answers to its questions, a third of a second in every start.
	env.set("TERM=dumb")
	env.setAll(inherited)
	if container != "" {
		env.set("container=" + container)
	}
	env.setAll(own)
	if notifyName != "" {
		env.set("NOTIFY_SOCKET=@" + notifyName)
	}
	return env.list
}

// environment keeps each variable once, the last value given.
type environment struct {
	list []string
	at   map[string]int
}

func newEnvironment() *environment { return &environment{at: map[string]int{}} }

func (e *environment) setAll(variables []string) {
	for _, variable := range variables {
		e.set(variable)
	}
}

func (e *environment) set(variable string) {
	name, _, _ := strings.Cut(variable, "=")
	if at, known := e.at[name]; known {
		e.list[at] = variable
		return
	}
	e.at[name] = len(e.list)
	e.list = append(e.list, variable)
}

func (e *environment) get(name string) string {
	if at, known := e.at[name]; known {
		return e.list[at][len(name)+1:]
	}
	return ""
}

// lookUp finds a program named without a slash in the PATH of env.
func lookUp(program string, variables []string) string {
	if strings.Contains(program, "/") {
		return program
	}
	env := newEnvironment()
	env.setAll(variables)
	for _, dir := range filepath.SplitList(env.get("PATH")) {
		path := filepath.Join(dir, program)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0 {
			return path
		}
	}
	return program
}

// notifySocket binds an abstract datagram socket before the init starts, so that nothing it says is lost.
func notifySocket() (fd int, name string, err error) {
	var random [8]byte
	if _, err := rand.Read(random[:]); err != nil {
		return -1, "", err
	}
	name = "berth-notify-" + hex.EncodeToString(random[:])
	fd, err = syscall.Socket(syscall.AF_UNIX, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, "", err
	}
	// Who sent it comes with each message; only process 1 is believed.
	err = errors.Join(
		syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_PASSCRED, 1),
		syscall.Bind(fd, &syscall.SockaddrUnix{Name: "@" + name}),
	)
	if err != nil {
		syscall.Close(fd)
		return -1, "", err
	}
	return fd, name, nil
}

// startAgent starts this program again with no other descriptor than it needs, in a session of its own: as `agent
// serve` with the listening socket, in a VM as `agent guard`. The notify socket comes last. The agent answers nobody
// before `waiting` closes, as it does when we become the init, and never once something was written to it (AwaitInit).
func startAgent(doc *Document, notify int) (waiting int, err error) {
	null, err := syscall.Open("/dev/null", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("/dev/null: %w", err)
	}
	defer syscall.Close(null)
	var init [2]int
	if err := syscall.Pipe2(init[:], syscall.O_CLOEXEC); err != nil {
		return -1, err
	}
	defer syscall.Close(init[0])
	role, fds := "guard", []uintptr{uintptr(init[0]), uintptr(null), uintptr(null)}
	if doc.VM == nil {
		role, fds = "serve", append(fds, ListenFD)
	}
	env := newEnvironment()
	env.set("PATH=" + defaultPath)
	env.setAll(doc.Env)
	if doc.VM != nil {
		// Kernels that give huge pages to whoever does not refuse make it 2 MiB larger. (A container's is the host's.)
		env.set("GODEBUG=disablethp=1")
	}
	if notify >= 0 {
		env.list = GiveNotifySocket(env.list, len(fds))
		fds = append(fds, uintptr(notify))
	}
	attr := &syscall.ProcAttr{Dir: "/", Env: env.list, Files: fds, Sys: &syscall.SysProcAttr{Setsid: true}}
	_, err = syscall.ForkExec("/proc/self/exe", []string{"berth-agent", role}, attr)
	if notify >= 0 {
		syscall.Close(notify)
	}
	return init[1], err
}

// AwaitInit returns when process 1 is the init: a machine that has none must not say that it runs. It waits for the end
// of standard input, which is then as good as /dev/null; when there is no init, for ever.
func AwaitInit() {
	if n, _ := os.Stdin.Read(make([]byte, 1)); n > 0 {
		time.Sleep(math.MaxInt64) // the machine's end is ours
	}
}

// GiveNotifySocket adds to an environment that the notify socket is descriptor fd.
func GiveNotifySocket(env []string, fd int) []string {
	return append(slices.Clone(env), notifyVariable+"="+strconv.Itoa(fd))
}

// TakeNotifySocket gives `agent serve` the socket that was bound for it before the init started, or nil. Once: the
// variable is gone then, so no command inherits it.
func TakeNotifySocket() *os.File {
	text := os.Getenv(notifyVariable)
	os.Unsetenv(notifyVariable)
	fd, err := strconv.Atoi(text)
	if err != nil || fd <= 2 {
		return nil
	}
	if kind, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TYPE); err != nil || kind != syscall.SOCK_DGRAM {
		return nil
	}
	syscall.CloseOnExec(fd)
	_ = syscall.SetNonblock(fd, true)
	return os.NewFile(uintptr(fd), "notify")
}

// closeOnExec keeps every inherited descriptor but the standard ones from the init.
func closeOnExec() {
	if _, _, errno := syscall.RawSyscall(sysCloseRange, ListenFD, uintptr(^uint32(0)), closeRangeCloexec); errno == 0 {
		return
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, entry := range entries {
		if fd, err := strconv.Atoi(entry.Name()); err == nil && fd >= ListenFD {
			syscall.CloseOnExec(fd)
		}
	}
}

// leaveTerminal gives up the controlling terminal that the container runtime gave us. The leader of a session gets
// SIGHUP for doing so; ignored, it would stay so in the init.
func leaveTerminal() {
	signal.Ignore(syscall.SIGHUP)
	_, _, _ = syscall.Syscall(syscall.SYS_IOCTL, 0, syscall.TIOCNOTTY, 0)
	signal.Reset(syscall.SIGHUP)
}

func say(err error) {
	fmt.Fprintf(os.Stderr, "berth: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
}

func fail(status int, err error) int {
	say(err)
	return status
}
