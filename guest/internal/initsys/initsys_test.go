package initsys

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, target, path string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	os.Remove(path)
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

func TestDetect(t *testing.T) {
	for name, test := range map[string]struct {
		make                       func(t *testing.T, root string)
		system, program, container string
	}{
		"debian": {func(t *testing.T, root string) {
			put(t, root+"/usr/lib/systemd/systemd", "\x7fELF")
			link(t, "../lib/systemd/systemd", root+"/usr/sbin/init")
			link(t, "usr/sbin", root+"/sbin")
		}, Systemd, Systemd, "oci"},
		"alpine": {func(t *testing.T, root string) {
			put(t, root+"/bin/busybox", "\x7fELF")
			link(t, "../bin/busybox", root+"/sbin/init")
		}, Busybox, Busybox, "docker"},
		"alpine with openrc": {func(t *testing.T, root string) {
			put(t, root+"/bin/busybox", "\x7fELF")
			link(t, "../bin/busybox", root+"/sbin/init")
			put(t, root+"/sbin/openrc", "\x7fELF")
		}, OpenRC, Busybox, "docker"},
		"openrc-init": {func(t *testing.T, root string) {
			put(t, root+"/sbin/openrc-init", "\x7fELF")
			link(t, "openrc-init", root+"/sbin/init")
		}, OpenRC, openrcInit, "docker"},
		"sysvinit": {func(t *testing.T, root string) {
			put(t, root+"/sbin/init", "\x7fELF")
			put(t, root+"/etc/inittab", "id:2:initdefault:\n")
		}, SysVInit, SysVInit, "docker"},
		"debian with openrc": {func(t *testing.T, root string) {
			put(t, root+"/sbin/init", "\x7fELF")
			put(t, root+"/etc/inittab", "id:2:initdefault:\n")
			put(t, root+"/sbin/openrc", "\x7fELF")
		}, OpenRC, SysVInit, "docker"},
		"script": {func(t *testing.T, root string) {
			put(t, root+"/sbin/init", "#!/bin/sh\n")
			put(t, root+"/etc/inittab", "")
		}, Other, Other, "docker"},
		"missing": {func(*testing.T, string) {}, Other, Other, "docker"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			test.make(t, root)
			init := Detect(root, []string{"/sbin/init"})
			if init.System != test.system || init.Program != test.program || init.ContainerEnv() != test.container {
				t.Errorf("%+v %s", init, init.ContainerEnv())
			}
		})
	}
	if init := Detect(t.TempDir(), nil); init.System != None || init.Look() != Running {
		t.Errorf("%+v", init)
	}
}

