// Package exec runs commands for the `exec` requests of docs/protocol.md.
//
// It owns the whole life of a command: who it runs as, its environment, its terminal or pipes, its bytes, its signals
// and its end. serve calls Run once per request; exec calls files, passwd and wire.
//
// Children are waited for one by one, by their own id. The agent is no subreaper: what a command leaves behind becomes a
// child of the guest's init, whose business it is to reap it, as with any daemon.
package exec

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"

	"berth.dev/guest/internal/passwd"
	"berth.dev/guest/internal/wire"
)

// Config is what the machine says about every command.
type Config struct {
	User string        // who a command runs as that names nobody: the twin
	Env  []string      // the boot document's
	Twin func() string // why the twin may be missing, for the message; nil: nothing is known
}

// command is a request, resolved: nothing is started yet.
type command struct {
	user        passwd.User
	program     string   // to be looked up in the PATH, unless it has a slash
	argv        []string // argv[0] included
	env         *environment
	cwd         string // empty: the home
	cwdOptional bool
	tty         *wire.Size
	detach      bool
}

// plan resolves a request. The error is a *wire.Error for the client.
func plan(request *wire.Exec, config Config) (*command, error) {
	if err := checkBytes(request); err != nil {
		return nil, err
	}
	who := config.User
	if request.User != nil {
		who = *request.User
	}
	user, err := passwd.Load("").Find(who)
	if err != nil {
		text := err.Error()
		if request.User == nil && config.Twin != nil {
			text += " (making it: " + config.Twin() + ")"
		}
		return nil, wire.Refusal(wire.CodeInvalidArgument, text)
	}
	c := &command{user: user, cwdOptional: request.CwdOptional, tty: request.Tty, detach: request.Detach}
	if c.detach {
		c.tty = nil
	}
	if request.Cwd != nil {
		if c.cwd = string(*request.Cwd); !strings.HasPrefix(c.cwd, "/") && !c.cwdOptional {
			return nil, wire.Refusal(wire.CodeInvalidArgument, "the working directory '"+c.cwd+"' is not absolute")
		}
	}
	c.program, c.argv = arguments(request, user.Shell)
	c.env = makeEnvironment(user, config.Env, request, c.tty != nil)
	return c, nil
}

func checkBytes(request *wire.Exec) error {
	refuse := func(text string) error { return wire.Refusal(wire.CodeInvalidArgument, text) }
	for _, argument := range request.Argv {
		if bytes.IndexByte(argument, 0) >= 0 {
			return refuse("an argument has a NUL byte in it")
		}
	}
	for _, variable := range request.Env {
		if bytes.IndexByte(variable, 0) >= 0 || bytes.IndexByte(variable, '=') < 1 {
			return refuse("a variable of the environment is not K=V")
		}
	}
	if request.Cwd != nil && bytes.IndexByte(*request.Cwd, 0) >= 0 {
		return refuse("the working directory has a NUL byte in it")
	}
	return nil
}

// arguments says what to execute: the argv itself, a login shell, or the login shell with a line to evaluate.
func arguments(request *wire.Exec, shell string) (string, []string) {
	switch {
	case len(request.Argv) == 0:
		// Source: login(1): a minus in front of its name tells a shell that it is a login shell.
		return shell, []string{"-" + filepath.Base(shell)}
	case request.Shell:
		line := string(bytes.Join(request.Argv, []byte{' '}))
		if strings.HasSuffix(shell, "csh") { // csh and tcsh take -l only alone
			return shell, []string{"-" + filepath.Base(shell), "-c", line}
		}
		return shell, []string{shell, "-lc", line}
	}
	argv := make([]string, len(request.Argv))
	for i, argument := range request.Argv {
		argv[i] = string(argument)
	}
	return argv[0], argv
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
