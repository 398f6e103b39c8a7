package files

import (
	"os"
	"slices"
	"strconv"
	"syscall"
)

// CloseInherited closes what a process was started with beyond the standard files and keep. The runtime's own
// descriptors are close-on-exec and an inherited one is not, which is how they are told apart: call it first.
func CloseInherited(keep ...int) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, entry := range entries {
		fd, err := strconv.Atoi(entry.Name())
		if err != nil || fd <= 2 || slices.Contains(keep, fd) {
			continue
		}
		flags, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_GETFD, 0)
		if errno == 0 && flags&syscall.FD_CLOEXEC == 0 {
			syscall.Close(fd)
		}
	}
}
