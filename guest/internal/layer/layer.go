// Package layer writes what a machine has changed as a layer of an image (OCI image-spec v1.1, layer.md): `berth commit`
// of a VM, in a VM of its own that has the machine's disk and the template that the disk was made on (docs/building.md).
// vmboot calls it. For containers src/berth/oci/diff.py does the same.
//
// The disk is a copy of the template that has been written to, so a file is the template's when it has the same inode
// number and the same times of change: the kernel sets ctime at each change of content, owner, mode, attributes or
// name, and no program can set it back. What a directory holds is compared name by name; one that was moved or made
// anew (another inode number) hides what the image has there, and all in it is written.
//
// Nobody else changes either tree meanwhile, and no component of a path that is walked is a symbolic link, so that
// whole paths are as good as open directories.
package layer

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
)

const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"

	depthMax  = 256       // directories in each other: no layer that is deeper can be unpacked again
	pathMax   = 4000      // bytes, of the 4096 that the kernel takes
	linksMax  = 1_000_000 // files with several names that are remembered; further ones are stored twice
	piecesMax = 10_000    // of a sparse file
	holesMin  = 64 << 10  // bytes of holes that make a file a sparse one
	bufferLen = 1 << 20

	capability = "security.capability"
	seekData   = 3 // Source: lseek(2), linux/fs.h
	seekHole   = 4
)

// modulesDirs are where berth mounts the modules of a VM's kernel. The directories made for that are not the machine's.
var modulesDirs = []string{"lib/modules", "usr/lib/modules"}

// Tree is what a layer is the difference to.
type Tree interface {
	// Names gives the sorted names in a directory.
	Names(path string) ([]string, error)
	// Stat describes a file itself, not what a link leads to; fs.ErrNotExist when it is not there.
	Stat(path string) (*syscall.Stat_t, error)
}

// Summary is what was written. LeftOut: files no layer can hold.
type Summary struct {
	Size      int64 `json:"size"`
	Entries   int   `json:"entries"`
	Whiteouts int   `json:"whiteouts"`
	LeftOut   int   `json:"leftOut"`
}

// Write writes the changes from base to the directory root, uncompressed; same trees, same bytes. exclude: paths
// relative to the root, neither they nor what is in them is looked at.
func Write(out io.Writer, root string, base Tree, exclude []string) (Summary, error) {
	w := &writer{
		out:     bufio.NewWriterSize(out, bufferLen),
		root:    root,
		base:    base,
		exclude: make(map[string]bool, len(exclude)),
		links:   map[uint64]string{},
	}
	for _, path := range exclude {
		w.exclude[strings.Trim(path, "/")] = true
	}
	if err := w.directory("", true, 0); err != nil {
		return Summary{}, err
	}
	if err := w.write(make([]byte, endBlocks*block)); err != nil {
		return Summary{}, err
	}
	return w.Summary, w.out.Flush()
}

// Directory is a Tree on a file system.
type Directory string

// Names implements Tree.
func (d Directory) Names(path string) ([]string, error) {
	entries, err := os.ReadDir(join(string(d), path)) // sorted
	names := make([]string, len(entries))
	for i, entry := range entries {
		names[i] = entry.Name()
	}
	return names, err
}

// Stat implements Tree.
func (d Directory) Stat(path string) (*syscall.Stat_t, error) {
	var status syscall.Stat_t
	if err := syscall.Lstat(join(string(d), path), &status); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return &status, nil
}

type writer struct {
	Summary
	out     *bufio.Writer
	root    string
	base    Tree
	exclude map[string]bool
	links   map[uint64]string // inode number to the first name
}

