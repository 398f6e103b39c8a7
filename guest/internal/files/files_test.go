package files

import (
	"os"
	"path/filepath"
	"testing"
)

func mine(mode os.FileMode) Attr { return Attr{Mode: mode, UID: os.Geteuid(), GID: os.Getegid()} }

func TestWriteReplacesDanglingLink(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.Symlink("../run/nowhere", path); err != nil {
		t.Fatal(err)
	}
	if err := Write(path, []byte("x\n"), mine(0o644)); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() || info.Mode().Perm() != 0o644 {
		t.Fatalf("%v %v", info, err)
	}
}

func TestWriteSweepsWhatAKilledWriterLeft(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, ".f.berth"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Write(filepath.Join(dir, "f"), []byte("whole"), mine(0o640)); err != nil {
		t.Fatal(err)
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 1 || entries[0].Name() != "f" {
		t.Fatalf("left: %v", entries)
	}
}

func TestWriteFailsWholly(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "f"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Write(filepath.Join(dir, "f"), nil, mine(0o600)); err == nil {
		t.Fatal("a directory was replaced")
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 1 {
		t.Fatalf("left: %v", entries)
	}
}

func TestKeep(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if got := Keep(path, mine(0o600)); got != mine(0o600) {
		t.Fatalf("missing: %+v", got)
	}
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if got := Keep(path, mine(0o600)); got.Mode != 0o644 {
		t.Fatalf("present: %+v", got)
	}
}