func TestLookOpenRC(t *testing.T) {
	root := t.TempDir()
	init := &Init{System: OpenRC, Program: Busybox, root: root}
	dir := root + "/run/openrc/"
	put(t, dir+"x", "")
	look := func(want string) {
		t.Helper()
		if got := init.Look(); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	look(Starting)
	put(t, dir+"softlevel", "sysinit")
	look(Starting)
	put(t, dir+"softlevel", "boot")
	look(Starting)
	put(t, dir+"softlevel", "default")
	put(t, dir+"rc.starting/x", "")
	look(Starting)
	if err := os.RemoveAll(dir + "rc.starting"); err != nil {
		t.Fatal(err)
	}
	look(Running)
	put(t, dir+"failed/nginx", "")
	look(Degraded)
	put(t, dir+"rc.stopping/x", "")
	look(Stopping)
	put(t, dir+"softlevel", "shutdown\n")
	look(Stopping)
}

const inittab = `# comment
::sysinit:/etc/init.d/rcS
::wait:/bin/sh -c "mkdir -p /x && echo"
si0:12345:bootwait:-/sbin/prepare now
l2:2:wait:/etc/init.d/rc 2
tty1::respawn:/sbin/getty 38400 tty1
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/umount -a -r
broken
`

func TestReadInittab(t *testing.T) {
	root := t.TempDir()
	put(t, root+"/inittab", inittab)
	first, last := readInittab(root + "/inittab")
	if got := strings.Join(first, " "); got != "/etc/init.d/rcS mkdir /sbin/prepare /etc/init.d/rc" {
		t.Error(got)
	}
	if got := strings.Join(last, " "); got != "/bin/umount" {
		t.Error(got)
	}
	first, last = readInittab(root + "/none")
	if len(first) != 1 || first[0] != "/etc/init.d/rcS" || len(last) != 1 {
		t.Error(first, last)
	}
}

func TestBusyboxIsAnInitByItsNameOnly(t *testing.T) {
	root := t.TempDir()
	put(t, root+"/bin/busybox", "\x7fELF")
	link(t, "busybox", root+"/bin/sh")
	link(t, "bin/busybox", root+"/linuxrc")
	for argv, want := range map[string]string{
		"/linuxrc": Busybox, "/bin/busybox init": Busybox, "/bin/sh /start": Other, "/bin/busybox sh": Other, "/bin/busybox": Other,
	} {
		if got := Detect(root, strings.Fields(argv)).Program; got != want {
			t.Errorf("%s: %s", argv, got)
		}
	}
}

// process puts one into a /proc of our own.
func process(t *testing.T, root, pid, cmdline string) {
	t.Helper()
	put(t, root+"/proc/"+pid+"/cmdline", strings.ReplaceAll(cmdline, " ", "\x00")+"\x00")
	put(t, root+"/proc/"+pid+"/stat", pid+" (a) b) S "+map[bool]string{true: "0", false: "1"}[pid == "1"]+" 1 1 0")
}

func TestLookActions(t *testing.T) {
	root := t.TempDir()
	put(t, root+"/sbin/init", "\x7fELF")
	put(t, root+"/etc/inittab", inittab)
	init := Detect(root, []string{"/sbin/init"})
	process(t, root, "1", "init")
	process(t, root, "2", "berth-agent serve")
	process(t, root, "7", "/bin/sh /etc/init.d/rcS")
	if got := init.Look(); got != Starting {
		t.Errorf("rcS runs, but %s", got)
	}
	process(t, root, "7", "init")
	if got := init.Look(); got != Starting {
		t.Errorf("forked, but %s", got)
	}
	process(t, root, "7", "/sbin/getty 38400 tty1")
	if got := init.Look(); got != Running {
		t.Errorf("getty runs, but %s", got)
	}
	put(t, root+"/proc/1/task/1/children", "2 ")
	process(t, root, "7", "/bin/sh /etc/init.d/rcS")
	if got := init.Look(); got != Running {
		t.Errorf("only a grandchild runs rcS, but %s", got)
	}
}

// utmp makes records of the length that this architecture has.
func utmp(records ...[2]int) string {
	size := 384
	if runtime.GOARCH == "arm64" {
		size = 400
	}
	var text []byte
	for _, record := range records {
		one := make([]byte, size)
		binary.LittleEndian.PutUint16(one, uint16(record[0]))
		binary.LittleEndian.PutUint32(one[4:], uint32(record[1]))
		text = append(text, one...)
	}
	return string(text) + "half a record"
}

func TestLookSysVInit(t *testing.T) {
	root := t.TempDir()
	put(t, root+"/sbin/init", "\x7fELF")
	put(t, root+"/etc/inittab", inittab)
	process(t, root, "1", "init [2]")
	init := Detect(root, []string{"/sbin/init"})
	for level, want := range map[byte]string{'2': Running, 'S': Starting, '0': Stopping, '6': Stopping} {
		put(t, root+"/run/utmp", utmp([2]int{2, 0}, [2]int{1, 256*'N' + int(level)}, [2]int{7, 99}))
		if got := init.Look(); got != want {
			t.Errorf("run level %c: %s", level, got)
		}
	}
	put(t, root+"/run/utmp", utmp([2]int{1, '2'}))
	process(t, root, "30", "/bin/sh /etc/init.d/rc 2")
	if got := init.Look(); got != Starting {
		t.Errorf("rc runs, but %s", got)
	}
}

func TestSystemdState(t *testing.T) {
	for word, want := range map[string]string{
		"running\n": Running, "degraded\n": Degraded, "maintenance": Degraded, "starting": Starting,
		"initializing": Starting, "stopping": Stopping, "offline": Unknown, "": Unknown,
	} {
		if got := systemdState(word); got != want {
			t.Errorf("%q: %s", word, got)
		}
	}
}

// What a program leaves in the background has its output open, and may have it for ever.
func TestRunDoesNotWaitForTheBackground(t *testing.T) {
	began := time.Now()
	if err := run("sh", "-c", "sleep 20 &"); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Error("it took", took)
	}
}

