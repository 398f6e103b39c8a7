package keeper

import "time"

const (
	// flood is how much a console may say within floodTime; a guest that says more has to wait. It is far above what a
	// boot prints, and bounds what a guest can make the host's disk and the keeper do.
	flood     = 2 << 20
	floodTime = time.Second
)

// pace slows one who floods down. The zero value is ready.
type pace struct {
	said  int
	began time.Time
}

// keep books what was said, and waits when that was too much for the time, unless done comes before.
func (p *pace) keep(count int, done <-chan struct{}) {
	if time.Since(p.began) >= floodTime {
		p.said, p.began = 0, time.Now()
	}
	if p.said += count; p.said < flood {
		return
	}
	select {
	case <-time.After(time.Until(p.began.Add(floodTime))):
	case <-done:
	}
}
