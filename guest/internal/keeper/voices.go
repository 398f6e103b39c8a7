package keeper

import (
	"sync"
	"time"

	"berth.dev/guest/internal/wire"
)

// voices brings the two consoles of a VM into one log. The kernel speaks on both; the serial port is the one that
// speaks from the beginning, the virtio console the one that is fast. So the serial port is written down while the
// other is silent.
type voices struct {
	log *consoleLog

	mu      sync.Mutex
	console bool // it has spoken, and is still there
}

// voice takes what one of them said; nil: it hung up.
type voice func(text []byte)

func (v *voices) fromConsole(text []byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.console = text != nil
	_, _ = v.log.Write(text)
}

func (v *voices) fromSerial(text []byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.console {
		_, _ = v.log.Write(text)
	}
}

// hear makes the use of a console's socket: all that comes is the voice's.
func (k *vmKeeper) hear(say voice) func(*wire.Socket) time.Duration {
	return func(socket *wire.Socket) time.Duration {
		defer say(nil)
		buffer := make([]byte, consoleBuffer)
		var pace pace
		for {
			count, err := socket.Read(buffer)
			if err != nil {
				return 0
			}
			say(buffer[:count])
			pace.keep(count, k.done)
		}
	}
}
