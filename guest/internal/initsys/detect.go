// Package initsys knows the init systems: which one a guest has, whether it has settled, how to ask it to power off.
// boot asks it for the environment to start with; guestos asks it for everything else.
package initsys

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"berth.dev/guest/internal/files"
)

// The kinds of init, as `status` names them.
const (
	Systemd  = "systemd"
	OpenRC   = "openrc"
	SysVInit = "sysvinit"
	Busybox  = "busybox"
	None     = "none"
	Other    = "other"

	openrcInit = "openrc-init" // only as a program
)

// Init is a guest's init. Program is what process 1 runs, System who manages the services: Alpine's are busybox and
// openrc, Debian's with OpenRC sysvinit and openrc.
type Init struct {
	System  string
	Program string
	// VM: the init's power off must be the kernel's.
	VM bool

	root    string   // "" in a guest; a directory in tests
	actions []string // the first words of what process 1 runs and waits for, by /etc/inittab
	last    []string // likewise, when it goes down
}

// Detect looks at the program argv[0] of the guest below root, its links and what lies beside it. It starts nothing
// and is right before the init runs as well as after.
func Detect(root string, argv []string) *Init {
	init := &Init{root: root}
	if len(argv) == 0 {
		init.System, init.Program = None, None
		return init
	}
	init.Program = detectProgram(root, argv)
	init.System = init.Program
	switch init.Program {
	case openrcInit:
		init.System = OpenRC
	case Busybox, SysVInit:
		if exists(root+"/sbin/openrc") || exists(root+"/usr/bin/openrc") {
			init.System = OpenRC
		}
		init.actions, init.last = readInittab(root + "/etc/inittab")
	}
	return init
}

func detectProgram(root string, argv []string) string {
	path := argv[0]
	if !filepath.IsAbs(path) {
		path = "/sbin/" + path
	}
	real, err := filepath.EvalSymlinks(root + path)
	if err != nil {
		return Other
	}
	switch base := filepath.Base(real); {
	case base == "systemd":
		return Systemd
	case base == openrcInit:
		return openrcInit
	case strings.HasPrefix(base, "busybox"):
		if applet := appletOf(argv); applet == "init" || applet == "linuxrc" {
			return Busybox
		}
	case base == "init" && !isScript(real) && (exists(root+"/etc/inittab") || exists(root+"/sbin/telinit")):
		return SysVInit
	}
	return Other
}

// appletOf says what busybox takes itself for: `/sbin/init`, `busybox init`, `/bin/sh`.
func appletOf(argv []string) string {
	name := filepath.Base(argv[0])
	if strings.HasPrefix(name, "busybox") && len(argv) > 1 {
		return argv[1]
	}
	return name
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func isScript(path string) bool {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // not to wait for a FIFO
	if err != nil {
		return false
	}
	defer file.Close()
	var magic [2]byte
	n, _ := file.Read(magic[:])
	return bytes.Equal(magic[:n], []byte("#!"))
}

// readInittab gives the programs that the init waits for one after another before it is done with starting, and those
// that it runs in the end (busybox).
// Source: inittab(5) of sysvinit and the comment at the top of busybox's examples/inittab: id:runlevels:action:process.
func readInittab(path string) (first, last []string) {
	data, err := files.Read(path)
	if err != nil {
		return []string{"/etc/init.d/rcS"}, []string{"/bin/umount"} // what busybox does without an inittab
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 4)
		if len(fields) != 4 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		program := firstProgram(strings.TrimLeft(fields[3], "-+"))
		switch fields[2] {
		case "sysinit", "wait", "bootwait":
			if program != "" {
				first = append(first, program)
			}
		case "shutdown":
			last = append(last, program)
		}
	}
	return first, last
}

// leavesDisks says whether this init turns the power off without having unmounted anything: one that we don't know,
// and busybox's where nothing that it is to run in the end is there. (Alpine's inittab names an openrc that many of
// its images lack.)
func (i *Init) leavesDisks() bool {
	if i.Program != Busybox {
		return i.Program == Other
	}
	return !slices.ContainsFunc(i.last, func(program string) bool {
		return filepath.IsAbs(program) && exists(i.root+program)
	})
}

// firstProgram names what a line runs; of `/bin/sh -c "mkdir /x"` it is mkdir, since a shell says nothing.
func firstProgram(process string) string {
	for word := range strings.FieldsSeq(process) {
		switch word = strings.Trim(word, `"'`); {
		case word == "exec" || strings.HasPrefix(word, "-"):
		case word == "sh" || strings.HasSuffix(word, "sh") && strings.HasPrefix(word, "/bin/"):
		default:
			return word
		}
	}
	return ""
}

// ContainerEnv is the value of `container` that makes this init behave in a container. OpenRC takes `oci` for a
// reason to mount the host's cgroups; systemd needs one that it does not special-case.
func (i *Init) ContainerEnv() string {
	if i.Program == Systemd {
		return "oci"
	}
	return "docker"
}
