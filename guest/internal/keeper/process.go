package keeper

import (
	"errors"
	"os"
	"syscall"
	"time"
	"unsafe"
)

const (
	sysPidfdOpen  = 434 // on every architecture; Linux 5.3
	pidfdNonblock = syscall.O_NONBLOCK
	pidLook       = time.Second
	pollIn        = 1
)

// watchProcess closes the channel it returns when the process has ended.
func watchProcess(pid int) <-chan struct{} {
	ended := make(chan struct{})
	fd, _, errno := syscall.Syscall(sysPidfdOpen, uintptr(pid), pidfdNonblock, 0)
	if errno == syscall.EINVAL { // Linux before 5.10 has no flag for it
		if fd, _, errno = syscall.Syscall(sysPidfdOpen, uintptr(pid), 0, 0); errno == 0 {
			_ = syscall.SetNonblock(int(fd), true)
		}
	}
	switch errno {
	case 0:
		syscall.CloseOnExec(int(fd))
		go waitPidfd(os.NewFile(fd, "pidfd"), pid, ended)
	case syscall.ESRCH:
		close(ended)
	default: // an old kernel, or a filter that forbids it
		go waitByLooking(pid, ended)
	}
	return ended
}

// waitPidfd waits in the runtime's poller: a pidfd is readable when its process has ended.
func waitPidfd(file *os.File, pid int, ended chan<- struct{}) {
	defer file.Close()
	raw, err := file.SyscallConn()
	if err == nil {
		err = raw.Read(readable)
	}
	if err != nil {
		waitByLooking(pid, ended)
		return
	}
	close(ended)
}

func readable(fd uintptr) bool {
	poll := struct {
		fd      int32
		events  int16
		revents int16
	}{fd: int32(fd), events: pollIn}
	var now syscall.Timespec
	n, _, errno := syscall.Syscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&poll)), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0)
	return errno == 0 && n == 1
}

func waitByLooking(pid int, ended chan<- struct{}) {
	for !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) { // EPERM: it lives and is another user's
		time.Sleep(pidLook)
	}
	close(ended)
}
