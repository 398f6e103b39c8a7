// Package channel is the one serial line that a VM and its keeper share, both ends of it: the synchronisation of
// docs/protocol.md, "The channel of a VM", which makes connections of a line that knows none.
//
// line.go is sans-I/O: what a line of the synchronisation is, and where frames begin. guest.go is the agent's end
// (package serve calls Serve and OpenPort), host.go the keeper's (package keeper calls Dial). Neither side can trust what it reads:
// both hold a bounded number of bytes, whatever comes.
package channel

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"

	"berth.dev/guest/internal/wire"
)

const (
	prefix    = "\nberth-channel 1 "
	nonceSize = 32 // hex digits
	lineSize  = len(prefix) + nonceSize + 1
)

type nonce [nonceSize]byte

func newNonce() (n nonce) {
	var random [nonceSize / 2]byte
	_, _ = rand.Read(random[:]) // never fails
	hex.Encode(n[:], random[:])
	return n
}

// line is what is sent. As a frame it is of no known kind.
func (n nonce) line() []byte { return append(append([]byte(prefix), n[:]...), '\n') }

// seeker finds lines in a flow of bytes, split anywhere. A line holds the byte 0x0A at its two ends only, so a mismatch
// never hides the beginning of another.
type seeker struct {
	matched int
	nonce   nonce
}

// feed looks through data and says how many bytes of it are dealt with: all, or those up to the end of a line, found.
func (s *seeker) feed(data []byte) (used int, found bool) {
	for i, c := range data {
		switch at := s.matched - len(prefix); {
		case at < 0 && c == prefix[s.matched]:
			s.matched++
		case 0 <= at && at < nonceSize && isHex(c):
			s.nonce[at] = c
			s.matched++
		case at == nonceSize && c == '\n':
			s.matched = 0
			return i + 1, true
		case c == '\n':
			s.matched = 1
		default:
			s.matched = 0
		}
	}
	return len(data), false
}

func isHex(c byte) bool { return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' }

// boundary follows the frames of a connection, to see a line where one would begin.
type boundary struct {
	header [wire.HeaderSize]byte
	have   int    // bytes of header
	left   uint32 // bytes of the payload that are still to come
}

// scan returns how many bytes of data belong to frames: all, or those before the byte that begins a line.
func (b *boundary) scan(data []byte) int {
	for at := 0; at < len(data); {
		if b.left > 0 {
			skip := min(uint64(b.left), uint64(len(data)-at))
			b.left -= uint32(skip)
			at += int(skip)
			continue
		}
		if b.have == 0 && data[at] == '\n' {
			return at
		}
		count := copy(b.header[b.have:], data[at:])
		b.have += count
		at += count
		if b.have == len(b.header) {
			b.have, b.left = 0, binary.BigEndian.Uint32(b.header[:])
		}
	}
	return len(data)
}
