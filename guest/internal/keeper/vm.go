package keeper

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"berth.dev/guest/internal/memory"
	"berth.dev/guest/internal/wire"
)

// The sockets of QEMU in the machine's runtime directory, which the keeper connects to.
const (
	qemuChannel = "channel.sock"
	qemuConsole = "console.sock"
	qemuSerial  = "serial.sock"
	qemuMonitor = "keeper-monitor.sock"
)

// vmKeeper is the state of one run for a VM. Each of QEMU's sockets has a goroutine that follows it.
type vmKeeper struct {
	options  Options
	times    times
	log      *consoleLog
	services *services
	ports    *forwarder // nil: nothing is forwarded
	clients  *wire.Listener
	slots    chan struct{} // one per client
	voices   *voices
	monitor  *monitor
	settled  *time.Timer // runs when some client has ended
	done     chan struct{}
	ended    chan struct{} // QEMU has

	retune chan struct{} // the guest's clock stood still; it holds one
	doubt  chan struct{} // the agent may be another one; it holds one

	// The channel's goroutine's.
	failed int          // attempts to reach the agent in a row
	orphan *wire.Socket // a client that was accepted when the connection to the agent had just ended; it has a slot

	mu      sync.Mutex
	there   map[string]bool // by path: the sockets at which QEMU is, or may be
	channel *wire.Conn      // nil while there is none
}

// keepVM keeps a VM until QEMU has ended, or stop brings something. QEMU's sockets listen already, whether it has begun
// to accept or not.
func keepVM(options Options, times times, log *consoleLog, ports *forwarder, stop <-chan os.Signal) error {
	clients, err := wire.NewListener(options.AgentFD)
	if err != nil {
		return err
	}
	defer clients.Close()
	k := &vmKeeper{
		options: options, times: times, log: log, ports: ports, clients: clients,
		services: newServices(options.Dir),
		slots:    make(chan struct{}, maxClients),
		voices:   &voices{log: log},
		settled:  time.AfterFunc(settleAfter, memory.GiveBack),
		done:     make(chan struct{}), ended: make(chan struct{}),
		retune: make(chan struct{}, 1), doubt: make(chan struct{}, 1),
		there: map[string]bool{},
	}
	k.monitor = newMonitor(k)
	defer k.monitor.forget()
	defer k.settled.Stop()
	defer close(k.done)
	users := map[string]func(*wire.Socket) time.Duration{
		qemuChannel: k.serveChannel,
		qemuConsole: k.hear(k.voices.fromConsole),
		qemuSerial:  k.hear(k.voices.fromSerial),
		qemuMonitor: k.monitor.serve,
	}
	for name := range users {
		k.there[filepath.Join(options.Dir, name)] = true
	}
	for name, use := range users {
		path := filepath.Join(options.Dir, name)
		own, _ := os.Lstat(path)
		go k.follow(path, own, use)
	}
	select {
	case <-stop:
	case <-k.ended:
	}
	return nil
}

// follow connects to one of QEMU's sockets again and again. use works over a connection until it ends and says how
// long to wait before the next. own is the socket at path when the keeper began: a machine that is started again has
// new ones, which are another keeper's.
func (k *vmKeeper) follow(path string, own fs.FileInfo, use func(*wire.Socket) time.Duration) {
	wait := k.times.retryMin
	for {
		socket, err := dialOwn(path, own)
		k.saw(path, !isGone(err))
		pause := wait
		wait = min(2*wait, k.times.retryMax)
		if err == nil {
			pause = max(k.use(socket, use), k.times.retryMin)
			wait = k.times.retryMin
		}
		select {
		case <-k.done:
			return
		case <-time.After(pause):
		}
	}
}

// use closes the socket at its end, and when the keeper ends.
func (k *vmKeeper) use(socket *wire.Socket, use func(*wire.Socket) time.Duration) time.Duration {
	finished := make(chan struct{})
	defer close(finished)
	go func() {
		select {
		case <-k.done:
		case <-finished:
		}
		socket.Close()
	}()
	return use(socket)
}

// dialOwn connects to the socket that was at path when we began.
func dialOwn(path string, own fs.FileInfo) (*wire.Socket, error) {
	if now, err := os.Lstat(path); err != nil || own == nil || !os.SameFile(own, now) {
		return nil, fs.ErrNotExist
	}
	return wire.DialUnix(path)
}

// isGone says whether nobody is at a socket any more, which is more than that nobody has time.
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// saw books whether QEMU is at a socket. It has ended when it is at none.
func (k *vmKeeper) saw(path string, there bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.there[path] = there
	for _, there := range k.there {
		if there {
			return
		}
	}
	select {
	case <-k.ended:
	default:
		close(k.ended)
	}
}
