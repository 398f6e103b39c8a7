package layer

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// memory is a tree as it was: what is recorded before a test changes it in place.
type memory struct {
	names map[string][]string
	stats map[string]*syscall.Stat_t
}

func (m memory) Names(path string) ([]string, error) { return m.names[path], nil }

func (m memory) Stat(path string) (*syscall.Stat_t, error) {
	if status, known := m.stats[path]; known {
		return status, nil
	}
	return nil, fs.ErrNotExist
}

func remember(t *testing.T, root string) memory {
	t.Helper()
	m := memory{map[string][]string{}, map[string]*syscall.Stat_t{}}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, _ := filepath.Rel(root, path)
		if relative == "." {
			relative = ""
		}
		m.stats[relative], err = Directory(root).Stat(relative)
		if entry.IsDir() {
			m.names[relative], _ = Directory(root).Names(relative)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// world is a tree with what the tests change; all of it is old.
func world(t *testing.T) (string, memory) {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{"etc", "opt/deep/er", "usr/share", "swap1", "swap2", "home/ada", "lib"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{"etc/passwd", "etc/hosts", "opt/deep/er/f", "usr/share/a", "swap1/f", "swap2/f", "home/ada/x"} {
		put(t, root, path, "old")
	}
	check(t, os.Link(root+"/etc/passwd", root+"/etc/passwd-"))
	check(t, os.Symlink("usr/share", root+"/link"))
	past := time.Unix(1_500_000_000, 0)
	check(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, _ error) error {
		if path == root+"/link" {
			return nil
		}
		return os.Chtimes(path, past, past)
	}))
	return root, remember(t, root)
}

func put(t *testing.T, root, path, text string) {
	t.Helper()
	check(t, os.WriteFile(filepath.Join(root, path), []byte(text), 0o644))
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func pack(t *testing.T, root string, base Tree, exclude ...string) ([]byte, Summary) {
	t.Helper()
	var out bytes.Buffer
	summary, err := Write(&out, root, base, exclude)
	check(t, err)
	if summary.Size != int64(out.Len()) || out.Len()%block != 0 {
		t.Errorf("%d bytes, %d said", out.Len(), summary.Size)
	}
	return out.Bytes(), summary
}

// listing is what another reader makes of an archive: `kind name[ -> link][ = text]`.
func listing(t *testing.T, data []byte) []string {
	t.Helper()
	var lines []string
	reader := tar.NewReader(bytes.NewReader(data))
	for {
		head, err := reader.Next()
		if err == io.EOF {
			return lines
		}
		check(t, err)
		line := string(head.Typeflag) + " " + head.Name
		if head.Linkname != "" {
			line += " -> " + head.Linkname
		}
		if text, _ := io.ReadAll(reader); len(text) > 0 && len(text) < 20 {
			line += " = " + string(text)
		}
		lines = append(lines, line)
	}
}

func expect(t *testing.T, data []byte, want ...string) {
	t.Helper()
	if got := listing(t, data); !slices.Equal(got, want) {
		t.Errorf("got\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

func TestNothingChanged(t *testing.T) {
	root, base := world(t)
	data, summary := pack(t, root, base)
	if !bytes.Equal(data, make([]byte, 1024)) || summary != (Summary{Size: 1024}) {
		t.Errorf("%d bytes, %+v", len(data), summary)
	}
}

func TestChangesAreInItAndNothingElse(t *testing.T) {
	root, base := world(t)
	put(t, root, "etc/hosts", "new")
	put(t, root, "etc/fresh", "fresh")
	check(t, os.Chmod(root+"/opt/deep/er/f", 0o600))
	check(t, os.Remove(root+"/link"))
	check(t, os.Symlink("opt", root+"/link"))
	data, _ := pack(t, root, base)
	expect(t, data, "5 etc/", "0 etc/fresh = fresh", "0 etc/hosts = new", "2 link -> opt", "0 opt/deep/er/f = old")
	again, _ := pack(t, root, base)
	if !bytes.Equal(data, again) {
		t.Error("the same tree gave other bytes")
	}
}

func TestTimeAndSizeMayBeAsBefore(t *testing.T) {
	root, base := world(t)
	past := time.Unix(1_500_000_000, 0)
	put(t, root, "etc/hosts", "nEw")
	check(t, os.Chtimes(root+"/etc/hosts", past, past))
	data, _ := pack(t, root, base)
	expect(t, data, "0 etc/hosts = nEw") // by its ctime
}

func TestWhatWasRemovedIsWhitedOut(t *testing.T) {
	root, base := world(t)
	check(t, os.RemoveAll(root+"/opt"))
	check(t, os.Remove(root+"/link"))
	check(t, os.Remove(root+"/usr/share/a"))
	data, summary := pack(t, root, base)
	expect(t, data, "0 .wh.link", "0 .wh.opt", "5 usr/share/", "0 usr/share/.wh.a")
	if summary.Whiteouts != 3 {
		t.Errorf("%+v", summary)
	}
}

func TestADirectoryMadeAnewHidesTheOldOne(t *testing.T) {
	root, base := world(t)
	check(t, os.Rename(root+"/usr/share", root+"/usr/share2"))
	check(t, os.Mkdir(root+"/usr/share", 0o755))
	put(t, root, "usr/share/x", "x")
	data, _ := pack(t, root, base)
	expect(t, data, "5 usr/", "5 usr/share/", "0 usr/share/.wh..wh..opq", "0 usr/share/x = x",
		"5 usr/share2/", "0 usr/share2/a = old")
}

func TestSwappedDirectoriesAreNotTakenForUnchanged(t *testing.T) {
	root, base := world(t)
	check(t, os.Rename(root+"/swap1", root+"/third"))
	check(t, os.Rename(root+"/swap2", root+"/swap1"))
	check(t, os.Rename(root+"/third", root+"/swap2"))
	data, _ := pack(t, root, base)
	expect(t, data, "5 swap1/", "0 swap1/.wh..wh..opq", "0 swap1/f = old",
		"5 swap2/", "0 swap2/.wh..wh..opq", "0 swap2/f = old")
}

func TestKindsThatChange(t *testing.T) {
	root, base := world(t)
	check(t, os.Remove(root+"/link"))
	check(t, os.Mkdir(root+"/link", 0o700))
	check(t, os.RemoveAll(root+"/swap1"))
	put(t, root, "swap1", "file")
	check(t, os.Remove(root+"/etc/hosts"))
	check(t, os.Symlink("passwd", root+"/etc/hosts"))
	data, _ := pack(t, root, base)
	expect(t, data, "5 etc/", "2 etc/hosts -> passwd", "5 link/", "0 link/.wh..wh..opq", "0 swap1 = file")
}

func TestHardLinks(t *testing.T) {
	root, base := world(t)
	put(t, root, "etc/passwd", "new")
	put(t, root, "opt/one", "1")
	check(t, os.Link(root+"/opt/one", root+"/usr/two"))
	data, _ := pack(t, root, base)
	expect(t, data, "0 etc/passwd = new", "1 etc/passwd- -> etc/passwd",
		"5 opt/", "0 opt/one = 1", "5 usr/", "1 usr/two -> opt/one")
}

func TestWhatIsExcludedIsNeitherWrittenNorWhitedOut(t *testing.T) {
	root, base := world(t)
	put(t, root, "etc/hosts", "mine")
	check(t, os.RemoveAll(root+"/opt"))
	put(t, root, "home/ada/secret", "!")
	data, _ := pack(t, root, base, "etc/hosts", "opt", "/home/ada/")
	expect(t, data)
}

func TestMountPointsOfModulesAreNotTheMachines(t *testing.T) {
	root, base := world(t)
	check(t, os.MkdirAll(root+"/lib/modules/6.1.0", 0o755))
	data, _ := pack(t, root, base)
	expect(t, data, "5 lib/")
	put(t, root, "lib/modules/6.1.0/own.ko", "k")
	data, _ = pack(t, root, base)
	expect(t, data, "5 lib/", "5 lib/modules/", "5 lib/modules/6.1.0/", "0 lib/modules/6.1.0/own.ko = k")
}

func TestHostileNames(t *testing.T) {
	root, base := world(t)
	long := strings.Repeat("n", 200)
	for _, name := range []string{"new\nline", "raw\xff\xfe", "ümlaut", long, ".wh.passwd", ".wh..wh..opq", "a=b", " "} {
		put(t, root, "etc/"+name, name[:1])
	}
	data, summary := pack(t, root, base)
	if summary.LeftOut != 2 {
		t.Errorf("%+v", summary)
	}
	expect(t, data, "5 etc/", "0 etc/  =  ", "0 etc/a=b = a", "0 etc/new\nline = n", "0 etc/"+long+" = n",
		"0 etc/raw\xff\xfe = r", "0 etc/ümlaut = \xc3")
}

func TestWhatNoLayerCanHoldIsLeftOut(t *testing.T) {
	root, base := world(t)
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	check(t, err)
	defer syscall.Close(fd)
	check(t, os.Chdir(root)) // the address has room for 108 bytes
	check(t, syscall.Bind(fd, &syscall.SockaddrUnix{Name: "etc/socket"}))
	check(t, syscall.Mkfifo(root+"/etc/pipe", 0o600))
	data, summary := pack(t, root, base)
	expect(t, data, "5 etc/", "6 etc/pipe")
	if summary.LeftOut != 1 {
		t.Errorf("%+v", summary)
	}
}

func TestFactsOfAFile(t *testing.T) {
	root, base := world(t)
	path := root + "/etc/fresh"
	put(t, root, "etc/fresh", "x")
	check(t, os.Chmod(path, 0o750|fs.ModeSetuid))
	check(t, syscall.Setxattr(path, "user.note", []byte("a\x00=\n"), 0))
	check(t, syscall.Setxattr(path, "user.overlay.opaque", []byte("y"), 0))
	check(t, syscall.Setxattr(path, "user.a=b", []byte("y"), 0))
	check(t, os.Chtimes(path, time.Time{}, time.Unix(-2, 500_000_000)))
	data, _ := pack(t, root, base)
	reader := tar.NewReader(bytes.NewReader(data))
	for {
		head, err := reader.Next()
		check(t, err)
		if head.Name != "etc/fresh" {
			continue
		}
		if head.Mode != 0o4750 || head.Uid != os.Getuid() || head.Gid != os.Getgid() ||
			!head.ModTime.Equal(time.Unix(-2, 500_000_000)) {
			t.Errorf("%+v", head)
		}
		want := map[string]string{"mtime": "-1.500000000", "SCHILY.xattr.user.note": "a\x00=\n"}
		if fmt.Sprint(head.PAXRecords) != fmt.Sprint(want) {
			t.Errorf("%q", head.PAXRecords)
		}
		return
	}
}

func TestCapabilitiesAreForAnyRoot(t *testing.T) {
	third := "\x01\x00\x00\x03\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xe8\x03\x00\x00"
	if got := anyRoot(third); got != "\x01\x00\x00\x02"+third[4:20] {
		t.Errorf("%q", got)
	}
	for _, same := range []string{"", third[:20], "\x01\x00\x00\x02" + third[4:20]} {
		if anyRoot(same) != same {
			t.Errorf("%q", same)
		}
	}
}

func TestHolesAreNotSent(t *testing.T) {
	root, base := world(t)
	file, err := os.Create(root + "/etc/sparse")
	check(t, err)
	defer file.Close()
	check(t, file.Truncate(1<<30))
	_, err = file.WriteAt([]byte("here"), 1<<29)
	check(t, err)
	check(t, os.Truncate(root+"/etc/hosts", 1<<20)) // nothing but a hole after its first bytes
	data, _ := pack(t, root, base)
	if len(data) > 64<<10 {
		t.Errorf("%d bytes", len(data))
	}
	reader := tar.NewReader(bytes.NewReader(data))
	for {
		head, err := reader.Next()
		check(t, err)
		if head.Name != "etc/sparse" {
			continue
		}
		if head.Size != 1<<30 {
			t.Errorf("%+v", head)
		}
		_, err = io.CopyN(io.Discard, reader, 1<<29)
		check(t, err)
		var text [5]byte
		_, err = io.ReadFull(reader, text[:])
		check(t, err)
		if string(text[:]) != "here\x00" {
			t.Errorf("%q", text)
		}
		return
	}
}

func TestTooDeep(t *testing.T) {
	root, base := world(t)
	path := strings.Repeat("/d", depthMax+1)
	check(t, os.MkdirAll(root+path, 0o755))
	if _, err := Write(io.Discard, root, base, nil); err == nil || !strings.Contains(err.Error(), "deeper") {
		t.Error(err)
	}
}

func TestAFullOutputIsAnError(t *testing.T) {
	root, base := world(t)
	put(t, root, "etc/big", strings.Repeat("x", 2*bufferLen))
	if _, err := Write(full{}, root, base, nil); err == nil || !strings.Contains(err.Error(), "no space") {
		t.Error(err)
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, syscall.ENOSPC }
