// Package netwatch tells which TCP ports listen in the guest. It reads /proc only while somebody asks.
package netwatch

import (
	"bufio"
	"context"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// MaxPorts bounds a list (docs/protocol.md).
	MaxPorts = 1024
	interval = time.Second
)

// The network namespace is the reader's own.
var tables = []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"}

// Watch sends the ports that listen, sorted, at once and at each change, until ctx ends; then it closes the channel.
// A reader that is slow gets the newest list, not all of them.
func Watch(ctx context.Context) <-chan []int { return watch(ctx, tables, interval) }

func watch(ctx context.Context, paths []string, interval time.Duration) <-chan []int {
	lists := make(chan []int)
	go func() {
		defer close(lists)
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		var sent []int
		fresh := true
		for {
			ports := Ports(paths)
			var out chan<- []int
			if fresh || !slices.Equal(ports, sent) {
				out = lists
			}
			select {
			case out <- ports:
				fresh, sent = false, ports
			case <-ticker.C:
				continue
			case <-ctx.Done():
				return
			}
			select {
			case <-ticker.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	return lists
}

// Ports gives the ports that listen by the tables at paths, sorted, each once, at most MaxPorts. What can't be read
// (no IPv6) counts as empty.
func Ports(paths []string) []int {
	ports := []int{}
	for _, path := range paths {
		file, err := os.Open(path)
		if err != nil {
			continue
		}
		ports = parse(file, ports)
		file.Close()
	}
	slices.Sort(ports)
	ports = slices.Compact(ports)
	return ports[:min(len(ports), MaxPorts)]
}

// parse appends the ports of the sockets that listen. The kernel lists these first (net/ipv4/tcp_ipv4.c,
// tcp_seq_start), so a guest with thousands of connections costs no more. Source: proc_pid_net(5).
func parse(table io.Reader, ports []int) []int {
	lines := bufio.NewScanner(table)
	lines.Scan() // the heading
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || fields[3] != "0A" {
			break
		}
		colon := strings.LastIndexByte(fields[1], ':')
		port, err := strconv.ParseUint(fields[1][colon+1:], 16, 16)
		if err == nil && port > 0 {
			ports = append(ports, int(port))
		}
	}
	return ports
}
