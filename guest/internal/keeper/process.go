package keeper

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

const (
	sysPidfdOpen  = 434 // on every architecture; Linux 5.3
	pidfdNonblock = syscall.O_NONBLOCK
	pidLook       = time.Second
	pollIn        = 1
	maxRecord     = 64 << 10
)

// watchRecorded is watchProcess for the process that container.json names, once berth has written it after the start:
// {"pid": N, "startTime": clock ticks}. nil while it says nothing.
func watchRecorded(path string) <-chan struct{} {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxRecord))
	var record struct {
		PID       int   `json:"pid"`
		StartTime int64 `json:"startTime"`
	}
	if err != nil || json.Unmarshal(text, &record) != nil || record.PID <= 0 {
		return nil
	}
	ended := watchProcess(record.PID)
	if record.StartTime > 0 && startTime(record.PID) != record.StartTime {
		gone := make(chan struct{}) // ended, and its number given to another
		close(gone)
		return gone
	}
	return ended
}

// startTime of a process in clock ticks since the host's boot, 0 when it is gone. Source: proc_pid_stat(5), field 22.
func startTime(pid int) int64 {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0
	}
	// The name in parentheses may hold anything.
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 20 {
		return 0
	}
	ticks, _ := strconv.ParseInt(fields[19], 10, 64)
	return ticks
}

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
