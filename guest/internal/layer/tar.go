package layer

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// The kinds of members. Source: POSIX pax(1), "ustar Interchange Format".
const (
	kindFile        = '0'
	kindHardLink    = '1'
	kindSymlink     = '2'
	kindCharDevice  = '3'
	kindBlockDevice = '4'
	kindDirectory   = '5'
	kindFIFO        = '6'

	block     = 512
	nameRoom  = 100 // bytes of the old header's fields for names
	idRoom    = 0o7777777
	sizeRoom  = 0o77777777777
	paxXattr  = "SCHILY.xattr."
	endBlocks = 2
)

// piece is a part of a sparse file that has data.
type piece struct{ offset, length int64 }

// member is one member without its data, as src/berth/oci/tarwriter.py has it: what the old header has no room for
// goes into PAX records. size: of the whole file. sparse: where the data goes when the file has holes, else nil.
type member struct {
	name         string
	kind         byte
	mode         uint32
	uid, gid     uint32
	size         int64
	seconds      int64
	nanos        int64
	link         string
	major, minor uint64
	xattrs       map[string]string
	sparse       []piece
}

// encode gives all that comes before the data: PAX records where needed, the header, a sparse file's map.
// Sources: POSIX pax(1), "pax Header Block"; GNU tar manual, "Storing Sparse Files", 1.0.
func (m *member) encode() []byte {
	name := m.name
	if m.kind == kindDirectory {
		name += "/"
	}
	var records []byte
	add := func(key, value string) { records = append(records, record(key, value)...) }
	size, sparseMap := m.size, []byte(nil)
	if m.sparse != nil {
		sparseMap = encodeMap(m.sparse)
		add("GNU.sparse.major", "1")
		add("GNU.sparse.minor", "0")
		add("GNU.sparse.name", name)
		add("GNU.sparse.realsize", strconv.FormatInt(m.size, 10))
		size = int64(len(sparseMap))
		for _, p := range m.sparse {
			size += p.length
		}
	}
	if !fits(name) {
		add("path", name)
	}
	if !fits(m.link) {
		add("linkpath", m.link)
	}
	for _, number := range []struct {
		key         string
		value, most int64
	}{{"uid", int64(m.uid), idRoom}, {"gid", int64(m.gid), idRoom}, {"size", size, sizeRoom}} {
		if number.value > number.most {
			add(number.key, strconv.FormatInt(number.value, 10))
		}
	}
	if m.nanos != 0 || m.seconds < 0 || m.seconds > sizeRoom {
		add("mtime", decimalTime(m.seconds, m.nanos))
	}
	for _, key := range sortedKeys(m.xattrs) {
		add(paxXattr+key, m.xattrs[key])
	}
	return slices.Concat(paxHeader(records), m.header(name, size), sparseMap)
}

func (m *member) header(name string, size int64) []byte {
	var head [block]byte
	copy(head[0:nameRoom], name)
	copy(head[157:157+nameRoom], m.link)
	fill(&head, 100, 8, uint64(m.mode))
	fill(&head, 108, 8, uint64(m.uid))
	fill(&head, 116, 8, uint64(m.gid))
	fill(&head, 124, 12, uint64(size))
	fill(&head, 136, 12, uint64(max(0, m.seconds)))
	head[156] = m.kind
	copy(head[257:265], "ustar\x0000")
	fill(&head, 329, 8, m.major)
	fill(&head, 337, 8, m.minor)
	return seal(&head)
}

func paxHeader(records []byte) []byte {
	if len(records) == 0 {
		return nil
	}
	var head [block]byte
	copy(head[:], "pax")
	fill(&head, 100, 8, 0o644)
	fill(&head, 108, 8, 0)
	fill(&head, 116, 8, 0)
	fill(&head, 124, 12, uint64(len(records)))
	fill(&head, 136, 12, 0)
	head[156] = 'x'
	copy(head[257:265], "ustar\x0000")
	return slices.Concat(seal(&head), records, padding(int64(len(records))))
}

// record encodes `LENGTH key=value`; the length counts its own digits.
func record(key, value string) string {
	rest := " " + key + "=" + value + "\n"
	length := len(rest)
	for len(strconv.Itoa(length))+len(rest) != length {
		length = len(strconv.Itoa(length)) + len(rest)
	}
	return strconv.Itoa(length) + rest
}

func encodeMap(pieces []piece) []byte {
	text := strconv.AppendInt(nil, int64(len(pieces)), 10)
	text = append(text, '\n')
	for _, p := range pieces {
		text = fmt.Appendf(text, "%d\n%d\n", p.offset, p.length)
	}
	return append(text, padding(int64(len(text)))...)
}

// decimalTime writes a time as PAX wants it: before 1970 the whole of it is negative, fraction and all.
func decimalTime(seconds, nanos int64) string {
	sign := ""
	if seconds < 0 {
		sign, seconds = "-", -seconds
		if nanos > 0 {
			seconds, nanos = seconds-1, 1_000_000_000-nanos
		}
	}
	return fmt.Sprintf("%s%d.%09d", sign, seconds, nanos)
}

// fits: within the old header's field, and in letters that mean the same to every reader.
func fits(name string) bool {
	return len(name) <= nameRoom && strings.IndexFunc(name, func(r rune) bool { return r >= 0x80 }) < 0
}

// fill writes an octal number; one that is too large is all sevens here and whole in a PAX record.
func fill(head *[block]byte, at, width int, value uint64) {
	value = min(value, 1<<(3*(width-1))-1)
	for i := at + width - 2; i >= at; i-- {
		head[i] = '0' + byte(value&7)
		value >>= 3
	}
}

func seal(head *[block]byte) []byte {
	copy(head[148:156], "        ")
	sum := uint64(0)
	for _, b := range head {
		sum += uint64(b)
	}
	copy(head[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return head[:]
}

// padding fills the last block of size bytes of data.
func padding(size int64) []byte { return make([]byte, (block-size%block)%block) }

func sortedKeys(values map[string]string) []string {
	keys := make([]string, 0, len(values))
	for key := range values {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}
