package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// beAgent takes the place of a container's agent: it takes the agent's listening socket, ends the agent, and from then on
// answers everybody in the manner that the file a[0] names by then. It never returns; the file a[0].ready is made when it
// is in the agent's place.
func beAgent(a []string) error {
	behave := func(client *os.File) {
		order, _ := os.ReadFile(a[0])
		if manner := manners[strings.TrimSpace(string(order))]; manner != nil {
			manner(client)
			return
		}
		client.Close()
	}
	pid, listener, err := stealListener()
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return err
	}
	if err := os.WriteFile(a[0]+".ready", nil, 0o644); err != nil {
		return err
	}
	for {
		fd, _, err := syscall.Accept4(listener, syscall.SOCK_CLOEXEC)
		if err != nil {
			continue
		}
		go behave(os.NewFile(uintptr(fd), "client"))
	}
}

// stealListener takes descriptor 3 from the process `berth-agent serve`. Source: pidfd_getfd(2).
func stealListener() (pid, listener int, err error) {
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		line, _ := os.ReadFile("/proc/" + entry.Name() + "/cmdline")
		if id, err := strconv.Atoi(entry.Name()); err == nil && strings.HasSuffix(string(line), "agent\x00serve\x00") {
			pid = id
		}
	}
	pidfd, err := call(sysPidfdOpen, uintptr(pid), 0)
	if err != nil {
		return 0, 0, fmt.Errorf("no agent found (%d): %w", pid, err)
	}
	fd, err := call(sysPidfdGetfd, pidfd, 3, 0)
	return pid, int(fd), err
}

const garbage = "\x1b]0;owned\x07\x1b[2J\r\n\x00\xff\xfe{{{[[[\"type\":"

var manners = map[string]func(client *os.File){
	// Takes every connection and never says a word.
	"silence": func(client *os.File) { _, _ = io.Copy(io.Discard, client) },
	// Hangs up at once.
	"hangup": func(client *os.File) { client.Close() },
	// Says what is no frame.
	"garbage": func(client *os.File) {
		_, _ = client.WriteString(strings.Repeat(garbage, 100))
		client.Close()
	},
	// Announces a frame of 4 GiB and fills it.
	"huge": func(client *os.File) {
		_, _ = client.Write([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 2})
		flood(client, make([]byte, 1<<16))
	},
	// Says the longest message that is allowed, with what would move a terminal's cursor in it, for ever.
	"escapes": func(client *os.File) {
		hello(client)
		flood(client, frame(0, 0, `{"type":"fatal","code":"\u001b]0;owned\u0007","message":"`+strings.Repeat(`\u001b[2J\r\nberth: fine`, 1000)+`"}`))
	},
	// Greets, and then sends frames at random, right and wrong ones; each client gets others.
	"noise": func(client *os.File) {
		hello(client)
		random := rand.New(rand.NewPCG(7, uint64(clients.Add(1))))
		for range 10_000 {
			data := make([]byte, random.IntN(300))
			for i := range data {
				data[i] = byte(random.Uint32())
			}
			one := frame(random.Uint32N(4), byte(random.IntN(5)), string(data))
			if random.IntN(4) == 0 {
				one = frame(1, 0, messages[random.IntN(len(messages))])
			}
			if _, err := client.Write(one); err != nil {
				break
			}
		}
		client.Close()
	},
	// Opens streams, tells ports and results that nobody asked for.
	"unasked": func(client *os.File) {
		hello(client)
		var id uint32
		for {
			id += 2
			one := frame(id, 0, `{"type":"open","service":"ssh-agent"}`)
			one = append(one, frame(1, 0, `{"type":"listening","ports":[22,22,65536,-1]}`)...)
			if _, err := client.Write(one); err != nil {
				client.Close()
				return
			}
		}
	},
}

var clients atomic.Uint32

var messages = []string{
	`{"type":"started","pid":4}`, `{"type":"exit","code":1}`, `{"type":"exit","signal":"\u001b[31m"}`, `{"type":"closed"}`,
	`{"type":"result","init":"running"}`, `{"type":"error","code":"\u001b[31m","message":"\r\n\u009b31m"}`,
	`{"type":"fatal","code":"x","message":"y"}`, `{"type":"open","service":"ssh-agent"}`, `{"type":"listening","ports":[1]}`,
	strings.Repeat(`[`, 60000), `{"type":"exit","code":99999999999999999999}`, `{"type":"started","pid":-1}`,
}

func hello(client *os.File) {
	_, _ = client.Write(frame(0, 0, `{"type":"hello","protocol":1,"version":"\u001b[31m","init":"running"}`))
}

func frame(stream uint32, kind byte, payload string) []byte {
	out := binary.BigEndian.AppendUint32(nil, uint32(len(payload)))
	out = binary.BigEndian.AppendUint32(out, stream)
	return append(append(out, kind), payload...)
}

func flood(client *os.File, data []byte) {
	for {
		if _, err := client.Write(data); err != nil {
			client.Close()
			return
		}
	}
}
