package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	portName = "berth.agent"
	lineHead = "\nberth-channel 1 "
	lineSize = len(lineHead) + 32 + 1
	// patience is for one write or read: the host may have hung up.
	patience = 300 * time.Millisecond
	// closing is how long a port has to be open for its end to be told, and not held back by QEMU until it is open again.
	closing = 2200 * time.Millisecond
	// look is how often the orders are looked at.
	look = 100 * time.Millisecond
)

// bePort takes the place of a VM's agent: it ends the agent and its guard, takes the serial port that leads to the host,
// and from then on answers whoever connects in the manner that the file a[0] names by then. It never returns. The file
// a[0].ready is made when it is in the agent's place, and a[0].met holds the manner that the host has met last.
func bePort(a []string) error {
	for _, role := range []string{"guard", "serve"} { // in this order, or it would be started again
		pid, err := findAgent(role)
		if err == nil {
			err = syscall.Kill(pid, syscall.SIGKILL)
		}
		if err != nil {
			return err
		}
	}
	file, err := openPort()
	if err != nil {
		return err
	}
	if err := os.WriteFile(a[0]+".ready", nil, 0o644); err != nil {
		return err
	}
	port := &port{file: file, orders: a[0]}
	for opened := time.Now(); ; {
		if port.isOver() {
			// QEMU tells the keeper of a port that is closed, so that it begins anew; but of one change a second at most.
			time.Sleep(time.Until(opened.Add(closing)))
			port.file.Close()
			if port.file, err = openPort(); err != nil {
				return err
			}
			opened, port.order = time.Now(), port.read()
		}
		if manner := portManners[port.order]; manner != nil && port.answerLine() {
			_ = os.WriteFile(a[0]+".met", []byte(port.order), 0o644)
			manner(port)
		} else {
			time.Sleep(20 * time.Millisecond)
		}
	}
}

func findAgent(role string) (int, error) {
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		line, _ := os.ReadFile("/proc/" + entry.Name() + "/cmdline")
		if pid, err := strconv.Atoi(entry.Name()); err == nil && string(line) == "berth-agent\x00"+role+"\x00" {
			return pid, nil
		}
	}
	return 0, errors.New("no agent " + role + " found")
}

// port is the serial port of a VM whose other end the host's keeper has.
type port struct {
	file   *os.File
	orders string // the file with them
	order  string // the one that is obeyed
	looked time.Time
}

func (p *port) read() string {
	text, _ := os.ReadFile(p.orders)
	return strings.TrimSpace(string(text))
}

// isOver says whether there is another order.
func (p *port) isOver() bool {
	if time.Since(p.looked) < look {
		return false
	}
	p.looked = time.Now()
	return p.read() != p.order
}

func openPort() (*os.File, error) {
	names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
	for _, path := range names {
		name, _ := os.ReadFile(path)
		if strings.TrimSpace(string(name)) != portName {
			continue
		}
		device := "/dev/" + filepath.Base(filepath.Dir(path))
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			fd, err := syscall.Open(device, syscall.O_RDWR|syscall.O_NONBLOCK, 0)
			if err == nil {
				return os.NewFile(uintptr(fd), device), nil
			}
			if err != syscall.EBUSY || time.Now().After(end) { // the agent before us is just ending
				return nil, fmt.Errorf("%s: %w", device, err)
			}
		}
	}
	return nil, errors.New("there is no port " + portName)
}

// answerLine waits for the keeper's line and sends it back.
func (p *port) answerLine() bool {
	var seen []byte
	buffer := make([]byte, 4096)
	_ = p.file.SetReadDeadline(time.Now().Add(patience))
	for {
		count, err := p.file.Read(buffer)
		if err != nil {
			return false
		}
		seen = append(seen, buffer[:count]...)
		if at := bytes.LastIndex(seen, []byte(lineHead)); at >= 0 && len(seen)-at >= lineSize {
			return p.say(seen[at : at+lineSize])
		}
	}
}

// say writes; false when the host takes no more.
func (p *port) say(pieces ...[]byte) bool {
	_ = p.file.SetWriteDeadline(time.Now().Add(patience))
	_, err := p.file.Write(bytes.Join(pieces, nil))
	return err == nil
}

// flood says the same until the host has enough.
func (p *port) flood(data []byte) {
	for !p.isOver() && p.say(data) {
	}
}

