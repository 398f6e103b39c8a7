package vmboot

import (
	"os"
	"os/signal"
	"syscall"
	"time"

	"berth.dev/guest/internal/boot"
	"berth.dev/guest/internal/memory"
)

const (
	firstPause = 100 * time.Millisecond
	lastPause  = 30 * time.Second
	// healthyAfter is how long an agent must have run for its end to be an accident, not a habit.
	healthyAfter = time.Minute
	// neverKill is oom_score_adj's: the way into the machine is the last that a shortage of memory may cost. What the
	// agent runs for others gets 0 (package exec). Source: proc_pid_oom_score_adj(5).
	neverKill = "-1000"
)

// Guard is `agent guard`, the parent of `agent serve` in a VM: it starts it again when it was killed, since nobody else
// can from outside. It ends at SIGTERM, which every init sends to everybody when the machine goes down.
func Guard() int {
	memory.BeSmall()
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT)
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte(neverKill), 0)
	notify := boot.TakeNotifySocket()
	pause := time.Duration(0)
	for {
		begun := time.Now()
		ended := startServe(notify)
		if notify != nil {
			_ = notify.Close() // who comes later asks the init instead: what it said is gone
			notify = nil
		}
		memory.GiveBack()
		select {
		case <-end:
			return 0
		case <-ended:
		}
		pause = nextPause(pause, time.Since(begun))
		select {
		case <-end:
			return 0
		case <-time.After(pause):
		}
	}
}

// startServe starts `agent serve`; the channel it returns is closed at its end, or at once when there is none.
func startServe(notify *os.File) <-chan struct{} {
	ended := make(chan struct{})
	process, err := os.StartProcess("/proc/self/exe", []string{"berth-agent", "serve"}, serveAttributes(notify))
	if err != nil {
		close(ended)
		return ended
	}
	go func() {
		defer close(ended)
		_, _ = process.Wait()
	}()
	return ended
}

func serveAttributes(notify *os.File) *os.ProcAttr {
	attr := &os.ProcAttr{Dir: "/", Env: os.Environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}}
	if notify != nil {
		attr.Env = boot.GiveNotifySocket(attr.Env, len(attr.Files))
		attr.Files = append(attr.Files, notify)
	}
	attr.Sys = &syscall.SysProcAttr{Setsid: true}
	return attr
}

// nextPause doubles from one short run to the next, so that an agent that can't run costs next to nothing.
func nextPause(last, ran time.Duration) time.Duration {
	if ran >= healthyAfter || last == 0 {
		return firstPause
	}
	return min(2*last, lastPause)
}
