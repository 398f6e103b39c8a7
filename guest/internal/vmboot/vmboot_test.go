package vmboot

import (
	"bytes"
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"berth.dev/guest/internal/boot"
	"berth.dev/guest/internal/layer"
)

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestParseOrder(t *testing.T) {
	got := parseOrder("/modules/virtio.ko\nmodules/virtio_blk.ko\n\n--\n/modules/fuse.ko\n--\n/modules/virtiofs.ko")
	if !slices.Equal(got.early, []string{"/modules/virtio.ko", "/modules/virtio_blk.ko"}) ||
		!slices.Equal(got.late, []string{"/modules/fuse.ko", "/modules/virtiofs.ko"}) {
		t.Errorf("%+v", got)
	}
	if got, err := readOrder(t.TempDir() + "/none"); err != nil || got.early != nil || got.late != nil {
		t.Error("a kernel with everything built in has no list", got, err)
	}
	if _, err := readOrder(t.TempDir()); err == nil {
		t.Error("a list that can't be read was passed over")
	}
}

func TestFindBy(t *testing.T) {
	class := t.TempDir()
	put(t, class+"/vda/serial", "modules") // the kernel writes no end of line here
	put(t, class+"/vdb/serial", "root")
	put(t, class+"/vdc/size", "0\n")
	put(t, class+"/vport1p1/name", "berth.agent\n")
	for value, want := range map[string]string{"root": "vdb", "modules": "vda", "roo": "", "": ""} {
		if got := findBy(class, "serial", value); got != want {
			t.Errorf("%q: %q, want %q", value, got, want)
		}
	}
	if got := findBy(class, "name", "berth.agent"); got != "vport1p1" {
		t.Error(got)
	}
	if got := findBy(class+"/none", "name", "x"); got != "" {
		t.Error(got)
	}
}

func TestJudge(t *testing.T) {
	for status, fine := range map[int]bool{0: true, 1: true, 2: true, 3: true, 4: false, 5: false, 8: false, 12: false, 128: false} {
		if err := judge(status); (err == nil) != fine {
			t.Errorf("status %d: %v", status, err)
		}
	}
}

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	put(t, dir+"/init", "agent")
	put(t, dir+"/modules/a.ko", "x")
	put(t, dir+"/deep/er/file", "x")
	if err := os.Symlink(dir+"/init", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	var stat syscall.Stat_t
	if err := syscall.Stat(dir, &stat); err != nil {
		t.Fatal(err)
	}
	sweep(dir, stat.Dev+1, nil)
	if entries, _ := os.ReadDir(dir); len(entries) != 4 {
		t.Fatal("it went to another device", entries)
	}
	sweep(dir, stat.Dev, map[string]bool{dir + "/init": true})
	entries, _ := os.ReadDir(dir)
	if len(entries) != 1 || entries[0].Name() != "init" {
		t.Error(entries)
	}
}

func TestShareOptions(t *testing.T) {
	kind, data, flags := shareOptions(boot.Mount{Tag: "share0", Type: boot.VirtioFS})
	if kind != "virtiofs" || data != "" || flags != syscall.MS_NOSUID|syscall.MS_NODEV {
		t.Error(kind, data, flags)
	}
	kind, data, flags = shareOptions(boot.Mount{Tag: "share0", Type: boot.NineP, ReadOnly: true})
	if kind != "9p" || !strings.HasPrefix(data, "trans=virtio,version=9p2000.L,") || flags&syscall.MS_RDONLY == 0 {
		t.Error(kind, data, flags)
	}
}

func TestBindFileFollowsNoLink(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("/etc/passwd", dir+"/f"); err != nil {
		t.Fatal(err)
	}
	if err := bindFile(dir+"/f", dir+"/target"); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Error(err)
	}
	if err := bindFile(dir+"/none", dir+"/target"); err == nil {
		t.Error("bound what is not there")
	}
}

