package serve

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"berth.dev/guest/internal/wire"
)

// dialTime is for a listener in the same machine: only one with a full queue takes any time at all.
const dialTime = 10 * time.Second

// dial connects a stream with a TCP port of the guest.
func dial(stream *wire.Stream) {
	request := wire.Dial{}
	if !decode(stream, &request) {
		return
	}
	if request.Port < 1 || request.Port > 65535 {
		refuse(stream, wire.CodeInvalidArgument, "there is no port "+strconv.Itoa(request.Port))
		return
	}
	socket, err := dialPort(request.Port)
	if errors.Is(err, syscall.ECONNREFUSED) {
		refuse(stream, wire.CodeNotFound, "nothing listens on port "+strconv.Itoa(request.Port))
		return
	}
	if err != nil {
		refuse(stream, wire.CodeInternal, "port "+strconv.Itoa(request.Port)+": "+err.Error())
		return
	}
	_ = stream.Send(wire.Started{Type: wire.TypeStarted})
	go hearCancel(stream)
	wire.Relay(stream, wire.Stdin, wire.Stdout, socket)
	finish(stream, wire.Plain{Type: wire.TypeClosed})
}

// hearCancel ends the stream when the client wants no more of it, though both ends are still open.
func hearCancel(stream *wire.Stream) {
	for {
		message, err := stream.ReadMessage(0)
		if err != nil {
			return
		}
		if message.Type == wire.TypeCancel {
			finish(stream, wire.Plain{Type: wire.TypeClosed})
			return
		}
	}
}

// dialPort tries the two loopback addresses, then those that something listens on at just that port.
func dialPort(port int) (*wire.Socket, error) {
	socket, err := wire.DialTCP(&syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}, dialTime)
	if err == nil || !errors.Is(err, syscall.ECONNREFUSED) {
		return socket, err
	}
	others := []syscall.Sockaddr{&syscall.SockaddrInet6{Port: port, Addr: [16]byte{15: 1}}}
	others = append(others, listening("/proc/self/net/tcp", port)...)
	others = append(others, listening("/proc/self/net/tcp6", port)...)
	for _, address := range others {
		if socket, other := wire.DialTCP(address, dialTime); other == nil {
			return socket, nil
		}
	}
	return nil, err
}

// listening reads from one of the kernel's tables on which addresses a port listens. Source: proc_pid_net(5).
func listening(path string, port int) []syscall.Sockaddr {
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	var found []syscall.Sockaddr
	lines := bufio.NewScanner(file)
	lines.Scan() // the heading
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || fields[3] != "0A" { // listening sockets come first
			break
		}
		address, number, _ := strings.Cut(fields[1], ":")
		if value, err := strconv.ParseUint(number, 16, 16); err != nil || int(value) != port {
			continue
		}
		if socket := parseAddress(address, port); socket != nil {
			found = append(found, socket)
		}
	}
	return found
}

// parseAddress reads 32-bit words in hexadecimal, each in the byte order of the machine (x86-64, arm64: little).
func parseAddress(text string, port int) syscall.Sockaddr {
	raw, err := hex.DecodeString(text)
	if err != nil || len(raw)%4 != 0 {
		return nil
	}
	for i := 0; i < len(raw); i += 4 {
		binary.BigEndian.PutUint32(raw[i:], binary.LittleEndian.Uint32(raw[i:]))
	}
	switch len(raw) {
	case 4:
		return &syscall.SockaddrInet4{Port: port, Addr: [4]byte(raw)}
	case 16:
		return &syscall.SockaddrInet6{Port: port, Addr: [16]byte(raw)}
	}
	return nil
}
