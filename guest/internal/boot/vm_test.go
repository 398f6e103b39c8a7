package boot

import (
	"strings"
	"testing"
)

func withVM(vm string) []byte { return []byte(`{"schema": 1, "instance": "i", "vm": ` + vm + `}`) }

func TestParseVM(t *testing.T) {
	doc, err := Parse(withVM(`{"root": "root", "modules": null, "check": true, "unixNanos": 1700000000000000001,
	 "mounts": [{"tag": "share0", "target": "/home/bob", "type": "virtiofs", "readOnly": true, "file": null},
	            {"tag": "share1", "target": "/etc/x", "type": "9p", "file": "x"}],
	 "network": {"mac": "52:54:00:12:ab:CD", "ip": "10.89.0.5", "prefix": 16, "gateway": null}}`))
	if err != nil {
		t.Fatal(err)
	}
	vm := doc.VM
	if vm.Root != "root" || vm.Modules != nil || !vm.Check || vm.UnixNanos != 1700000000000000001 {
		t.Errorf("%+v", vm)
	}
	if m := vm.Mounts; len(m) != 2 || !m[0].ReadOnly || m[0].File != nil || m[1].File == nil || *m[1].File != "x" {
		t.Errorf("%+v", m)
	}
	if n := vm.Network; n.MAC != (MAC{0x52, 0x54, 0, 0x12, 0xab, 0xcd}) || n.IP != (IPv4{10, 89, 0, 5}) || n.Gateway != (IPv4{}) {
		t.Errorf("%+v", n)
	}
	if doc, err := Parse([]byte(full)); err != nil || doc.VM != nil {
		t.Error("a container's document has no vm", err)
	}
}

func TestParseChanges(t *testing.T) {
	doc, err := Parse(withVM(`{"root": "r", "changes": {"template": "t", "output": "o", "exclude": ["ZXRjL/8=", "cnVu"]}}`))
	if err != nil {
		t.Fatal(err)
	}
	if c := doc.VM.Changes; c.Template != "t" || c.Output != "o" || len(c.Exclude) != 2 || string(c.Exclude[0]) != "etc/\xff" {
		t.Errorf("%+v", c)
	}
}

func TestParseVMRefuses(t *testing.T) {
	mount := func(members string) string { return `{"root": "r", "mounts": [{` + members + `}]}` }
	network := func(members string) string { return `{"root": "r", "network": {` + members + `}}` }
	for text, want := range map[string]string{
		`{}`:                                                                 "no root disk",
		mount(`"tag": "", "target": "/a"`):                                   "tag",
		mount(`"tag": "../x", "target": "/a"`):                               "tag",
		mount(`"tag": "..", "target": "/a"`):                                 "tag",
		mount(`"tag": "t", "target": "a"`):                                   "target",
		mount(`"tag": "t", "target": "/a", "type": "x"`):                     "type",
		mount(`"tag": "t", "target": "/a", "type": "9p", "file": "a/b"`):     "file",
		mount(`"tag": "t", "target": "/a", "type": "9p", "file": ".."`):      "file",
		`{"root": "r", "changes": {"template": "t"}}`:                        "no disks",
		network(`"mac": "52:54:00:12:ab", "ip": "1.2.3.4"`):                  "MAC",
		network(`"mac": "5254:0012:ab:cd", "ip": "1.2.3.4"`):                 "MAC",
		network(`"mac": "52:54:00:12:ab:cd", "ip": "1.2.3"`):                 "IPv4",
		network(`"mac": "52:54:00:12:ab:cd", "ip": "1.2.3.256"`):             "IPv4",
		network(`"mac": "52:54:00:12:ab:cd", "ip": "1.2.3.4", "prefix": 33`): "prefix",
	} {
		if _, err := Parse(withVM(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func TestInitOfAVMIsToldOfNoContainer(t *testing.T) {
	env := initEnv([]string{"HOME=/"}, []string{"A=b"}, "", "")
	for _, variable := range env {
		if strings.HasPrefix(variable, "container=") || strings.HasPrefix(variable, "NOTIFY_SOCKET=") {
			t.Error(variable)
		}
	}
}
