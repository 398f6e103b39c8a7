// Command enemy is what a hostile root in a machine would run: one system call, or a few, against what is not its own.
// tests/integration/test_enemy.py builds it and runs it in machines, where it must fail, and where it may do what it
// does, so that it is known to work. It exits with 0 when the attack succeeded, 1 when the kernel refused it (stdout
// then has the name of the error), 2 when it was called wrongly.
package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

var attacks map[string]func(args []string) error

func init() {
	attacks = map[string]func(args []string) error{
		"umount":       func(a []string) error { return syscall.Unmount(a[0], 0) },
		"detach":       func(a []string) error { return syscall.Unmount(a[0], syscall.MNT_DETACH) },
		"move":         func(a []string) error { return syscall.Mount(a[0], a[1], "", syscall.MS_MOVE, "") },
		"move-mount":   moveMount,
		"bind":         func(a []string) error { return syscall.Mount(a[0], a[1], "", syscall.MS_BIND, "") },
		"open-tree":    openTree,
		"remount-rw":   func(a []string) error { return syscall.Mount("", a[0], "", syscall.MS_REMOUNT|syscall.MS_BIND, "") },
		"clear-ro":     clearReadOnly,
		"nested":       nested,
		"chroot":       escapeChroot,
		"handle":       openByHandle,
		"mknod":        makeNode,
		"open-read":    func(a []string) error { return openAs(a[0], syscall.O_RDONLY) },
		"open-write":   func(a []string) error { return openAs(a[0], syscall.O_WRONLY) },
		"write":        writeText,
		"mount":        func(a []string) error { return syscall.Mount(a[0], a[1], a[2], 0, at(a, 3)) },
		"module":       loadModule,
		"bpf":          loadProgram,
		"perf":         watchProcessor,
		"swapon":       swapOn,
		"immutable":    makeImmutable,
		"kill":         func(a []string) error { return syscall.Kill(number(a[0]), syscall.Signal(number(a[1]))) },
		"ptrace":       func(a []string) error { return syscall.PtraceAttach(number(a[0])) },
		"connect":      func(a []string) error { return connect(a[0]) },
		"parent-ns":    parentNamespace,
		"setns":        enterNamespace,
		"find-key":     findKey,
		"with-key":     withKey,
		"replace-exe":  replaceProgram,
		"foreign-fds":  findForeign,
		"fork":         forkMany,
		"be-agent":     beAgent,
		"be-port":      bePort,
		"replace-node": replaceNode,
	}
}

func main() {
	runtime.LockOSThread()
	if len(os.Args) < 2 || attacks[os.Args[1]] == nil {
		fmt.Println("usage: enemy ATTACK ARGUMENT…")
		os.Exit(2)
	}
	err := attacks[os.Args[1]](os.Args[2:])
	if err == nil {
		return
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		if name := names[errno]; name != "" {
			fmt.Println(name)
			os.Exit(1)
		}
	}
	fmt.Println(err)
	os.Exit(1)
}

var names = map[syscall.Errno]string{
	syscall.EPERM: "EPERM", syscall.EACCES: "EACCES", syscall.EINVAL: "EINVAL", syscall.ENOENT: "ENOENT",
	syscall.EROFS: "EROFS", syscall.ESRCH: "ESRCH", syscall.ECONNREFUSED: "ECONNREFUSED", syscall.ENOSYS: "ENOSYS",
	syscall.ENODEV: "ENODEV", syscall.ENXIO: "ENXIO", syscall.ETXTBSY: "ETXTBSY", syscall.ENOKEY: "ENOKEY",
	syscall.ENOEXEC: "ENOEXEC", syscall.EAGAIN: "EAGAIN", syscall.EBUSY: "EBUSY", syscall.ESTALE: "ESTALE",
	syscall.EOPNOTSUPP: "EOPNOTSUPP", syscall.EBADF: "EBADF", syscall.ENOTBLK: "ENOTBLK", syscall.EOVERFLOW: "EOVERFLOW",
}

func at(args []string, index int) string {
	if index < len(args) {
		return args[index]
	}
	return ""
}

func number(text string) int {
	value, err := strconv.ParseInt(text, 0, 64)
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	return int(value)
}

// kept holds on to what only the kernel knows the address of.
var kept [][]byte

func text(value string) uintptr {
	data := append([]byte(value), 0)
	kept = append(kept, data)
	return uintptr(unsafe.Pointer(&data[0]))
}

