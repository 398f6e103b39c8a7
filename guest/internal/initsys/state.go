package initsys

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"berth.dev/guest/internal/files"
)

// The states of docs/protocol.md.
const (
	Starting = "starting"
	Running  = "running"
	Degraded = "degraded"
	Stopping = "stopping"
	Unknown  = "unknown"
)

// Look gives the state as files of the running guest tell it, now. Not for systemd, which says it by itself (Tracker).
//
// A single look can fall into the gap between two steps of the start, when one program has ended and the next one is
// not there yet: believe only two in a row that say the same (Tracker does).
func (i *Init) Look() string {
	switch {
	case i.System == None:
		return Running
	case i.System == Other:
		return Unknown
	case i.BeforeExec():
		return Starting
	case i.System == OpenRC && exists(i.root+"/run/openrc"):
		return i.lookOpenRC()
	case i.Program == SysVInit:
		return i.lookSysVInit()
	}
	return i.lookActions()
}

// BeforeExec: process 1 is still `agent boot`.
func (i *Init) BeforeExec() bool {
	own, errOwn := os.Stat(i.root + "/proc/self/exe")
	first, errFirst := os.Stat(i.root + "/proc/1/exe")
	return errOwn == nil && errFirst == nil && os.SameFile(own, first)
}

// lookOpenRC reads what rc keeps in /run/openrc: softlevel is the run level it goes to or has reached, rc.starting
// and rc.stopping exist on the way, failed names the services that did not start. Source: openrc, src/openrc/rc.c.
func (i *Init) lookOpenRC() string {
	dir := i.root + "/run/openrc/"
	data, _ := files.Read(dir + "softlevel")
	switch level := strings.TrimSpace(string(data)); {
	case level == "shutdown" || level == "reboot" || level == "off" || exists(dir+"rc.stopping") && level != "":
		return Stopping
	case level == "" || level == "sysinit" || level == "boot" || level == "recovery" || exists(dir+"rc.starting"):
		return Starting
	}
	if entries, err := os.ReadDir(dir + "failed"); err == nil && len(entries) > 0 {
		return Degraded
	}
	return Running
}

// lookSysVInit: the run level is reached when init has written it to utmp and no `rc` that starts its services runs
// any more. Without a utmp (nothing creates it in some images) only the second is known.
func (i *Init) lookSysVInit() string {
	switch i.runLevel() {
	case '0', '6':
		return Stopping
	case 'S', 's':
		return Starting
	}
	return i.lookActions()
}

// Source: utmp(5), bits/utmp.h: type at offset 0, pid at 4, RUN_LVL is 1. Where a long has 64 bits and time does not
// follow it to 32 (arm64) a record is longer.
func (i *Init) runLevel() byte {
	size := 384
	if runtime.GOARCH == "arm64" {
		size = 400
	}
	for _, path := range []string{"/run/utmp", "/var/run/utmp"} {
		data, err := files.Read(i.root + path)
		if err != nil {
			continue
		}
		var level byte
		for ; len(data) >= size; data = data[size:] {
			if binary.LittleEndian.Uint16(data) == 1 {
				level = data[4] // pid = level + 256 × the one before
			}
		}
		if level != 0 {
			return level
		}
	}
	return 0
}

// lookActions: an init with an inittab runs what it must wait for as its direct children, one at a time, and goes on
// to its getty entries when the last has ended. So it is starting while one of these is a child of process 1. A child
// that is still a copy of process 1 (between fork and exec) may become one, and counts.
func (i *Init) lookActions() string {
	first := i.commandLine(1)
	if len(first) == 0 {
		return Unknown
	}
	for _, pid := range i.children() {
		line := i.commandLine(pid)
		if len(line) > 0 && line[0] == first[0] {
			return Starting
		}
		for _, action := range i.actions {
			if mentions(line, action) {
				return Starting
			}
		}
	}
	return Running
}

// mentions finds `/etc/init.d/rcS`, `/bin/sh /etc/init.d/rcS` and `sh -c "exec /etc/init.d/rcS"`.
func mentions(line []string, action string) bool {
	for n, arg := range line {
		if arg == action || n > 0 && line[n-1] == "-c" && strings.Contains(arg, action) {
			return true
		}
	}
	return false
}

func (i *Init) commandLine(pid int) []string {
	data, err := os.ReadFile(i.root + "/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil || len(data) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00")
}

// children of process 1. Source: proc_pid_task_tid_children(5); it needs CONFIG_PROC_CHILDREN, so with a way round.
func (i *Init) children() (pids []int) {
	if data, err := os.ReadFile(i.root + "/proc/1/task/1/children"); err == nil {
		for field := range strings.FieldsSeq(string(data)) {
			if pid, err := strconv.Atoi(field); err == nil {
				pids = append(pids, pid)
			}
		}
		return pids
	}
	stats, _ := filepath.Glob(i.root + "/proc/[0-9]*/stat")
	for _, path := range stats {
		data, _ := os.ReadFile(path)
		// The name in parentheses may hold anything; behind it: state, parent.
		fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
		if len(fields) > 1 && fields[1] == "1" {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}
