// Command berth-agent is the one program that berth brings into a machine, and the small one that stays beside it on the
// host: `boot` and `serve` in the guest, and in a VM /init, `guard`, `freeze` and `thaw`; `keeper` and `pause` on the host
// (docs/internals.md).
package main

import (
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"berth.dev/guest/internal/boot"
	"berth.dev/guest/internal/channel"
	"berth.dev/guest/internal/exec"
	"berth.dev/guest/internal/freeze"
	"berth.dev/guest/internal/guestos"
	"berth.dev/guest/internal/keeper"
	"berth.dev/guest/internal/pause"
	"berth.dev/guest/internal/serve"
	"berth.dev/guest/internal/vmboot"
	"berth.dev/guest/internal/wire"
)

// version is set by the build: -ldflags "-X main.version=…".
var version = "dev"

const (
	exitFailed = 1
	exitUsage  = 2
	// farewell is how long a command that is ended by the machine's shutdown, too, has to tell its end.
	farewell = 300 * time.Millisecond
)

func main() {
	if vmboot.IsInit() { // whatever the kernel adds to its arguments
		vmboot.Main()
	}
	if len(os.Args) < 2 {
		os.Exit(usage())
	}
	switch os.Args[1] {
	case "boot":
		os.Exit(boot.Main())
	case "serve":
		os.Exit(runServe())
	case "guard":
		os.Exit(vmboot.Guard())
	case "freeze":
		os.Exit(freeze.Main())
	case "thaw":
		os.Exit(freeze.Thaw())
	case "keeper":
		os.Exit(keeper.Main(os.Args[2:], version))
	case "pause":
		os.Exit(pause.Main())
	case "version", "--version":
		_, _ = os.Stdout.WriteString(version + "\n")
	default:
		os.Exit(usage())
	}
}

func usage() int {
	complain("usage: berth-agent boot|serve|guard|freeze|thaw|keeper|pause|version")
	return exitUsage
}

func complain(text string) { _, _ = os.Stderr.WriteString("berth-agent: " + text + "\n") }

// runServe is the agent proper, until the machine goes down: it answers on the listening socket that is descriptor 3,
// in a VM on the channel.
func runServe() int {
	beModest()
	isolate()
	doc, err := boot.Load(boot.DocumentPath)
	if err != nil {
		complain(err.Error())
		doc = &boot.Document{} // root can still be served
	}
	config := exec.Config{User: "root", Env: doc.Env}
	if doc.Twin != nil {
		config.User = doc.Twin.Name
	}
	guest := guestos.New(doc)
	server := serve.New(guest, version, config)
	if err := guest.ForwardSSHAgent(server.OpenToKeeper); err != nil {
		complain("the SSH agent is not forwarded: " + err.Error())
	}
	boot.AwaitInit()
	if doc.VM != nil {
		stopAtShutdown(server, func() {}) // who comes now is served until we end
		complain(channel.Serve(vmboot.OpenPort, server.Attend).Error())
		return exitFailed
	}
	return serveContainer(server)
}

func serveContainer(server *serve.Server) int {
	listener, err := wire.NewListener(boot.ListenFD)
	if err != nil {
		complain(err.Error())
		return exitFailed
	}
	stopAtShutdown(server, func() { _ = listener.Close() })
	if err := server.Serve(listener); err != nil {
		complain(err.Error())
		return exitFailed
	}
	select {} // the shutdown has closed the listener, and ends the process
}

// beModest trades some speed of the collector for memory: each machine has an agent. It begins at 4 MiB × this
// percentage, and each thread of the runtime has its own caches.
func beModest() {
	debug.SetGCPercent(25)
	runtime.GOMAXPROCS(min(4, runtime.GOMAXPROCS(0)))
}

// isolate lets nothing of how the agent was started through to the commands: descriptors, umask, directory.
func isolate() {
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, entry := range entries {
		if fd, err := strconv.Atoi(entry.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
	syscall.Umask(0o022)
	_ = os.Chdir("/")
}

// stopAtShutdown ends the agent at SIGTERM, which an init sends to everybody when the machine goes down, and which it
// waits for. The commands get it as well: whoever waits for them is still told how they ended.
func stopAtShutdown(server *serve.Server, admitNobody func()) {
	signals := make(chan os.Signal, 4)
	// SIGHUP and SIGINT mean nothing here; but had the starter ignored them, so would every command.
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT)
	go func() {
		for received := range signals {
			if received != syscall.SIGTERM {
				continue
			}
			admitNobody()
			for end := time.Now().Add(farewell); server.Busy() && time.Now().Before(end); {
				time.Sleep(10 * time.Millisecond)
			}
			os.Exit(0)
		}
	}()
}
