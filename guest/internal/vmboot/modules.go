package vmboot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"unsafe"
)

// orderPath lists the modules to load, in order (docs/protocol.md).
const orderPath = "/modules.order"

// order is what to load: early before the root can be mounted, late at the same time.
type order struct{ early, late []string }

// readOrder reads the list. There is none for a kernel that has everything built in.
func readOrder(path string) (order, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return order{}, nil
	}
	if err != nil {
		return order{}, fmt.Errorf("can't read the list of modules: %w", err)
	}
	return parseOrder(string(text)), nil
}

func parseOrder(text string) (o order) {
	group := &o.early
	for line := range strings.Lines(text) {
		switch line = strings.TrimSpace(line); line {
		case "":
		case "--":
			group = &o.late
		default:
			*group = append(*group, filepath.Join("/", line))
		}
	}
	return o
}

func loadModules(paths []string) {
	for _, path := range paths {
		if err := loadModule(path); err != nil {
			say(fmt.Errorf("can't load the kernel module %s: %w", filepath.Base(path), err))
		}
	}
}

// loadModule gives the kernel a module. It is no error that it is there already.
func loadModule(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	var none byte // the module's parameters: an empty string
	_, _, errno := syscall.Syscall(sysFinitModule, file.Fd(), uintptr(unsafe.Pointer(&none)), 0)
	if errno != 0 && errno != syscall.EEXIST {
		return errno
	}
	return nil
}
