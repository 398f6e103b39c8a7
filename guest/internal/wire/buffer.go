package wire

import "sync"

const (
	smallBuffer = 8 << 10
	bigBuffer   = HeaderSize + MaxData
)

// Buffer is a piece of memory from a pool, so that bulk bytes leave no garbage.
type Buffer struct{ Bytes []byte }

var smallBuffers = sync.Pool{New: func() any { return &Buffer{make([]byte, smallBuffer)} }}
var bigBuffers = sync.Pool{New: func() any { return &Buffer{make([]byte, bigBuffer)} }}

// getBuffer returns a buffer of at least size bytes.
func getBuffer(size int) *Buffer {
	switch {
	case size <= smallBuffer:
		return smallBuffers.Get().(*Buffer)
	case size <= bigBuffer:
		return bigBuffers.Get().(*Buffer)
	}
	return &Buffer{make([]byte, size)}
}

// SmallFrame and BigFrame return a buffer for one data frame, header included: 8 KiB, or the longest there can be.
func SmallFrame() *Buffer { return getBuffer(smallBuffer) }

// BigFrame is SmallFrame for bulk bytes.
func BigFrame() *Buffer { return getBuffer(bigBuffer) }

// Release gives the buffer back; its bytes must not be used any more.
func (b *Buffer) Release() {
	switch len(b.Bytes) {
	case smallBuffer:
		smallBuffers.Put(b)
	case bigBuffer:
		bigBuffers.Put(b)
	}
}
