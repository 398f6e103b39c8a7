package exec

import (
	"os"
	"strconv"
	"sync"
	"syscall"

	"berth.dev/guest/internal/wire"
)

// process is a started command: the leader of its own session and process group.
type process struct {
	pid    int
	handle *wire.Socket // a pidfd; nil where the kernel has none
	exited chan struct{}

	mutex  sync.Mutex
	reaped bool // pid may be anybody's
	status syscall.WaitStatus
}

func newProcess(pid, handle int) *process {
	p := &process{pid: pid, exited: make(chan struct{})}
	if handle >= 0 {
		p.handle, _ = wire.NewSocket(handle)
	}
	resetOOMScore(pid)
	go p.wait()
	return p
}

// wait reaps the process and nobody else.
func (p *process) wait() {
	defer close(p.exited)
	if p.handle != nil {
		// In the poller: no thread sleeps for each command.
		err := p.handle.Raw().Read(func(uintptr) bool { return p.reap(syscall.WNOHANG) })
		_ = p.handle.Close()
		if err == nil {
			return
		}
	}
	p.waitBlocking()
}

// reap takes the status if there is one.
func (p *process) reap(options int) bool {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for {
		pid, err := syscall.Wait4(p.pid, &p.status, options, nil)
		if err == syscall.EINTR {
			continue
		}
		if pid == 0 && err == nil {
			return false
		}
		p.reaped = true
		return true
	}
}

// waitBlocking sleeps without the lock, and without reaping, so that signals can be sent meanwhile.
func (p *process) waitBlocking() {
	const pidType, flags = 1, syscall.WEXITED | syscall.WNOWAIT // Source: linux/wait.h, P_PID
	for {
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, pidType, uintptr(p.pid), 0, flags, 0, 0)
		if errno != syscall.EINTR {
			break
		}
	}
	p.reap(0)
}

// signalGroup sends a signal to the command's process group, as long as its leader has not been reaped.
func (p *process) signalGroup(signal syscall.Signal) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if !p.reaped {
		_ = syscall.Kill(-p.pid, signal)
	}
}

// killGroup kills what is left of the group, also after its leader's end.
func (p *process) killGroup() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	// The kernel gives no new process a number that is still a group's. So if one has it, the old group is gone.
	if !p.reaped || syscall.Kill(p.pid, 0) == syscall.ESRCH {
		_ = syscall.Kill(-p.pid, syscall.SIGKILL)
	}
}

// groupIsEmpty says whether nobody is left in the group; only after exited.
func (p *process) groupIsEmpty() bool { return syscall.Kill(-p.pid, 0) == syscall.ESRCH }

// message makes the final message.
func (p *process) message() wire.Exit {
	if p.status.Signaled() {
		return wire.Exit{Type: wire.TypeExit, Signal: signalName(p.status.Signal())}
	}
	code := p.status.ExitStatus()
	return wire.Exit{Type: wire.TypeExit, Code: &code}
}

// oomScore is what the agent was given to outlive a shortage of memory; commands have no claim to it.
var oomScore = sync.OnceValue(func() string {
	text, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return "0\n"
	}
	return string(text)
})

func resetOOMScore(pid int) {
	if oomScore() != "0\n" {
		_ = os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte("0"), 0)
	}
}
