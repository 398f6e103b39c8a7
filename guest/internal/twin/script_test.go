package twin

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"
)

func script(t *testing.T, root, text string) *os.File {
	t.Helper()
	write(t, root+scriptFile, "#!/bin/sh\n"+text, 0o755)
	console, err := os.Create(root + "/console")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { console.Close() })
	return console
}

func TestScript(t *testing.T) {
	root := guest(t, basePasswd, baseGroup)
	console := script(t, root, `echo "$CONTAINER_USER $CONTAINER_UID $CONTAINER_GID $CONTAINER_HOME $CONTAINER_MACHINE_ID $EXTRA $(id -u)"
echo "$CONTAINER_USER:x:$CONTAINER_UID:$CONTAINER_GID::$CONTAINER_HOME:/bin/sh" >> `+root+`/etc/passwd`)
	if !ScriptPending(root, "i1", bob) || !LeftToScript(root, "i1", bob) {
		t.Fatal("not pending")
	}
	if err := runScript(context.Background(), root, "i1", "dev", bob, []string{"EXTRA=e"}, console, scriptDeadline); err != nil {
		t.Fatal(err)
	}
	if got := read(t, root+"/console"); got != "bob.b 2000 2000 /home/bob.b dev e 0\n" {
		t.Error(got)
	}
	if ScriptPending(root, "i1", bob) || !LeftToScript(root, "i1", bob) {
		t.Error("once per instance, and what it made is left alone")
	}
	if !ScriptPending(root, "i2", bob) {
		t.Error("a clone runs it again")
	}
	write(t, root+"/etc/passwd", basePasswd, 0o644)
	if LeftToScript(root, "i1", bob) {
		t.Error("the user it made is gone: ours to make")
	}
}

func TestScriptThatFails(t *testing.T) {
	for text, want := range map[string]string{
		"exit 3":   "exit status 3",
		"exit 0":   "made no user bob.b",
		"sleep 60": "took longer than",
	} {
		root := guest(t, basePasswd, baseGroup)
		console := script(t, root, text)
		err := runScript(context.Background(), root, "i1", "dev", bob, nil, console, 200*time.Millisecond)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
		if ScriptPending(root, "i1", bob) || LeftToScript(root, "i1", bob) {
			t.Errorf("%s: not ours to make now", text)
		}
	}
}

func TestScriptIsNotRun(t *testing.T) {
	root := guest(t, basePasswd, baseGroup)
	if ScriptPending(root, "i1", bob) {
		t.Error("there is none")
	}
	write(t, root+scriptFile, "", 0o644)
	if ScriptPending(root, "i1", bob) {
		t.Error("not executable")
	}
	write(t, root+scriptFile, "", 0o755)
	if ScriptPending(root, "i1", User{Name: "root"}) {
		t.Error("for root")
	}
}
