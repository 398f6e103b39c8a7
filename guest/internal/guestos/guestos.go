// Package guestos joins what the agent knows about its guest into what package serve asks of it: the init's state,
// power off, listening ports, the console, the twin, the forwarded SSH agent.
package guestos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"berth.dev/guest/internal/boot"
	"berth.dev/guest/internal/initsys"
	"berth.dev/guest/internal/netwatch"
	"berth.dev/guest/internal/sshagent"
	"berth.dev/guest/internal/twin"
	"berth.dev/guest/internal/upkeep"
)

const (
	consolePath = "/dev/console"
	// twinPending is the twin's state while the image's create-user.sh runs.
	twinPending = "pending"
	twinReady   = "ready"
)

// Guest is the running guest. Safe for concurrent use.
type Guest struct {
	doc     *boot.Document
	init    *initsys.Init
	tracker *initsys.Tracker
	upkeep  *upkeep.Keeper // nil in a container, whose memory and disk are the host's
	ready   chan struct{}  // closed when the twin has been made, or could not be

	mu    sync.Mutex
	twin  string
	agent *sshagent.Agent
}

// New starts to follow the guest that doc describes, for the life of the process. It takes the notify socket over
// that `agent boot` left, and has the image's create-user.sh run where that is due.
func New(doc *boot.Document) *Guest {
	ctx := context.Background()
	init := initsys.Detect("", doc.Init)
	init.VM = doc.VM != nil
	g := &Guest{
		doc:     doc,
		init:    init,
		tracker: initsys.Track(ctx, init, boot.TakeNotifySocket()),
		ready:   make(chan struct{}),
		twin:    twinPending,
	}
	if init.VM {
		g.upkeep = upkeep.Start(sayOnConsole)
	}
	if doc.Twin != nil && twin.ScriptPending("", doc.Instance, *doc.Twin) {
		go func() { g.settleTwin(g.runScript(ctx)) }()
		return g
	}
	g.settleTwin(nil)
	return g
}

func sayOnConsole(err error) {
	if console := openConsole(); console != nil {
		defer console.Close()
		fmt.Fprintf(console, "berth: %s\n", err)
	}
}

// openConsole gives nil when there is none.
func openConsole() *os.File {
	console, err := os.OpenFile(consolePath, os.O_WRONLY|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	return console
}

// settleTwin makes the twin if it is still not there, and says how it came out; err is why the image's script failed.
func (g *Guest) settleTwin(err error) {
	if user := g.doc.Twin; user != nil && (err != nil || !twin.Known("", *user)) {
		err = errors.Join(err, twin.Ensure("", *user))
	}
	state := twinReady
	if err != nil {
		state = "failed: " + strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	g.mu.Lock()
	g.twin = state
	g.mu.Unlock()
	close(g.ready)
}

// runScript waits until process 1 is the init: the script is the image's and may expect one.
func (g *Guest) runScript(ctx context.Context) error {
	for range 200 {
		if !g.init.BeforeExec() {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	console := openConsole()
	if console != nil {
		defer console.Close()
	}
	machine := g.doc.Hostname
	if machine == "" {
		machine = g.doc.Instance
	}
	err := twin.RunScript(ctx, g.doc.Instance, machine, *g.doc.Twin, g.doc.Env, console)
	if err != nil && console != nil {
		fmt.Fprintf(console, "berth: %s; making the user %s without it\n", err, g.doc.Twin.Name)
	}
	return err
}

// InitState gives STATE without blocking.
func (g *Guest) InitState() string { return g.tracker.State() }

// WaitInit returns STATE once it is no longer starting, or when ctx ends.
func (g *Guest) WaitInit(ctx context.Context) string { return g.tracker.Wait(ctx) }

// System names the kind of init.
func (g *Guest) System() string { return g.init.System }

// PowerOff returns when the init has been asked to power off.
func (g *Guest) PowerOff() error {
	if g.upkeep != nil {
		g.upkeep.BeforePowerOff()
	}
	return g.tracker.PowerOff()
}

// Listeners sends the TCP ports that listen at once and at each change, until ctx ends and the channel is closed.
func (g *Guest) Listeners(ctx context.Context) <-chan []int { return netwatch.Watch(ctx) }

// TwinState is "ready", "pending" while the image's create-user.sh runs, or "failed: …".
func (g *Guest) TwinState() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.twin
}

// WaitReady returns when commands may be run as the twin. It also sees to the SSH agent's socket: an init that is still
// starting may hide it below a new /run at any moment.
func (g *Guest) WaitReady() {
	<-g.ready
	g.mu.Lock()
	agent := g.agent
	g.mu.Unlock()
	if agent != nil {
		_ = agent.Check()
	}
}

// ForwardSSHAgent makes the forwarded SSH agent's socket, if the document wants one; open opens a stream to a keeper.
// Call it once.
func (g *Guest) ForwardSSHAgent(open sshagent.Opener) error {
	if !g.doc.SSHAgent {
		return nil
	}
	var uid, gid uint32
	if g.doc.Twin != nil {
		uid, gid = g.doc.Twin.UID, g.doc.Twin.GID
	}
	agent := sshagent.New(sshagent.Path, uid, gid, open)
	g.mu.Lock()
	g.agent = agent
	g.mu.Unlock()
	go func() {
		g.tracker.Wait(context.Background())
		_ = agent.Check()
	}()
	return agent.Check()
}

// NewConsole makes a pseudo-terminal the guest's /dev/console, in place of the one before, and gives its master.
func (g *Guest) NewConsole() (*os.File, error) {
	if g.doc.VM != nil {
		return nil, fmt.Errorf("the console of a VM is a device of its own: %w", errors.ErrUnsupported)
	}
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	slave, err := unlock(master)
	if err == nil {
		err = mountConsole(slave)
	}
	if err != nil {
		master.Close()
		return nil, fmt.Errorf("can't make a new %s: %w", consolePath, err)
	}
	return master, nil
}

// unlock gives the path of the other side, ready to be opened. Source: ptsname(3), unlockpt(3).
func unlock(master *os.File) (string, error) {
	raw, err := master.SyscallConn()
	if err != nil {
		return "", err
	}
	var number uint32
	var locked int32
	var errno syscall.Errno
	err = raw.Control(func(fd uintptr) {
		_, _, errno = syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCSPTLCK, uintptr(unsafe.Pointer(&locked)))
		if errno == 0 {
			_, _, errno = syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCGPTN, uintptr(unsafe.Pointer(&number)))
		}
	})
	if err == nil && errno != 0 {
		err = errno
	}
	return "/dev/pts/" + strconv.Itoa(int(number)), err
}

func mountConsole(slave string) error {
	file, err := os.OpenFile(consolePath, os.O_CREATE|os.O_RDONLY|syscall.O_NOCTTY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0o600)
	if err == nil {
		file.Close()
	} else if !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.ENXIO) { // a dead terminal still is a place to mount on
		return err
	}
	// The old one goes if it may; a mount that is not ours stays below.
	_ = syscall.Unmount(consolePath, syscall.MNT_DETACH)
	return syscall.Mount(slave, consolePath, "", syscall.MS_BIND, "")
}
