package passwd

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

const passwdText = `root:x:0:0:root:/root:/bin/sh
# a comment:x:1:1:::
+::::::
ana:x:1000:1000:Ana,,,:/home/ana:/bin/sh
broken
noid:x:abc:1:::/bin/sh
toobig:x:4294967295:1::/:/bin/sh
1234:x:77:78::/home/number:/bin/sh
first.last:x:1001:1001::relative:/no/such/shell
windows:x:1002:1002::/home/w:/bin/sh` + "\r\n" + `short:x:5
many:x:1003:1003::/home/many:/bin/sh:one:more
`

const groupText = `root:x:0:
sudo:x:27:ana,first.last
tabs:x:30: ana
ana:x:1000:
bad:x:x:ana
nomembers:x:31
twice:x:27:ana
`

func database(t *testing.T) *Database {
	t.Helper()
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"passwd": passwdText, "group": groupText} {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Load(root)
}

func TestFind(t *testing.T) {
	d := database(t)
	ana := User{"ana", 1000, 1000, []uint32{1000, 27, 30}, "/home/ana", "/bin/sh"}
	with := func(gid uint32) User {
		changed := ana
		changed.GID, changed.Groups = gid, []uint32{gid}
		return changed
	}
	for spec, want := range map[string]User{
		"ana":       ana,
		"1000":      ana,
		"ana:sudo":  with(27),
		"ana:99":    with(99),
		"1000:27":   with(27),
		"1234":      {"1234", 77, 78, []uint32{78}, "/home/number", "/bin/sh"}, // a name wins over a number
		"77":        {"1234", 77, 78, []uint32{78}, "/home/number", "/bin/sh"},
		"5555":      {"", 5555, 0, []uint32{0}, "/", "/bin/sh"},
		"5555:6666": {"", 5555, 6666, []uint32{6666}, "/", "/bin/sh"},
		// The home is no path and the shell is not there.
		"first.last": {"first.last", 1001, 1001, []uint32{1001, 27}, "/", "/bin/sh"},
		"windows":    {"windows", 1002, 1002, []uint32{1002}, "/home/w", "/bin/sh"},
		"many":       {"many", 1003, 1003, []uint32{1003}, "/home/many", "/bin/sh"},
	} {
		if got, err := d.Find(spec); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", spec, got, err)
		}
	}
}

func TestNotFound(t *testing.T) {
	d := database(t)
	for spec, want := range map[string]string{
		"":               "user '' not found",
		"nosuch":         "user 'nosuch' not found",
		"noid":           "user 'noid' not found",
		"+":              "user '+' not found",
		"-1":             "user '-1' not found",
		"4294967295":     "user '4294967295' not found",
		"99999999999999": "user '99999999999999' not found",
		"ana:nosuch":     "group 'nosuch' not found",
		"ana:":           "group '' not found",
	} {
		if _, err := d.Find(spec); err == nil || err.Error() != want {
			t.Errorf("%s: %v", spec, err)
		}
	}
}

func TestRootWithoutFiles(t *testing.T) {
	got, err := Load(t.TempDir()).Find("root")
	if err == nil {
		t.Fatal("a name out of nowhere", got)
	}
	got, err = Load(t.TempDir()).Find("0")
	if err != nil || got.UID != 0 || got.Home != "/root" || got.Shell != "/bin/sh" {
		t.Fatal(got, err)
	}
}

func TestHugeAndOddFiles(t *testing.T) {
	root := t.TempDir()
	_ = os.Mkdir(filepath.Join(root, "etc"), 0o755)
	if err := os.Symlink("/dev/zero", filepath.Join(root, "etc/passwd")); err != nil { // would never end
		t.Fatal(err)
	}
	members := "big:x:5:" + strings.Repeat("u,", 100_000) + "root\n"
	if err := os.WriteFile(filepath.Join(root, "etc/group"), []byte(members), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := Load(root).Find("0")
	if err != nil || !reflect.DeepEqual(got.Groups, []uint32{0, 5}) {
		t.Fatal(got, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(passwdText, groupText, "ana:sudo")
	f.Fuzz(func(_ *testing.T, passwd, groups, spec string) {
		d := &Database{parsePasswd(passwd), parseGroup(groups)}
		_, _ = d.Find(spec)
	})
}
