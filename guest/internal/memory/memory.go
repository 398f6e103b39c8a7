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
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return
	}
	for line := range strings.Lines(string(maps)) {
		fields := strings.Fields(line)
		// Only what is read from a file and never written: dropping anything else would lose it.
		if len(fields) != 6 || fields[1] != "r-xp" && fields[1] != "r--p" || !strings.HasPrefix(fields[5], "/") {
			continue
		}
		first, last, _ := strings.Cut(fields[0], "-")
		begin, errBegin := strconv.ParseUint(first, 16, 64)
		end, errEnd := strconv.ParseUint(last, 16, 64)
		if errBegin == nil && errEnd == nil && begin < end {
			_, _, _ = syscall.Syscall(syscall.SYS_MADVISE, uintptr(begin), uintptr(end-begin), syscall.MADV_DONTNEED)
		}
	}
}
