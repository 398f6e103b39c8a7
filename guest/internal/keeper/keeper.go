// Package keeper is `agent keeper`, the one process that stays on the host while a container machine runs. It writes
// the machine's console to a file, forwards the ports that listen in it, and connects it with the host's SSH agent.
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
	"sync"
	"syscall"
	"time"

	"berth.dev/guest/internal/files"
	"berth.dev/guest/internal/memory"
	"berth.dev/guest/internal/wire"
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
	if options.ConsoleFD >= 0 {
		files.CloseInherited(options.ConsoleFD)
		syscall.CloseOnExec(options.ConsoleFD)
	} else {
		files.CloseInherited()
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
	}
	return options, nil
}

// keeper is the state of one run. What is not said to be shared belongs to the goroutine of run.
type keeper struct {
	options Options
	times   times
	console *console
	ports   *forwarder // nil: nothing is forwarded
	changed chan struct{}

	mu        sync.Mutex
	lastAlive time.Time // of the connection to the agent
	connected bool
	awaiting  bool // the console from the container runtime
}

// run keeps one machine until it has ended, or stop brings something. nil also when another keeper has the lock.
func run(options Options, times times, stop <-chan os.Signal) error {
	patience := times.probe
	if options.ConsoleFD >= 0 {
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
	k := &keeper{options: options, times: times, changed: make(chan struct{}, 1), lastAlive: time.Now()}
	k.console = newConsole(log, k.changed)
	defer k.console.close()
	if options.Forward.IsValid() {
		k.ports = newForwarder(options.Forward, filepath.Join(options.Dir, "ports.json"))
		defer k.ports.close()
	}
	if options.ConsoleFD >= 0 {
		log.mark("boot", time.Now())
		k.awaiting = true
		go k.awaitConsole()
	} else {
		log.mark("console attached again", time.Now())
	}
	done := make(chan struct{})
	defer close(done)
	go k.followAgent(done)
	k.untilEnd(stop)
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

// untilEnd waits for what ends a keeper: a signal; the machine's process 1; or, when there never was one, that nobody
// listens at the agent's socket and the console is gone: the start has failed.
func (k *keeper) untilEnd(stop <-chan os.Signal) {
	var ended <-chan struct{}
	if k.options.PID > 0 {
		ended = watchProcess(k.options.PID)
	}
	for {
		if ended == nil {
			ended = watchRecorded(filepath.Join(k.options.Dir, "container.json"))
		}
		var look <-chan time.Time
		if wait, possible := k.endsIn(); ended == nil && possible {
			if wait <= 0 {
				return
			}
			look = time.After(wait)
		}
		select {
		case <-stop:
			return
		case <-ended:
			k.drain()
			return
		case <-k.changed:
		case <-look:
		}
	}
}

// endsIn says how long nothing must happen until the start counts as failed; possible is false while something lives.
// The agent's socket listens before the keeper is started, so a console that may still come needs no patience.
func (k *keeper) endsIn() (wait time.Duration, possible bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.connected || !k.console.gone() {
		return 0, false
	}
	return time.Until(k.lastAlive.Add(k.times.grace)), true
}

// drain lets the console's last words into the log.
func (k *keeper) drain() {
	for deadline := time.Now().Add(k.times.drain); time.Now().Before(deadline); {
		k.console.keepOpen(false) // each time: the console may have come only now
		k.mu.Lock()
		awaiting := k.awaiting
		k.mu.Unlock()
		if !awaiting && k.console.gone() {
			return
		}
		select {
		case <-k.changed:
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (k *keeper) awaitConsole() {
	master, err := receiveConsole(k.options.ConsoleFD, k.times.console)
	k.mu.Lock()
	k.awaiting = false
	k.mu.Unlock()
	if err != nil {
		fmt.Fprintf(os.Stderr, "berth-agent keeper: no console: %s\n", err)
		wake(k.console.lost) // to ask the agent, if the machine runs all the same
	} else {
		k.console.attach(master)
	}
	wake(k.changed)
}

// followAgent connects to the agent again and again: a machine outlives its agent, and a repaired one has a new one.
func (k *keeper) followAgent(done <-chan struct{}) {
	wait := k.times.retryMin
	for {
		socket, err := wire.DialUnix(filepath.Join(k.options.Dir, "agent.sock"))
		if err == nil {
			k.setConnected(true)
			if k.serve(socket, done) {
				wait = k.times.retryMin
			}
			k.setConnected(false)
		} else {
			k.console.keepOpen(false)
		}
		select {
		case <-done:
			return
		case <-time.After(wait):
		}
		wait = min(2*wait, k.times.retryMax)
	}
}

func (k *keeper) setConnected(connected bool) {
	k.mu.Lock()
	k.connected, k.lastAlive = connected, time.Now()
	k.mu.Unlock()
	k.console.keepOpen(connected)
	wake(k.changed)
}

// serve works over one connection until it ends, and tells whether the agent ever greeted. A machine that is starting
// answers late: its socket is there before it, and the connection waits in its queue.
func (k *keeper) serve(socket *wire.Socket, done <-chan struct{}) bool {
	socket.WantFile()
	conn := wire.NewConn(socket, wire.Options{Side: wire.Host, Version: k.options.Version, Role: "keeper", MaxStreams: maxServices})
	defer conn.Close()
	var others sync.WaitGroup
	defer others.Wait()
	defer conn.Close() // before the wait
	others.Go(func() {
		select {
		case <-done:
			conn.Close()
		case <-conn.Done():
		}
	})
	if _, err := conn.WaitHello(0); err != nil {
		return false
	}
	others.Go(func() { serveGuest(conn, filepath.Join(k.options.Dir, "ssh-agent")) })
	if k.ports != nil {
		others.Go(func() { k.ports.follow(conn) })
	}
	settled := time.AfterFunc(settleAfter, memory.GiveBack) // when the start is behind it
	defer settled.Stop()
	k.mendConsole(conn, socket)
	return true
}

// mendConsole asks the agent for a new console whenever there is none, until the connection ends.
func (k *keeper) mendConsole(conn *wire.Conn, socket *wire.Socket) {
	for {
		k.mu.Lock()
		missing := !k.awaiting && k.console.missing()
		k.mu.Unlock()
		if missing {
			if master, err := askConsole(conn, socket); err == nil {
				k.console.attach(master)
			}
		}
		select {
		case <-conn.Done():
			return
		case <-k.console.lost:
		}
		// A guest that breaks its console over and over costs no more than this.
		select {
		case <-conn.Done():
			return
		case <-time.After(k.times.ask):
		}
	}
}

func askConsole(conn *wire.Conn, socket *wire.Socket) (*os.File, error) {
	stream, err := conn.Open(wire.Plain{Type: wire.TypeConsole})
	if err != nil {
		return nil, err
	}
	message, err := stream.ReadMessage(consoleAnswer)
	if err != nil {
		stream.Drop()
		return nil, err
	}
	master := socket.TakeFile()
	if master == nil {
		return nil, errors.New("the agent gave no console")
	}
	if message.Type != wire.TypeResult {
		master.Close()
		return nil, errors.New("the agent refused to give a console")
	}
	return asMaster(master)
}
