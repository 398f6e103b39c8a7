package twin

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// skelDepth bounds the copy of /etc/skel.
const skelDepth = 16

// ensureHome makes the twin's home when it is the machine's own: parents root's, 0755; the home the twin's, 0700,
// filled from /etc/skel when it is new or empty. before is the passwd line that was taken over from another id.
func ensureHome(root string, u User, before row) error {
	if !u.HomeIsOwn || u.Home == "/" {
		return nil
	}
	home := root + u.Home
	if err := os.MkdirAll(filepath.Dir(home), 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(home)
	switch {
	case err == nil && len(entries) > 0:
		return adopt(home, u, before)
	case err == nil:
		return errors.Join(copyTree(root+"/etc/skel", home, u, skelDepth), own(home, u))
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	// Built aside, so that a boot cut short does not leave a home that looks filled.
	partial := filepath.Join(filepath.Dir(home), "."+filepath.Base(home)+".berth")
	if err := os.RemoveAll(partial); err != nil {
		return err
	}
	if err := os.Mkdir(partial, 0o700); err != nil {
		return err
	}
	if err := errors.Join(copyTree(root+"/etc/skel", partial, u, skelDepth), own(partial, u)); err != nil {
		return err
	}
	return os.Rename(partial, home)
}

func own(path string, u User) error { return os.Lchown(path, int(u.UID), int(u.GID)) }

// adopt gives the twin what belonged to the user of the same name and another id. The home's own directory it gives
// in any case where it is root's: a Dockerfile's COPY or WORKDIR makes it so.
func adopt(home string, u User, before row) error {
	oldUID, oldGID := -1, -1
	if before != nil && before[0] == u.Name {
		oldUID, oldGID = atoi(before[2]), atoi(before[3])
	}
	info, err := os.Lstat(home)
	if err != nil {
		return err
	}
	top, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	if u.UID != 0 && top.Uid == 0 {
		err = own(home, u)
	}
	if oldUID <= 0 {
		return err
	}
	return errors.Join(err, filepath.WalkDir(home, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return nil // what can't be read can't be given away
		}
		info, err := entry.Info()
		if err != nil {
			return nil
		}
		stat, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return nil
		}
		if stat.Dev != top.Dev && entry.IsDir() {
			return fs.SkipDir // a mount
		}
		if stat.Dev != top.Dev || int(stat.Uid) != oldUID {
			return nil
		}
		gid := -1
		if int(stat.Gid) == oldGID {
			gid = int(u.GID)
		}
		return os.Lchown(path, int(u.UID), gid)
	}))
}

// copyTree copies what is in from into the directory to, as the twin's. Links are copied as links and never
// followed, so /etc/skel/.x -> /etc/shadow gives the twin a link and not the secret; devices and pipes are skipped.
func copyTree(from, to string, u User, depth int) error {
	info, err := os.Lstat(from)
	if err != nil || !info.IsDir() {
		return nil // no skeleton is fine
	}
	if depth == 0 {
		return fmt.Errorf("%s is nested too deeply", from)
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if err := copyEntry(filepath.Join(from, entry.Name()), filepath.Join(to, entry.Name()), u, depth); err != nil {
			return err
		}
	}
	return nil
}

func copyEntry(from, to string, u User, depth int) error {
	info, err := os.Lstat(from)
	if err != nil {
		return err
	}
	switch {
	case info.IsDir():
		if err := os.Mkdir(to, 0o700); err != nil {
			return err
		}
		if err := copyTree(from, to, u, depth-1); err != nil {
			return err
		}
		return errors.Join(own(to, u), os.Chmod(to, info.Mode().Perm()))
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		return errors.Join(os.Symlink(target, to), own(to, u))
	case info.Mode().IsRegular():
		return copyFile(from, to, u)
	}
	return nil
}

func copyFile(from, to string, u User) error {
	source, err := os.OpenFile(from, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer source.Close()
	info, err := source.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return err
	}
	target, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer target.Close()
	if _, err := io.Copy(target, source); err != nil {
		return err
	}
	if err := target.Chown(int(u.UID), int(u.GID)); err != nil {
		return err
	}
	return errors.Join(target.Chmod(info.Mode().Perm()), target.Close())
}

func atoi(text string) int {
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return -1
	}
	return int(n)
}
