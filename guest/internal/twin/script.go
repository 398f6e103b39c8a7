package twin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"berth.dev/guest/internal/files"
)

const (
	// scriptFile, when an image brings it, makes the twin instead of Ensure: once per instance.
	scriptFile = "/etc/machine/create-user.sh"
	// scriptState holds "INSTANCE running", "INSTANCE done" or "INSTANCE failed".
	scriptState = "/var/lib/berth/create-user"

	scriptDeadline = 60 * time.Second
)

// ScriptPending: the image brings a create-user.sh that has not been started in this instance.
// There is nothing to create for the host's root.
func ScriptPending(root, instance string, u User) bool {
	started, _, _ := strings.Cut(readText(root+scriptState), " ")
	return u.UID != 0 && started != instance && executable(root+scriptFile)
}

// LeftToScript: Ensure must keep its hands off, because the image's script is to make the twin or has made it.
// After a script that failed, or that was cut short by the machine's end, the twin is ours to make.
func LeftToScript(root, instance string, u User) bool {
	if ScriptPending(root, instance, u) {
		return true
	}
	return u.UID != 0 && readText(root+scriptState) == instance+" done\n" && Known(root, u)
}

// RunScript runs the image's create-user.sh as root, under a deadline, with its output on console, and checks that
// the twin is there afterwards. machineID is the machine's name.
func RunScript(ctx context.Context, instance, machineID string, u User, env []string, console *os.File) error {
	return runScript(ctx, "", instance, machineID, u, env, console, scriptDeadline)
}

func runScript(ctx context.Context, root, instance, machineID string, u User, env []string, console *os.File, deadline time.Duration) error {
	if err := noteScript(root, instance, "running"); err != nil {
		return err // it could not be kept from running again at each boot
	}
	err := execScript(ctx, root, machineID, u, env, console, deadline)
	if err == nil && !Known(root, u) {
		err = fmt.Errorf("%s made no user %s with uid %d", scriptFile, u.Name, u.UID)
	}
	outcome := "done"
	if err != nil {
		outcome = "failed"
	}
	return errors.Join(err, noteScript(root, instance, outcome))
}

func execScript(ctx context.Context, root, machineID string, u User, env []string, console *os.File, deadline time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	command := exec.CommandContext(ctx, root+scriptFile)
	command.Dir = "/"
	command.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}, env...)
	command.Env = append(command.Env,
		"CONTAINER_USER="+u.Name,
		"CONTAINER_UID="+id(u.UID),
		"CONTAINER_GID="+id(u.GID),
		"CONTAINER_HOME="+u.Home,
		"CONTAINER_MACHINE_ID="+machineID,
	)
	if console != nil { // not a nil *os.File in an interface
		command.Stdout, command.Stderr = console, console
	}
	// A session of its own: the deadline ends all that it started, and no terminal can stop it.
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	command.Cancel = func() error { return syscall.Kill(-command.Process.Pid, syscall.SIGKILL) }
	command.WaitDelay = time.Second
	err := command.Run()
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("%s took longer than %s", scriptFile, deadline)
	case err != nil:
		return fmt.Errorf("%s: %w", scriptFile, err)
	}
	return nil
}

func noteScript(root, instance, state string) error {
	path := root + scriptState
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return files.Write(path, []byte(instance+" "+state+"\n"), files.Attr{Mode: 0o600})
}
