package exec

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func itoa(number int) string { return strconv.Itoa(number) }

func atoi(text string) int {
	number, _ := strconv.Atoi(strings.TrimSpace(text))
	return number
}

// exterminate kills the orphans of this test: processes of nobody's with exactly this argv.
func exterminate(t testing.TB, argv ...string) int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	killed := 0
	for _, entry := range entries {
		text, err := os.ReadFile("/proc/" + entry.Name() + "/cmdline")
		info, statErr := os.Stat("/proc/" + entry.Name())
		if err != nil || statErr != nil || string(text) != strings.Join(argv, "\x00")+"\x00" {
			continue
		}
		if info.Sys().(*syscall.Stat_t).Uid == 65534 {
			_ = syscall.Kill(atoi(entry.Name()), syscall.SIGKILL)
			killed++
		}
	}
	return killed
}

// closeInherited keeps what `go test` itself was started with from the commands; `agent serve` does so when it starts.
func closeInherited(t testing.TB) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if fd := atoi(entry.Name()); fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
}
