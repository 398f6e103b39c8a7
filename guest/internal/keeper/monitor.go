package keeper

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"berth.dev/guest/internal/files"
	"berth.dev/guest/internal/qmp"
	"berth.dev/guest/internal/wire"
)

const (
	// agentPort is the ID of the channel's port in QEMU's events.
	agentPort = "agent"
	// enoughSpace is how much of the host's disk must be free for a paused machine to go on.
	enoughSpace = 64 << 20
	// again is how soon after going on a machine must be paused anew for the next look to be later than the last.
	again    = 30 * time.Second
	maxLook  = time.Minute
	qmpPause = 10 * time.Second // for QEMU to greet, or between attempts when it does not

	diskFull    = "the host's disk is full; the machine is paused until there is space"
	diskFailing = "the host can't read or write the machine's disk; the machine is paused, and tried again"
)

// monitor watches over QEMU: what it says of the machine's end, and of a disk that can't be written. A machine whose
// disk fails is paused by QEMU and loses nothing; the monitor lets it go on when it can. It belongs to the goroutine
// that follows the socket.
type monitor struct {
	log      *consoleLog
	file     string // paused.json
	disk     string // a directory on the disk's file system
	look     time.Duration
	resumed  func()
	portOpen func(open bool)
	free     func(directory string) uint64

	paused  atomic.Bool
	full    bool          // why it is paused
	next    time.Time     // to look; zero when there is nothing to look for
	wait    time.Duration // between looks
	gone    time.Time     // when it was last told to go on
	inquiry uint64        // the ID of the last query-status
}

func newMonitor(k *vmKeeper) *monitor {
	disk := k.options.DiskDir
	if disk == "" {
		disk = filepath.Dir(k.options.Log)
	}
	return &monitor{
		log: k.log, file: filepath.Join(k.options.Dir, "paused.json"), disk: disk, look: k.times.look,
		resumed: func() { wake(k.retune) }, portOpen: k.portChanged, free: freeSpace,
	}
}

func (m *monitor) isPaused() bool { return m.paused.Load() }

// serve works over one connection with QEMU's monitor.
func (m *monitor) serve(socket *wire.Socket) time.Duration {
	client, err := qmp.Open(socket, qmpPause)
	if err != nil {
		return 0
	}
	m.inquiry, err = client.Send("query-status") // what happened before we came
	for err == nil {
		var message qmp.Message
		message, err = client.Next(m.next)
		switch {
		case err == nil:
			err = m.take(client, message)
		case errors.Is(err, os.ErrDeadlineExceeded):
			err = m.tryOn(client)
		}
	}
	return 0
}

// take deals with one message. Only words that are known are ever written down.
func (m *monitor) take(client *qmp.Client, message qmp.Message) (err error) {
	var data struct {
		Action, Reason, ID string
		NoSpace, Open      bool
	}
	if message.Data != nil {
		if err := qmp.Decode(message.Data, &data); err != nil {
			return err
		}
	}
	switch message.Event {
	case "BLOCK_IO_ERROR":
		if data.Action == "stop" {
			m.pause(data.NoSpace)
		}
	case "STOP":
		m.inquiry, err = client.Send("query-status")
	case "RESUME":
		m.goOn()
	case "GUEST_PANICKED":
		m.mark("the guest's kernel panicked")
	case "SHUTDOWN":
		m.mark("the machine ended (" + known(data.Reason) + ")")
	case "RESET":
		m.mark("the machine was reset (" + known(data.Reason) + ")")
	case "VSERPORT_CHANGE":
		if data.ID == agentPort {
			m.portOpen(data.Open)
		}
	case "":
		return m.answered(message)
	}
	return err
}

// answered takes an answer. Only that to the last query-status matters: an older one may be overtaken by events.
func (m *monitor) answered(message qmp.Message) error {
	if message.ID == 0 || message.ID != m.inquiry || message.Return == nil {
		return nil
	}
	var data struct {
		Status  string
		Running bool
	}
	if err := qmp.Decode(message.Return, &data); err != nil {
		return err
	}
	switch {
	case data.Status == "io-error":
		m.pause(m.free(m.disk) < enoughSpace)
	case data.Running:
		m.goOn()
	}
	return nil
}

func (m *monitor) pause(full bool) {
	if m.isPaused() {
		return
	}
	if m.wait *= 2; m.wait == 0 || time.Since(m.gone) > again {
		m.wait = m.look
	}
	m.wait = min(m.wait, maxLook)
	m.full, m.next = full, time.Now().Add(m.wait)
	m.paused.Store(true)
	m.tell()
	m.mark(m.reason())
}

func (m *monitor) reason() string {
	if m.full {
		return diskFull
	}
	return diskFailing
}

// tell writes paused.json, for whoever asks why the machine does nothing.
func (m *monitor) tell() {
	text, err := json.Marshal(struct {
		Schema int    `json:"schema"`
		Reason string `json:"reason"`
		Since  string `json:"since"`
	}{1, m.reason(), time.Now().UTC().Format(time.RFC3339)})
	if err == nil {
		_ = files.Write(m.file, append(text, '\n'), files.Attr{Mode: 0o600, UID: os.Geteuid(), GID: os.Getegid()})
	}
}

// tryOn lets a paused machine go on, if that makes sense. QEMU says RESUME then.
func (m *monitor) tryOn(client *qmp.Client) error {
	m.next = time.Now().Add(m.wait)
	if m.full && m.free(m.disk) < enoughSpace {
		return nil
	}
	_, err := client.Send("cont")
	m.gone = time.Now()
	return err
}

// goOn books that the machine runs.
func (m *monitor) goOn() {
	m.forget()
	if m.paused.Swap(false) {
		m.mark("the machine goes on")
		m.resumed() // its clock stood still
	}
	m.next = time.Time{}
}

// forget takes paused.json away, which a keeper before us may have left.
func (m *monitor) forget() { _ = os.Remove(m.file) }

func (m *monitor) mark(what string) { m.log.mark("berth: "+what, time.Now()) }

// known gives the reasons of QEMU's events back that it has. Source: QEMU's qapi/run-state.json, ShutdownCause.
func known(reason string) string {
	switch reason {
	case "host-error", "host-qmp-quit", "host-qmp-system-reset", "host-signal", "host-ui", "guest-shutdown", "guest-reset",
		"guest-panic", "subsystem-reset", "snapshot-load":
		return reason
	}
	return "unknown"
}

// freeSpace is what an ordinary user may still write to a file system; when that can't be known, enough.
func freeSpace(directory string) uint64 {
	var stat syscall.Statfs_t
	if syscall.Statfs(directory, &stat) != nil || stat.Frsize <= 0 {
		return enoughSpace
	}
	return stat.Bavail * uint64(stat.Frsize)
}
