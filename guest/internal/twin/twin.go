// Package twin gives the guest the host user's twin: same name, uid, gid, login shell where it exists, password-less
// sudo. It edits the guest's own files, so the image need not bring a single tool. `agent boot` calls it before the
// init runs; guestos calls it again when an image's create-user.sh failed.
package twin

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"berth.dev/guest/internal/files"
)

// User is the twin as the boot document describes it.
type User struct {
	Name  string `json:"name"`
	UID   uint32 `json:"uid"`
	GID   uint32 `json:"gid"`
	Group string `json:"group"`
	Home  string `json:"home"`
	Shell string `json:"shell"`
	// HomeIsOwn: the home is on the machine's own disk; else it is a mount and not ours to touch.
	HomeIsOwn bool `json:"homeIsOwn"`
}

// sudoersFile has no dot and no tilde, which sudo would skip, and sorts late: in sudoers the last match wins.
const (
	sudoersFile = "/etc/sudoers.d/zz-berth"
	// recordFile holds the passwd line as we wrote it last: whoever changed it since (chsh) is respected.
	recordFile = "/var/lib/berth/twin"
	lockWait   = 5 * time.Second
)

// Check says what is wrong with the user, in words for the console. A name may hold dots and more, but nothing
// that would break a line of passwd or a path.
func (u *User) Check() error {
	for what, text := range map[string]string{"name": u.Name, "group": u.Group, "home": u.Home, "shell": u.Shell} {
		if strings.ContainsAny(text, ":\n\x00") {
			return fmt.Errorf("the twin's %s %q holds a colon, a line end or a NUL", what, text)
		}
	}
	switch {
	case u.Name == "" || u.Name == "." || u.Name == ".." || strings.ContainsAny(u.Name, "/, \t") || strings.ContainsAny(u.Name[:1], "-+#@%!"):
		return fmt.Errorf("the twin's name %q can't be a user's name", u.Name)
	case strings.ContainsAny(u.Group, "/, \t"):
		return fmt.Errorf("the twin's group %q can't be a group's name", u.Group)
	case !filepath.IsAbs(u.Home) || filepath.Clean(u.Home) != u.Home:
		return fmt.Errorf("the twin's home %q is not a clean absolute path", u.Home)
	case u.Shell != "" && !filepath.IsAbs(u.Shell):
		return fmt.Errorf("the twin's shell %q is not an absolute path", u.Shell)
	case u.UID == ^uint32(0) || u.GID == ^uint32(0):
		return errors.New("the twin's uid or gid is the reserved one (4294967295)")
	}
	return nil
}

// Known tells whether the guest below root ("" is the guest itself) already knows the twin by name and uid.
func Known(root string, u User) bool {
	users := load(root+"/etc/passwd", passwdFields)
	at := users.find(0, u.Name)
	return at >= 0 && users.rows[at][2] == id(u.UID)
}

// Ensure makes the twin in the guest below root, or brings an older one up to date. Idempotent: what is right
// already is not written again. Everything that can be done is done; the errors come together.
func Ensure(root string, u User) error {
	unlock := lockDatabases(root)
	defer unlock()
	shell := pickShell(root, u.Shell)
	if u.UID == 0 {
		_, err := ensurePasswd(root, u, shell)
		return errors.Join(err, ensureHome(root, u, nil))
	}
	before, errPasswd := ensurePasswd(root, u, shell)
	return errors.Join(
		errPasswd,
		ensureGroups(root, u, before),
		ensureShadow(root, u),
		ensureSudo(root, u),
		ensureHome(root, u, before),
	)
}

// pickShell is the host user's shell where the guest has it, else bash, else sh.
func pickShell(root, wanted string) string {
	for _, shell := range []string{wanted, "/bin/bash"} {
		if shell != "" && executable(root+shell) {
			return shell
		}
	}
	return "/bin/sh"
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0
}

// ensurePasswd writes the twin's line and gives the one that stood there before with another uid or gid, if any.
//
// The image may know the name with another uid (the line is taken over) or the uid by another name, as `ubuntu` or
// `node`: that user stays, since files and services may name it, but the twin's line goes before it, because
// getpwuid(3) takes the first line with a uid and `whoami` must say the twin's name.
func ensurePasswd(root string, u User, shell string) (before row, err error) {
	path := root + "/etc/passwd"
	users := load(path, passwdFields)
	if len(users.rows) == 0 && u.UID != 0 {
		users.insert(0, row{"root", "x", "0", "0", "root", "/root", "/bin/sh"})
	}
	kept := false
	line := row{u.Name, "x", id(u.UID), id(u.GID), "", u.Home, shell}
	at, first := users.find(0, u.Name), users.find(2, id(u.UID))
	if at < 0 && u.UID == 0 {
		at = first // root by whatever name the image gives it
	}
	if at >= 0 {
		old := users.rows[at]
		if old[2] != line[2] || old[3] != line[3] {
			before = old
		}
		line[0], line[1], line[4] = old[0], old[1], old[4]
		if kept = keepShell(root, u, old, shell); kept {
			line[6] = old[6]
		}
		users.replace(at, line)
	}
	switch {
	case at < 0 && first < 0:
		users.insert(len(users.rows), line)
	case at < 0:
		users.insert(first, line)
	case first >= 0 && first < at:
		users.move(at, first)
	}
	if err := users.save(path, files.Attr{Mode: 0o644, Sync: true}); err != nil {
		return before, err
	}
	record := root + recordFile
	if text := line.String() + "\n"; !kept && readText(record) != text {
		err = errors.Join(os.MkdirAll(filepath.Dir(record), 0o700), files.Write(record, []byte(text), files.Attr{Mode: 0o600}))
	}
	return before, err
}

