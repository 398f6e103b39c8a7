package boot

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"berth.dev/guest/internal/initsys"
)

const full = `{"schema": 1, "instance": "0123", "hostname": "dev", "hosts": "127.0.0.1 localhost\n", "resolv": "nameserver 10.0.0.1\n",
 "twin": {"name": "bob", "uid": 2000, "gid": 2000, "group": "bob", "home": "/home/bob", "shell": "/bin/sh", "homeIsOwn": true},
 "sshAgent": true, "env": ["A=b=c"], "init": ["/sbin/init", "--x"], "fromTheFuture": {"a": [1]}}`

func TestParse(t *testing.T) {
	doc, err := Parse([]byte(full))
	if err != nil {
		t.Fatal(err)
	}
	if doc.Instance != "0123" || doc.Twin.Name != "bob" || !doc.Twin.HomeIsOwn || !doc.SSHAgent || doc.Env[0] != "A=b=c" || len(doc.Init) != 2 {
		t.Errorf("%+v", doc)
	}
	doc, err = Parse([]byte(`{"schema": 1, "instance": "i", "twin": null}`))
	if err != nil || doc.Twin != nil || len(doc.Init) != 0 {
		t.Errorf("%+v %v", doc, err)
	}
}

func TestParseRefuses(t *testing.T) {
	for text, want := range map[string]string{
		``:                                "damaged",
		`{"schema": 1,`:                   "damaged",
		`[]`:                              "damaged",
		`{"schema": "1"}`:                 "damaged",
		`{}`:                              "schema 0",
		`{"schema": 2, "instance": 7.5}`:  "damaged",
		`{"schema": 2, "instance": "i"}`:  "schema 2",
		`{"schema": 1}`:                   "instance",
		`{"schema": 1, "instance": "a/"}`: "instance",
		`{"schema": 1, "instance": "i", "hostname": "a b"}`:                                    "hostname",
		`{"schema": 1, "instance": "i", "env": ["=x"]}`:                                        "K=V",
		`{"schema": 1, "instance": "i", "env": ["x"]}`:                                         "K=V",
		`{"schema": 1, "instance": "i", "init": [""]}`:                                         "program",
		`{"schema": 1, "instance": "i", "twin": {"name": "a:b", "home": "/h"}}`:                "colon",
		`{"schema": 1, "instance": "i", "twin": {"name": "a", "home": "/h", "uid": -1}}`:       "damaged",
		`{"schema": 1, "instance": "i", "twin": {"name": "a", "home": "h", "uid": 1}}`:         "home",
		`{"schema": 1, "instance": "i", "twin": {"name": "a", "home": "/h", "shell": "bash"}}`: "shell",
	} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(dir + "/none"); err == nil || !strings.Contains(err.Error(), "no boot document") {
		t.Error(err)
	}
	if err := os.WriteFile(dir+"/big", make([]byte, maxDocument+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(dir + "/big"); err == nil || !strings.Contains(err.Error(), "longer") {
		t.Error(err)
	}
}

// guest is a root file system with /etc, and a document for it.
func guest(t *testing.T) (string, *Document) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes files of root")
	}
	root := t.TempDir()
	for _, dir := range []string{"/etc", "/run"} {
		if err := os.Mkdir(root+dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	doc, err := Parse([]byte(full))
	if err != nil {
		t.Fatal(err)
	}
	return root, doc
}

func prepare(t *testing.T, root string, doc *Document) {
	t.Helper()
	if problems := Prepare(root, doc); len(problems) > 0 {
		t.Fatal(problems)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestFirstBoot(t *testing.T) {
	root, doc := guest(t)
	put(t, root+"/etc/hosts", "the image's\n")
	put(t, root+"/etc/machine-id", "11111111111111111111111111111111\n")
	put(t, root+"/var/lib/dbus/machine-id", "11111111111111111111111111111111\n")
	if err := os.Symlink("../run/systemd/resolve/stub-resolv.conf", root+"/etc/resolv.conf"); err != nil {
		t.Fatal(err)
	}
	prepare(t, root, doc)
	if got := read(t, root+"/etc/hosts"); got != ownershipMark+"\n127.0.0.1 localhost\n" {
		t.Error(got)
	}
	if got := read(t, root+"/etc/resolv.conf"); got != ownershipMark+"\nnameserver 10.0.0.1\n" {
		t.Error(got)
	}
	if got := read(t, root+"/etc/hostname"); got != "dev\n" {
		t.Error(got)
	}
	machineID := read(t, root+"/etc/machine-id")
	if len(machineID) != 33 || strings.Trim(machineID, "0123456789abcdef") != "\n" || machineID[0:4] == "1111" {
		t.Error(machineID)
	}
	if read(t, root+"/var/lib/dbus/machine-id") != machineID {
		t.Error("dbus has another machine id")
	}
	info, err := os.Stat(root + "/var/lib/berth")
	if err != nil || info.Mode().Perm() != 0o700 || read(t, root+instancePath) != "0123\n" {
		t.Error(info, err)
	}
	if !strings.Contains(read(t, root+"/etc/passwd"), "\nbob:x:2000:") {
		t.Error("no twin")
	}
	// A clone is a first boot again, with an id of its own.
	doc.Instance = "4567"
	prepare(t, root, doc)
	if read(t, root+"/etc/machine-id") == machineID {
		t.Error("a clone has its original's machine id")
	}
}

func TestDbusLinkStaysALink(t *testing.T) {
	root, doc := guest(t)
	put(t, root+"/etc/machine-id", "")
	put(t, root+"/var/lib/dbus/x", "")
	if err := os.Symlink("/etc/machine-id", root+"/var/lib/dbus/machine-id"); err != nil {
		t.Fatal(err)
	}
	prepare(t, root, doc)
	if info, err := os.Lstat(root + "/var/lib/dbus/machine-id"); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Error(info, err)
	}
	if len(read(t, root+"/etc/machine-id")) != 33 {
		t.Error("no machine id")
	}
}

func TestLaterBoots(t *testing.T) {
	root, doc := guest(t)
	prepare(t, root, doc)
	put(t, root+"/etc/machine-id", "mine\n")
	doc.Hosts, doc.Resolv, doc.Hostname = "127.0.0.1 new\n", ownershipMark+"\nnameserver 10.0.0.2\n", "renamed"
	prepare(t, root, doc)
	if read(t, root+"/etc/hosts") != ownershipMark+"\n127.0.0.1 new\n" || read(t, root+"/etc/hostname") != "renamed\n" {
		t.Error("what is berth's was not brought up to date")
	}
	if read(t, root+"/etc/resolv.conf") != ownershipMark+"\nnameserver 10.0.0.2\n" {
		t.Error("a marked text was marked again")
	}
	if read(t, root+"/etc/machine-id") != "mine\n" {
		t.Error("the machine id changed after the first boot")
	}
	// Whoever removes the line owns the file.
	put(t, root+"/etc/hosts", "127.0.0.1 mine\n")
	if err := os.Remove(root + "/etc/resolv.conf"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../run/dangling", root+"/etc/resolv.conf"); err != nil {
		t.Fatal(err)
	}
	prepare(t, root, doc)
	if read(t, root+"/etc/hosts") != "127.0.0.1 mine\n" {
		t.Error("the user's hosts was overwritten")
	}
	if target, err := os.Readlink(root + "/etc/resolv.conf"); err != nil || target != "../run/dangling" {
		t.Error("systemd-resolved's link was replaced", err)
	}
	// What is gone is made again.
	if err := os.Remove(root + "/etc/hosts"); err != nil {
		t.Fatal(err)
	}
	prepare(t, root, doc)
	if read(t, root+"/etc/hosts") != ownershipMark+"\n127.0.0.1 new\n" {
		t.Error("a missing hosts was not written")
	}
}

func TestUnwritableIsNotFatal(t *testing.T) {
	root, doc := guest(t)
	for _, name := range []string{"/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/etc/machine-id", "/var"} {
		// A directory, or a file where one must be, can't be replaced by root either.
		if name == "/var" {
			put(t, root+name, "")
		} else if err := os.MkdirAll(root+name+"/x", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	problems := Prepare(root, doc)
	if len(problems) != 6 { // these, and the twin's record below /var
		t.Errorf("%d: %v", len(problems), problems)
	}
	if !strings.Contains(read(t, root+"/etc/passwd"), "\nbob:x:2000:") {
		t.Error("no twin")
	}
}

func TestImagesScriptComesFirst(t *testing.T) {
	root, doc := guest(t)
	put(t, root+"/etc/machine/create-user.sh", "#!/bin/sh\n")
	if err := os.Chmod(root+"/etc/machine/create-user.sh", 0o755); err != nil {
		t.Fatal(err)
	}
	prepare(t, root, doc)
	if _, err := os.Lstat(root + "/etc/passwd"); err == nil {
		t.Error("the twin was made before the image's script ran")
	}
}

func TestInitEnv(t *testing.T) {
	env := initEnv([]string{"PATH=/x", "HOME=/", "NOTIFY_SOCKET=/evil"}, []string{"A=1", "HOME=/h", "PATH=/y"}, "oci", "berth-notify-1")
	want := []string{"PATH=/y", "TERM=dumb", "HOME=/h", "NOTIFY_SOCKET=@berth-notify-1", "container=oci", "A=1"}
	if !slices.Equal(env, want) {
		t.Errorf("%q", env)
	}
	if env := initEnv([]string{"TERM=vt100"}, nil, "docker", ""); !slices.Equal(env, []string{"PATH=" + defaultPath, "TERM=vt100", "container=docker"}) {
		t.Errorf("%q", env)
	}
}

func TestLookUp(t *testing.T) {
	dir := t.TempDir()
	put(t, dir+"/plain", "")
	put(t, dir+"/myinit", "")
	if err := os.Chmod(dir+"/myinit", 0o755); err != nil {
		t.Fatal(err)
	}
	env := []string{"PATH=/nowhere:" + dir}
	for program, want := range map[string]string{"myinit": dir + "/myinit", "plain": "plain", "/sbin/init": "/sbin/init", "gone": "gone"} {
		if got := lookUp(program, env); got != want {
			t.Errorf("%s: %s", program, got)
		}
	}
}

func TestNoUnitFailsForWantOfKmod(t *testing.T) {
	root := t.TempDir()
	unit := root + "/run/systemd/system/kmod-static-nodes.service"
	if err := maskWithoutKmod(root); err != nil {
		t.Fatal(err)
	}
	if target, err := os.Readlink(unit); err != nil || target != "/dev/null" {
		t.Errorf("%q %v", target, err)
	}
	if err := os.Remove(unit); err != nil {
		t.Fatal(err)
	}
	put(t, root+"/usr/bin/kmod", "")
	if err := maskWithoutKmod(root); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(unit); err == nil {
		t.Error("masked though there is a kmod")
	}
}

func TestJournalGoesToTheConsole(t *testing.T) {
	root, _ := guest(t)
	if err := copyJournalToConsole(root); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(root + "/run/systemd/journald.conf.d/50-berth.conf")
	if err != nil || !strings.Contains(string(data), "ForwardToConsole=yes") {
		t.Errorf("%q, %v", data, err)
	}
}

// Whoever is root in a guest chooses what stands where the next boot reads: it must come to its end all the same.
func TestOddFilesHoldUpNothing(t *testing.T) {
	read := []string{"/etc/passwd", "/etc/group", "/etc/gshadow", "/etc/shadow", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/etc/inittab", "/etc/.pwd.lock", "/sbin/init", instancePath, "/var/lib/berth/twin", "/var/lib/berth/create-user"}
	for kind, put := range map[string]func(path string) error{
		"fifo":      func(path string) error { return syscall.Mkfifo(path, 0o755) },
		"directory": func(path string) error { return os.Mkdir(path, 0o755) },
		"endless":   func(path string) error { return os.Symlink("/dev/zero", path) },
		"loop":      func(path string) error { return os.Symlink(path, path) },
		"huge": func(path string) error {
			return errors.Join(os.WriteFile(path, nil, 0o755), os.Truncate(path, 1<<40))
		},
	} {
		t.Run(kind, func(t *testing.T) {
			root, doc := guest(t)
			for _, path := range read {
				if err := os.MkdirAll(filepath.Dir(root+path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := put(root + path); err != nil {
					t.Fatal(err)
				}
			}
			done := inBackground(func() {
				Prepare(root, doc)
				initsys.Detect(root, []string{"/sbin/init"}).Look()
			})
			select {
			case <-done:
			case <-time.After(20 * time.Second):
				t.Fatal("it waits")
			}
		})
	}
}

func inBackground(work func()) <-chan struct{} {
	done := make(chan struct{})
	go func() { defer close(done); work() }()
	return done
}
