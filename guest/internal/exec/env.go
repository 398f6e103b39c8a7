package exec

import (
	"strconv"
	"strings"

	"berth.dev/guest/internal/files"
	"berth.dev/guest/internal/passwd"
	"berth.dev/guest/internal/wire"
)

// SSHAgentSocket is where the guest finds the host's SSH agent, when it is forwarded.
const SSHAgentSocket = "/run/berth-ssh-agent.sock"

const (
	rootPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// The twin may use sudo: what lies in sbin is for them too, after their own.
	userPath = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games:/usr/local/sbin:/usr/sbin:/sbin"

	maxEnvironmentFile = 256 << 10 // bytes
)

// environment is a list of K=V in which a later one replaces an earlier.
type environment struct {
	list []string
	at   map[string]int
}

func (e *environment) set(key, value string) {
	if at, known := e.at[key]; known {
		e.list[at] = key + "=" + value
		return
	}
	e.at[key] = len(e.list)
	e.list = append(e.list, key+"="+value)
}

func (e *environment) has(key string) bool {
	_, known := e.at[key]
	return known
}

func (e *environment) get(key string) string {
	if at, known := e.at[key]; known {
		return e.list[at][len(key)+1:]
	}
	return ""
}

// makeEnvironment: who the user is, what the session has, /etc/environment, the boot document, the request.
func makeEnvironment(user passwd.User, boot []string, request *wire.Exec, tty bool) *environment {
	e := &environment{at: map[string]int{}}
	e.set("HOME", user.Home)
	e.set("SHELL", user.Shell)
	if user.Name != "" {
		e.set("USER", user.Name)
		e.set("LOGNAME", user.Name)
	}
	e.set("PATH", userPath)
	if user.UID == 0 {
		e.set("PATH", rootPath)
	}
	if tty {
		e.set("TERM", "xterm")
	}
	setSession(e, user.UID)
	for key, value := range parseEnvironmentFile(readEnvironmentFile("/etc/environment")) {
		e.set(key, value)
	}
	for _, variable := range boot {
		if key, value, ok := strings.Cut(variable, "="); ok && key != "" {
			e.set(key, value)
		}
	}
	for _, variable := range request.Env {
		key, value, _ := strings.Cut(string(variable), "=")
		e.set(key, value)
	}
	return e
}

func setSession(e *environment, uid uint32) {
	runtimeDir := "/run/user/" + strconv.FormatUint(uint64(uid), 10)
	if exists(runtimeDir) {
		e.set("XDG_RUNTIME_DIR", runtimeDir)
		if bus := runtimeDir + "/bus"; exists(bus) {
			e.set("DBUS_SESSION_BUS_ADDRESS", "unix:path="+bus)
		}
	}
	if exists(SSHAgentSocket) {
		e.set("SSH_AUTH_SOCK", SSHAgentSocket)
	}
}

func readEnvironmentFile(path string) string {
	text, err := files.Read(path)
	if err != nil {
		return ""
	}
	return string(text[:min(len(text), maxEnvironmentFile)])
}

// parseEnvironmentFile reads lines as pam_env does: K=V, perhaps exported, perhaps quoted; # begins a comment line.
func parseEnvironmentFile(text string) func(yield func(key, value string) bool) {
	return func(yield func(key, value string) bool) {
		for line := range strings.Lines(text) {
			line = strings.TrimPrefix(strings.TrimSpace(line), "export ")
			key, value, ok := strings.Cut(line, "=")
			if !ok || key == "" || strings.ContainsAny(key, "# \t\x00") || strings.Contains(value, "\x00") {
				continue
			}
			if !yield(key, unquote(value)) {
				return
			}
		}
	}
}

func unquote(value string) string {
	if count := len(value); count >= 2 && (value[0] == '"' || value[0] == '\'') && value[count-1] == value[0] {
		return value[1 : count-1]
	}
	return value
}
