// Package files reads and replaces whole files that somebody else may have put there. Used by whatever reads or writes
// below /etc, /var/lib/berth or a runtime directory.
package files

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Attr says what a file written by Write looks like.
type Attr struct {
	Mode fs.FileMode
	UID  int
	GID  int
	// Sync: the data is on disk before the name is. For what a power cut must not empty.
	Sync bool
}

// Keep gives the attributes of the file at path, or other where there is no regular file.
func Keep(path string, other Attr) Attr {
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() {
		return other
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		other.UID, other.GID = int(stat.Uid), int(stat.Gid)
	}
	other.Mode = info.Mode().Perm()
	return other
}

// MaxRead bounds what Read takes in: an account file of a hundred thousand users is not longer.
const MaxRead = 16 << 20

// ErrOdd is the error of Read for what is no file that one reads: a FIFO, on which an open waits for ever, a device, a
// directory, or a file that is too long.
var ErrOdd = errors.New("it is no regular file, or too long")

// Read gives what is in the file at path. The guest's users choose what stands there, and nothing of it must hold up or
// fill who reads: so it never waits, and takes in MaxRead at most.
func Read(path string) ([]byte, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > MaxRead {
		return nil, &fs.PathError{Op: "read", Path: path, Err: ErrOdd}
	}
	data, err := io.ReadAll(io.LimitReader(file, MaxRead+1))
	if len(data) > MaxRead {
		return nil, &fs.PathError{Op: "read", Path: path, Err: ErrOdd}
	}
	return data, err
}

// Write replaces path, also when it is a symbolic link, by a regular file that holds data: readers see the old
// file or the whole new one. One writer per path at a time; what a killed one left is removed.
func Write(path string, data []byte, attr Attr) error {
	partial := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".berth")
	if err := os.Remove(partial); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := create(partial, data, attr); err != nil {
		os.Remove(partial)
		return err
	}
	if err := os.Rename(partial, path); err != nil {
		os.Remove(partial)
		return err
	}
	return nil
}

func create(path string, data []byte, attr Attr) error {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.Write(data); err != nil {
		return err
	}
	// Before the mode: chown clears set-id bits, and nobody may read a secret in between.
	if attr.UID != os.Geteuid() || attr.GID != os.Getegid() {
		if err := file.Chown(attr.UID, attr.GID); err != nil {
			return err
		}
	}
	if err := file.Chmod(attr.Mode); err != nil {
		return err
	}
	if attr.Sync {
		if err := file.Sync(); err != nil {
			return err
		}
	}
	return file.Close()
}
