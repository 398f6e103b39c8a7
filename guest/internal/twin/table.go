package twin

import (
	"errors"
	"io/fs"
	"slices"
	"strings"

	"berth.dev/guest/internal/files"
)

// Source: passwd(5), group(5), gshadow(5), shadow(5).
const (
	passwdFields = 7
	groupFields  = 4
	shadowFields = 9
)

// row is one line, split at its colons.
type row []string

func (r row) String() string { return strings.Join(r, ":") }

// withMember gives a group's row (group or gshadow: the members come last) with name among the members.
func (r row) withMember(name string) row {
	last := len(r) - 1
	var members []string
	if r[last] != "" {
		members = strings.Split(r[last], ",")
	}
	if slices.Contains(members, name) {
		return r
	}
	changed := slices.Clone(r)
	changed[last] = strings.Join(append(members, name), ",")
	return changed
}

// table is one of the account files. A line that is none of its kind (a comment, a NIS marker, damage) is kept as
// it is and never matches.
type table struct {
	rows    []row
	fields  int
	exists  bool
	changed bool
	err     error
}

// load never fails: a file that can't be read is remembered and makes save fail, so it is not overwritten.
func load(path string, fields int) *table {
	t := &table{fields: fields}
	data, err := files.Read(path)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			t.err = err
		}
		return t
	}
	t.exists = true
	if text := strings.TrimSuffix(string(data), "\n"); text != "" {
		for line := range strings.SplitSeq(text, "\n") {
			t.rows = append(t.rows, strings.Split(line, ":"))
		}
	}
	return t
}

// find gives the index of the first row whose field is value, or -1.
func (t *table) find(field int, value string) int {
	return slices.IndexFunc(t.rows, func(r row) bool { return len(r) == t.fields && r[field] == value })
}

func (t *table) insert(at int, r row) {
	t.rows = slices.Insert(t.rows, at, r)
	t.changed = true
}

func (t *table) replace(at int, r row) {
	if !slices.Equal(t.rows[at], r) {
		t.rows[at] = r
		t.changed = true
	}
}

func (t *table) move(from, to int) {
	r := t.rows[from]
	t.rows = slices.Insert(slices.Delete(t.rows, from, from+1), to, r)
	t.changed = true
}

// save writes the table if it has changed, with the owner and mode that the file had, or attr for a new one.
func (t *table) save(path string, attr files.Attr) error {
	if t.err != nil || !t.changed {
		return t.err
	}
	var text strings.Builder
	for _, r := range t.rows {
		text.WriteString(r.String())
		text.WriteByte('\n')
	}
	sync := attr.Sync
	attr = files.Keep(path, attr)
	attr.Sync = sync
	return files.Write(path, []byte(text.String()), attr)
}
