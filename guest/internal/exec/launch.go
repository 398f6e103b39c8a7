package exec

import (
	"bytes"
	"io"
	"os"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"berth.dev/guest/internal/passwd"
	"berth.dev/guest/internal/wire"
)

const (
	sysFaccessat2 = 439   // on every architecture; Linux 5.8
	atEaccess     = 0x200 // Source: linux/fcntl.h
	atFdcwd       = -100
	accessExecute = 1
)

// launch starts a command with its three standard files; terminal says whether the first is to control it.
//
// Whatever is asked of the file system on the way is asked as the user, by the kernel: the working directory may be
// on a file system where root is nobody (a squashing NFS, FUSE), and a directory of the PATH closed to them. Linux
// keeps credentials and the working directory per thread, so a thread of its own takes on the user's, changes directory,
// looks the program up, forks from there, and is thrown away. The error is a *wire.Error.
func launch(c *command, files [3]int, terminal bool) (*process, error) {
	type outcome struct {
		process *process
		err     error
	}
	result := make(chan outcome, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		defer func() {
			if cause := recover(); cause != nil {
				result <- outcome{err: wire.Refusal(wire.CodeInternal, "the command was given up: this is a bug")}
			}
		}()
		started, err := c.launchHere(files, terminal)
		result <- outcome{started, err}
	}()
	got := <-result
	return got.process, got.err
}

func (c *command) launchHere(files [3]int, terminal bool) (*process, error) {
	if err := syscall.Unshare(syscall.CLONE_FS); err != nil {
		return nil, internal("unshare", err)
	}
	if err := takeRights(c.user); err != nil {
		return nil, internal("taking on the rights of the user", err)
	}
	directory, err := c.enter()
	if err != nil {
		return nil, err
	}
	if !c.env.has("PWD") {
		c.env.set("PWD", directory) // so that a shell keeps the path as it was said, symbolic links and all
	}
	path, err := findProgram(c.program, c.env.get("PATH"))
	if err != nil {
		return nil, err
	}
	return c.start(path, files, terminal)
}

// takeRights gives this thread the user's rights on files. What else root may do stays: start needs it.
func takeRights(user passwd.User) error {
	if user.UID == uint32(os.Geteuid()) && user.UID != 0 {
		return nil // an agent that is not root can only run commands as itself
	}
	groups := unsafe.Pointer(unsafe.SliceData(user.Groups))
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETGROUPS, uintptr(len(user.Groups)), uintptr(groups), 0); errno != 0 {
		return errno
	}
	if !setFileID(syscall.SYS_SETFSGID, user.GID) || !setFileID(syscall.SYS_SETFSUID, user.UID) {
		return syscall.EPERM
	}
	// A change of credentials makes the whole process undumpable, and with it its files in /proc somebody else's.
	_, _, _ = syscall.RawSyscall(syscall.SYS_PRCTL, syscall.PR_SET_DUMPABLE, 1, 0)
	return nil
}

// setFileID calls setfsuid or setfsgid, which tell only what was before; so it asks again.
func setFileID(call uintptr, id uint32) bool {
	_, _, _ = syscall.RawSyscall(call, uintptr(id), 0, 0)
	now, _, _ := syscall.RawSyscall(call, uintptr(id), 0, 0)
	return uint32(now) == id
}

// enter changes this thread's working directory and says to which.
func (c *command) enter() (string, error) {
	if c.cwd != "" {
		err := syscall.Chdir(c.cwd)
		if err == nil {
			return c.cwd, nil
		}
		if !c.cwdOptional {
			return "", wire.Refusal(wire.CodeInvalidArgument, "the working directory '"+c.cwd+"': "+err.Error())
		}
	}
	if syscall.Chdir(c.user.Home) == nil {
		return c.user.Home, nil
	}
	if err := syscall.Chdir("/"); err != nil {
		return "", internal("/", err)
	}
	return "/", nil
}

// findProgram looks a program up as execvp(3) does, from this thread's directory and with its rights.
func findProgram(program, path string) (string, error) {
	if program == "" {
		return "", notFound(program)
	}
	if strings.Contains(program, "/") {
		return program, describe(program, program, checkProgram(program))
	}
	failure := syscall.ENOENT
	for directory := range strings.SplitSeq(path, ":") {
		candidate := directory + "/" + program
		if directory == "" { // Source: POSIX, XBD 8.3: an empty prefix is the working directory
			candidate = "./" + program
		}
		errno := checkProgram(candidate)
		if errno == 0 {
			return candidate, nil
		}
		if errno == syscall.EACCES || errno == syscall.EISDIR && failure == syscall.ENOENT {
			failure = errno
		}
	}
	if failure == syscall.EISDIR { // a directory of that name somewhere in the PATH is not what was meant
		failure = syscall.ENOENT
	}
	return "", describe(program, program, failure)
}

