package guestos

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"berth.dev/guest/internal/boot"
	"berth.dev/guest/internal/initsys"
)

// TestMain lets the test's own program be a guest with mounts of its own.
func TestMain(m *testing.M) {
	if os.Getenv("BERTH_TEST_CONSOLE") != "" {
		if err := consoles(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestGuestWithoutInitAndTwin(t *testing.T) {
	guest := New(&boot.Document{})
	guest.WaitReady()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if guest.System() != initsys.None || guest.WaitInit(ctx) != initsys.Running || guest.TwinState() != twinReady {
		t.Errorf("%s, %s, %s", guest.System(), guest.InitState(), guest.TwinState())
	}
	if err := guest.ForwardSSHAgent(nil); err != nil {
		t.Error("nobody asked for it: ", err)
	}
	if ports := <-guest.Listeners(ctx); ports == nil {
		t.Error("no list")
	}
}

func TestNewConsole(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
	if _, err := os.Lstat(consolePath); err != nil {
		t.Skip("the host has no console, and this must not make one: ", err)
	}
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), "BERTH_TEST_CONSOLE=1")
	command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if output, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%s: %s", err, output)
	}
}

// consoles asks for two consoles one after the other; each must be /dev/console then.
func consoles() error {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	guest := New(&boot.Document{})
	for _, text := range []string{"first\n", "second\n"} {
		master, err := guest.NewConsole()
		if err != nil {
			return err
		}
		console, err := os.OpenFile(consolePath, os.O_WRONLY|syscall.O_NOCTTY, 0)
		if err != nil {
			return err
		}
		if _, err := console.WriteString(text); err != nil {
			return err
		}
		line, err := bufio.NewReader(master).ReadString('\n')
		if err != nil || strings.TrimRight(line, "\r\n")+"\n" != text {
			return fmt.Errorf("%q: %w", line, err)
		}
		console.Close()
		master.Close() // as when its keeper is killed
	}
	return nil
}
