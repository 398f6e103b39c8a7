package boot

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// The types of a Mount.
const (
	VirtioFS = "virtiofs"
	NineP    = "9p"
)

// VM is what only a virtual machine's boot document has: where its disks, folders and network are (docs/protocol.md).
type VM struct {
	// Root and Modules are serial numbers of virtio block devices.
	Root      string   `json:"root"`
	Modules   *string  `json:"modules"`
	Check     bool     `json:"check"`
	Mounts    []Mount  `json:"mounts"`
	Network   *Network `json:"network"`
	UnixNanos int64    `json:"unixNanos"`
	// Changes is set in a VM that is no machine's: it only reads what a machine has changed on its root disk.
	Changes *Changes `json:"changes"`
}

// Changes says what they are the difference to and where they go: Template and Output are serial numbers of virtio block
// devices. Exclude: paths below the root that are not looked at.
type Changes struct {
	Template string   `json:"template"`
	Output   string   `json:"output"`
	Exclude  [][]byte `json:"exclude"`
}

// Mount is a folder of the host's, or one File in it.
type Mount struct {
	Tag      string  `json:"tag"`
	Target   string  `json:"target"`
	Type     string  `json:"type"`
	ReadOnly bool    `json:"readOnly"`
	File     *string `json:"file"`
}

// Network is the one interface. Gateway is the zero address when there is no way out.
type Network struct {
	MAC     MAC  `json:"mac"`
	IP      IPv4 `json:"ip"`
	Prefix  int  `json:"prefix"`
	Gateway IPv4 `json:"gateway"`
}

func (v *VM) check() error {
	if v.Root == "" {
		return errors.New("vm names no root disk")
	}
	for _, mount := range v.Mounts {
		if err := mount.check(); err != nil {
			return err
		}
	}
	if v.Changes != nil && (v.Changes.Template == "" || v.Changes.Output == "") {
		return errors.New("changes name no disks")
	}
	if v.Network != nil && (v.Network.Prefix < 0 || v.Network.Prefix > 32) {
		return fmt.Errorf("the network's prefix is %d", v.Network.Prefix)
	}
	return nil
}

func (m *Mount) check() error {
	switch {
	case m.Tag == "" || m.Tag == "." || m.Tag == ".." || strings.ContainsAny(m.Tag, "/\x00"):
		return fmt.Errorf("a mount's tag is %q", m.Tag)
	case !strings.HasPrefix(m.Target, "/") || strings.Contains(m.Target, "\x00"):
		return fmt.Errorf("a mount's target is %q", m.Target)
	case m.Type != VirtioFS && m.Type != NineP:
		return fmt.Errorf("a mount's type is %q", m.Type)
	case m.File != nil && (*m.File == "" || *m.File == "." || *m.File == ".." || strings.ContainsAny(*m.File, "/\x00")):
		return fmt.Errorf("a mount's file is %q", *m.File)
	}
	return nil
}

// IPv4 is an address in network byte order. (Package net costs memory in a process that must be small.)
type IPv4 [4]byte

// UnmarshalText reads 10.0.0.1.
func (a *IPv4) UnmarshalText(text []byte) error {
	parts := strings.Split(string(text), ".")
	if len(parts) != len(a) {
		return fmt.Errorf("%q is no IPv4 address", text)
	}
	for i, part := range parts {
		value, err := strconv.ParseUint(part, 10, 8)
		if err != nil {
			return fmt.Errorf("%q is no IPv4 address", text)
		}
		a[i] = byte(value)
	}
	return nil
}

// MAC is an Ethernet address.
type MAC [6]byte

// UnmarshalText reads 52:54:00:12:34:56.
func (m *MAC) UnmarshalText(text []byte) error {
	raw, err := hex.DecodeString(strings.ReplaceAll(string(text), ":", ""))
	if err != nil || len(raw) != len(m) || len(text) != len(m)*3-1 {
		return fmt.Errorf("%q is no MAC address", text)
	}
	*m = MAC(raw)
	return nil
}
