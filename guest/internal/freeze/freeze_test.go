package freeze

import (
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// fake counts; freezing twice and thawing what is not frozen fail, as in the kernel.
type fake struct {
	sync.Mutex
	frozen bool
	thaws  int
}

func (f *fake) freeze() error {
	f.Lock()
	defer f.Unlock()
	if f.frozen {
		return syscall.EBUSY
	}
	f.frozen = true
	return nil
}

func (f *fake) thaw() error {
	f.Lock()
	defer f.Unlock()
	if !f.frozen {
		return syscall.EINVAL
	}
	f.frozen = false
	f.thaws++
	return nil
}

func (f *fake) isFrozen() bool {
	f.Lock()
	defer f.Unlock()
	return f.frozen
}

type held struct {
	root          *fake
	stdin, other  *os.File // our ends
	said          *os.File
	otherEnded    chan struct{}
	signals       chan os.Signal
	status        chan int
	theirOtherEnd *os.File
}

func pipe(t *testing.T) (read, write *os.File) {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { read.Close(); write.Close() })
	return read, write
}

func start(t *testing.T, root *fake) *held {
	t.Helper()
	theirStdin, stdin := pipe(t)
	said, theirStdout := pipe(t)
	other, theirOther := pipe(t)
	h := &held{root, stdin, other, said, make(chan struct{}), make(chan os.Signal, 1), make(chan int, 1), theirOther}
	go func() {
		h.status <- hold(root, theirOther, theirStdin, theirStdout, h.otherEnded, h.signals)
		theirOther.Close()
	}()
	return h
}

func (h *held) waitFrozen(t *testing.T) {
	t.Helper()
	text := make([]byte, len("frozen\n"))
	if _, err := io.ReadFull(h.said, text); err != nil || string(text) != "frozen\n" || !h.root.isFrozen() {
		t.Fatalf("%q %v, frozen: %v", text, err, h.root.isFrozen())
	}
}

// told is what the other process has been told.
func (h *held) told(t *testing.T) string {
	t.Helper()
	text, err := io.ReadAll(h.other)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestItIsFrozenUntilTheEndOfStdin(t *testing.T) {
	h := start(t, &fake{})
	h.waitFrozen(t)
	h.stdin.Close()
	if status := <-h.status; status != 0 || h.root.isFrozen() {
		t.Error(status, h.root.isFrozen())
	}
	if told := h.told(t); told != "fn" {
		t.Errorf("%q", told)
	}
}

func TestWhatEndsItEarlyIsNoSuccess(t *testing.T) {
	for name, end := range map[string]func(*held){
		"the other process was killed": func(h *held) { close(h.otherEnded) },
		"a signal":                     func(h *held) { h.signals <- syscall.SIGHUP },
		"somebody thawed":              func(h *held) { _ = h.root.thaw(); h.stdin.Close() },
	} {
		h := start(t, &fake{})
		h.waitFrozen(t)
		end(h)
		if status := <-h.status; status == 0 || h.root.isFrozen() {
			t.Error(name, status, h.root.isFrozen())
		}
	}
}

func TestWhatSomebodyElseHasFrozenStaysFrozen(t *testing.T) {
	h := start(t, &fake{frozen: true})
	if status := <-h.status; status == 0 || !h.root.isFrozen() {
		t.Error(status, h.root.isFrozen())
	}
	if told := h.told(t); !strings.HasSuffix(told, "n") {
		t.Errorf("the other process would thaw it: %q", told)
	}
}

func TestTheOtherProcessThawsWhatAKilledOneLeft(t *testing.T) {
	for told, frozen := range map[string]bool{"f": false, "fn": true, "": true} {
		root := &fake{frozen: true}
		read, write := pipe(t)
		if _, err := write.WriteString(told); err != nil {
			t.Fatal(err)
		}
		write.Close()
		watch(root, read)
		if root.frozen != frozen {
			t.Errorf("%q: frozen is %v", told, root.frozen)
		}
	}
}

// The real calls, on a file system that can't be frozen: the numbers are known to the kernel.
func TestProcCantBeFrozen(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	fd, err := syscall.Open("/proc", syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	root := rootFS{uintptr(fd)}
	if err := root.freeze(); !errors.Is(err, syscall.EOPNOTSUPP) {
		t.Error(err)
	}
	if err := root.thaw(); !errors.Is(err, syscall.EINVAL) {
		t.Error(err)
	}
}