// keepShell: the line has been changed since we wrote it, as by chsh, and its shell is there.
// For root, whose line the image brings, a shell that is there stays unless the host's is there too.
func keepShell(root string, u User, old row, shell string) bool {
	if !executable(root + old[6]) {
		return false
	}
	if u.UID == 0 && shell != u.Shell {
		return true
	}
	record := strings.TrimSuffix(readText(root+recordFile), "\n")
	if record == "" || record == old.String() {
		return false
	}
	was := strings.Split(record, ":")
	return len(was) == passwdFields && was[0] == old[0] && was[2] == old[2] && was[6] != old[6]
}

// ensureGroups gives the twin's gid a name, where it has none, and makes it a member of the groups that may use sudo.
func ensureGroups(root string, u User, before row) error {
	path := root + "/etc/group"
	groups := load(path, groupFields)
	if len(groups.rows) == 0 {
		groups.insert(0, row{"root", "x", "0", ""})
	}
	shadow := load(root+"/etc/gshadow", groupFields)
	if groups.find(2, id(u.GID)) < 0 {
		nameGroup(groups, shadow, u, before)
	}
	for _, name := range []string{"sudo", "wheel"} {
		if at := groups.find(0, name); at >= 0 {
			groups.replace(at, groups.rows[at].withMember(u.Name))
			if at := shadow.find(0, name); at >= 0 {
				shadow.replace(at, shadow.rows[at].withMember(u.Name))
			}
		}
	}
	err := groups.save(path, files.Attr{Mode: 0o644, Sync: true})
	if shadow.exists {
		err = errors.Join(err, shadow.save(root+"/etc/gshadow", files.Attr{Mode: 0o600, Sync: true}))
	}
	return err
}

// nameGroup adds a group for the gid. Its name may be taken with another gid: when that is the private group of the
// user whose line was taken over, it moves along; else a free name is made, since files may belong to the other one.
func nameGroup(groups, shadow *table, u User, before row) {
	if at := groups.find(0, u.Group); at >= 0 && before != nil && u.Group == u.Name && groups.rows[at][2] == before[3] {
		line := append(row(nil), groups.rows[at]...)
		line[2] = id(u.GID)
		groups.replace(at, line)
		return
	}
	for _, name := range []string{u.Group, u.Name, "berth", "berth-" + id(u.GID)} {
		if name != "" && groups.find(0, name) < 0 {
			groups.insert(len(groups.rows), row{name, "x", id(u.GID), ""})
			if shadow.find(0, name) < 0 {
				shadow.insert(len(shadow.rows), row{name, "!", "", ""})
			}
			return
		}
	}
}

// ensureShadow: without a line here PAM refuses the account, and with it sudo and su. The password is `*`: none
// fits, but the account is not locked, so a key lets in. No date of change: the guest's clock may be wrong.
func ensureShadow(root string, u User) error {
	path := root + "/etc/shadow"
	shadow := load(path, shadowFields)
	if shadow.find(0, u.Name) >= 0 {
		return nil
	}
	shadow.insert(len(shadow.rows), row{u.Name, "*", "", "0", "99999", "7", "", "", ""})
	attr := files.Attr{Mode: 0o600, Sync: true}
	groups := load(root+"/etc/group", groupFields)
	if at := groups.find(0, "shadow"); at >= 0 {
		if gid, err := strconv.ParseUint(groups.rows[at][2], 10, 32); err == nil {
			attr.Mode, attr.GID = 0o640, int(gid)
		}
	}
	return shadow.save(path, attr)
}

// ensureSudo also when sudo is not there yet: it may be installed later. By uid, so no name needs to be escaped.
func ensureSudo(root string, u User) error {
	path := root + sudoersFile
	text := "# written by berth at each start: the twin of the host's user\n#" + id(u.UID) + " ALL=(ALL:ALL) NOPASSWD: ALL\n"
	info, err := os.Lstat(path)
	if err == nil && info.Mode().IsRegular() && info.Mode().Perm() == 0o440 && readText(path) == text {
		return nil
	}
	if err := os.Mkdir(filepath.Dir(path), 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return files.Write(path, []byte(text), files.Attr{Mode: 0o440})
}

// lockDatabases takes the lock of lckpwdf(3), as a courtesy to a useradd that runs now, and gives what releases it.
// It is no condition: on a read-only disk there is nothing to lock, and a lock held for ever must not hold the boot.
func lockDatabases(root string) func() {
	file, err := os.OpenFile(root+"/etc/.pwd.lock", os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return func() {}
	}
	lock := syscall.Flock_t{Type: syscall.F_WRLCK}
	for deadline := time.Now().Add(lockWait); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		err := syscall.FcntlFlock(file.Fd(), syscall.F_SETLK, &lock)
		if err == nil || !errors.Is(err, syscall.EAGAIN) && !errors.Is(err, syscall.EACCES) {
			break
		}
	}
	return func() { file.Close() }
}

func id(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

func readText(path string) string {
	data, err := files.Read(path)
	if err != nil {
		return ""
	}
	return string(data)
}
