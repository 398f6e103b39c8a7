package twin

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

const basePasswd = `root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
# a comment
node:x:1000:1000:Node:/home/node:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
`

const baseGroup = `root:x:0:
daemon:x:1:
sudo:x:27:node
shadow:x:42:
node:x:1000:
users:x:100:
`

// guest makes a root file system as small as it can be. Skips where files can't be given to others.
func guest(t *testing.T, passwd, group string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes files of other users")
	}
	root := t.TempDir()
	write(t, root+"/etc/passwd", passwd, 0o644)
	write(t, root+"/etc/group", group, 0o644)
	write(t, root+"/bin/bash", "", 0o755)
	write(t, root+"/bin/sh", "", 0o755)
	return root
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
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

func ensure(t *testing.T, root string, u User) {
	t.Helper()
	if err := u.Check(); err != nil {
		t.Fatal(err)
	}
	if err := Ensure(root, u); err != nil {
		t.Fatal(err)
	}
}

// line gives the line of a colon file whose first field is name, and its number.
func line(t *testing.T, path, name string) (string, int) {
	t.Helper()
	for i, text := range strings.Split(read(t, path), "\n") {
		if strings.HasPrefix(text, name+":") {
			return text, i
		}
	}
	return "", -1
}

func expectLine(t *testing.T, path, name, want string) {
	t.Helper()
	if got, _ := line(t, path, name); got != want {
		t.Errorf("%s: got %q, want %q", filepath.Base(path), got, want)
	}
}

func expectStat(t *testing.T, path string, mode os.FileMode, uid, gid uint32) {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	stat := info.Sys().(*syscall.Stat_t)
	if info.Mode().Perm() != mode || stat.Uid != uid || stat.Gid != gid {
		t.Errorf("%s: %v %d:%d, want %v %d:%d", path, info.Mode().Perm(), stat.Uid, stat.Gid, mode, uid, gid)
	}
}

var bob = User{Name: "bob.b", UID: 2000, GID: 2000, Group: "bob.b", Home: "/home/bob.b", Shell: "/usr/bin/zsh", HomeIsOwn: true}

func TestFreshTwin(t *testing.T) {
	root := guest(t, basePasswd, baseGroup)
	write(t, root+"/etc/gshadow", "root:*::\nsudo:*::node\n", 0o640)
	write(t, root+"/etc/skel/.bashrc", "hello\n", 0o644)
	ensure(t, root, bob)
	expectLine(t, root+"/etc/passwd", "bob.b", "bob.b:x:2000:2000::/home/bob.b:/bin/bash")
	expectLine(t, root+"/etc/group", "bob.b", "bob.b:x:2000:")
	expectLine(t, root+"/etc/group", "sudo", "sudo:x:27:node,bob.b")
	expectLine(t, root+"/etc/gshadow", "sudo", "sudo:*::node,bob.b")
	expectLine(t, root+"/etc/gshadow", "bob.b", "bob.b:!::")
	expectLine(t, root+"/etc/shadow", "bob.b", "bob.b:*::0:99999:7:::")
	expectStat(t, root+"/etc/shadow", 0o640, 0, 42)
	expectStat(t, root+"/etc/gshadow", 0o640, 0, 0)
	expectStat(t, root+"/etc/passwd", 0o644, 0, 0)
	expectStat(t, root+"/home/bob.b", 0o700, 2000, 2000)
	expectStat(t, root+"/home/bob.b/.bashrc", 0o644, 2000, 2000)
	expectStat(t, root+"/home", 0o755, 0, 0)
	expectStat(t, root+sudoersFile, 0o440, 0, 0)
	expectStat(t, root+"/etc/sudoers.d", 0o750, 0, 0)
	if !strings.HasSuffix(read(t, root+sudoersFile), "\n#2000 ALL=(ALL:ALL) NOPASSWD: ALL\n") {
		t.Error(read(t, root+sudoersFile))
	}
	if strings.ContainsAny(filepath.Base(sudoersFile), ".~") {
		t.Error("sudo skips this file")
	}
	if !strings.Contains(read(t, root+"/etc/passwd"), "# a comment\n") {
		t.Error("a comment was lost")
	}
	if !Known(root, bob) {
		t.Error("not known")
	}
}

func TestIdempotent(t *testing.T) {
	root := guest(t, basePasswd, baseGroup)
	ensure(t, root, bob)
	snapshot := func() (inodes []uint64) {
		for _, path := range []string{"/etc/passwd", "/etc/group", "/etc/shadow", sudoersFile, recordFile} {
			info, err := os.Lstat(root + path)
			if err != nil {
				t.Fatal(err)
			}
			inodes = append(inodes, info.Sys().(*syscall.Stat_t).Ino)
		}
		return inodes
	}
	before := snapshot()
	write(t, root+"/home/bob.b/mine", "x", 0o600)
	ensure(t, root, bob)
	for i, inode := range snapshot() {
		if inode != before[i] {
			t.Errorf("file %d was written again", i)
		}
	}
	expectStat(t, root+"/home/bob.b/mine", 0o600, 0, 0)
}

