package keeper

import (
	"errors"
	"os"
	"sync"
	"time"

	"berth.dev/guest/internal/channel"
	"berth.dev/guest/internal/wire"
)

const (
	// maxClients is how many clients of agent.sock are carried at once; more wait in its queue.
	maxClients = 512
	// helloTime is how long an agent that has answered the line may take to greet.
	helloTime = 30 * time.Second
	// lasting is how long a connection has to last for the agent not to count as broken.
	lasting = time.Second
)

// serveChannel makes one connection with the agent of a VM and works over it until it ends. It says how long to wait
// before the next attempt: a guest that breaks connection after connection is to cost little.
func (k *vmKeeper) serveChannel(socket *wire.Socket) time.Duration {
	stream, err := channel.Dial(socket, channel.Wait(k.failed))
	if err != nil {
		k.failed++
		if errors.Is(err, channel.ErrFlood) {
			return channel.Wait(k.failed)
		}
		return k.times.breath
	}
	began := time.Now()
	conn := wire.NewConn(stream, wire.Options{Side: wire.Host, Version: k.options.Version, Role: "keeper", MaxStreams: maxServices})
	defer conn.Close()
	k.setChannel(conn)
	defer k.setChannel(nil)
	if _, err := conn.WaitHello(helloTime); err == nil {
		k.serve(conn)
	}
	if k.failed++; time.Since(began) > lasting {
		k.failed = 0
	}
	return min(k.times.retryMin<<min(k.failed, 10), k.times.retryMax)
}

// serve works over a connection whose agent has greeted.
func (k *vmKeeper) serve(conn *wire.Conn) {
	k.settled.Reset(settleAfter) // when the start is behind it
	var others sync.WaitGroup
	defer others.Wait()
	defer conn.Close() // before the wait
	others.Go(func() { k.services.serve(conn) })
	others.Go(func() { k.keepClock(conn) })
	others.Go(func() { k.acceptClients(conn) })
	if k.ports != nil {
		others.Go(func() { k.ports.follow(conn) })
	}
	<-conn.Done()
}

func (k *vmKeeper) setChannel(conn *wire.Conn) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.channel = conn
}

// portChanged takes what QEMU tells of the agent: it has closed its port, or another one opened it.
func (k *vmKeeper) portChanged(open bool) {
	k.mu.Lock()
	conn := k.channel
	k.mu.Unlock()
	switch {
	case conn == nil:
	case !open:
		conn.Close()
	default: // mostly the very agent that we speak with, for QEMU holds events back
		wake(k.doubt)
	}
}

// acceptClients carries clients until the connection to the agent ends. Those that come while there is none wait in
// the socket's queue, as do those beyond maxClients.
func (k *vmKeeper) acceptClients(conn *wire.Conn) {
	_ = k.clients.SetDeadline(time.Time{})
	finished := make(chan struct{})
	var watcher sync.WaitGroup
	defer watcher.Wait() // or it would stop the next connection's clients
	defer close(finished)
	watcher.Go(func() {
		select {
		case <-conn.Done():
			_ = k.clients.SetDeadline(time.Unix(1, 0))
		case <-finished:
		}
	})
	for {
		client := k.nextClient(conn)
		if client == nil {
			return
		}
		stream, err := conn.Open(wire.Plain{Type: wire.TypeConnect})
		switch {
		case err == nil:
			go k.carry(stream, client)
		case conn.Err() != nil:
			k.orphan = client
			return
		default:
			client.Close()
			<-k.slots
		}
	}
}

// nextClient waits for a client and takes a slot for it; nil when the connection to the agent has ended.
func (k *vmKeeper) nextClient(conn *wire.Conn) *wire.Socket {
	if client := k.orphan; client != nil {
		k.orphan = nil
		return client
	}
	select {
	case k.slots <- struct{}{}:
	case <-conn.Done():
		return nil
	}
	for {
		client, err := k.clients.Accept()
		switch {
		case err == nil:
			return client
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, os.ErrClosed):
			<-k.slots
			return nil
		}
		select { // out of descriptors: it passes
		case <-conn.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// carry joins one client with the agent. The client's bytes wait for no answer: when the agent refuses, the stream ends.
func (k *vmKeeper) carry(stream *wire.Stream, client *wire.Socket) {
	defer func() {
		<-k.slots
		k.settled.Reset(settleAfter)
	}()
	go func() {
		if _, err := stream.ReadMessage(k.times.begin); errors.Is(err, os.ErrDeadlineExceeded) {
			wake(k.doubt)
		}
	}()
	relay(stream, client)
}
