package exec

import (
	"strconv"
	"syscall"
	"unsafe"

	"berth.dev/guest/internal/wire"
)

// Source: asm-generic/ioctls.h, the same on x86-64 and arm64.
const (
	ioctlUnlock = 0x40045431 // TIOCSPTLCK
	ioctlNumber = 0x80045430 // TIOCGPTN
	ioctlPeer   = 0x5441     // TIOCGPTPEER, Linux 4.13
)

func ioctl(fd, request uintptr, argument unsafe.Pointer) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, request, uintptr(argument)); errno != 0 {
		return errno
	}
	return nil
}

// openPty makes a pseudo-terminal of a size; the slave belongs to uid.
func openPty(size wire.Size, uid uint32) (master, slave int, err error) {
	flags := syscall.O_RDWR | syscall.O_NOCTTY | syscall.O_CLOEXEC
	if master, err = syscall.Open("/dev/ptmx", flags, 0); err != nil {
		return -1, -1, err
	}
	if slave, err = openSlave(master, flags); err != nil {
		_ = syscall.Close(master)
		return -1, -1, err
	}
	setSize(uintptr(master), size)
	// The group stays what the mount of devpts says (tty). Source: grantpt(3).
	_ = syscall.Fchown(slave, int(uid), -1)
	_ = syscall.Fchmod(slave, 0o620)
	return master, slave, nil
}

func openSlave(master, flags int) (int, error) {
	var unlocked, number int32
	if err := ioctl(uintptr(master), ioctlUnlock, unsafe.Pointer(&unlocked)); err != nil {
		return -1, err
	}
	// By the master itself where possible: /dev/pts might be another mount than the master's.
	fd, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(master), ioctlPeer, uintptr(flags))
	if errno == 0 {
		return int(fd), nil
	}
	if err := ioctl(uintptr(master), ioctlNumber, unsafe.Pointer(&number)); err != nil {
		return -1, err
	}
	return syscall.Open("/dev/pts/"+strconv.Itoa(int(number)), flags, 0)
}

// setSize tells the terminal its size; the kernel sends SIGWINCH when it is another one.
func setSize(master uintptr, size wire.Size) {
	window := struct{ rows, cols, width, height uint16 }{rows: size.Rows, cols: size.Cols}
	_ = ioctl(master, syscall.TIOCSWINSZ, unsafe.Pointer(&window))
}

// foreground returns the terminal's foreground process group, 0 for none.
func foreground(master uintptr) int {
	var group int32
	if ioctl(master, syscall.TIOCGPGRP, unsafe.Pointer(&group)) != nil {
		return 0
	}
	return int(group)
}

// endOfFile returns the character that means end of file on the terminal: usually Ctrl-D.
func endOfFile(master uintptr) byte {
	var settings syscall.Termios
	if ioctl(master, syscall.TCGETS, unsafe.Pointer(&settings)) != nil {
		return 4
	}
	return settings.Cc[syscall.VEOF]
}
