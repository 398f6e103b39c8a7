package upkeep

import (
	"encoding/binary"
	"testing"
)

const gib = 1 << 30

func TestTrimIsDueWhenRoomWasMade(t *testing.T) {
	disk := trimming{free: 10 * gib}
	for _, step := range []struct {
		free uint64
		due  bool
	}{
		{10 * gib, false},                       // nothing happened
		{8 * gib, false},                        // files were written
		{8*gib + trimGain - 1, false},           // some deleted
		{8*gib + trimGain, true},                // enough
		{8*gib + trimGain + trimGain - 1, true}, // and still so until it is done
		{8*gib - 1, false}, {8*gib + gib, true}, // fuller than ever, then not
	} {
		if due := disk.due(step.free); due != step.due {
			t.Errorf("%d free: due is %v", step.free, due)
		}
	}
	disk.done(9 * gib)
	if disk.due(9*gib + trimGain - 1) {
		t.Error("trimmed again at once")
	}
	if disk.due(0) { // statfs failed
		t.Error("nothing is free, and that should be trimmed")
	}
}

func TestCacheIsDroppedOnceInIdleness(t *testing.T) {
	var cache caching
	full := sample{total: 4 * gib, cache: 2 * gib}
	if cache.due(full, 0.9) {
		t.Error("dropped while somebody works")
	}
	if !cache.due(full, 0.99) {
		t.Fatal("never dropped")
	}
	cache.done(sample{4 * gib, gib}) // the rest is mapped, say
	if cache.due(sample{4 * gib, gib + cacheLeast}, 1) {
		t.Error("dropped again though it has hardly grown")
	}
	if !cache.due(sample{4 * gib, gib + cacheLeast + 1}, 1) {
		t.Error("not dropped though it has grown")
	}
	cache.done(sample{4 * gib, gib})
	cache.due(sample{4 * gib, gib / 2}, 1) // the kernel itself gave some up
	if !cache.due(sample{4 * gib, gib}, 1) {
		t.Error("what grew since then does not count")
	}
	if (&caching{}).due(sample{gib, cacheLeast}, 1) || (&caching{}).due(sample{64 * gib, 7 * gib}, 1) {
		t.Error("a small cache was dropped")
	}
}

func TestParseMemory(t *testing.T) {
	got := parseMemory("MemTotal:        1000 kB\nBuffers: 10 kB\nCached: 200 kB\nShmem: 50 kB\nHugePages_Total:       0\nOdd\n")
	if got != (sample{1000 << 10, 160 << 10}) {
		t.Errorf("%+v", got)
	}
	if got := parseMemory(""); got != (sample{}) {
		t.Errorf("%+v", got)
	}
}

func TestParseLoad(t *testing.T) {
	before := parseLoad("cpu  10 0 10 100 5 0 0 0 7 7\ncpu0 1 2 3\n")
	now := parseLoad("cpu  15 0 10 190 10 0 0 0 9 9\n")
	if idle := now.idleSince(before); idle != 0.9 {
		t.Errorf("%v of %v idle", now, idle)
	}
	if idle := before.idleSince(before); idle != 0 {
		t.Error("no time passed, yet it was idle")
	}
	if idle := parseLoad("").idleSince(before); idle != 0 {
		t.Error("without a sample nothing is idle")
	}
}

func TestGrowTo(t *testing.T) {
	super := make([]byte, superSize)
	binary.LittleEndian.PutUint16(super[0x38:], superMagic)
	binary.LittleEndian.PutUint32(super[0x18:], 2) // 4 KiB
	binary.LittleEndian.PutUint32(super[4:], 1<<20)
	for size, want := range map[uint64]uint64{
		4 * gib:                  0,
		4*gib + growLeast - 4096: 0,
		4*gib + growLeast:        1<<20 + growLeast>>12,
		100*gib + 1:              100 * gib >> 12,
		gib:                      0, // it can't be made smaller
		0:                        0,
	} {
		if got := growTo(super, size); got != want {
			t.Errorf("%d bytes: %d, want %d", size, got, want)
		}
	}
	binary.LittleEndian.PutUint32(super[0x150:], 1) // 2^32 blocks more
	if growTo(super, 100*gib) != 0 || growTo(super, 1<<45) != 1<<33 {
		t.Error("the upper half of the count is not read")
	}
	binary.LittleEndian.PutUint32(super[0x18:], 40)
	if growTo(super, 1<<45) != 0 {
		t.Error("a block size that does not exist")
	}
	if growTo(make([]byte, superSize), gib) != 0 {
		t.Error("grew what is no ext4")
	}
}

func TestDeviceNumbers(t *testing.T) {
	for dev, want := range map[uint64]string{0xfe00: "254:0", 0x10305: "259:5", 0x110fd00: "253:4352"} {
		if got := deviceNumbers(dev); got != want {
			t.Errorf("%#x: %s, want %s", dev, got, want)
		}
	}
}
