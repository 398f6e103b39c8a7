// Package halt ends a virtual machine: its processes, its file systems, its power. It is for where no init does so: an
// image without one, an init that knows no power off, a boot that failed. Used by boot's stages and initsys.
package halt

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	look = 20 * time.Millisecond
	// remountWithin is for the kernel's own remounting, which tells nobody when it is done.
	remountWithin = time.Second
)

// PowerOff makes all file systems on disks clean and turns the machine off. It returns only if it may not.
func PowerOff() error {
	syscall.Sync()
	if !protectAll() {
		// Somebody still writes. The kernel does it by force. Source: Documentation/admin-guide/sysrq.rst.
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("u"), 0)
		for end := time.Now().Add(remountWithin); len(writable()) > 0 && time.Now().Before(end); {
			time.Sleep(look)
		}
	}
	syscall.Sync()
	return os.NewSyscallError("reboot", syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF))
}

// protectAll makes what is on disks read-only, the latest mount first, and says whether it all is.
func protectAll() bool {
	all := true
	for _, target := range slices.Backward(writable()) {
		all = syscall.Mount("", target, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, "") == nil && all
	}
	return all
}

func writable() []string {
	text, _ := os.ReadFile("/proc/self/mounts")
	return parseWritable(string(text))
}

// parseWritable gives where disks are mounted writable. Source: fstab(5) for the escapes.
func parseWritable(table string) (targets []string) {
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(table) {
		fields := strings.Fields(line)
		if len(fields) < 4 || !strings.HasPrefix(fields[0], "/dev/") {
			continue
		}
		if slices.Contains(strings.Split(fields[3], ","), "rw") {
			targets = append(targets, unescape.Replace(fields[1]))
		}
	}
	return targets
}

// EndProcesses ends all processes of the machine but process 1 and this one: SIGTERM, and SIGKILL for those who are
// left after within. It must run in the machine's own process namespace, as its root.
func EndProcesses(within time.Duration) {
	_ = syscall.Kill(-1, syscall.SIGTERM)
	_ = syscall.Kill(-1, syscall.SIGCONT)
	for end := time.Now().Add(within); othersLive("/proc", os.Getpid()) && time.Now().Before(end); {
		time.Sleep(look)
	}
	_ = syscall.Kill(-1, syscall.SIGKILL)
}

// othersLive: threads of the kernel and zombies have no command line. Source: proc_pid_cmdline(5).
func othersLive(proc string, self int) bool {
	lines, _ := filepath.Glob(proc + "/[0-9]*/cmdline")
	for _, path := range lines {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil || pid == 1 || pid == self {
			continue
		}
		if text, err := os.ReadFile(path); err == nil && len(text) > 0 {
			return true
		}
	}
	return false
}
