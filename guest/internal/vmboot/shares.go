package vmboot

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"berth.dev/guest/internal/boot"
)

// sharesDir is where shares are mounted of which the machine sees one file only. Only root gets there.
const sharesDir = runDir + "/shares"

// mountShare mounts a folder of the host's, or one file of it, on its target. The directories that lead there are made.
func mountShare(m boot.Mount) error {
	kind, data, flags := shareOptions(m)
	target := filepath.Clean(m.Target)
	if m.File == nil {
		return makeAndMount(m.Tag, target, kind, flags, data)
	}
	if err := os.MkdirAll(sharesDir, 0o700); err != nil {
		return err
	}
	folder := filepath.Join(sharesDir, m.Tag)
	if err := makeAndMount(m.Tag, folder, kind, flags, data); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	if err := makeFile(target); err != nil {
		return err
	}
	return bindFile(filepath.Join(folder, *m.File), target)
}

// bindFile binds a file of a share, and nothing that a symbolic link there leads to.
func bindFile(path, target string) error {
	fd, err := syscall.Open(path, oPath|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer syscall.Close(fd)
	var stat syscall.Stat_t
	if err := syscall.Fstat(fd, &stat); err != nil || stat.Mode&syscall.S_IFMT == syscall.S_IFLNK {
		return fmt.Errorf("%s is a symbolic link", path)
	}
	return mount(bindFD(uintptr(fd)), target, "", syscall.MS_BIND, "")
}

const oPath = 0x200000 // Source: asm-generic/fcntl.h

// shareOptions are those of mount(2). A host's folder gives nobody rights in the machine, as in a container.
func shareOptions(m boot.Mount) (kind, data string, flags uintptr) {
	flags = syscall.MS_NOSUID | syscall.MS_NODEV
	if m.ReadOnly {
		flags |= syscall.MS_RDONLY
	}
	if m.Type == boot.NineP {
		// mmap: programs map files to write into them, which needs the page cache. Source: Documentation/filesystems/9p.rst.
		return boot.NineP, "trans=virtio,version=9p2000.L,msize=262144,cache=mmap", flags
	}
	return boot.VirtioFS, "", flags
}