func TestKeepModulesMounted(t *testing.T) {
	root := t.TempDir()
	if err := keepModulesMounted(root); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(root + "/run/systemd/system/usr-lib-modules-.mount.d/50-berth.conf")
	if err != nil || !strings.Contains(string(text), "[Unit]\nDefaultDependencies=no\n") {
		t.Errorf("%s %v", text, err)
	}
}

// The bytes are those that strace shows of ip(8): little-endian, as both architectures are.
func TestNetlinkRequests(t *testing.T) {
	for name, test := range map[string]struct {
		got  []byte
		want string
	}{
		"link": {setUp(2), "20000000 1000 0500 00000000 00000000" +
			"00 00 0000 02000000 01000000 01000000"},
		"address": {addAddress(2, boot.IPv4{10, 89, 0, 5}, 24), "30000000 1400 0505 00000000 00000000" +
			"02 18 00 00 02000000" + "0800 0200 0a590005" + "0800 0100 0a590005" + "0800 0400 0a5900ff"},
		"point to point": {addAddress(2, boot.IPv4{10, 0, 0, 1}, 32), "28000000 1400 0505 00000000 00000000" +
			"02 20 00 00 02000000" + "0800 0200 0a000001" + "0800 0100 0a000001"},
		"route": {addDefaultRoute(3, boot.IPv4{10, 89, 0, 1}), "2c000000 1800 0505 00000000 00000000" +
			"02 00 00 00 fe 03 00 01 00000000" + "0800 0500 0a590001" + "0800 0400 03000000"},
	} {
		want, err := hex.DecodeString(strings.ReplaceAll(test.want, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(test.got, want) {
			t.Errorf("%s:\n%x, want\n%x", name, test.got, want)
		}
	}
}

func TestAcknowledgement(t *testing.T) {
	answer := make([]byte, 36)
	answer[4] = syscall.NLMSG_ERROR
	if err := parseAcknowledgement(answer); err != nil {
		t.Error(err)
	}
	copy(answer[16:], []byte{0xef, 0xff, 0xff, 0xff}) // -17
	if err := parseAcknowledgement(answer); err != syscall.EEXIST {
		t.Error(err)
	}
	if parseAcknowledgement(answer[:18]) == nil || parseAcknowledgement(make([]byte, 36)) == nil {
		t.Error("believed what is no acknowledgement")
	}
}

func TestFormatMAC(t *testing.T) {
	if got := formatMAC(boot.MAC{0x52, 0x54, 0, 0x0a, 0xbc, 1}); got != "52:54:00:0a:bc:01" {
		t.Error(got)
	}
}

func TestNextPause(t *testing.T) {
	pause := time.Duration(0)
	var total time.Duration
	for range 20 {
		pause = nextPause(pause, time.Second)
		total += pause
	}
	if pause != lastPause || total < 5*time.Minute {
		t.Errorf("a loop of crashes costs too much: %s, %s", pause, total)
	}
	if got := nextPause(pause, healthyAfter); got != firstPause {
		t.Errorf("an agent that ran well is back after %s", got)
	}
}

func TestVerdictOfTheChanges(t *testing.T) {
	for said, want := range map[verdict]string{
		{Summary: layer.Summary{Size: 1024, Entries: 2, Whiteouts: 1}}: `{"size":1024,"entries":2,"whiteouts":1,"leftOut":0}`,
		{Error: "it is damaged"}:                 `{"size":0,"entries":0,"whiteouts":0,"leftOut":0,"error":"it is damaged"}`,
		{Error: strings.Repeat("x", outputHead)}: `{"error": "no words for it"}`,
	} {
		path := t.TempDir() + "/disk"
		put(t, path, strings.Repeat("~", 2*outputHead))
		file, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if err := writeVerdict(file, said); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil || string(bytes.TrimRight(data[:outputHead], "\x00")) != want || data[outputHead] != '~' {
			t.Errorf("%v %q", err, data[:outputHead])
		}
	}
}
