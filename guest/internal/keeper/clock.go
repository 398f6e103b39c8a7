package keeper

import (
	"syscall"
	"time"
	"unsafe"

	"berth.dev/guest/internal/wire"
)

const (
	// sleptEnough: a host that was suspended for less than that leaves the guest's clock near enough.
	sleptEnough = time.Second

	clockMonotonic = 1 // clock_gettime(2): does not run while the host sleeps
	clockBoottime  = 7 // does
)

// keepClock tells the agent the time: at once, after the host has slept, and after the guest was paused. It does so
// also to learn whether the agent is still the one that the connection was made with: another one does not answer.
func (k *vmKeeper) keepClock(conn *wire.Conn) {
	asleep := hostSlept()
	setClock(conn)
	ticker := time.NewTicker(k.times.clock)
	defer ticker.Stop()
	for {
		select {
		case <-conn.Done():
			return
		case <-k.doubt:
			k.doubts(conn)
		case <-k.retune:
			setClock(conn)
		case <-ticker.C:
			if now := hostSlept(); now-asleep > sleptEnough {
				asleep = now
				setClock(conn)
			}
		}
	}
}

// doubts hangs up if the agent does not answer, also where not even the question gets through: it may have stopped
// reading. A paused machine has all the time it wants.
func (k *vmKeeper) doubts(conn *wire.Conn) {
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		if stream, err := askClock(conn); err == nil {
			defer stream.Drop()
			_, _ = stream.ReadMessage(0)
		}
	}()
	for {
		select {
		case <-answered:
			return
		case <-time.After(k.times.answer):
			if !k.monitor.isPaused() {
				conn.Close()
			}
		}
	}
}

// setClock tells the agent the time, and waits for no answer.
func setClock(conn *wire.Conn) {
	if stream, err := askClock(conn); err == nil {
		stream.Drop()
	}
}

func askClock(conn *wire.Conn) (*wire.Stream, error) {
	return ask(conn, wire.Clock{Type: wire.TypeClock, UnixNanos: time.Now().UnixNano()})
}

// hostSlept is how long the host has been suspended since its boot.
func hostSlept() time.Duration { return clockNow(clockBoottime) - clockNow(clockMonotonic) }

func clockNow(clock uintptr) time.Duration {
	var now syscall.Timespec
	_, _, _ = syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clock, uintptr(unsafe.Pointer(&now)), 0)
	return time.Duration(now.Nano())
}
