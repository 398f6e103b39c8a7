// Package vmboot is the agent as the initramfs's /init of a virtual machine: process 1 from the kernel's hand-over to
// the new root, where package boot makes the twin and becomes the image's init (docs/protocol.md, "How the agent is
// started"). It also owns `agent guard`, which keeps `agent serve` there, and a VM that is no machine's: the one that
// reads the changes of a disk. main calls both.
//
// What only costs comfort when it fails (a share, a module, the network) is said on the console and passed over; without
// the rest there is no machine, and it is turned off, because a process 1 that just ends is a kernel panic.
package vmboot

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"syscall"

	"berth.dev/guest/internal/boot"
	"berth.dev/guest/internal/halt"
	"berth.dev/guest/internal/memory"
)

// initPath is what the kernel runs of an initramfs, and gives it as argv[0].
const initPath = "/init"

// IsInit says whether this process is a VM's first.
func IsInit() bool { return os.Getpid() == 1 && os.Args[0] == initPath }

// Main is process 1 until it becomes the image's init. It never returns.
func Main() {
	defer turnOff()
	defer func() {
		if cause := recover(); cause != nil {
			say(fmt.Errorf("the boot failed by a bug in berth: %v", cause))
		}
	}()
	debug.SetGCPercent(-1) // over before there is garbage worth a collection
	syscall.Umask(0o022)
	if err := run(); err != nil {
		say(err)
	}
}

// run returns when there is no machine, or no more.
func run() error {
	if err := mountInitramfs(); err != nil {
		return err
	}
	order, err := readOrder(orderPath)
	if err != nil {
		return err
	}
	loadModules(order.early)
	late := make(chan struct{})
	go func() {
		defer close(late)
		loadModules(order.late)
	}()
	text, err := boot.Read(documentPath)
	if err != nil {
		return err
	}
	doc, err := boot.Parse(text)
	if err != nil {
		return err
	}
	if doc.VM == nil {
		return errors.New("the boot document is a container's")
	}
	if doc.VM.Changes != nil {
		return writeChanges(doc.VM)
	}
	if err := mountRoot(doc.VM); err != nil {
		return err
	}
	<-late // they are files of the initramfs, and needed from here on
	if err := switchRoot(); err != nil {
		return err
	}
	return settle(doc, text)
}

// settle does the rest in the new root, and gives the process to boot.
func settle(doc *boot.Document, text []byte) error {
	if err := mountSystem(doc); err != nil {
		return err
	}
	if err := keepDocument(text); err != nil {
		return err
	}
	catchUp(doc.VM.UnixNanos)
	if err := bringModules(doc.VM.Modules); err != nil {
		say(fmt.Errorf("the kernel's modules are not there: %w", err))
	}
	for _, mount := range doc.VM.Mounts {
		if err := mountShare(mount); err != nil {
			say(fmt.Errorf("the host's %s is not there: %w", mount.Target, err))
		}
	}
	if err := bringNetworkUp(doc.VM.Network); err != nil {
		say(fmt.Errorf("the network is not there: %w", err))
	}
	takeConsole()
	memory.BeSmall() // for an image without an init we stay
	boot.Become(doc) // it says itself what went wrong
	return nil
}

// takeConsole makes what is the console now our standard files, and those of the init: first a serial port, which the
// kernel has a driver for, then the virtual one, which comes some time after its module was loaded.
func takeConsole() {
	fd, err := syscall.Open("/dev/console", syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer syscall.Close(fd)
	for standard := range 3 {
		_ = syscall.Dup3(fd, standard, 0)
	}
}

// say writes one line on the console, whose log is what the host shows when a boot fails.
func say(err error) {
	takeConsole()
	_, _ = os.Stderr.WriteString("berth: " + strings.ReplaceAll(err.Error(), "\n", "; ") + "\n")
}

func turnOff() {
	if err := halt.PowerOff(); err != nil {
		say(err)
	}
	select {} // for ever: to end would be a panic of the kernel
}
