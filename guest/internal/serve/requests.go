package serve

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"berth.dev/guest/internal/exec"
	"berth.dev/guest/internal/wire"
)

// ticksPerSecond is the unit of times in /proc/PID/stat. Source: proc_pid_stat(5); USER_HZ is 100 on x86-64 and arm64.
const ticksPerSecond = 100

// clockTolerance is how far from the host's a clock may be without being set.
const clockTolerance = 250 * time.Millisecond

// answer deals with one request.
func (s *Server) answer(stream *wire.Stream) {
	switch stream.Request.Type {
	case wire.TypeExec:
		defer s.begin()()
		s.exec(stream)
	case wire.TypeStatus:
		finish(stream, s.status())
	case wire.TypeWait:
		s.wait(stream)
	case wire.TypePoweroff:
		finishOr(stream, s.guest.PowerOff())
	case wire.TypeDial:
		defer s.begin()()
		dial(stream)
	case wire.TypeListeners:
		s.listeners(stream)
	case wire.TypeConsole:
		s.console(stream)
	case wire.TypeClock:
		setClock(stream)
	case wire.TypeConnect:
		s.connect(stream)
	default:
		name := stream.Request.Type
		refuse(stream, wire.CodeUnsupported, "this agent does not know the request '"+name[:min(len(name), 40)]+"'")
	}
}

// finish says the last word; when that can't be sent, the stream has ended anyway.
func finish(stream *wire.Stream, message any) { _ = stream.Finish(message) }

func refuse(stream *wire.Stream, code, text string) { finish(stream, wire.Refusal(code, text)) }

func finishOr(stream *wire.Stream, err error) {
	if err != nil {
		refuse(stream, wire.CodeInternal, err.Error())
		return
	}
	finish(stream, wire.Result{Type: wire.TypeResult})
}

// decode reads the request; false when it was refused for what is in it.
func decode(stream *wire.Stream, into any) bool {
	err := stream.Request.Decode(into)
	stream.Taken()
	if err != nil {
		refuse(stream, wire.CodeInvalidArgument, err.Error())
	}
	return err == nil
}

func (s *Server) exec(stream *wire.Stream) {
	request := &wire.Exec{}
	if !decode(stream, request) {
		return
	}
	ready := make(chan struct{})
	go stream.Conn().Protect(func() {
		defer close(ready)
		s.guest.WaitReady()
	})
	select {
	case <-ready:
		exec.Run(stream, request, s.config)
	case <-stream.Done():
	}
}

func (s *Server) status() wire.Status {
	return wire.Status{
		Type: wire.TypeResult, Init: s.guest.InitState(), System: s.guest.System(), Version: s.version,
		Twin: s.guest.TwinState(), Uptime: uptime(),
	}
}

// uptime is how long process 1 has been there, in seconds: a container shares the kernel's uptime with its host.
func uptime() float64 {
	system, _ := os.ReadFile("/proc/uptime")
	first, _, _ := strings.Cut(string(system), " ")
	now, err := strconv.ParseFloat(first, 64)
	stat, _ := os.ReadFile("/proc/1/stat")
	// The name, in parentheses, may hold anything; starttime is field 22, the 20th after it.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if err != nil || len(fields) < 20 {
		return 0
	}
	ticks, err := strconv.ParseFloat(fields[19], 64)
	if err != nil {
		return 0
	}
	return max(0, now-ticks/ticksPerSecond)
}

func (s *Server) wait(stream *wire.Stream) {
	request := wire.Wait{}
	if !decode(stream, &request) {
		return
	}
	if request.For != "init" {
		refuse(stream, wire.CodeInvalidArgument, "this agent can wait for 'init' only")
		return
	}
	ctx, cancel := untilCancelled(stream)
	defer cancel()
	state := s.guest.WaitInit(ctx)
	if ctx.Err() != nil {
		finish(stream, wire.Plain{Type: wire.TypeClosed})
		return
	}
	finish(stream, wire.Result{Type: wire.TypeResult, Init: state})
}

func (s *Server) listeners(stream *wire.Stream) {
	ctx, cancel := untilCancelled(stream)
	defer cancel()
	for ports := range s.guest.Listeners(ctx) {
		if ports == nil {
			ports = []int{} // an empty list, not null
		}
		if stream.Send(wire.Listening{Type: wire.TypeListening, Ports: ports}) != nil {
			cancel()
		}
	}
	finish(stream, wire.Plain{Type: wire.TypeClosed})
}

// untilCancelled makes a context that ends when the client says cancel, or with the stream.
func untilCancelled(stream *wire.Stream) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer cancel()
		for {
			message, err := stream.ReadMessage(0)
			if err != nil || message.Type == wire.TypeCancel {
				return
			}
		}
	}()
	return ctx, cancel
}

func (s *Server) console(stream *wire.Stream) {
	master, err := s.guest.NewConsole()
	if errors.Is(err, errors.ErrUnsupported) {
		refuse(stream, wire.CodeUnsupported, err.Error())
		return
	}
	if err != nil {
		refuse(stream, wire.CodeInternal, err.Error())
		return
	}
	defer master.Close()
	if err := stream.FinishWithFile(wire.Result{Type: wire.TypeResult}, master); err != nil {
		refuse(stream, wire.CodeUnsupported, err.Error()) // in vain unless it is the kind of connection
	}
}

func setClock(stream *wire.Stream) {
	request := wire.Clock{}
	if !decode(stream, &request) {
		return
	}
	now := time.Unix(0, request.UnixNanos)
	if !isPossible(now) {
		refuse(stream, wire.CodeInvalidArgument, "no clock says that")
		return
	}
	if isRight(now, time.Now()) {
		finishOr(stream, nil)
		return
	}
	value := syscall.Timeval{Sec: now.Unix(), Usec: int64(now.Nanosecond() / 1000)}
	err := os.NewSyscallError("settimeofday", syscall.Settimeofday(&value))
	if errors.Is(err, syscall.EPERM) {
		refuse(stream, wire.CodeUnsupported, "the clock of this machine is its host's")
		return
	}
	finishOr(stream, err)
}

// isPossible is false for a request without a time, which reads as 1970, and for what no host's clock can say.
func isPossible(host time.Time) bool { return host.Year() >= 2020 }

// isRight spares a clock that is as good as the host's word for it, which took its time to come here. Time that jumps
// back by milliseconds is what make(1) and databases stumble over.
func isRight(host, own time.Time) bool {
	return host.Sub(own).Abs() < clockTolerance
}
