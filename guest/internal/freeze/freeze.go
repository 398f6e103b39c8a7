// Package freeze is `agent freeze`: it keeps the root file system of a VM as it is for as long as its stdin is open,
// while the host copies the disk (`berth commit`). What is in memory has been written when it says "frozen"; whoever
// writes meanwhile waits. Its exit status says whether the file system stood still until the end of stdin.
//
// Nobody may be left in a frozen machine. A second process, `agent thaw`, holds the other end of a pipe, in a session of
// its own, and thaws when this one has gone without doing so; this one thaws when that one has gone. Once the file
// system is frozen neither writes to it: they use pipes only.
package freeze

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"berth.dev/guest/internal/memory"
)

const (
	// longest is how long a machine may be kept from writing, whatever the host does.
	longest = 5 * time.Minute

	// Source: linux/fs.h: FIFREEZE is _IOWR('X', 119, int), FITHAW _IOWR('X', 120, int).
	ioctlFreeze = 0xc0045877
	ioctlThaw   = 0xc0045878

	// What the pipe to the other process says: whether it is to thaw at the end.
	armed    = 'f'
	disarmed = 'n'

	neverKill = "-1000" // as vmboot's guard
)

// target is a file system that can be frozen.
type target interface {
	freeze() error
	thaw() error
}

// Main is `agent freeze`.
func Main() int {
	memory.BeSmall()
	protect()
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGPIPE)
	root, err := openRoot()
	if err != nil {
		return fail(err)
	}
	toOther, fromOther, err := startThaw()
	if err != nil {
		return fail(err)
	}
	return hold(root, toOther, os.Stdin, os.Stdout, ended(fromOther), end)
}

// hold freezes until the end of stdin. The file system is thawed when it returns, and stays so.
func hold(root target, other, stdin, stdout *os.File, otherEnded <-chan struct{}, signals <-chan os.Signal) int {
	// Before it is frozen: from here on whatever happens to this process, the other one thaws.
	if _, err := other.Write([]byte{armed}); err != nil {
		return fail(err)
	}
	if err := root.freeze(); err != nil {
		_, _ = other.Write([]byte{disarmed}) // else it would thaw what somebody else has frozen
		return fail(fmt.Errorf("the root file system can't be frozen: %w", err))
	}
	_, _ = stdout.WriteString("frozen\n")
	why := ""
	select {
	case <-ended(stdin):
	case <-otherEnded:
		why = "the process that was to thaw it was killed"
	case <-signals:
		why = "it was told to end"
	case <-time.After(longest):
		why = fmt.Sprintf("it took longer than %v", longest)
	}
	err := root.thaw()
	_, _ = other.Write([]byte{disarmed})
	switch {
	case err != nil:
		return fail(fmt.Errorf("the root file system was no more frozen at the end: %w", err))
	case why != "":
		return fail(fmt.Errorf("the root file system was thawed too early: %s", why))
	}
	return 0
}

// Thaw is `agent thaw`: descriptor 0 is the pipe from `agent freeze`, 1 the one to it.
func Thaw() int {
	memory.BeSmall()
	protect()
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGPIPE,
		syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU)
	root, err := openRoot()
	if err != nil {
		return fail(err)
	}
	// Only now may the other one freeze.
	if _, err := os.Stdout.Write([]byte{armed}); err != nil {
		return 1
	}
	watch(root, os.Stdin)
	return 0
}

// watch thaws at the end of a pipe if the last that came through it says so.
func watch(root target, pipe *os.File) {
	last := []byte{disarmed}
	var buffer [1]byte
	for {
		if count, err := pipe.Read(buffer[:]); err != nil || count == 0 {
			break
		}
		last[0] = buffer[0]
	}
	if last[0] == armed {
		_ = root.thaw() // an error: it is not frozen
	}
}

// startThaw starts the other process; it gives the pipe to it and the one from it, which ends with it.
func startThaw() (to, from *os.File, err error) {
	theirStdin, to, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer theirStdin.Close()
	from, theirStdout, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer theirStdout.Close()
	process, err := os.StartProcess("/proc/self/exe", []string{"berth-agent", "thaw"}, &os.ProcAttr{
		Dir: "/", Env: os.Environ(), Files: []*os.File{theirStdin, theirStdout, nil},
		// What hangs up on this one, or ends its process group, is not to reach it.
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return nil, nil, err
	}
	go func() { _, _ = process.Wait() }()
	theirStdout.Close()
	var ready [1]byte
	if _, err := from.Read(ready[:]); err != nil {
		return nil, nil, fmt.Errorf("the process that is to thaw the root file system did not start: %w", err)
	}
	return to, from, nil
}

// ended is closed when a descriptor comes to its end.
func ended(file *os.File) <-chan struct{} {
	over := make(chan struct{})
	go func() {
		defer close(over)
		var buffer [64]byte
		for {
			if count, err := file.Read(buffer[:]); err != nil || count == 0 {
				return
			}
		}
	}()
	return over
}

// protect: a shortage of memory, which a frozen file system makes likelier, may not cost the way out of it.
func protect() { _ = os.WriteFile("/proc/self/oom_score_adj", []byte(neverKill), 0) }

// rootFS is the real one, open before it is frozen.
type rootFS struct{ fd uintptr }

func openRoot() (target, error) {
	fd, err := syscall.Open("/", syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	return rootFS{uintptr(fd)}, err
}

func (r rootFS) freeze() error { return r.control(ioctlFreeze) }
func (r rootFS) thaw() error   { return r.control(ioctlThaw) }

func (r rootFS) control(command uintptr) error {
	for {
		_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, r.fd, command, 0)
		if errno == 0 {
			return nil
		}
		if errno != syscall.EINTR {
			return errno
		}
	}
}

func fail(err error) int {
	_, _ = os.Stderr.WriteString(err.Error() + "\n")
	return 1
}
