package vmboot

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"runtime/debug"
	"syscall"

	"berth.dev/guest/internal/boot"
	"berth.dev/guest/internal/layer"
)

const (
	templateRoot = "/template"
	// outputHead is the part of the output disk that says how it went; the layer follows.
	outputHead = 4096
	// Said on the console: the host knows then that the boot has not got stuck.
	readingChanges = "berth: reading the changes\n"

	gcPercent = 100
)

// verdict is the JSON object in the output disk's head, filled up with zeros.
type verdict struct {
	layer.Summary
	Error string `json:"error,omitempty"`
}

// writeChanges is all that a VM does that was started for the changes of a machine's disk (docs/protocol.md): nothing
// on the disk is run. Its root stays the initramfs.
func writeChanges(vm *boot.VM) error {
	takeConsole()
	_, _ = os.Stderr.WriteString(readingChanges)
	debug.SetGCPercent(gcPercent) // this one may last
	device, err := waitDisk(vm.Changes.Output)
	if err != nil {
		return err
	}
	output, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer output.Close()
	summary, err := packChanges(vm, output)
	said := verdict{Summary: summary}
	if err != nil {
		said.Error = err.Error()
	}
	return errors.Join(err, writeVerdict(output, said))
}

func packChanges(vm *boot.VM, output *os.File) (layer.Summary, error) {
	if err := mountReadOnly(vm); err != nil {
		return layer.Summary{}, err
	}
	if _, err := output.Seek(outputHead, io.SeekStart); err != nil {
		return layer.Summary{}, err
	}
	exclude := make([]string, len(vm.Changes.Exclude))
	for i, path := range vm.Changes.Exclude {
		exclude[i] = string(path)
	}
	return layer.Write(output, newRoot, layer.Directory(templateRoot), exclude)
}

// mountReadOnly mounts the machine's disk, with what is left in its journal, and the template it was made on.
func mountReadOnly(vm *boot.VM) error {
	const flags = syscall.MS_RDONLY | syscall.MS_NODEV | syscall.MS_NOSUID | syscall.MS_NOEXEC | syscall.MS_NOATIME
	if err := mountDisk(vm, flags, ""); err != nil {
		return err
	}
	device, err := waitDisk(vm.Changes.Template)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(templateRoot, 0o755); err != nil {
		return err
	}
	return mount(device, templateRoot, "ext4", flags, "noload")
}

// writeVerdict comes last: without it the host believes nothing.
func writeVerdict(output *os.File, said verdict) error {
	if err := output.Sync(); err != nil {
		said = verdict{Error: err.Error()}
	}
	text, err := json.Marshal(said)
	if err != nil {
		return err
	}
	if len(text) > outputHead {
		text = []byte(`{"error": "no words for it"}`)
	}
	head := append(text, bytes.Repeat([]byte{0}, outputHead-len(text))...)
	if _, err := output.WriteAt(head, 0); err != nil {
		return err
	}
	return output.Sync()
}