// eachRequest calls answer with each stream that the keeper opens, and what for.
func (p *port) eachRequest(answer func(id uint32, request string)) {
	var seen []byte
	buffer := make([]byte, 1<<16)
	for last := uint32(0); !p.isOver(); {
		_ = p.file.SetReadDeadline(time.Now().Add(patience))
		count, err := p.file.Read(buffer)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		seen = append(seen, buffer[:count]...)
		for len(seen) >= 9 && len(seen) >= 9+int(binary.BigEndian.Uint32(seen)) {
			size, id, kind := int(binary.BigEndian.Uint32(seen)), binary.BigEndian.Uint32(seen[4:]), seen[8]
			if kind == 0 && id > last {
				last = id
				answer(id, string(seen[9:9+size]))
			}
			seen = seen[9+size:]
		}
	}
}

var (
	portHello = frame(0, 0, `{"type":"hello","protocol":1,"version":"\u001b[31m","init":"running"}`)
	started   = `{"type":"started"}`
)

func isConnect(request string) bool { return strings.Contains(request, `"connect"`) }

// inner is what a client of the host's is told over a stream: that its command runs.
func inner(id uint32) []byte {
	said := append(bytes.Clone(portHello), frame(1, 0, `{"type":"started","pid":1}`)...)
	return append(frame(id, 0, started), frame(id, 2, string(said))...)
}

// portManners begin when the keeper's line was answered, and end when the host has enough or there is another order.
var portManners = map[string]func(p *port){
	// Says what is no frame.
	"garbage": func(p *port) { p.flood([]byte(strings.Repeat(garbage, 1000))) },
	// Greets, announces a frame of 4 GiB and fills it.
	"huge": func(p *port) {
		p.say(portHello, []byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 2})
		p.flood(make([]byte, 1<<16))
	},
	// Pretends to speak another protocol, in the longest words.
	"forged": func(p *port) {
		p.say(frame(0, 0, `{"type":"hello","protocol":99,"version":"`+strings.Repeat(`\u001b[2J`, 6000)+`","role":"keeper"}`))
	},
	// Opens streams without end, and ends most of them at once.
	"opens": func(p *port) {
		p.say(portHello)
		for id := uint32(2); !p.isOver(); {
			var many []byte
			for range 1000 {
				many = append(many, frame(id, 0, `{"type":"open","service":"ssh-agent"}`)...)
				if id%64 > 0 {
					many = append(many, frame(id, 0, `{"type":"closed"}`)...)
				}
				id += 2
			}
			if !p.say(many) {
				return
			}
		}
	},
	// Tells of ports without end.
	"ports": func(p *port) {
		p.say(portHello)
		p.eachRequest(func(id uint32, request string) {
			if strings.Contains(request, `"listeners"`) {
				p.flood(append(frame(id, 0, `{"type":"listening","ports":[31001,31002]}`), frame(id, 0, `{"type":"listening","ports":[31003]}`)...))
			}
		})
	},
	// Takes every client, and sends what nobody reads on every stream.
	"stderr": func(p *port) {
		p.say(portHello)
		p.eachRequest(func(id uint32, request string) {
			if isConnect(request) {
				p.say(frame(id, 0, started))
			}
			for range 4 {
				p.say(frame(id, 3, string(make([]byte, 1<<18))))
			}
		})
	},
	// Takes every client, says that its command runs, and sends output without asking whether there is credit.
	"endless": func(p *port) {
		p.say(portHello)
		p.eachRequest(func(id uint32, request string) {
			if !isConnect(request) || !p.say(inner(id)) {
				return
			}
			for range 100 { // 6 MiB, of which 1 may be under way; then the next client
				if !p.say(frame(id, 2, string(frame(1, 2, strings.Repeat("endless\n", 8000))))) {
					return
				}
			}
		})
	},
	// Refuses every client, in words that a terminal would obey.
	"refuse": func(p *port) {
		p.say(portHello)
		p.eachRequest(func(id uint32, request string) {
			if isConnect(request) {
				p.say(frame(id, 0, started), frame(id, 2, string(frame(0, 0, `{"type":"fatal","code":"\u001b]0;owned\u0007","message":"\u001b[2J\r\nberth: fine"}`))))
			}
			p.say(frame(id, 0, `{"type":"closed"}`))
		})
	},
	// Greets, and then sends frames at random.
	"noise": func(p *port) {
		p.say(portHello)
		random := rand.New(rand.NewPCG(7, uint64(clients.Add(1))))
		for !p.isOver() {
			data := make([]byte, random.IntN(300))
			for i := range data {
				data[i] = byte(random.Uint32())
			}
			one := frame(random.Uint32N(6), byte(random.IntN(5)), string(data))
			if random.IntN(4) > 0 {
				one = frame(random.Uint32N(6), 0, messages[random.IntN(len(messages))])
			}
			if !p.say(one) {
				return
			}
		}
	},
	// Greets, and never says or reads anything again.
	"deaf": func(p *port) {
		p.say(portHello)
		for !p.isOver() {
			time.Sleep(look)
		}
	},
}
