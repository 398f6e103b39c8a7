package memory

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"
)

// What is dropped is read again: code, constants and what was allocated are all still there.
func TestGiveBack(t *testing.T) {
	kept := bytes.Repeat([]byte("kept"), 1<<18)
	for range 3 {
		GiveBack()
		if strings.Count(string(kept), "kept") != 1<<18 {
			t.Fatal("memory was lost")
		}
	}
}

const smaps = `00400000-005b6000 r-xp 00000000 fe:00 1 /usr/bin/a
Rss:                1000 kB
Anonymous:             0 kB
005b6000-00600000 r--p 001b6000 fe:00 1 /usr/bin/a
Anonymous:             8 kB
00600000-00700000 rw-p 001b6000 fe:00 1 /usr/bin/a
Anonymous:             0 kB
00700000-00800000 r--p 001b6000 fe:00 1 /usr/bin/a
Anonymous:             0 kB
c000000000-c000400000 rw-p 00000000 00:00 0
Anonymous:             0 kB
7ffd000-7ffe000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
x-y r-xp 00000000 fe:00 1 /usr/bin/a
Anonymous:             0 kB
`

func TestDroppable(t *testing.T) {
	path := t.TempDir() + "/smaps"
	if err := os.WriteFile(path, []byte(smaps), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := droppable(path); !slices.Equal(got, []mapping{{0x400000, 0x5b6000}, {0x700000, 0x800000}}) {
		t.Errorf("%x", got)
	}
	if got := droppable(path + "x"); got != nil {
		t.Error(got)
	}
}
