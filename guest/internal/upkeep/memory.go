package upkeep

import (
	"os"
	"strconv"
	"strings"
)

const (
	// A machine counts as idle when its processors were so for this much of a period.
	idleShare = 0.95
	// cacheLeast, and this part of the memory, is how large a cache may be that nobody uses. It is also how much it
	// must have grown again before it is dropped once more: the part that is in use comes back at once.
	cacheLeast = 256 << 20
	cachePart  = 8
)

// sample is what the kernel says of the memory, in bytes. Cache: of files on disks, what can be read again.
type sample struct{ total, cache uint64 }

// caching knows how much cache was left when it was dropped the last time.
type caching struct{ left uint64 }

// due says whether the cache should be dropped. After that the balloon's free page reporting gives it to the host.
func (c *caching) due(now sample, idle float64) bool {
	c.left = min(c.left, now.cache)
	limit := max(cacheLeast, now.total/cachePart)
	return idle > idleShare && now.cache > limit && now.cache-c.left > cacheLeast
}

func (c *caching) done(now sample) { c.left = now.cache }

func readMemory() sample {
	text, _ := os.ReadFile("/proc/meminfo")
	return parseMemory(string(text))
}

// parseMemory: files of tmpfs count as cached and can't be dropped. Source: proc_meminfo(5).
func parseMemory(text string) sample {
	values := map[string]uint64{}
	for line := range strings.Lines(text) {
		name, rest, _ := strings.Cut(line, ":")
		fields := strings.Fields(rest)
		if len(fields) == 0 {
			continue
		}
		if kib, err := strconv.ParseUint(fields[0], 10, 54); err == nil {
			values[name] = kib << 10
		}
	}
	cached := values["Cached"] + values["Buffers"]
	return sample{total: values["MemTotal"], cache: cached - min(cached, values["Shmem"])}
}

// load is how long the processors were idle and how long there was to be so, in ticks.
type load struct{ idle, all uint64 }

// idleSince is the share of idle time since another, earlier sample.
func (l load) idleSince(before load) float64 {
	if l.all <= before.all || l.idle < before.idle {
		return 0
	}
	return float64(l.idle-before.idle) / float64(l.all-before.all)
}

func readLoad() load {
	text, _ := os.ReadFile("/proc/stat")
	return parseLoad(string(text))
}

// parseLoad reads the first line: cpu, user, nice, system, idle, iowait, irq, softirq, steal; then guests' times, which
// the first two contain. Waiting for a disk is no idleness: somebody reads. Source: proc_stat(5).
func parseLoad(text string) (l load) {
	line, _, _ := strings.Cut(text, "\n")
	for i, field := range strings.Fields(line) {
		value, err := strconv.ParseUint(field, 10, 64)
		if err != nil || i > 8 {
			continue
		}
		l.all += value
		if i == 4 {
			l.idle = value
		}
	}
	return l
}
