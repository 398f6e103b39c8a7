package vmboot

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"berth.dev/guest/internal/channel"
)

const (
	sysfs = "/sys"
	// deviceTime is for devices that a driver finds a moment after it was loaded.
	deviceTime = 10 * time.Second
	deviceLook = 5 * time.Millisecond
	// portName is the virtio-serial port that leads to the keeper.
	portName = "berth.agent"
)

// waitDevice gives the name of the device of a class whose attribute has a value, as soon as there is one.
func waitDevice(what, class, attribute, value string) (string, error) {
	for end := time.Now().Add(deviceTime); ; time.Sleep(deviceLook) {
		if name := findBy(sysfs+class, attribute, value); name != "" {
			return name, nil
		}
		if time.Now().After(end) {
			return "", fmt.Errorf("there is no %s with the %s %s", what, attribute, value)
		}
	}
}

// waitDisk gives the path of the block device with a serial number.
func waitDisk(serial string) (string, error) {
	name, err := waitDevice("disk", "/block", "serial", serial)
	return "/dev/" + name, err
}

// OpenPort opens the serial port that leads to the keeper.
func OpenPort() (io.ReadWriteCloser, error) {
	name, err := waitDevice("serial port", "/class/virtio-ports", "name", portName)
	if err != nil {
		return nil, err
	}
	return channel.OpenPort("/dev/" + name)
}

// findBy gives the name of the first device of a class whose attribute has a value; "" when there is none (yet).
func findBy(class, attribute, value string) string {
	devices, _ := os.ReadDir(class)
	for _, device := range devices {
		text, err := os.ReadFile(filepath.Join(class, device.Name(), attribute))
		if err == nil && strings.TrimRight(string(text), "\n") == value {
			return device.Name()
		}
	}
	return ""
}
