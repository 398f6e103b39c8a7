package vmboot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"berth.dev/guest/internal/boot"
)

const (
	documentPath = "/boot.json"
	checkPath    = "/e2fsck"
	newRoot      = "/newroot"

	// A power cut must not cost more than the last seconds, and a damaged disk not get worse. The tables of inodes
	// that were never used read as zeroes from a sparse disk: to write them would only fill it.
	rootOptions = "errors=remount-ro,noinit_itable"
)

func mountInitramfs() error {
	for _, dir := range []string{"/dev", "/proc", "/sys", newRoot} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	// A kernel may have mounted it itself (CONFIG_DEVTMPFS_MOUNT is for the root only, but who knows whose it is).
	if err := mount("devtmpfs", "/dev", "devtmpfs", syscall.MS_NOSUID, "mode=755"); err != nil && !errors.Is(err, syscall.EBUSY) {
		return err
	}
	return errors.Join(mountProc(), mountSys())
}

func mountProc() error {
	return mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, "")
}

func mountSys() error {
	return mount("sysfs", "/sys", "sysfs", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, "")
}

func mountRoot(vm *boot.VM) error { return mountDisk(vm, 0, rootOptions) }

// mountDisk waits for the root disk, has it checked where the host wants it so, and mounts it.
func mountDisk(vm *boot.VM, flags uintptr, options string) error {
	device, err := waitDisk(vm.Root)
	if err != nil {
		return err
	}
	if vm.Check {
		if err := check(device); err != nil {
			return err
		}
	}
	if err := syscall.Mount(device, newRoot, "ext4", flags, options); err != nil {
		return fmt.Errorf("the root disk is damaged or no ext4: can't mount it: %w", err)
	}
	return nil
}

// check runs the initramfs's e2fsck, if it is there, with its output on the console.
func check(device string) error {
	takeConsole()
	attr := &syscall.ProcAttr{Dir: "/", Env: []string{"PATH=/"}, Files: []uintptr{0, 1, 2}}
	pid, err := syscall.ForkExec(checkPath, []string{checkPath, "-p", device}, attr)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("can't check the root disk: %w", err)
	}
	var status syscall.WaitStatus
	for {
		if _, err := syscall.Wait4(pid, &status, 0, nil); err != syscall.EINTR {
			break
		}
	}
	if !status.Exited() {
		say(errors.New("the check of the root disk was killed; its journal must do"))
		return nil
	}
	return judge(status.ExitStatus())
}

// judge says what e2fsck's end means. Source: e2fsck(8): 1 corrected, 2 corrected and to be rebooted if it is mounted
// (it is not), 4 left uncorrected, 8 and more: it could not do its work.
func judge(status int) error {
	if status >= 4 {
		return fmt.Errorf("the root disk is damaged beyond what e2fsck -p repairs (it ended with status %d)", status)
	}
	return nil
}

// switchRoot makes the root disk the root, and gives back the memory of what the initramfs holds, but for this program.
func switchRoot() error {
	for _, target := range []string{"/sys", "/proc", "/dev"} {
		if err := syscall.Unmount(target, syscall.MNT_DETACH); err != nil {
			return fmt.Errorf("can't unmount %s: %w", target, err)
		}
	}
	var root syscall.Stat_t
	if err := syscall.Stat("/", &root); err != nil {
		return err
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	sweep("/", root.Dev, map[string]bool{initPath: true, newRoot: true})
	if err := syscall.Mount(".", "/", "", syscall.MS_MOVE, ""); err != nil {
		return fmt.Errorf("can't move to the new root: %w", err)
	}
	return errors.Join(os.NewSyscallError("chroot", syscall.Chroot(".")), os.Chdir("/"))
}

// sweep removes what is below dir on a device, but for what is to be kept.
func sweep(dir string, device uint64, keep map[string]bool) {
	entries, _ := os.ReadDir(dir)
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		var stat syscall.Stat_t
		if keep[path] || syscall.Lstat(path, &stat) != nil || stat.Dev != device {
			continue
		}
		if entry.IsDir() {
			sweep(path, device, keep)
		}
		_ = os.Remove(path)
	}
}

// mount is mount(2) with words for what failed.
func mount(source, target, kind string, flags uintptr, data string) error {
	if err := syscall.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("can't mount %s: %w", target, err)
	}
	return nil
}

// bindFD gives a path that leads to an open file, whatever is mounted or linked on the way to its name.
func bindFD(fd uintptr) string { return "/proc/self/fd/" + strconv.FormatUint(uint64(fd), 10) }
