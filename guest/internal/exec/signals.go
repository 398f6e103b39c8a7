package exec

import (
	"strconv"
	"strings"
	"syscall"
)

// The real-time signals as programs count them: the C library keeps the first two of the kernel's for itself.
const firstRealTime, lastRealTime = 34, 64

// Source: signal(7), the numbers of x86-64 and arm64.
var signals = map[string]syscall.Signal{
	"HUP": syscall.SIGHUP, "INT": syscall.SIGINT, "QUIT": syscall.SIGQUIT, "ILL": syscall.SIGILL,
	"TRAP": syscall.SIGTRAP, "ABRT": syscall.SIGABRT, "BUS": syscall.SIGBUS, "FPE": syscall.SIGFPE,
	"KILL": syscall.SIGKILL, "USR1": syscall.SIGUSR1, "SEGV": syscall.SIGSEGV, "USR2": syscall.SIGUSR2,
	"PIPE": syscall.SIGPIPE, "ALRM": syscall.SIGALRM, "TERM": syscall.SIGTERM, "STKFLT": syscall.SIGSTKFLT,
	"CHLD": syscall.SIGCHLD, "CONT": syscall.SIGCONT, "STOP": syscall.SIGSTOP, "TSTP": syscall.SIGTSTP,
	"TTIN": syscall.SIGTTIN, "TTOU": syscall.SIGTTOU, "URG": syscall.SIGURG, "XCPU": syscall.SIGXCPU,
	"XFSZ": syscall.SIGXFSZ, "VTALRM": syscall.SIGVTALRM, "PROF": syscall.SIGPROF, "WINCH": syscall.SIGWINCH,
	"IO": syscall.SIGIO, "PWR": syscall.SIGPWR, "SYS": syscall.SIGSYS,
}

// signalNumber reads a name without SIG: TERM, RTMIN, RTMIN+3, RTMAX-1.
func signalNumber(name string) (syscall.Signal, bool) {
	if signal, known := signals[name]; known {
		return signal, true
	}
	base, offset := firstRealTime, name
	switch {
	case strings.HasPrefix(name, "RTMIN"):
		offset = name[len("RTMIN"):]
	case strings.HasPrefix(name, "RTMAX"):
		base, offset = lastRealTime, name[len("RTMAX"):]
	default:
		return 0, false
	}
	if offset != "" {
		count, err := strconv.Atoi(offset)
		if err != nil || offset[0] != '+' && offset[0] != '-' {
			return 0, false
		}
		base += count
	}
	return syscall.Signal(base), firstRealTime <= base && base <= lastRealTime
}

// signalName is the reverse; a number that has no name is written as such.
func signalName(signal syscall.Signal) string {
	for name, number := range signals {
		if number == signal {
			return name
		}
	}
	if offset := int(signal) - firstRealTime; offset == 0 {
		return "RTMIN"
	} else if offset > 0 {
		return "RTMIN+" + strconv.Itoa(offset)
	}
	return strconv.Itoa(int(signal))
}
