package vmboot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"berth.dev/guest/internal/boot"
	"berth.dev/guest/internal/files"
	"berth.dev/guest/internal/initsys"
)

const (
	runDir     = "/run/berth"
	modulesDir = "/lib/modules"
	groupTTY   = "5" // in every distribution; systemd builds it in as well

	cgroupDir = "/sys/fs/cgroup"
)

// mountSystem mounts in the new root what a kernel gives and every init expects or would mount itself. systemd and
// OpenRC make their own trees of control groups.
func mountSystem(doc *boot.Document) error {
	essential := errors.Join(
		makeAndMount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""),
		makeAndMount("sysfs", "/sys", "sysfs", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""),
		makeAndMount("devtmpfs", "/dev", "devtmpfs", syscall.MS_NOSUID, "mode=755"),
		makeAndMount("tmpfs", "/run", "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=755,size=20%,nr_inodes=800k"),
	)
	if essential != nil {
		return essential
	}
	note(makeAndMount("devpts", "/dev/pts", "devpts", syscall.MS_NOSUID|syscall.MS_NOEXEC, "mode=620,ptmxmode=666,gid="+groupTTY))
	note(makeAndMount("tmpfs", "/dev/shm", "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=1777"))
	if system := initsys.Detect("", doc.Init).System; system != initsys.Systemd && system != initsys.OpenRC {
		note(makeAndMount("cgroup2", cgroupDir, "cgroup2", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, "nsdelegate"))
	}
	for name, target := range map[string]string{"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		if err := os.Symlink("/proc/self/"+target, "/dev/"+name); err != nil && !errors.Is(err, fs.ErrExist) {
			note(err)
		}
	}
	// Everybody may ping, as in a container and on most distributions.
	note(os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0))
	return nil
}

// note says an error, if it is one, that does not matter much.
func note(err error) {
	if err != nil {
		say(err)
	}
}

// makeAndMount mounts below the machine's own root, which an image's symbolic links can't leave: we have moved there.
func makeAndMount(source, target, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	return mount(source, target, kind, flags, data)
}

// keepDocument puts the boot document where it is in a container. The program itself stays the initramfs's file, below
// the new root: its pages are in memory once, it can be started by its process's link in /proc whatever becomes of
// /run, and an init that unmounts everything meets no mount of ours that is busy.
func keepDocument(document []byte) error {
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return err
	}
	if err := files.Write(boot.DocumentPath, document, files.Attr{Mode: 0o600}); err != nil {
		return fmt.Errorf("can't keep the boot document: %w", err)
	}
	return nil
}

// makeFile makes sure that there is something to mount a file on.
func makeFile(path string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return file.Close()
}

// bringModules mounts the modules of the running kernel where modprobe looks for them. serial is the disk's; nil: there
// is none, and the kernel has all it needs.
func bringModules(serial *string) error {
	if serial == nil {
		return nil
	}
	version, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err
	}
	name := filepath.Base(strings.TrimSuffix(string(version), "\n"))
	device, err := waitDisk(*serial)
	if err != nil {
		return err
	}
	disk := runDir + "/modules"
	if err := makeAndMount(device, disk, "ext4", syscall.MS_RDONLY|syscall.MS_NOSUID|syscall.MS_NODEV, ""); err != nil {
		return err
	}
	defer func() {
		note(syscall.Unmount(disk, syscall.MNT_DETACH)) // what is bound stays
		note(os.Remove(disk))
	}()
	if err := makeAndMount(filepath.Join(disk, name), filepath.Join(modulesDir, name), "", syscall.MS_BIND, ""); err != nil {
		return err
	}
	return keepModulesMounted("")
}

// keepModulesMounted tells systemd to leave them when it unmounts the rest in the end: process 1 and udev have them in
// use, so it would fail, and say so in each shutdown. Source: systemd.unit(5) on drop-ins for names up to a dash.
func keepModulesMounted(root string) error {
	for _, prefix := range []string{"lib-modules-", "usr-lib-modules-"} {
		dir := root + "/run/systemd/system/" + prefix + ".mount.d"
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		text := "# written by berth\n[Unit]\nDefaultDependencies=no\n"
		if err := files.Write(dir+"/50-berth.conf", []byte(text), files.Attr{Mode: 0o644}); err != nil {
			return err
		}
	}
	return nil
}

// catchUp sets a clock that lies behind the host's: a machine without a clock of its own begins in 1970.
func catchUp(unixNanos int64) {
	if now := time.Now().UnixNano(); now >= unixNanos {
		return
	}
	value := syscall.NsecToTimeval(unixNanos)
	note(os.NewSyscallError("settimeofday", syscall.Settimeofday(&value)))
}
