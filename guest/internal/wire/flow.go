package wire

// Side is who we are in a connection.
type Side uint8

// The guest's side is the server: it answers hello and the host's requests.
const (
	Guest Side = iota
	Host
)

func (s Side) incoming() Direction {
	if s == Guest {
		return ToGuest
	}
	return ToHost
}

func (s Side) sends(kind Kind) bool { return kind.isData() && (kind == Stdin) == (s == Host) }

// Flow is the credit of one stream, both ways. It does no locking.
type Flow struct {
	side     Side
	credit   [4]uint32 // by kind: what we may still send, or what the peer may
	reserved [4]uint32 // what was taken of credit, and is not sent yet
	owed     [4]uint32 // what our reader consumed and the peer was not given back
	gotEnd   [4]bool
}

// NewFlow starts every kind with a whole window.
func NewFlow(side Side) Flow {
	return Flow{side: side, credit: [4]uint32{0, Window, Window, Window}}
}

// Reserve takes up to want bytes of credit for sending and returns how many; 0 means wait.
func (f *Flow) Reserve(kind Kind, want int) int {
	count := min(want, int(f.credit[kind]))
	f.credit[kind] -= uint32(count)
	f.reserved[kind] += uint32(count)
	return count
}

// Settle ends a reservation, before the bytes go out: sent of them are spent, the rest is credit again.
func (f *Flow) Settle(kind Kind, reserved, sent int) {
	f.reserved[kind] -= uint32(reserved)
	f.credit[kind] += uint32(reserved - sent)
}

// Granted books a CREDIT frame.
func (f *Flow) Granted(kind Kind, count uint32) error {
	if !f.side.sends(kind) {
		return broken("credit for what this side does not send")
	}
	if uint64(f.credit[kind])+uint64(f.reserved[kind])+uint64(count) > Window {
		return broken("credit beyond the window")
	}
	f.credit[kind] += count
	return nil
}

// Received books a data frame; size 0 is the end of file.
func (f *Flow) Received(kind Kind, size int) error {
	switch {
	case !kind.isData() || f.side.sends(kind):
		return broken("data of a kind that this side sends")
	case f.gotEnd[kind]:
		return broken("data after the end of file")
	case uint32(size) > f.credit[kind]:
		return broken("data beyond the credit")
	}
	f.credit[kind] -= uint32(size)
	f.gotEnd[kind] = size == 0
	return nil
}

// Consumed books what the reader took and returns the credit to give back now, as Due does.
func (f *Flow) Consumed(kind Kind, count int) uint32 {
	f.Owe(kind, count)
	return f.Due(kind)
}

// Owe books what the reader took, to be given back by a later Due.
func (f *Flow) Owe(kind Kind, count int) { f.owed[kind] += uint32(count) }

// Due returns the credit to give back now, 0 for none: in steps of a quarter of the window, so that a slow trickle costs
// no frames and a fast sender never starves.
func (f *Flow) Due(kind Kind) uint32 {
	if f.owed[kind] < Window/4 || f.gotEnd[kind] {
		return 0
	}
	grant := f.owed[kind]
	f.owed[kind] = 0
	f.credit[kind] += grant
	return grant
}
