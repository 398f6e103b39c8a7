package boot

import (
	"os"
	"os/signal"
	"syscall"
	"time"
)

// endWithin is how long the processes of a machine without an init have to end after SIGTERM.
const endWithin = 5 * time.Second

// beInit is the init of an image that has none: it takes the orphans' exit statuses and powers off when asked, by the
// signals that docker, systemd and people use for it.
func beInit() int {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGCHLD, syscall.SIGTERM, syscall.SIGINT, syscall.SIGPWR,
		syscall.Signal(34+3), syscall.Signal(34+4)) // SIGRTMIN+3 halt, +4 power off; source: systemd(1)
	signal.Ignore(syscall.SIGHUP)
	for {
		reap()
		if received := <-signals; received != syscall.SIGCHLD {
			break
		}
	}
	// As process 1 these reach all processes of the machine but this one; elsewhere they would reach the whole host.
	if os.Getpid() == 1 {
		endAll(signals)
	}
	return 0
}

func endAll(signals <-chan os.Signal) {
	_ = syscall.Kill(-1, syscall.SIGTERM)
	_ = syscall.Kill(-1, syscall.SIGCONT)
	deadline := time.After(endWithin)
	for reap() {
		select {
		case <-signals:
		case <-deadline:
			_ = syscall.Kill(-1, syscall.SIGKILL)
			return
		}
	}
}

// reap takes what has ended and tells whether there are children left.
func reap() bool {
	for {
		switch pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); {
		case err == syscall.EINTR:
		case err != nil:
			return false
		case pid == 0:
			return true
		}
	}
}
