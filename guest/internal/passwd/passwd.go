// Package passwd reads the guest's own /etc/passwd and /etc/group, whatever state they are in: lines that make no
// sense are passed over, sizes are bounded. It knows no other source of users. exec calls it; it calls files.
package passwd

import (
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"

	"berth.dev/guest/internal/files"
)

const (
	maxGroups = 65536 // Source: setgroups(2), NGROUPS_MAX
	noID      = 1<<32 - 1
	// fallbackShell is used where the listed shell does not exist.
	fallbackShell = "/bin/sh"
)

// User is who a command runs as.
type User struct {
	Name   string // empty for an id that nobody has
	UID    uint32
	GID    uint32
	Groups []uint32 // supplementary, the primary one included
	Home   string
	Shell  string // exists and is executable, or /bin/sh
}

// Database is what the two files said when they were read.
type Database struct {
	entries []entry
	groups  []group
}

type entry struct {
	name        string
	uid, gid    uint32
	home, shell string
}

type group struct {
	name    string
	gid     uint32
	members []string
}

// Load reads passwd and group below a root directory ("" for the real one). A file that can't be read, or is too long,
// counts as empty.
func Load(root string) *Database {
	return &Database{
		entries: parsePasswd(readFile(root + "/etc/passwd")),
		groups:  parseGroup(readFile(root + "/etc/group")),
	}
}

func readFile(path string) string {
	text, err := files.Read(path)
	if err != nil {
		return ""
	}
	return string(text)
}

// Source: passwd(5), name:password:UID:GID:GECOS:directory:shell.
func parsePasswd(text string) []entry {
	var entries []entry
	for line := range strings.Lines(text) {
		fields := strings.Split(strings.TrimRight(line, "\r\n"), ":")
		if len(fields) < 7 || !isName(fields[0]) {
			continue
		}
		uid, okUID := parseID(fields[2])
		gid, okGID := parseID(fields[3])
		if okUID && okGID {
			entries = append(entries, entry{fields[0], uid, gid, fields[5], fields[6]})
		}
	}
	return entries
}

// Source: group(5), name:password:GID:user,user.
func parseGroup(text string) []group {
	var groups []group
	for line := range strings.Lines(text) {
		fields := strings.Split(strings.TrimRight(line, "\r\n"), ":")
		if len(fields) < 3 || !isName(fields[0]) {
			continue
		}
		gid, ok := parseID(fields[2])
		if !ok {
			continue
		}
		found := group{name: fields[0], gid: gid}
		if len(fields) > 3 {
			for member := range strings.SplitSeq(fields[3], ",") {
				found.members = append(found.members, strings.TrimSpace(member))
			}
		}
		groups = append(groups, found)
	}
	return groups
}

// isName passes over comments and the + and - lines of NIS.
func isName(text string) bool {
	return text != "" && !strings.ContainsAny(text[:1], "#+- \t") && !strings.Contains(text, "\x00")
}

func parseID(text string) (uint32, bool) {
	if text == "" || strings.Trim(text, "0123456789") != "" {
		return 0, false
	}
	id, err := strconv.ParseUint(text, 10, 32)
	return uint32(id), err == nil && id != noID
}

// Find resolves `NAME`, `UID`, `NAME:GROUP`, `UID:GID` and the mixed forms. As docker does it: a name wins over a
// number; a UID that nobody has is group 0 and lives in /; with a group given, that is the only one.
func (d *Database) Find(spec string) (User, error) {
	who, groupSpec, hasGroup := strings.Cut(spec, ":")
	found, err := d.findUser(who)
	if err != nil || !hasGroup {
		return found, err
	}
	if found.GID, err = d.findGroup(groupSpec); err != nil {
		return User{}, err
	}
	found.Groups = []uint32{found.GID}
	return found, nil
}

func (d *Database) findUser(who string) (User, error) {
	for _, e := range d.entries {
		if e.name == who {
			return d.user(e), nil
		}
	}
	uid, ok := parseID(who)
	if !ok {
		return User{}, errors.New("user '" + who + "' not found")
	}
	for _, e := range d.entries {
		if e.uid == uid {
			return d.user(e), nil
		}
	}
	if uid == 0 { // also where there is no passwd at all
		return d.user(entry{name: "root", home: "/root", shell: fallbackShell}), nil
	}
	return User{UID: uid, Groups: []uint32{0}, Home: "/", Shell: fallbackShell}, nil
}

func (d *Database) user(e entry) User {
	user := User{Name: e.name, UID: e.uid, GID: e.gid, Home: e.home, Shell: fallbackShell, Groups: []uint32{e.gid}}
	if !strings.HasPrefix(user.Home, "/") {
		user.Home = "/"
	}
	if isProgram(e.shell) {
		user.Shell = e.shell
	}
	for _, g := range d.groups {
		if len(user.Groups) < maxGroups && slices.Contains(g.members, e.name) && !slices.Contains(user.Groups, g.gid) {
			user.Groups = append(user.Groups, g.gid)
		}
	}
	return user
}

func (d *Database) findGroup(spec string) (uint32, error) {
	for _, g := range d.groups {
		if g.name == spec {
			return g.gid, nil
		}
	}
	if gid, ok := parseID(spec); ok {
		return gid, nil
	}
	return 0, errors.New("group '" + spec + "' not found")
}

func isProgram(path string) bool {
	if !strings.HasPrefix(path, "/") {
		return false
	}
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0
}
