package exec

import (
	"strconv"
	"syscall"
)

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

// others are second names of a number.
var others = map[string]syscall.Signal{"IOT": syscall.SIGABRT, "POLL": syscall.SIGIO, "CLD": syscall.SIGCHLD}

const lastSignal = 64

// signalNumber reads a name without SIG, or a decimal number.
func signalNumber(name string) (syscall.Signal, bool) {
	if signal, known := signals[name]; known {
		return signal, true
	}
	if signal, known := others[name]; known {
		return signal, true
	}
	number, err := strconv.ParseUint(name, 10, 8)
	return syscall.Signal(number), err == nil && 0 < number && number <= lastSignal
}

// signalName is the reverse. A real-time signal has no name: it is written as its number.
func signalName(signal syscall.Signal) string {
	for name, number := range signals {
		if number == signal {
			return name
		}
	}
	return strconv.Itoa(int(signal))
}
