package upkeep

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

const (
	// trimGain is how much must have become free since the disk was fullest for a trim to be worth it. A trim looks at
	// the whole disk and costs some tenths of a second.
	trimGain = 256 << 20
	// trimLeast is the smallest hole that is given back: the unit in which the host's disk image is kept.
	trimLeast = 64 << 10
	// growLeast keeps the rounding of sizes from being taken for new room.
	growLeast = 32 << 20

	// Source: linux/fs.h, ext4.h.
	ioctlTrim   = 0xc0185879 // FITRIM: _IOWR('X', 121, struct fstrim_range)
	ioctlResize = 0x40086610 // EXT4_IOC_RESIZE_FS: _IOW('f', 16, __u64)
)

// trimming knows how little was free since the last trim.
type trimming struct{ free uint64 }

// due takes a sample of the free bytes and says whether a trim is worth it.
func (t *trimming) due(free uint64) bool {
	t.free = min(t.free, free)
	return free-t.free >= trimGain
}

func (t *trimming) done(free uint64) { t.free = free }

// trim tells the host which parts of the disk hold nothing. Source: ioctl_fitrim, linux/fs.h, struct fstrim_range.
func trim() error {
	span := struct{ start, length, least uint64 }{0, math.MaxUint64, trimLeast}
	return onRoot(ioctlTrim, unsafe.Pointer(&span))
}

// grow makes the root file system as large as its disk, where the host has made that larger.
func grow() error {
	device, size, err := rootDevice()
	if err != nil {
		return fmt.Errorf("can't see how large the root disk is: %w", err)
	}
	file, err := os.Open(device)
	if err != nil {
		return err
	}
	defer file.Close()
	var super [superSize]byte
	if _, err := file.ReadAt(super[:], superOffset); err != nil {
		return err
	}
	blocks := growTo(super[:], size)
	if blocks == 0 {
		return nil
	}
	if err := onRoot(ioctlResize, unsafe.Pointer(&blocks)); err != nil {
		return fmt.Errorf("the root file system did not grow to the size of its disk: %w", err)
	}
	return nil
}

const (
	superOffset = 1024
	superSize   = 1024
	superMagic  = 0xef53
	maxLogBlock = 6 // 64 KiB
)

// growTo says how many blocks the file system with a superblock should have on a device of size bytes; 0: it is well
// as it is, or no ext4. Source: Documentation/filesystems/ext4/super.rst.
func growTo(super []byte, size uint64) uint64 {
	log := binary.LittleEndian.Uint32(super[0x18:])
	if binary.LittleEndian.Uint16(super[0x38:]) != superMagic || log > maxLogBlock {
		return 0
	}
	blockSize := uint64(1024) << log
	have := uint64(binary.LittleEndian.Uint32(super[0x150:]))<<32 | uint64(binary.LittleEndian.Uint32(super[4:]))
	want := size / blockSize
	if want <= have || (want-have)*blockSize < growLeast {
		return 0
	}
	return want
}

// rootDevice finds the disk of the root file system and its size in bytes.
func rootDevice() (path string, size uint64, err error) {
	var stat syscall.Stat_t
	if err := syscall.Stat(root, &stat); err != nil {
		return "", 0, err
	}
	dir := "/sys/dev/block/" + deviceNumbers(stat.Dev)
	uevent, err := os.ReadFile(dir + "/uevent")
	if err != nil {
		return "", 0, err
	}
	name := ""
	for line := range strings.Lines(string(uevent)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			name = value
		}
	}
	text, err := os.ReadFile(dir + "/size")
	if err != nil {
		return "", 0, err
	}
	sectors, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 54)
	if err == nil && name == "" {
		err = errors.New("the root's device has no name")
	}
	return "/dev/" + name, sectors * 512, err
}

// deviceNumbers writes a dev_t as sysfs does. Source: makedev(3).
func deviceNumbers(dev uint64) string {
	major := dev>>8&0xfff | dev>>32&^0xfff
	minor := dev&0xff | dev>>12&0xffffff00
	return strconv.FormatUint(major, 10) + ":" + strconv.FormatUint(minor, 10)
}

func onRoot(command uintptr, argument unsafe.Pointer) error {
	dir, err := os.Open(root)
	if err != nil {
		return err
	}
	defer dir.Close()
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, dir.Fd(), command, uintptr(argument)); errno != 0 {
		return errno
	}
	return nil
}
