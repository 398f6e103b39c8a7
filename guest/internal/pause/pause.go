// Package pause is `agent pause`: a process that does nothing but hold the namespaces it was started in, for the
// network hub of an ordinary user.
package pause

import (
	"os"
	"os/signal"
	"syscall"

	"berth.dev/guest/internal/files"
	"berth.dev/guest/internal/memory"
)

// Main closes what was inherited beyond the standard files, ignores what a terminal sends, and ends at SIGTERM.
func Main() int {
	memory.BeSmall()
	files.CloseInherited()
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTSTP)
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	memory.GiveBack()
	<-end
	return 0
}