func call(nr uintptr, args ...uintptr) (uintptr, error) {
	var a [6]uintptr
	copy(a[:], args)
	result, _, errno := syscall.Syscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5])
	if errno != 0 {
		return 0, errno
	}
	return result, nil
}

const (
	atFDCWD    = ^uintptr(99) // -100
	emptyPath  = 0x1000
	treeClone  = 1
	movesEmpty = 4
	readOnly   = 1
)

// Mounts ------------------------------------------------------------------------------------------------------------

func clone(path string) (uintptr, error) {
	return call(sysOpenTree, atFDCWD, text(path), treeClone)
}

// moveMount takes the mount at a[0] itself to a[1].
func moveMount(a []string) error {
	_, err := call(sysMoveMount, atFDCWD, text(a[0]), atFDCWD, text(a[1]), 0)
	return err
}

// openTree copies the one mount at a[0], without what covers places in it, and reads a[1] in the copy.
func openTree(a []string) error {
	fd, err := clone(a[0])
	if err != nil {
		return err
	}
	return openAs(fmt.Sprintf("/proc/self/fd/%d/%s", fd, a[1]), syscall.O_RDONLY)
}

func clearReadOnly(a []string) error {
	attributes := [4]uint64{0, readOnly, 0, 0}
	_, err := call(sysMountSetattr, atFDCWD, text(a[0]), 0, uintptr(unsafe.Pointer(&attributes)), 32)
	return err
}

// nested does another attack as root of a user and mount namespace of its own.
func nested(a []string) error {
	if os.Getenv("ENEMY_NESTED") != "" {
		_ = syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")
		return attacks[a[0]](a[1:])
	}
	attr := &syscall.ProcAttr{
		Env:   append(os.Environ(), "ENEMY_NESTED=1"),
		Files: []uintptr{0, 1, 2},
		Sys: &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		},
	}
	return wait("/proc/self/exe", os.Args, attr)
}

func wait(path string, argv []string, attr *syscall.ProcAttr) error {
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return err
	}
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &status, 0, nil); err != nil {
		return err
	}
	if status.ExitStatus() != 0 {
		os.Exit(1) // it has said why
	}
	return nil
}

// escapeChroot leaves the root directory it is in, the way every jail without a mount namespace is left, and reads a[1].
// a[0] is a directory to make the jail in.
func escapeChroot(a []string) error {
	inner := filepath.Join(a[0], "inner")
	_ = os.Mkdir(inner, 0o700)
	if err := syscall.Chdir(a[0]); err != nil {
		return err
	}
	if err := syscall.Chroot(inner); err != nil {
		return err
	}
	for range 64 {
		_ = syscall.Chdir("..")
	}
	if err := syscall.Chroot("."); err != nil {
		return err
	}
	return openAs(a[1], syscall.O_RDONLY)
}

