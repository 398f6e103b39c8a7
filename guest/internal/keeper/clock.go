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
	setClock(conn, 0)
	ticker := time.NewTicker(k.times.clock)
	defer ticker.Stop()
	for {
		select {
		case <-conn.Done():
			return
		case <-k.doubt:
			if !setClock(conn, k.times.answer) && !k.monitor.isPaused() {
				conn.Close()
			}
		case <-k.retune:
			setClock(conn, 0)
		case <-ticker.C:
			if now := hostSlept(); now-asleep > sleptEnough {
				asleep = now
				setClock(conn, 0)
			}
		}
	}
}

// setClock tells the agent the time. With a patience it waits for the answer and says whether one came.
func setClock(conn *wire.Conn, patience time.Duration) bool {
	stream, err := conn.Open(wire.Clock{Type: wire.TypeClock, UnixNanos: time.Now().UnixNano()})
	if err != nil {
		return false
	}
	defer stream.Drop()
	if patience == 0 {
		return true
	}
	_, err = stream.ReadMessage(patience)
	return err == nil
}

// hostSlept is how long the host has been suspended since its boot.
func hostSlept() time.Duration { return clockNow(clockBoottime) - clockNow(clockMonotonic) }

func clockNow(clock uintptr) time.Duration {
	var now syscall.Timespec
	_, _, _ = syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clock, uintptr(unsafe.Pointer(&now)), 0)
	return time.Duration(now.Nano())
}
