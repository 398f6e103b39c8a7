// Package upkeep gives back to the host what a virtual machine does not need any more: room on its disk that files have
// left, and memory that only caches them; and takes what the host has added to the disk. `agent serve` starts it in a VM.
//
// It looks once a minute, which costs next to nothing. What is due is decided by pure functions of the samples.
package upkeep

import (
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	root   = "/"
	period = time.Minute
	// trimWithin is how long a power off waits for the last trim. It goes on behind it.
	trimWithin = time.Second
)

// Keeper does the upkeep of this machine. Safe for concurrent use.
type Keeper struct {
	mutex sync.Mutex // held while the disk is trimmed
	disk  trimming
}

// Start begins the upkeep, for the life of the process. Growing the file system comes first; report is told when that
// fails.
func Start(report func(error)) *Keeper {
	k := &Keeper{disk: trimming{free: freeBytes()}}
	go func() {
		if err := grow(); err != nil {
			report(err)
		}
		k.run()
	}()
	return k
}

func (k *Keeper) run() {
	var cache caching
	before := readLoad()
	for range time.Tick(period) {
		k.trimIfDue()
		now := readLoad()
		idle := now.idleSince(before)
		before = now
		if sample := readMemory(); cache.due(sample, idle) {
			_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0)
			cache.done(readMemory())
		}
	}
}

// BeforePowerOff trims the disk a last time, if it is worth it.
func (k *Keeper) BeforePowerOff() {
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.trimIfDue()
	}()
	select {
	case <-done:
	case <-time.After(trimWithin):
	}
}

func (k *Keeper) trimIfDue() {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	if !k.disk.due(freeBytes()) {
		return
	}
	_ = trim()
	k.disk.done(freeBytes()) // also when it failed: a disk that can't be trimmed is not asked all the time
}

func freeBytes() uint64 {
	var stat syscall.Statfs_t
	if syscall.Statfs(root, &stat) != nil {
		return 0
	}
	return stat.Bfree * uint64(stat.Bsize)
}
