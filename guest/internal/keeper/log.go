package keeper

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"time"
)

// maxLog is where the console log is turned over: it and the one before hold at most twice that, whatever a guest
// writes.
const maxLog = 8 << 20

// consoleLog is the file that a machine's console goes to. Errors (a full disk) lose text and nothing else.
type consoleLog struct {
	mu    sync.Mutex
	path  string
	limit int64
	file  *os.File
	size  int64
	start bool // at the start of a line
}

func openLog(path string, limit int64) (*consoleLog, error) {
	l := &consoleLog{path: path, limit: limit}
	return l, l.open()
}

func (l *consoleLog) open() error {
	file, err := os.OpenFile(l.path, os.O_CREATE|os.O_APPEND|os.O_RDWR|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New(l.path + " is no regular file")
	}
	if err != nil {
		file.Close()
		return err
	}
	l.file, l.size = file, info.Size()
	l.start = l.size == 0
	if !l.start {
		var last [1]byte
		_, err := file.ReadAt(last[:], l.size-1)
		l.start = err == nil && last[0] == '\n'
	}
	return nil
}

// mark writes a line of our own: -- boot 2026-11-22T14:16:00Z --
func (l *consoleLog) mark(what string, at time.Time) {
	line := "-- " + what + " " + at.UTC().Format(time.RFC3339) + " --\n"
	l.mu.Lock()
	start := l.start
	l.mu.Unlock()
	if !start {
		line = "\n" + line
	}
	_, _ = l.Write([]byte(line))
}

// Write appends data, turning the log over when it would grow beyond its limit. It never fails.
func (l *consoleLog) Write(data []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size > 0 && l.size+int64(len(data)) > l.limit {
		l.turnOver()
	}
	if l.file == nil || len(data) == 0 {
		return len(data), nil
	}
	n, _ := l.file.Write(data)
	l.size += int64(n)
	l.start = data[len(data)-1] == '\n'
	return len(data), nil
}

func (l *consoleLog) turnOver() {
	if err := os.Rename(l.path, l.path+".1"); err != nil {
		// Bounded above all: what can't be kept is dropped.
		if l.file != nil && l.file.Truncate(0) == nil {
			l.size, l.start = 0, true
		}
		return
	}
	if l.file != nil {
		l.file.Close()
		l.file = nil
	}
	l.size, l.start = 0, true
	_ = l.open()
}

func (l *consoleLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		l.file.Close()
		l.file = nil
	}
}
