// Package memory keeps the processes small that stay on the host: the keeper and the pause process.
package memory

import (
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
)

// BeSmall trades speed that nobody needs here for memory: the collector starts at 4 MiB × this percentage, and each
// thread of the runtime has its own caches.
func BeSmall() {
	debug.SetGCPercent(15)
	runtime.GOMAXPROCS(min(2, runtime.NumCPU()))
}

// GiveBack returns what the start or a burst of work has left: garbage, and the pages of this program that were
// mapped for it and will not be needed soon (they stay in the page cache, shared by all that run it).
func GiveBack() {
	runtime.GC() // twice in all: a pool keeps its buffers for one round
	debug.FreeOSMemory()
	for _, mapping := range droppable("/proc/self/smaps") {
		_, _, _ = syscall.Syscall(syscall.SYS_MADVISE, mapping.begin, mapping.end-mapping.begin, syscall.MADV_DONTNEED)
	}
}

type mapping struct{ begin, end uintptr }

// droppable gives the mappings of files that can be read again: read-only now, and with no page of our own in them. A
// program that was relocated at its start (PIE, cgo) has such pages, and would lose them. Source: proc_pid_smaps(5).
func droppable(path string) (list []mapping) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	var current mapping
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		switch {
		case len(fields) >= 5 && strings.Contains(fields[0], "-"):
			current = mapping{}
			if len(fields) == 6 && (fields[1] == "r-xp" || fields[1] == "r--p") && strings.HasPrefix(fields[5], "/") {
				current = parse(fields[0])
			}
		case len(fields) == 3 && fields[0] == "Anonymous:" && fields[1] == "0" && current.begin < current.end:
			list = append(list, current)
		}
	}
	return list
}

func parse(addresses string) mapping {
	first, last, _ := strings.Cut(addresses, "-")
	begin, errBegin := strconv.ParseUint(first, 16, 64)
	end, errEnd := strconv.ParseUint(last, 16, 64)
	if errBegin != nil || errEnd != nil {
		return mapping{}
	}
	return mapping{uintptr(begin), uintptr(end)}
}
