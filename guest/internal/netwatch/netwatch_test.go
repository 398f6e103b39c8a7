package netwatch

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

const table4 = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   2: 0100007F:1538 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   3: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
`

const table6 = `  sl  local_address                         remote_address                        st tx_queue rx_queue
   0: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000
   1: 00000000000000000000000001000000:01BB 00000000000000000000000000000000:0000 0A 00000000:00000000
`

func put(t *testing.T, text string) string {
	t.Helper()
	path := t.TempDir() + "/tcp"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestPorts(t *testing.T) {
	got := Ports([]string{put(t, table4), put(t, table6), "/nowhere"})
	if !slices.Equal(got, []int{80, 443, 5432}) { // 22 stands behind a connection, where the kernel lists no listener
		t.Error(got)
	}
	if got := Ports([]string{"/nowhere", put(t, "")}); got == nil || len(got) != 0 {
		t.Error(got)
	}
}

func TestPortsAreBounded(t *testing.T) {
	var text strings.Builder
	text.WriteString("heading\n")
	for port := 1; port <= 3000; port++ {
		fmt.Fprintf(&text, "   0: 00000000:%04X 00000000:0000 0A\n", port)
	}
	got := Ports([]string{put(t, text.String())})
	if len(got) != MaxPorts || got[0] != 1 || got[MaxPorts-1] != MaxPorts {
		t.Error(len(got))
	}
}

func TestGarbage(t *testing.T) {
	for _, text := range []string{"h\nx", "h\n0: : : 0A\n", "h\n0: 0:0 0 0A\n", "h\n0: 0:10000 0 0A\n0: zz 0 0A", "h\n" + strings.Repeat("x", 1<<20)} {
		if got := Ports([]string{put(t, text)}); len(got) != 0 {
			t.Errorf("%.20q: %v", text, got)
		}
	}
}

func TestWatch(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	lists := watch(ctx, tables, time.Millisecond)
	first := <-lists
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := listener.Addr().(*net.TCPAddr).Port
	if slices.Contains(first, port) {
		t.Fatal("it is there already")
	}
	for list := range lists {
		if slices.Contains(list, port) {
			listener.Close()
			break
		}
	}
	for list := range lists {
		if !slices.Contains(list, port) {
			cancel()
			break
		}
	}
	for range lists { // closed when ctx has ended
	}
}