// openByHandle opens the file a[1] by number on the file system of a[0], as the "shocker" did.
func openByHandle(a []string) error {
	mount, err := syscall.Open(a[0], syscall.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	var handle [8 + 128]byte
	binary.NativeEndian.PutUint32(handle[:], 128)
	var id int32
	_, err = call(sysNameToHandle, atFDCWD, text(a[1]), uintptr(unsafe.Pointer(&handle)), uintptr(unsafe.Pointer(&id)), 0)
	if err != nil {
		return fmt.Errorf("no handle of %s: %v", a[1], err) // a file system without handles proves nothing
	}
	_, err = call(sysOpenByHandle, uintptr(mount), uintptr(unsafe.Pointer(&handle)), syscall.O_RDONLY)
	return err
}

// Files and devices -------------------------------------------------------------------------------------------------

func openAs(path string, flags int) error {
	fd, err := syscall.Open(path, flags|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err == nil {
		syscall.Close(fd)
	}
	return err
}

func writeText(a []string) error {
	fd, err := syscall.Open(a[0], syscall.O_WRONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	_, err = syscall.Write(fd, []byte(a[1]))
	return err
}

// makeNode: PATH b|c|p MAJOR MINOR, which is then opened, but for a FIFO.
func makeNode(a []string) error {
	mode := map[string]uint32{"b": syscall.S_IFBLK, "c": syscall.S_IFCHR, "p": syscall.S_IFIFO}[a[1]]
	os.Remove(a[0])
	if err := syscall.Mknod(a[0], mode|0o600, number(a[2])<<8|number(a[3])); err != nil {
		return err
	}
	defer os.Remove(a[0])
	if a[1] == "p" {
		return nil
	}
	return openAs(a[0], syscall.O_RDONLY)
}

// replaceNode puts at PATH something that no reader expects: fifo, socket, directory, huge, or a link to a[2].
func replaceNode(a []string) error {
	os.RemoveAll(a[0])
	switch a[1] {
	case "fifo":
		return syscall.Mkfifo(a[0], 0o644)
	case "directory":
		return os.Mkdir(a[0], 0o755)
	case "link":
		return os.Symlink(a[2], a[0])
	case "huge":
		file, err := os.Create(a[0])
		if err != nil {
			return err
		}
		return errors.Join(file.Truncate(1<<40), file.Close())
	case "socket":
		fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		return syscall.Bind(fd, &syscall.SockaddrUnix{Name: a[0]})
	}
	return errors.New("no such kind")
}

const (
	getFlags      = 0x80086601
	setFlags      = 0x40086602
	immutableFlag = 0x10
)

// makeImmutable keeps the host's user from deleting a file of theirs; it takes the flag away again.
func makeImmutable(a []string) error {
	fd, err := syscall.Open(a[0], syscall.O_RDONLY, 0)
	if err != nil {
		return err
	}
	var flags int32
	if _, err := call(syscall.SYS_IOCTL, uintptr(fd), getFlags, uintptr(unsafe.Pointer(&flags))); err != nil {
		return err
	}
	changed := flags | immutableFlag
	if _, err := call(syscall.SYS_IOCTL, uintptr(fd), setFlags, uintptr(unsafe.Pointer(&changed))); err != nil {
		return err
	}
	_, err = call(syscall.SYS_IOCTL, uintptr(fd), setFlags, uintptr(unsafe.Pointer(&flags)))
	return err
}

// The kernel --------------------------------------------------------------------------------------------------------

// loadModule hands over a file that is no module: who may load one is told so (ENOEXEC), who may not is told that.
func loadModule(a []string) error {
	file, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	_, err = call(sysFinitModule, file.Fd(), text(""), 0)
	return err
}

// loadProgram loads the program `return 0` as a tracepoint's.
func loadProgram([]string) error {
	program := [2]uint64{0x00000000000000b7, 0x0000000000000095} // r0 = 0; exit
	license := append([]byte("GPL"), 0)
	var attr [128]byte
	binary.NativeEndian.PutUint32(attr[0:], 5) // BPF_PROG_TYPE_TRACEPOINT
	binary.NativeEndian.PutUint32(attr[4:], 2)
	binary.NativeEndian.PutUint64(attr[8:], uint64(uintptr(unsafe.Pointer(&program))))
	binary.NativeEndian.PutUint64(attr[16:], uint64(uintptr(unsafe.Pointer(&license[0]))))
	_, err := call(sysBPF, 5, uintptr(unsafe.Pointer(&attr)), 128) // BPF_PROG_LOAD
	runtime.KeepAlive(program)
	runtime.KeepAlive(license)
	return err
}

// watchProcessor counts what all processes of the host do on processor 0.
func watchProcessor([]string) error {
	var attr [128]byte
	binary.NativeEndian.PutUint32(attr[0:], 1) // PERF_TYPE_SOFTWARE
	binary.NativeEndian.PutUint32(attr[4:], 128)
	_, err := call(sysPerfOpen, uintptr(unsafe.Pointer(&attr)), ^uintptr(0), 0, ^uintptr(0), 0)
	return err
}

// swapOn gives a file that is no swap space: who may use one is told so (EINVAL).
func swapOn(a []string) error {
	_, err := call(syscall.SYS_SWAPON, text(a[0]), 0)
	return err
}

// Processes, sockets, namespaces, keys ------------------------------------------------------------------------------

// connect to a unix socket: a path, or @NAME for an abstract one.
func connect(name string) error {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	return syscall.Connect(fd, &syscall.SockaddrUnix{Name: name})
}

// parentNamespace asks the kernel for the user namespace above that of the process a[0], and enters it.
func parentNamespace(a []string) error {
	fd, err := syscall.Open("/proc/"+a[0]+"/ns/user", syscall.O_RDONLY, 0)
	if err != nil {
		return err
	}
	_, err = call(syscall.SYS_IOCTL, uintptr(fd), 0xb702, 0) // NS_GET_PARENT
	return err
}

// enterNamespace enters the namespace a[1] of the process a[0].
func enterNamespace(a []string) error {
	fd, err := syscall.Open("/proc/"+a[0]+"/ns/"+a[1], syscall.O_RDONLY, 0)
	if err != nil {
		return err
	}
	_, err = call(sysSetns, uintptr(fd), 0)
	return err
}

const (
	keyJoin        = 1
	keySearch      = 10
	sessionKeyring = ^uintptr(2) // -3
)

// findKey searches the session's keyring, and all that hangs on it, for the key a[0].
func findKey(a []string) error {
	_, err := call(sysKeyctl, keySearch, sessionKeyring, text("user"), text(a[0]), 0)
	return err
}

// withKey runs a program in a session that holds the key a[0].
func withKey(a []string) error {
	if _, err := call(sysKeyctl, keyJoin, 0); err != nil {
		return err
	}
	if _, err := call(sysAddKey, text("user"), text(a[0]), text("secret"), 6, sessionKeyring); err != nil {
		return err
	}
	// Anybody who has the keyring may search it and read the key, also after a change of ids.
	for _, key := range []uintptr{sessionKeyring} {
		_, _ = call(sysKeyctl, 5, key, 0x3f3f3f3f) // KEYCTL_SETPERM
	}
	if id, err := call(sysKeyctl, keySearch, sessionKeyring, text("user"), text(a[0]), 0); err == nil {
		_, _ = call(sysKeyctl, 5, id, 0x3f3f3f3f)
	}
	return syscall.Exec(a[1], a[1:], os.Environ())
}

// replaceProgram writes to the program that a process is running, once it does not run any more: CVE-2019-5736.
// a[0] is what its command line ends with. The byte that is written is the one that stands there.
func replaceProgram(a []string) error {
	pid := 0
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		line, _ := os.ReadFile("/proc/" + entry.Name() + "/cmdline")
		id, err := strconv.Atoi(entry.Name())
		if err == nil && id != os.Getpid() && bytes.HasSuffix(bytes.ReplaceAll(line, []byte{0}, []byte{' '}), []byte(a[0]+" ")) {
			pid = id
		}
	}
	if pid == 0 {
		return errors.New("no such process")
	}
	const path = 0x200000 // O_PATH
	fd, err := syscall.Open(fmt.Sprintf("/proc/%d/exe", pid), path, 0)
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return err
	}
	for range 200 {
		err = writeText([]string{fmt.Sprintf("/proc/self/fd/%d", fd), "\x7f"})
		if err != syscall.ETXTBSY {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}

// findForeign looks at everything that any process here has open, works in or runs, and succeeds when something of
// that lies in a mount that is not ours.
func findForeign(a []string) error {
	mounts := map[string]bool{}
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(data)) {
		id, _, _ := strings.Cut(line, " ")
		mounts[id] = true
	}
	entries, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, kind := range []string{"cwd", "root", "exe"} {
		found, _ := filepath.Glob("/proc/[0-9]*/" + kind)
		entries = append(entries, found...)
	}
	self := fmt.Sprintf("/proc/%d/", os.Getpid())
	for _, entry := range entries {
		target, err := os.Readlink(entry)
		if err != nil || !strings.HasPrefix(target, "/") && !strings.HasPrefix(target, "(") || strings.HasPrefix(target, "/memfd:") || strings.HasPrefix(entry, self) {
			continue // a pipe, a socket, memory, or a kernel thread
		}
		fd, err := syscall.Open(entry, 0x200000, 0)
		if err != nil {
			continue
		}
		info, _ := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
		syscall.Close(fd)
		for line := range strings.Lines(string(info)) {
			key, value, _ := strings.Cut(line, ":")
			if key == "mnt_id" && !mounts[strings.TrimSpace(value)] {
				fmt.Println(entry, target)
				return nil
			}
		}
	}
	return errors.New("nothing foreign")
}

// forkMany starts processes until no more can be, at most a[0], and succeeds when it had them all.
func forkMany(a []string) error {
	var made []int
	defer func() {
		for _, pid := range made {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}()
	for range number(a[0]) {
		attr := &syscall.ProcAttr{Files: []uintptr{0, 1, 2}}
		pid, err := syscall.ForkExec("/bin/sleep", []string{"sleep", "60"}, attr)
		if err != nil {
			return err
		}
		made = append(made, pid)
	}
	return nil
}
