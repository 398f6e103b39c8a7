package boot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"berth.dev/guest/internal/twin"
)

const (
	// DocumentPath is where the host puts the boot document of a container, and the initramfs's stage that of a VM.
	DocumentPath = "/run/berth/boot.json"
	// ListenFD is where the host hands over the agent's listening socket.
	ListenFD = 3

	schema      = 1
	maxDocument = 1 << 20
)

// Document is the boot document of docs/protocol.md.
type Document struct {
	Schema int `json:"schema"`
	// Instance is the machine's id; a new one means first boot.
	Instance string     `json:"instance"`
	Hostname string     `json:"hostname"`
	Hosts    string     `json:"hosts"`
	Resolv   string     `json:"resolv"`
	Twin     *twin.User `json:"twin"`
	SSHAgent bool       `json:"sshAgent"`
	Env      []string   `json:"env"`
	// Init is the argv of the image's init; empty when it has none.
	Init []string `json:"init"`
	// VM is nil in a container.
	VM *VM `json:"vm"`
}

// Parse reads a boot document. Members it does not know are ignored: a newer host may send more.
func Parse(data []byte) (*Document, error) {
	var doc Document
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("the boot document is damaged: %w", err)
	}
	if doc.Schema != schema {
		return nil, fmt.Errorf("the boot document has schema %d, this agent reads %d: berth was updated or downgraded, restart the machine", doc.Schema, schema)
	}
	if err := doc.check(); err != nil {
		return nil, fmt.Errorf("the boot document is not valid: %w", err)
	}
	return &doc, nil
}

func (d *Document) check() error {
	if d.Instance == "" || strings.ContainsAny(d.Instance, "\n\x00/") {
		return fmt.Errorf("instance is %q", d.Instance)
	}
	if strings.ContainsAny(d.Hostname, " \t\n\x00/") {
		return fmt.Errorf("hostname is %q", d.Hostname)
	}
	for _, variable := range d.Env {
		if strings.Index(variable, "=") < 1 || strings.Contains(variable, "\x00") {
			return fmt.Errorf("env holds %q, which is not K=V", variable)
		}
	}
	for _, arg := range d.Init {
		if strings.Contains(arg, "\x00") {
			return errors.New("init holds a NUL")
		}
	}
	if len(d.Init) > 0 && d.Init[0] == "" {
		return errors.New("init has no program")
	}
	if d.VM != nil {
		if err := d.VM.check(); err != nil {
			return err
		}
	}
	if d.Twin != nil {
		return d.Twin.Check()
	}
	return nil
}

// Load reads the boot document at path.
func Load(path string) (*Document, error) {
	data, err := Read(path)
	if err != nil {
		return nil, err
	}
	return Parse(data)
}

// Read gives the text of the boot document at path.
func Read(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("no boot document: %w", err)
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("can't read the boot document %s: %w", path, err)
	}
	if len(data) > maxDocument {
		return nil, fmt.Errorf("the boot document %s is longer than %d bytes", path, maxDocument)
	}
	return data, nil
}
