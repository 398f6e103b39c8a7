package pause

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain lets the test's own program be `agent pause`.
func TestMain(m *testing.M) {
	if os.Getenv("BERTH_TEST_PAUSE") != "" {
		os.Exit(Main())
	}
	os.Exit(m.Run())
}

func TestPause(t *testing.T) {
	kept, inherited, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), "BERTH_TEST_PAUSE=1")
	command.ExtraFiles = []*os.File{inherited}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	inherited.Close()
	// The end of file says that it has closed what it inherited, and is about to ignore signals.
	_ = kept.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := kept.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Error("it holds what it inherited: ", err)
	}
	for deadline := time.Now().Add(10 * time.Second); !ignores(command.Process.Pid, syscall.SIGHUP) && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	for _, signal := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM} {
		if err := command.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
	}
	_ = command.Wait()
	// Either it has seen SIGTERM as it should, or SIGTERM came before it listened; never one of the others.
	if status, ok := command.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signaled() && status.Signal() != syscall.SIGTERM {
		t.Error(command.ProcessState)
	}
}

func ignores(pid int, signal syscall.Signal) bool {
	data, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	_, rest, _ := strings.Cut(string(data), "SigIgn:\t")
	mask, _ := strconv.ParseUint(strings.SplitN(rest, "\n", 2)[0], 16, 64)
	return mask&(1<<(signal-1)) != 0
}
