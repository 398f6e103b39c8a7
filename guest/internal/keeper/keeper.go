// Package keeper is `agent keeper`, the one process of berth that stays on the host while a machine runs. It writes the
// machine's console to a file, forwards the ports that listen in it, and connects it with the host's SSH agent. For a
// VM it also carries the clients of agent.sock to the agent, and watches over QEMU.
//
// keeper.go is the beginning of both kinds; container.go and vm.go are the two. main calls Main.
//
// It runs as the host's user and outlives the berth command that started it. It may be killed at any time: the machine
// lives on and the next berth command starts another. All that comes from the guest is untrusted. It is to be small
// (docs/performance.md), hence no package net.
package keeper

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"berth.dev/guest/internal/files"
	"berth.dev/guest/internal/memory"
)

// Options of the keeper, as its command line gives them.
type Options struct {
	// Dir is the machine's runtime directory: agent.sock, keeper.lock, ports.json, ssh-agent.
	Dir string
	// Log is the console's log; LOG.1 is the part before.
	Log string
	// ConsoleFD is a listening unix socket to which the container runtime sends the console, -1 for none: the agent is
	// asked for one then.
	ConsoleFD int
	// Forward is the machine's loopback address; the zero value forwards nothing.
	Forward netip.Addr
	// PID is the machine's process 1 as the host sees it, 0 when it is not known yet: container.json tells it later.
	PID int
	// VM: the machine is one; what follows is of VMs only.
	VM bool
	// AgentFD is the listening socket at agent.sock, whose clients are ours to carry.
	AgentFD int
	// Again: the machine runs already, and its keeper was killed.
	Again bool
	// DiskDir is a directory of the file system that the machine's disk lies on.
	DiskDir string
	// Version is told to the agent.
	Version string
}

// times are constants but for tests.
type times struct {
	console  time.Duration // for the container runtime to send the console
	lock     time.Duration // for the keeper of the machine's last run to end, when this is a new run
	probe    time.Duration // for somebody who only looks whether the lock is held
	grace    time.Duration // without agent and console, until a machine that never came up is given up
	drain    time.Duration // for the console's last words after process 1 has ended
	retryMin time.Duration // between attempts to reach the agent
	retryMax time.Duration
	ask      time.Duration // between attempts to get a console from the agent
	look     time.Duration // between looks for space on the host's disk
	breath   time.Duration // for a guest to see that the channel was hung up
	clock    time.Duration // between looks whether the host has slept
	begin    time.Duration // for the agent to take a client, until it is doubted
	answer   time.Duration // for a doubted agent to answer
}

var usual = times{
	console:  30 * time.Second,
	lock:     5 * time.Second,
	probe:    500 * time.Millisecond,
	grace:    time.Second,
	drain:    time.Second,
	retryMin: 50 * time.Millisecond,
	retryMax: 2 * time.Second,
	ask:      10 * time.Second,
	look:     2 * time.Second,
	breath:   100 * time.Millisecond,
	clock:    10 * time.Second,
	begin:    10 * time.Second,
	answer:   30 * time.Second, // a software-emulated guest on a busy host is slow
}

const (
	consoleAnswer = 10 * time.Second
	// settleAfter is how long after its last burst of work a keeper gives its memory back.
	settleAfter = 3 * time.Second
)

// Main reads the command line (without the word keeper), runs the keeper and gives its exit status: 0, also when there
// is another one for this machine; 1 when it can't work; 2 for wrong usage.
func Main(args []string, version string) int {
	options, err := parse(args)
	if err != nil {
		fmt.Fprintf(os.Stderr, "berth-agent keeper: %s\n", err)
		return 2
	}
	options.Version = version
	memory.BeSmall()
	files.CloseInherited(options.ConsoleFD, options.AgentFD)
	for _, fd := range []int{options.ConsoleFD, options.AgentFD} {
		if fd >= 0 {
			syscall.CloseOnExec(fd)
		}
	}
	_, _ = syscall.Setsid()
	syscall.Umask(0o077)
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGPIPE)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	if err := run(options, usual, stop); err != nil {
		fmt.Fprintf(os.Stderr, "berth-agent keeper: %s\n", err)
		return 1
	}
	return 0
}