func TestUIDOfAnImagesUser(t *testing.T) {
	root := guest(t, basePasswd, baseGroup)
	u := User{Name: "bob", UID: 1000, GID: 1000, Group: "bob", Home: "/home/bob", Shell: "/bin/bash"}
	ensure(t, root, u)
	_, twin := line(t, root+"/etc/passwd", "bob")
	other, node := line(t, root+"/etc/passwd", "node")
	if twin < 0 || node < twin || other != "node:x:1000:1000:Node:/home/node:/bin/bash" {
		t.Errorf("twin %d, node %d %q", twin, node, other)
	}
	if _, at := line(t, root+"/etc/group", "bob"); at >= 0 {
		t.Error("the gid had a name already")
	}
	if _, err := os.Lstat(root + "/home/bob"); err == nil {
		t.Error("a home that is a mount was touched")
	}
	ensure(t, root, u)
	if n := strings.Count(read(t, root+"/etc/passwd"), "\nbob:"); n != 1 {
		t.Errorf("%d lines", n)
	}
}

func TestTwinBehindAnotherWithItsUIDIsMoved(t *testing.T) {
	root := guest(t, basePasswd+"bob:x:1000:1000::/home/bob:/bin/bash\n", baseGroup)
	ensure(t, root, User{Name: "bob", UID: 1000, GID: 1000, Group: "bob", Home: "/home/bob", Shell: "/bin/bash"})
	_, twin := line(t, root+"/etc/passwd", "bob")
	if _, node := line(t, root+"/etc/passwd", "node"); twin < 0 || node != twin+1 {
		t.Errorf("twin %d, node %d", twin, node)
	}
}

func TestNameOfAnImagesUser(t *testing.T) {
	root := guest(t, basePasswd, baseGroup)
	write(t, root+"/home/node/.profile", "x", 0o644)
	write(t, root+"/home/node/roots", "x", 0o644)
	for _, path := range []string{"/home/node", "/home/node/.profile"} {
		if err := os.Lchown(root+path, 1000, 1000); err != nil {
			t.Fatal(err)
		}
	}
	u := User{Name: "node", UID: 2000, GID: 2001, Group: "node", Home: "/home/node", Shell: "/bin/bash", HomeIsOwn: true}
	ensure(t, root, u)
	expectLine(t, root+"/etc/passwd", "node", "node:x:2000:2001:Node:/home/node:/bin/bash")
	expectLine(t, root+"/etc/group", "node", "node:x:2001:")
	expectStat(t, root+"/home/node", 0o755, 2000, 2001)
	expectStat(t, root+"/home/node/.profile", 0o644, 2000, 2001)
	expectStat(t, root+"/home/node/roots", 0o644, 0, 0)
}

