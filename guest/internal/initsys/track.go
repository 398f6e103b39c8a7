package initsys

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	pollFast  = 50 * time.Millisecond
	pollSlow  = time.Second
	fastFor   = 2 * time.Minute
	askAfter  = 10 * time.Second // systemd that has not said READY may sit in emergency mode
	askWithin = 5 * time.Second
)

// Tracker follows an init from its start until it has settled, and knows when it stops. Safe for concurrent use.
type Tracker struct {
	init *Init

	mu      sync.Mutex
	state   string
	settled chan struct{} // closed when state is no longer starting
}

// Track starts to follow init until ctx ends. notify is the socket that NOTIFY_SOCKET names in the init's
// environment, or nil where there is none (an agent started as a repair); Track takes it over.
func Track(ctx context.Context, init *Init, notify *os.File) *Tracker {
	t := &Tracker{init: init, state: Starting, settled: make(chan struct{})}
	if init.System == None || init.System == Other {
		t.set(init.Look())
	}
	switch {
	case init.Program == Systemd:
		ready := make(chan struct{})
		go t.followSystemd(ctx, ready, notify == nil)
		if notify != nil {
			go t.listen(notify, ready)
		}
	default:
		if notify != nil {
			notify.Close()
		}
		go t.poll(ctx)
	}
	return t
}

// State gives the state without blocking.
func (t *Tracker) State() string {
	t.mu.Lock()
	state := t.state
	t.mu.Unlock()
	if state == Running || state == Degraded {
		// Cheap, and the only way to learn that somebody in the guest powers it off.
		if t.init.Program != Systemd && t.init.Look() == Stopping {
			return Stopping
		}
	}
	return state
}

// Wait returns the state once it is no longer starting, or when ctx ends.
func (t *Tracker) Wait(ctx context.Context) string {
	select {
	case <-t.settled:
	case <-ctx.Done():
	}
	return t.State()
}

// set moves on: never back to starting, and from stopping nowhere.
func (t *Tracker) set(state string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if state == Starting || t.state == Stopping {
		return
	}
	t.state = state
	select {
	case <-t.settled:
	default:
		close(t.settled)
	}
}

// poll looks until two looks in a row agree that the start is over. Nothing tells these inits' states by an event.
func (t *Tracker) poll(ctx context.Context) {
	begun := time.Now()
	last := Starting
	for t.isStarting() {
		state := t.init.Look()
		if state == last && state != Starting {
			t.set(state)
			return
		}
		last = state
		wait := pollFast
		if time.Since(begun) > fastFor {
			wait = pollSlow
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

func (t *Tracker) isStarting() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.state == Starting
}

// listen reads what systemd sends to its NOTIFY_SOCKET, for ever, so that it never meets a full queue. Only process 1
// of root is believed: the socket's name can be read by anybody in the guest. Source: sd_notify(3).
func (t *Tracker) listen(notify *os.File, ready chan<- struct{}) {
	defer notify.Close()
	raw, err := notify.SyscallConn()
	if err != nil {
		return
	}
	buffer, oob := make([]byte, 4096), make([]byte, 256)
	for {
		var n, oobn int
		var errRecv error
		err := raw.Read(func(fd uintptr) bool {
			n, oobn, _, _, errRecv = syscall.Recvmsg(int(fd), buffer, oob, syscall.MSG_DONTWAIT|syscall.MSG_CMSG_CLOEXEC)
			return errRecv != syscall.EAGAIN
		})
		if err != nil || errRecv != nil && errRecv != syscall.EINTR {
			return
		}
		if errRecv != nil || !fromInit(oob[:oobn]) {
			continue
		}
		for line := range strings.SplitSeq(string(buffer[:n]), "\n") {
			switch line {
			case "READY=1":
				if ready != nil {
					close(ready)
					ready = nil
				}
			case "STOPPING=1":
				t.set(Stopping)
			}
		}
	}
}

// fromInit also closes descriptors that came along: systemd sends none, but then it was not systemd.
func fromInit(oob []byte) bool {
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return false
	}
	trusted := false
	for i := range messages {
		if fds, err := syscall.ParseUnixRights(&messages[i]); err == nil {
			for _, fd := range fds {
				syscall.Close(fd)
			}
			continue
		}
		if cred, err := syscall.ParseUnixCredentials(&messages[i]); err == nil {
			trusted = cred.Pid == 1 && cred.Uid == 0
		}
	}
	return trusted
}

// followSystemd waits for READY and then asks once whether all went well. Without a notify socket it asks until there
// is an answer.
func (t *Tracker) followSystemd(ctx context.Context, ready <-chan struct{}, askOnly bool) {
	wait := askAfter
	if askOnly {
		wait = 0
	}
	for t.isStarting() {
		select {
		case <-ctx.Done():
			return
		case <-ready:
			state := askSystemd(ctx)
			if state == Starting || state == Unknown {
				state = Running // READY is the truth; systemctl was too slow or is missing
			}
			t.set(state)
			return
		case <-time.After(wait):
			if state := askSystemd(ctx); state != Starting && state != Unknown {
				t.set(state)
				return
			}
			if wait = askAfter; askOnly {
				wait = pollSlow
			}
		}
	}
}

func askSystemd(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, askWithin)
	defer cancel()
	// It exits with 1 for everything but running: the word counts.
	command := exec.CommandContext(ctx, "systemctl", "is-system-running")
	command.WaitDelay = lingering
	output, _ := command.Output()
	return systemdState(string(output))
}

// Source: systemctl(1), is-system-running.
func systemdState(word string) string {
	switch strings.TrimSpace(word) {
	case "running":
		return Running
	case "degraded", "maintenance":
		return Degraded
	case "stopping":
		return Stopping
	case "initializing", "starting":
		return Starting
	}
	return Unknown
}