func parse(args []string) (options Options, err error) {
	set := flag.NewFlagSet("keeper", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	set.StringVar(&options.Dir, "dir", "", "")
	set.StringVar(&options.Log, "log", "", "")
	set.IntVar(&options.ConsoleFD, "console-fd", -1, "")
	set.IntVar(&options.PID, "pid", 0, "")
	set.TextVar(&options.Forward, "forward", netip.Addr{}, "")
	set.BoolVar(&options.VM, "vm", false, "")
	set.IntVar(&options.AgentFD, "agent-fd", -1, "")
	set.BoolVar(&options.Again, "again", false, "")
	set.StringVar(&options.DiskDir, "disk-dir", "", "")
	if err := set.Parse(args); err != nil {
		return options, err
	}
	switch {
	case set.NArg() > 0:
		return options, fmt.Errorf("unexpected argument %q", set.Arg(0))
	case !filepath.IsAbs(options.Dir) || !filepath.IsAbs(options.Log):
		return options, errors.New("--dir and --log must be given, as absolute paths")
	case options.Forward.IsValid() && !(options.Forward.Is4() && options.Forward.IsLoopback()):
		return options, errors.New("--forward must be an address in 127.0.0.0/8")
	case options.ConsoleFD >= 0 && options.ConsoleFD <= 2:
		return options, errors.New("--console-fd must be above 2")
	case options.PID < 0:
		return options, errors.New("--pid must be above 0")
	case options.VM != (options.AgentFD > 2) || options.VM && options.ConsoleFD >= 0:
		return options, errors.New("--vm needs --agent-fd, above 2, and no --console-fd")
	case options.DiskDir != "" && !filepath.IsAbs(options.DiskDir):
		return options, errors.New("--disk-dir must be an absolute path")
	}
	return options, nil
}

// run keeps one machine until it has ended, or stop brings something. nil also when another keeper has the lock.
func run(options Options, times times, stop <-chan os.Signal) error {
	first := options.ConsoleFD >= 0 || options.VM && !options.Again
	patience := times.probe
	if first {
		patience = times.lock
	}
	lock, err := takeLock(filepath.Join(options.Dir, "keeper.lock"), patience)
	if err != nil || lock == nil {
		return err
	}
	defer lock.Close()
	log, err := openLog(options.Log, maxLog)
	if err != nil {
		return fmt.Errorf("can't open the console log: %w", err)
	}
	defer log.close()
	var ports *forwarder
	if options.Forward.IsValid() {
		ports = newForwarder(options.Forward, filepath.Join(options.Dir, "ports.json"))
		defer ports.close()
	}
	if first {
		log.mark("boot", time.Now())
	} else {
		log.mark("console attached again", time.Now())
	}
	if options.VM {
		return keepVM(options, times, log, ports, stop)
	}
	keepContainer(options, times, log, ports, stop)
	return nil
}

// takeLock gives nil when another keeper has it. The file then holds our process id.
func takeLock(path string, patience time.Duration) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		raw, err := file.SyscallConn()
		if err != nil {
			file.Close()
			return nil, err
		}
		var failed error
		err = raw.Control(func(fd uintptr) { failed = syscall.Flock(int(fd), syscall.LOCK_EX|syscall.LOCK_NB) })
		switch failed = errors.Join(err, failed); {
		case failed == nil:
			text := strconv.Itoa(os.Getpid()) + "\n"
			_, err := file.WriteAt([]byte(text), 0)
			return file, errors.Join(err, file.Truncate(int64(len(text))))
		case !errors.Is(failed, syscall.EWOULDBLOCK):
			file.Close()
			return nil, failed
		case !time.Now().Before(deadline):
			file.Close()
			return nil, nil
		}
	}
}
