package memory

import (
	"bytes"
	"strings"
	"testing"
)

// What is dropped is read again: code, constants and what was allocated are all still there.
func TestGiveBack(t *testing.T) {
	kept := bytes.Repeat([]byte("kept"), 1<<18)
	for range 3 {
		GiveBack()
		if strings.Count(string(kept), "kept") != 1<<18 {
			t.Fatal("memory was lost")
		}
	}
}
