package keeper

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"berth.dev/guest/internal/memory"
	"berth.dev/guest/internal/wire"
)

// containerKeeper is the state of one run. What is not said to be shared belongs to the goroutine of run.
type containerKeeper struct {
	options  Options
	times    times
	console  *console
	services *services
	ports    *forwarder // nil: nothing is forwarded
	changed  chan struct{}

	mu        sync.Mutex
	lastAlive time.Time // of the connection to the agent
	connected bool
	awaiting  bool // the console from the container runtime
}

// keepContainer keeps a container until it has ended, or stop brings something.
func keepContainer(options Options, times times, log *consoleLog, ports *forwarder, stop <-chan os.Signal) {
	k := &containerKeeper{
		options: options, times: times, services: newServices(options.Dir), ports: ports,
		changed: make(chan struct{}, 1), lastAlive: time.Now(),
	}
	k.console = newConsole(log, k.changed)
	defer k.console.close()
	if options.ConsoleFD >= 0 {
		k.awaiting = true
		go k.awaitConsole()
	}
	done := make(chan struct{})
	defer close(done)
	go k.followAgent(done)
	k.untilEnd(stop)
}

// untilEnd waits for what ends a keeper: a signal; the machine's process 1; or, when there never was one, that nobody
// listens at the agent's socket and the console is gone: the start has failed.
func (k *containerKeeper) untilEnd(stop <-chan os.Signal) {
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
func (k *containerKeeper) endsIn() (wait time.Duration, possible bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.connected || !k.console.gone() {
		return 0, false
	}
	return time.Until(k.lastAlive.Add(k.times.grace)), true
}

// drain lets the console's last words into the log.
func (k *containerKeeper) drain() {
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

func (k *containerKeeper) awaitConsole() {
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
func (k *containerKeeper) followAgent(done <-chan struct{}) {
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

func (k *containerKeeper) setConnected(connected bool) {
	k.mu.Lock()
	k.connected, k.lastAlive = connected, time.Now()
	k.mu.Unlock()
	k.console.keepOpen(connected)
	wake(k.changed)
}

// serve works over one connection until it ends, and tells whether the agent ever greeted. A machine that is starting
// answers late: its socket is there before it, and the connection waits in its queue.
func (k *containerKeeper) serve(socket *wire.Socket, done <-chan struct{}) bool {
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
	others.Go(func() { k.services.serve(conn) })
	if k.ports != nil {
		others.Go(func() { k.ports.follow(conn) })
	}
	settled := time.AfterFunc(settleAfter, memory.GiveBack) // when the start is behind it
	defer settled.Stop()
	k.mendConsole(conn, socket)
	return true
}

// mendConsole asks the agent for a new console whenever there is none, until the connection ends.
func (k *containerKeeper) mendConsole(conn *wire.Conn, socket *wire.Socket) {
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
	stream, err := ask(conn, wire.Plain{Type: wire.TypeConsole})
	if err != nil {
		return nil, err
	}
	defer stream.Drop()
	message, err := stream.ReadMessage(consoleAnswer)
	if err != nil {
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
