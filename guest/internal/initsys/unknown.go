package initsys

import (
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"berth.dev/guest/internal/halt"
)

const (
	firstWithin  = 5 * time.Second // process 1 to end by itself
	othersWithin = 5 * time.Second // everybody else
	firstLook    = 10 * time.Millisecond

	// Source: linux/ptrace.h.
	ptraceSeize      = 0x4206
	ptraceListen     = 0x4208
	optionTraceExit  = 0x40
	eventExit        = 6
	eventStop        = 128
	statusEventShift = 16
)

// endWithout powers off a VM whose process 1 can't be trusted with it: tini, a script, somebody's own. tell: it gets
// SIGTERM first, as from docker. But the kernel panics when process 1 ends, with the file systems as they are: so we
// hold it at its exit by ptrace(2), end the others, and turn the machine off ourselves.
func endWithout(tell bool) {
	syscall.Sync()
	runtime.LockOSThread() // ptrace is the thread's
	if seizeFirst() && tell && catches("/proc/1/status", syscall.SIGTERM) {
		_ = syscall.Kill(1, syscall.SIGTERM)
		holdFirst(time.Now().Add(firstWithin))
	}
	halt.EndProcesses(othersWithin)
	_ = halt.PowerOff()
}

func seizeFirst() bool {
	_, _, errno := syscall.Syscall6(syscall.SYS_PTRACE, ptraceSeize, 1, 0, optionTraceExit, 0, 0)
	return errno == 0
}

// holdFirst lets process 1 go on until it is about to exit, or until deadline.
func holdFirst(deadline time.Time) {
	for time.Now().Before(deadline) {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(1, &status, syscall.WNOHANG|syscall.WALL, nil)
		if err != nil && err != syscall.EINTR {
			return
		}
		if err != nil || pid != 1 {
			time.Sleep(firstLook)
			continue
		}
		if !status.Stopped() || uint32(status)>>statusEventShift == eventExit {
			return
		}
		letGo(status)
	}
}

// letGo resumes process 1 from a stop that is not its exit, and delivers the signal that was the reason.
func letGo(status syscall.WaitStatus) {
	switch event := uint32(status) >> statusEventShift; event {
	case 0:
		_ = syscall.PtraceCont(1, int(status.StopSignal()))
	case eventStop:
		_, _, _ = syscall.Syscall6(syscall.SYS_PTRACE, ptraceListen, 1, 0, 0, 0, 0)
	default:
		_ = syscall.PtraceCont(1, 0)
	}
}

// catches says whether a process has a handler for a signal: process 1 never gets those it has none for.
// Source: proc_pid_status(5).
func catches(status string, signal syscall.Signal) bool {
	text, _ := os.ReadFile(status)
	_, after, _ := strings.Cut(string(text), "\nSigCgt:")
	mask, err := strconv.ParseUint(strings.TrimSpace(strings.SplitN(after, "\n", 2)[0]), 16, 64)
	return err == nil && mask>>(uint(signal)-1)&1 == 1
}