func TestGroupNames(t *testing.T) {
	for name, test := range map[string]struct {
		u    User
		want string
	}{
		"free":              {User{Name: "a", UID: 500, GID: 500, Group: "staff2"}, "staff2:x:500:"},
		"gid taken":         {User{Name: "a", UID: 500, GID: 42, Group: "a"}, ""},
		"name taken":        {User{Name: "a", UID: 500, GID: 985, Group: "users"}, "a:x:985:"},
		"both names taken":  {User{Name: "users", UID: 500, GID: 985, Group: "users"}, "berth:x:985:"},
		"no name":           {User{Name: "a", UID: 500, GID: 985}, "a:x:985:"},
		"gid of root group": {User{Name: "a", UID: 500, GID: 0, Group: "a"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			root := guest(t, basePasswd, baseGroup)
			test.u.Home = "/h"
			ensure(t, root, test.u)
			before := strings.Count(baseGroup, "\n")
			lines := strings.Split(strings.TrimSuffix(read(t, root+"/etc/group"), "\n"), "\n")
			got := strings.Join(lines[before:], "|")
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestShellThatTheUserChose(t *testing.T) {
	root := guest(t, basePasswd, baseGroup)
	ensure(t, root, bob) // zsh is not there: bash
	write(t, root+"/usr/bin/zsh", "", 0o755)
	ensure(t, root, bob)
	expectLine(t, root+"/etc/passwd", "bob.b", "bob.b:x:2000:2000::/home/bob.b:/usr/bin/zsh")
	// chsh -s /bin/sh
	write(t, root+"/etc/passwd", strings.Replace(read(t, root+"/etc/passwd"), "/usr/bin/zsh", "/bin/sh", 1), 0o644)
	ensure(t, root, bob)
	ensure(t, root, bob)
	expectLine(t, root+"/etc/passwd", "bob.b", "bob.b:x:2000:2000::/home/bob.b:/bin/sh")
	if err := os.Remove(root + "/bin/sh"); err != nil {
		t.Fatal(err)
	}
	ensure(t, root, bob)
	expectLine(t, root+"/etc/passwd", "bob.b", "bob.b:x:2000:2000::/home/bob.b:/usr/bin/zsh")
}

func TestHostRoot(t *testing.T) {
	root := guest(t, strings.Replace(basePasswd, "/root:/bin/bash", "/somewhere:/bin/gone", 1), baseGroup)
	ensure(t, root, User{Name: "root", Group: "root", Home: "/root", Shell: "/bin/bash", HomeIsOwn: true})
	expectLine(t, root+"/etc/passwd", "root", "root:x:0:0:root:/root:/bin/bash")
	for _, path := range []string{sudoersFile, "/etc/shadow"} {
		if _, err := os.Lstat(root + path); err == nil {
			t.Errorf("%s was made for root", path)
		}
	}
	expectStat(t, root+"/root", 0o700, 0, 0)
}

func TestHostRootKeepsTheImagesShell(t *testing.T) {
	root := guest(t, "root:x:0:0:root:/root:/bin/ash\n", baseGroup)
	write(t, root+"/bin/ash", "", 0o755)
	ensure(t, root, User{Name: "root", Group: "root", Home: "/root", Shell: "/usr/bin/fish"})
	expectLine(t, root+"/etc/passwd", "root", "root:x:0:0:root:/root:/bin/ash")
}

func TestImageWithoutAnything(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	root := t.TempDir()
	if err := os.Mkdir(root+"/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	ensure(t, root, bob)
	if got := read(t, root+"/etc/passwd"); got != "root:x:0:0:root:/root:/bin/sh\nbob.b:x:2000:2000::/home/bob.b:/bin/sh\n" {
		t.Error(got)
	}
	if got := read(t, root+"/etc/group"); got != "root:x:0:\nbob.b:x:2000:\n" {
		t.Error(got)
	}
	expectStat(t, root+"/etc/shadow", 0o600, 0, 0)
}

func TestSkeletonIsNotFollowed(t *testing.T) {
	root := guest(t, basePasswd, baseGroup)
	write(t, root+"/etc/secret", "secret", 0o600)
	write(t, root+"/etc/skel/dir/deep", "x", 0o600)
	write(t, root+"/etc/skel/run", "x", 0o755)
	if err := os.Symlink("/etc/secret", root+"/etc/skel/link"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc", root+"/etc/skel/linkdir"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(root+"/etc/skel/pipe", 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(root+"/etc/skel/dir", 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(root+"/home/.bob.b.berth/half", 0o700); err != nil {
		t.Fatal(err)
	}
	ensure(t, root, bob)
	home := root + "/home/bob.b"
	for _, name := range []string{"link", "linkdir"} {
		if info, err := os.Lstat(home + "/" + name); err != nil || info.Mode()&os.ModeSymlink == 0 {
			t.Errorf("%s: %v %v", name, info, err)
		}
	}
	expectStat(t, home+"/dir", 0o750, 2000, 2000)
	expectStat(t, home+"/dir/deep", 0o600, 2000, 2000)
	expectStat(t, home+"/run", 0o755, 2000, 2000)
	expectStat(t, root+"/etc/secret", 0o600, 0, 0)
	if _, err := os.Lstat(home + "/pipe"); err == nil {
		t.Error("the pipe was copied")
	}
	if entries, _ := os.ReadDir(root + "/home"); len(entries) != 1 {
		t.Errorf("left in /home: %v", entries)
	}
}

func TestEmptyHomeIsFilled(t *testing.T) {
	root := guest(t, basePasswd, baseGroup)
	write(t, root+"/etc/skel/.profile", "x", 0o644)
	if err := os.MkdirAll(root+"/home/bob.b", 0o755); err != nil {
		t.Fatal(err)
	}
	ensure(t, root, bob)
	expectStat(t, root+"/home/bob.b", 0o755, 2000, 2000)
	expectStat(t, root+"/home/bob.b/.profile", 0o644, 2000, 2000)
}

func TestUnreadableDatabaseIsNotOverwritten(t *testing.T) {
	root := guest(t, basePasswd, baseGroup)
	if err := os.Remove(root + "/etc/group"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(root+"/etc/group", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Ensure(root, bob); err == nil {
		t.Error("no error")
	}
	expectLine(t, root+"/etc/shadow", "bob.b", "bob.b:*::0:99999:7:::") // the rest was done all the same
}

func TestCheck(t *testing.T) {
	good := User{Name: "first.last", UID: 1, GID: 1, Group: "g", Home: "/home/x", Shell: "/bin/sh"}
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	for _, change := range []func(*User){
		func(u *User) { u.Name = "" },
		func(u *User) { u.Name = "a:b" },
		func(u *User) { u.Name = "a\nroot2" },
		func(u *User) { u.Name = "a/b" },
		func(u *User) { u.Name = ".." },
		func(u *User) { u.Name = "-x" },
		func(u *User) { u.Name = "#1" },
		func(u *User) { u.Group = "a,b" },
		func(u *User) { u.Home = "home" },
		func(u *User) { u.Home = "/home/../etc" },
		func(u *User) { u.Home = "/a:b" },
		func(u *User) { u.Shell = "bash" },
		func(u *User) { u.UID = ^uint32(0) },
		func(u *User) { u.GID = ^uint32(0) },
	} {
		bad := good
		change(&bad)
		if bad.Check() == nil {
			t.Errorf("accepted: %+v", bad)
		}
	}
}