// directory writes what is in a directory. inBase: the base has this very directory, not only one of its name.
func (w *writer) directory(path string, inBase bool, depth int) error {
	if depth > depthMax || len(path) > pathMax {
		return fmt.Errorf("%.60q… is nested deeper than an image can hold", path)
	}
	own, err := Directory(w.root).Names(path)
	if err != nil {
		return err
	}
	var theirs []string
	if inBase {
		if theirs, err = w.base.Names(path); err != nil {
			return err
		}
	}
	for _, name := range union(own, theirs) {
		below := join(path, name)
		_, isOwn := slices.BinarySearch(own, name)
		_, isTheirs := slices.BinarySearch(theirs, name)
		switch {
		case w.exclude[below]:
		case strings.HasPrefix(name, whiteout):
			w.LeftOut++
		case !isOwn:
			err = w.mark(join(path, whiteout+name))
		default:
			err = w.own(below, isTheirs, depth)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// own writes what the machine has at a path, as far as it is not the base's.
func (w *writer) own(path string, inBase bool, depth int) error {
	status, err := Directory(w.root).Stat(path)
	if err != nil {
		return err
	}
	var theirs *syscall.Stat_t
	if inBase {
		if theirs, err = w.base.Stat(path); err != nil {
			return err
		}
	}
	isSame := theirs != nil && unchanged(status, theirs)
	if kindOf(status) != kindDirectory {
		if isSame {
			return nil
		}
		return w.node(path, status)
	}
	if theirs == nil && w.isMountPoint(path) {
		return nil
	}
	if !isSame {
		if err := w.member(path, status, kindDirectory, member{}); err != nil {
			return err
		}
	}
	continues := theirs != nil && kindOf(theirs) == kindDirectory && theirs.Ino == status.Ino
	if theirs != nil && !continues {
		if err := w.mark(join(path, opaque)); err != nil {
			return err
		}
	}
	return w.directory(path, continues, depth+1)
}

// unchanged says whether a file is the base's. Its number of names is not asked for: a change of it changes ctime.
func unchanged(a, b *syscall.Stat_t) bool {
	return a.Ino == b.Ino && a.Mode == b.Mode && a.Uid == b.Uid && a.Gid == b.Gid && a.Size == b.Size &&
		a.Rdev == b.Rdev && a.Mtim == b.Mtim && a.Ctim == b.Ctim
}

// isMountPoint says whether a new directory is only there because a kernel's modules were mounted in it.
func (w *writer) isMountPoint(path string) bool {
	folder := path[:max(0, strings.LastIndexByte(path, '/'))]
	isFolder := slices.Contains(modulesDirs, path)
	if !isFolder && !slices.Contains(modulesDirs, folder) {
		return false
	}
	names, err := Directory(w.root).Names(path)
	if err != nil || (len(names) > 0 && !isFolder) {
		return false
	}
	return !slices.ContainsFunc(names, func(name string) bool { return !w.isMountPoint(join(path, name)) })
}

// node writes all that is no directory.
func (w *writer) node(path string, status *syscall.Stat_t) error {
	kind := kindOf(status)
	if kind == 0 || kind == kindCharDevice && status.Rdev == 0 { // a socket; overlayfs's own whiteout
		w.LeftOut++
		return nil
	}
	if status.Nlink > 1 {
		if first, known := w.links[status.Ino]; known {
			return w.member(path, status, kindHardLink, member{link: first})
		}
		if len(w.links) < linksMax {
			w.links[status.Ino] = path
		}
	}
	switch kind {
	case kindFile:
		return w.file(path, status)
	case kindSymlink:
		target, err := os.Readlink(join(w.root, path))
		if err != nil {
			return err
		}
		return w.member(path, status, kind, member{link: target})
	case kindCharDevice, kindBlockDevice:
		return w.member(path, status, kind, member{major: major(status.Rdev), minor: minor(status.Rdev)})
	}
	return w.member(path, status, kind, member{})
}

func (w *writer) file(path string, status *syscall.Stat_t) error {
	file, err := os.OpenFile(join(w.root, path), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	sparse, err := pieces(file, status)
	if err != nil {
		return err
	}
	if err := w.member(path, status, kindFile, member{sparse: sparse}); err != nil {
		return err
	}
	if sparse == nil {
		sparse = []piece{{0, status.Size}}
	}
	total := int64(0)
	for _, p := range sparse {
		if err := w.copy(file, p); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		total += p.length
	}
	return w.write(padding(total))
}

func (w *writer) copy(file *os.File, p piece) error {
	copied, err := io.Copy(w.out, io.NewSectionReader(file, p.offset, p.length))
	w.Size += copied
	if err == nil && copied < p.length {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// member writes a header. more: what its kind has beside what status says.
func (w *writer) member(path string, status *syscall.Stat_t, kind byte, more member) error {
	if len(path) > pathMax {
		return fmt.Errorf("%.60q… is nested deeper than an image can hold", path)
	}
	more.name, more.kind = path, kind
	more.mode, more.uid, more.gid = status.Mode&0o7777, status.Uid, status.Gid
	more.seconds, more.nanos = int64(status.Mtim.Sec), int64(status.Mtim.Nsec)
	if kind == kindFile {
		more.size = status.Size
	}
	if kind == kindFile || kind == kindDirectory {
		xattrs, err := readXattrs(join(w.root, path))
		if err != nil {
			return err
		}
		more.xattrs = xattrs
	}
	w.Entries++
	return w.write(more.encode())
}

// mark writes a whiteout.
func (w *writer) mark(path string) error {
	w.Whiteouts++
	w.Entries++
	return w.write((&member{name: path, kind: kindFile}).encode())
}

func (w *writer) write(data []byte) error {
	w.Size += int64(len(data))
	_, err := w.out.Write(data)
	return err
}

// readXattrs gives the attributes that are in layers: the users' own, capabilities and access control lists.
func readXattrs(path string) (map[string]string, error) {
	list, err := xattr(func(buffer []byte) (int, error) { return syscall.Listxattr(path, buffer) })
	if errors.Is(err, syscall.ENOTSUP) || len(list) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "listxattr", Path: path, Err: err}
	}
	found := map[string]string{}
	for key := range strings.SplitSeq(strings.TrimSuffix(list, "\x00"), "\x00") {
		if !isKept(key) {
			continue
		}
		value, err := xattr(func(buffer []byte) (int, error) { return syscall.Getxattr(path, key, buffer) })
		if err != nil {
			return nil, &os.PathError{Op: "getxattr", Path: path, Err: err}
		}
		if key == capability {
			value = anyRoot(value)
		}
		found[key] = value
	}
	return found, nil
}

func isKept(key string) bool {
	switch key {
	case capability, "system.posix_acl_access", "system.posix_acl_default":
		return true
	}
	// A PAX record can't hold a key with an equals sign, and overlayfs's marks would be taken for its own.
	return strings.HasPrefix(key, "user.") && !strings.HasPrefix(key, "user.overlay.") && !strings.Contains(key, "=")
}

// anyRoot takes the namespace's root out of a file's capabilities: what was granted in the machine is meant for any.
// Source: linux/capability.h, vfs_ns_cap_data (revision 3) and vfs_cap_data (revision 2).
func anyRoot(value string) string {
	if len(value) != 24 || value[3] != 3 {
		return value
	}
	return value[:3] + "\x02" + value[4:20]
}

// xattr asks for the size first. Nobody changes it meanwhile.
func xattr(get func([]byte) (int, error)) (string, error) {
	size, err := get(nil)
	if err != nil || size == 0 {
		return "", err
	}
	buffer := make([]byte, size)
	size, err = get(buffer)
	if err != nil {
		return "", err
	}
	return string(buffer[:size]), nil
}

// pieces says where a file with holes has data; nil when it is to be stored as it is.
func pieces(file *os.File, status *syscall.Stat_t) ([]piece, error) {
	if status.Size-status.Blocks*512 < holesMin {
		return nil, nil
	}
	found := []piece{}
	for at := int64(0); at < status.Size; {
		start, err := file.Seek(at, seekData)
		if errors.Is(err, syscall.ENXIO) { // nothing but a hole
			break
		}
		if err != nil {
			return nil, err
		}
		end, err := file.Seek(start, seekHole)
		if err != nil {
			return nil, err
		}
		at = min(end, status.Size)
		if at <= start {
			break
		}
		found = append(found, piece{start, at - start})
		if len(found) > piecesMax {
			return nil, nil
		}
	}
	// GNU tar's way to say where the file ends, which some readers rely on.
	if last := len(found) - 1; last < 0 || found[last].offset+found[last].length != status.Size {
		found = append(found, piece{status.Size, 0})
	}
	return found, nil
}

// kindOf gives the kind of a member for a file; 0 for what no layer can hold.
func kindOf(status *syscall.Stat_t) byte {
	switch status.Mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		return kindFile
	case syscall.S_IFDIR:
		return kindDirectory
	case syscall.S_IFLNK:
		return kindSymlink
	case syscall.S_IFIFO:
		return kindFIFO
	case syscall.S_IFCHR:
		return kindCharDevice
	case syscall.S_IFBLK:
		return kindBlockDevice
	}
	return 0
}

// Source: makedev(3).
func major(dev uint64) uint64 { return dev>>8&0xfff | dev>>32&0xfffff000 }

func minor(dev uint64) uint64 { return dev&0xff | dev>>12&0xffffff00 }

// union merges two sorted lists.
func union(a, b []string) []string {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

func join(folder, name string) string {
	if folder == "" || name == "" {
		return folder + name
	}
	return folder + "/" + name
}