func TestTrackerWaits(t *testing.T) {
	root := t.TempDir()
	init := &Init{System: OpenRC, Program: Busybox, root: root}
	put(t, root+"/run/openrc/softlevel", "boot")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	tracker := Track(ctx, init, nil)
	if got := tracker.State(); got != Starting {
		t.Fatal(got)
	}
	put(t, root+"/run/openrc/softlevel", "default")
	if got := tracker.Wait(ctx); got != Running {
		t.Error(got)
	}
	put(t, root+"/run/openrc/softlevel", "shutdown")
	if got := tracker.State(); got != Stopping {
		t.Error(got)
	}
}

func TestWaitEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	tracker := Track(ctx, &Init{System: OpenRC, Program: Busybox, root: t.TempDir()}, nil)
	if got := tracker.Wait(ctx); got != Starting {
		t.Error(got)
	}
}

func TestNothingFollowsStopping(t *testing.T) {
	tracker := &Tracker{init: &Init{System: Systemd, Program: Systemd}, state: Starting, settled: make(chan struct{})}
	tracker.set(Stopping)
	tracker.set(Running)
	if got := tracker.State(); got != Stopping {
		t.Error(got)
	}
}

// The notify socket believes process 1 only: what this test sends is read and dropped.
func TestNotifyIsNotForged(t *testing.T) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.SetsockoptInt(fds[0], syscall.SOL_SOCKET, syscall.SO_PASSCRED, 1); err != nil {
		t.Fatal(err)
	}
	tracker := &Tracker{init: &Init{System: Systemd, Program: Systemd}, state: Starting, settled: make(chan struct{})}
	ready := make(chan struct{})
	notify := os.NewFile(uintptr(fds[0]), "notify")
	gone := make(chan struct{})
	go func() { tracker.listen(notify, ready); close(gone) }()
	for _, text := range []string{"STOPPING=1", "READY=1\nSTATUS=x"} {
		rights := syscall.UnixRights(fds[1])
		if err := syscall.Sendmsg(fds[1], []byte(text), rights, nil, 0); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(20 * time.Millisecond)
	notify.Close()
	<-gone
	syscall.Close(fds[1])
	select {
	case <-ready:
		t.Error("READY of another process was believed")
	default:
	}
	if got := tracker.State(); got != Starting {
		t.Error(got)
	}
}

func TestCatches(t *testing.T) {
	path := t.TempDir() + "/status"
	// SIGTERM is 15: bit 14.
	if err := os.WriteFile(path, []byte("Name:\tx\nSigIgn:\t0000000000004000\nSigCgt:\t0000000000004002\nCapInh:\t0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if !catches(path, syscall.SIGTERM) || !catches(path, syscall.SIGINT) || catches(path, syscall.SIGHUP) {
		t.Error("the mask is read wrongly")
	}
	if catches(path+".none", syscall.SIGTERM) {
		t.Error("nobody catches nothing")
	}
}

func TestLeavesDisks(t *testing.T) {
	root := t.TempDir()
	put(t, root+"/bin/busybox", "")
	link(t, "../bin/busybox", root+"/sbin/init")
	leaves := func(argv ...string) bool { return Detect(root, argv).leavesDisks() }
	put(t, root+"/etc/inittab", "::sysinit:/sbin/openrc sysinit\n::shutdown:/sbin/openrc shutdown\n")
	if !leaves("/sbin/init") {
		t.Error("nothing that it runs in the end is there")
	}
	put(t, root+"/sbin/openrc", "")
	if leaves("/sbin/init") {
		t.Error("openrc unmounts")
	}
	put(t, root+"/bin/umount", "")
	put(t, root+"/etc/inittab", "::sysinit:/sbin/openrc sysinit\n::shutdown:/bin/umount -a -r\n")
	if leaves("/sbin/init") {
		t.Error("umount unmounts")
	}
	put(t, root+"/init.sh", "#!/bin/sh\n")
	if !leaves("/init.sh") || leaves() {
		t.Error("a script does not; we do")
	}
}
