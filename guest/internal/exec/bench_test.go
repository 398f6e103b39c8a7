package exec

import (
	"os"
	"testing"

	"berth.dev/guest/internal/wire"
)

const bulk = 1 << 30

// bulkFile is a sparse file: reading it costs the command what reading a cached file does, without the disk.
func bulkFile(b *testing.B) string {
	b.Helper()
	path := b.TempDir() + "/bulk"
	file, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(bulk); err != nil {
		b.Fatal(err)
	}
	return path
}

// BenchmarkOutput is `cat` of 1 GiB to a peer that drops it.
func BenchmarkOutput(b *testing.B) {
	host, path := agent(b, Config{User: "root"}), bulkFile(b)
	b.SetBytes(bulk)
	for b.Loop() {
		stream := open(b, host, request("cat", path))
		count := 0
		for {
			chunk, err := stream.Next(wire.Stdout)
			if err != nil {
				break
			}
			count += len(chunk.Data)
			stream.Consumed(wire.Stdout, chunk)
		}
		if got := finish(b, stream); got.code != 0 || count != bulk {
			b.Fatal(count, got)
		}
	}
}

// BenchmarkInput is 1 GiB into a command that reads all of it.
func BenchmarkInput(b *testing.B) {
	host := agent(b, Config{User: "root"})
	data := make([]byte, 1<<20)
	b.SetBytes(bulk)
	for b.Loop() {
		stream := open(b, host, request("dd", "of=/dev/null", "bs=1M", "status=none"))
		for range bulk / len(data) {
			if err := stream.Write(wire.Stdin, data); err != nil {
				b.Fatal(err)
			}
		}
		_ = stream.CloseWrite(wire.Stdin)
		if got := finish(b, stream); got.code != 0 {
			b.Fatal(got)
		}
	}
}

// BenchmarkTrue is the way of a short command, without the client's own start.
func BenchmarkTrue(b *testing.B) {
	host := agent(b, Config{User: "nobody"})
	for b.Loop() {
		if got := run(b, host, request("true"), ""); got.code != 0 {
			b.Fatal(got)
		}
	}
}
