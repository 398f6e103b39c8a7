package halt

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestWritable(t *testing.T) {
	table := "none / rootfs rw 0 0\n/dev/vda / ext4 rw,relatime 0 0\nproc /proc proc rw 0 0\n/dev/vdb /lib/modules/6.1 ext4 ro,relatime 0 0\n" +
		`/dev/loop0 /mnt/a\040b\134c ext4 nosuid,rw 0 0` + "\nshort\n"
	if got := parseWritable(table); !slices.Equal(got, []string{"/", `/mnt/a b\c`}) {
		t.Errorf("%q", got)
	}
}

func TestOthersLive(t *testing.T) {
	proc := t.TempDir()
	put := func(pid, line string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(proc, pid), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, pid, "cmdline"), []byte(line), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("1", "/sbin/init\x00")
	put("2", "") // a thread of the kernel
	put("7", "berth-agent\x00serve\x00")
	if othersLive(proc, 7) {
		t.Error("nobody is left but process 1 and we")
	}
	put("9", "sleep\x001\x00")
	if !othersLive(proc, 7) {
		t.Error("9 lives")
	}
}