// checkProgram says why a path can't be executed; 0 when it seems that it can.
func checkProgram(path string) syscall.Errno {
	var status syscall.Stat_t
	if err := syscall.Stat(path, &status); err != nil {
		return errnoOf(err)
	}
	switch status.Mode & syscall.S_IFMT {
	case syscall.S_IFDIR:
		return syscall.EISDIR
	case syscall.S_IFREG:
		return mayExecute(path, &status)
	}
	return syscall.EACCES
}

func mayExecute(path string, status *syscall.Stat_t) syscall.Errno {
	name, err := syscall.BytePtrFromString(path)
	if err != nil {
		return syscall.EINVAL
	}
	cwd := atFdcwd
	_, _, errno := syscall.Syscall6(sysFaccessat2, uintptr(cwd), uintptr(unsafe.Pointer(name)), accessExecute, atEaccess, 0, 0)
	if errno != syscall.ENOSYS && errno != syscall.EPERM {
		return errno
	}
	if status.Mode&0o111 == 0 { // an old kernel: execve itself will say the rest
		return syscall.EACCES
	}
	return 0
}

// start forks and executes. The child takes on the user's whole credentials before it does.
func (c *command) start(path string, files [3]int, terminal bool) (*process, error) {
	handle := -1
	attributes := &syscall.ProcAttr{
		Env:   c.env.list,
		Files: []uintptr{uintptr(files[0]), uintptr(files[1]), uintptr(files[2])},
		Sys:   &syscall.SysProcAttr{Setsid: true, Setctty: terminal, Ctty: 0, PidFD: &handle},
	}
	if os.Geteuid() == 0 {
		attributes.Sys.Credential = &syscall.Credential{Uid: c.user.UID, Gid: c.user.GID, Groups: c.user.Groups}
	}
	pid, err := syscall.ForkExec(path, c.argv, attributes)
	if err == syscall.ENOEXEC && isScript(path) {
		// Source: execvp(3): a file that is no program is one for the shell.
		argv := append([]string{"/bin/sh", path}, c.argv[1:]...)
		pid, err = syscall.ForkExec("/bin/sh", argv, attributes)
	}
	if err != nil {
		return nil, describe(c.program, path, errnoOf(err))
	}
	return newProcess(pid, handle), nil
}

// isScript says whether a file that the kernel can't execute looks like text: no NUL byte in its beginning.
func isScript(path string) bool {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // it may be a FIFO by now
	if err != nil {
		return false
	}
	defer file.Close()
	beginning := make([]byte, 128)
	count, err := io.ReadFull(file, beginning)
	return (err == nil || err == io.ErrUnexpectedEOF || err == io.EOF) && bytes.IndexByte(beginning[:count], 0) < 0
}

// describe makes the client's error of what execve said.
func describe(program, path string, errno syscall.Errno) error {
	refuse := func(text string) error {
		return wire.Refusal(wire.CodeNotExecutable, "'"+program+"' can't be executed: "+text)
	}
	switch errno {
	case 0:
		return nil
	case syscall.ENOENT:
		if exists(path) && strings.Contains(path, "/") {
			return wire.Refusal(wire.CodeNotFound, "'"+program+"' can't be executed: its interpreter or loader was not found")
		}
		return notFound(program)
	case syscall.EISDIR:
		return refuse("it is a directory")
	case syscall.E2BIG:
		return refuse("its arguments and environment are too long")
	case syscall.EACCES, syscall.ENOTDIR, syscall.ELOOP, syscall.ENAMETOOLONG, syscall.ENOEXEC, syscall.ETXTBSY, syscall.EINVAL,
		syscall.ELIBBAD, syscall.EPERM, syscall.EIO:
		return refuse(errno.Error())
	}
	return internal("'"+program+"' can't be started", errno)
}

func notFound(program string) error {
	return wire.Refusal(wire.CodeNotFound, "'"+program+"' was not found")
}

func internal(what string, err error) error {
	return wire.Refusal(wire.CodeInternal, what+": "+err.Error())
}

func errnoOf(err error) syscall.Errno {
	if errno, ok := err.(syscall.Errno); ok {
		return errno
	}
	return syscall.EINVAL // ForkExec's word for a NUL in a string
}
