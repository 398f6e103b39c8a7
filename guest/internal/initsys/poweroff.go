package initsys

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

const (
	powerOffWithin = 10 * time.Second
	askAgainAfter  = 300 * time.Millisecond
	// lingering is how long a program's output is waited for after its end: somebody in the background may have it.
	lingering = 500 * time.Millisecond
	// sigPowerOff is SIGRTMIN+4 as the C library counts: systemd(1) starts poweroff.target on it.
	sigPowerOff = syscall.Signal(34 + 4)
)

// PowerOff asks the init to power the machine off, the way its kind wants it, and returns when it has been asked.
func (t *Tracker) PowerOff() error {
	err := t.init.powerOff()
	if err == nil {
		t.set(Stopping)
	}
	return err
}

func (i *Init) powerOff() error {
	if i.VM && i.leavesDisks() {
		go endWithout(i.Program == Other)
		return nil
	}
	switch i.Program {
	case Systemd:
		if run("systemctl", "--no-wall", "--no-ask-password", "poweroff") == nil {
			return nil
		}
		// The bus or systemctl is missing, or it is too early for them. Then it may be too early for the signal as well,
		// and process 1 loses what it has no handler for yet: so it is asked again until it goes, and we with it.
		go func() {
			for range time.Tick(askAgainAfter) {
				_ = signalInit(sigPowerOff)
			}
		}()
		return signalInit(sigPowerOff)
	case openrcInit:
		return run("openrc-shutdown", "--poweroff", "now")
	case SysVInit:
		return run("/sbin/init", "0")
	case Busybox:
		return signalInit(syscall.SIGUSR2) // Source: busybox, init/init.c: HUP reload, USR1 halt, USR2 power off
	}
	// Our own process 1; and whatever else runs as one (tini, dumb-init, a script) is used to what docker sends.
	return signalInit(syscall.SIGTERM)
}

func signalInit(signal syscall.Signal) error {
	if err := syscall.Kill(1, signal); err != nil {
		return fmt.Errorf("can't signal process 1: %w", err)
	}
	return nil
}

func run(argv ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), powerOffWithin)
	defer cancel()
	command := exec.CommandContext(ctx, argv[0], argv[1:]...)
	command.Dir = "/"
	command.WaitDelay = lingering
	output, err := command.CombinedOutput()
	if err == nil || errors.Is(err, exec.ErrWaitDelay) {
		return nil
	}
	text := strings.TrimSpace(string(output))
	if len(text) > 500 {
		text = text[:500]
	}
	return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, text)
}
