package boot

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"berth.dev/guest/internal/files"
	"berth.dev/guest/internal/twin"
)

const (
	instancePath = "/var/lib/berth/instance"
	// ownershipMark is the first line of the files that berth writes: whoever removes it owns the file.
	ownershipMark = "# written by berth; remove this line to keep your own"
)

// Prepare does to the guest below root ("" is the guest itself) what must be true before the init runs: host name,
// hosts, resolv.conf, machine id, the twin. Nothing here may hold up the boot, on a read-only disk either: what could
// not be done comes back as errors for the console.
func Prepare(root string, doc *Document) []error {
	first := firstBoot(root, doc.Instance)
	var problems []error
	note := func(what string, err error) {
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", what, err))
		}
	}
	if doc.Hostname != "" {
		note("host name", replace(root+"/etc/hostname", doc.Hostname+"\n"))
	}
	note("hosts", writeOwned(root+"/etc/hosts", doc.Hosts, first))
	note("name servers", writeOwned(root+"/etc/resolv.conf", doc.Resolv, first))
	if first {
		note("machine id", writeMachineID(root, doc.Instance))
	}
	if doc.Twin != nil && !twin.LeftToScript(root, doc.Instance, *doc.Twin) {
		note("the user "+doc.Twin.Name, twin.Ensure(root, *doc.Twin))
	}
	if first {
		// Last, so that a first boot cut short is done again as one.
		note("instance", writeInstance(root, doc.Instance))
	}
	return problems
}

// copyJournalToConsole lets what services say outlive the machine: the host keeps the console's log, the journal may be
// in memory. Below /run, so that the image's own files stay as they are. Source: journald.conf(5).
func copyJournalToConsole(root string) error {
	dir := root + "/run/systemd/journald.conf.d"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text := "# written by berth\n[Journal]\nForwardToConsole=yes\nMaxLevelConsole=info\n"
	return files.Write(dir+"/50-berth.conf", []byte(text), files.Attr{Mode: 0o644})
}

// maskWithoutKmod keeps systemd from failing at a unit of its own in an image without kmod, as those made for containers
// are: it means to ask for kernel modules wherever the kernel is the machine's. Source: systemd.unit(5), masked units.
func maskWithoutKmod(root string) error {
	for _, path := range []string{"/bin/kmod", "/usr/bin/kmod", "/sbin/kmod", "/usr/sbin/kmod"} {
		if info, err := os.Stat(root + path); err == nil && info.Mode().IsRegular() {
			return nil
		}
	}
	dir := root + "/run/systemd/system"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Symlink("/dev/null", dir+"/kmod-static-nodes.service")
}

func firstBoot(root, instance string) bool {
	data, err := files.Read(root + instancePath)
	return err != nil || strings.TrimSuffix(string(data), "\n") != instance
}

func writeInstance(root, instance string) error {
	dir := filepath.Dir(root + instancePath)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return err
	}
	return files.Write(root+instancePath, []byte(instance+"\n"), files.Attr{Mode: 0o600})
}

// writeOwned follows the ownership rule of docs/protocol.md. A symbolic link that stands there after the first boot
// is the user's, though it dangle: systemd-resolved links resolv.conf into /run, which is empty now.
func writeOwned(path, text string, first bool) error {
	if text == "" {
		return nil
	}
	if !first {
		info, err := os.Lstat(path)
		if err == nil && !(info.Mode().IsRegular() && marked(path)) {
			return nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if !strings.HasPrefix(text, ownershipMark) {
		text = ownershipMark + "\n" + text
	}
	if !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	return replace(path, text)
}

func marked(path string) bool {
	data, err := files.Read(path)
	line, _, _ := strings.Cut(string(data), "\n")
	return err == nil && line == ownershipMark
}

// writeMachineID gives this instance an id of its own, the same at a repeated first boot, so that clones differ.
// An image that brings one (or one that dbus made) would give it to all its machines.
func writeMachineID(root, instance string) error {
	sum := sha256.Sum256([]byte("berth machine-id " + instance))
	// Source: machine-id(5): 32 hexadecimal digits; marked as a version 4 UUID, as systemd does.
	sum[6] = sum[6]&0x0f | 0x40
	sum[8] = sum[8]&0x3f | 0x80
	text := hex.EncodeToString(sum[:16]) + "\n"
	err := replaceMode(root+"/etc/machine-id", text, 0o444)
	dbus := root + "/var/lib/dbus/machine-id"
	if info, statErr := os.Lstat(dbus); statErr == nil && info.Mode().IsRegular() {
		err = errors.Join(err, replaceMode(dbus, text, 0o444))
	}
	return err
}

func replace(path, text string) error { return replaceMode(path, text, 0o644) }

// replaceMode makes path a regular file that holds text, and does nothing when it is one. It is no error that an image
// has no /etc on a disk that can't be written: who boots such a thing wants it so, and is told all the same.
func replaceMode(path, text string, mode fs.FileMode) error {
	if info, err := os.Lstat(path); err == nil && info.Mode().IsRegular() {
		if data, err := files.Read(path); err == nil && string(data) == text {
			return nil
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return files.Write(path, []byte(text), files.Attr{Mode: mode, UID: os.Geteuid(), GID: os.Getegid()})
}
