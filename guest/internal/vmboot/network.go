package vmboot

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"berth.dev/guest/internal/boot"
)

const (
	loopback       = 1 // its index in every network namespace
	netlinkSeconds = 5 // an answer comes at once, or never
)

// bringNetworkUp brings the loopback interface up (the kernel gives it its addresses), then the one with the MAC
// address of the document, with its address and the way out. Source: rtnetlink(7).
func bringNetworkUp(network *boot.Network) error {
	link, err := openNetlink()
	if err != nil {
		return err
	}
	defer syscall.Close(link)
	if err := ask(link, setUp(loopback)); err != nil {
		return fmt.Errorf("lo: %w", err)
	}
	if network == nil {
		return nil
	}
	name, err := waitDevice("network interface", "/class/net", "address", formatMAC(network.MAC))
	if err != nil {
		return err
	}
	index, err := interfaceIndex(sysfs, name)
	if err != nil {
		return err
	}
	messages := [][]byte{addAddress(index, network.IP, network.Prefix), setUp(index)}
	if network.Gateway != (boot.IPv4{}) {
		messages = append(messages, addDefaultRoute(index, network.Gateway))
	}
	for _, message := range messages {
		if err := ask(link, message); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func formatMAC(mac boot.MAC) string {
	parts := make([]string, len(mac))
	for i, part := range mac {
		parts[i] = hex.EncodeToString([]byte{part})
	}
	return strings.Join(parts, ":")
}

func interfaceIndex(sys, name string) (uint32, error) {
	text, err := os.ReadFile(sys + "/class/net/" + name + "/ifindex")
	if err != nil {
		return 0, err
	}
	index, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32)
	return uint32(index), err
}

// setUp makes the request that ip(8) makes for `ip link set INDEX up`.
func setUp(index uint32) []byte {
	body := make([]byte, syscall.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(body[4:], index)
	binary.NativeEndian.PutUint32(body[8:], syscall.IFF_UP)
	binary.NativeEndian.PutUint32(body[12:], syscall.IFF_UP) // what changes
	return request(syscall.RTM_NEWLINK, 0, body)
}

// addAddress: `ip address replace IP/PREFIX broadcast + dev INDEX`.
func addAddress(index uint32, ip boot.IPv4, prefix int) []byte {
	body := make([]byte, syscall.SizeofIfAddrmsg)
	body[0], body[1] = syscall.AF_INET, byte(prefix)
	binary.NativeEndian.PutUint32(body[4:], index)
	body = appendAttribute(body, syscall.IFA_LOCAL, ip[:])
	body = appendAttribute(body, syscall.IFA_ADDRESS, ip[:])
	if prefix < 31 {
		last := broadcast(ip, prefix)
		body = appendAttribute(body, syscall.IFA_BROADCAST, last[:])
	}
	return request(syscall.RTM_NEWADDR, syscall.NLM_F_CREATE|syscall.NLM_F_REPLACE, body)
}

// addDefaultRoute: `ip route replace default via GATEWAY dev INDEX`.
func addDefaultRoute(index uint32, gateway boot.IPv4) []byte {
	body := make([]byte, syscall.SizeofRtMsg)
	body[0] = syscall.AF_INET
	body[4], body[5], body[6], body[7] = syscall.RT_TABLE_MAIN, syscall.RTPROT_BOOT, syscall.RT_SCOPE_UNIVERSE, syscall.RTN_UNICAST
	body = appendAttribute(body, syscall.RTA_GATEWAY, gateway[:])
	body = appendAttribute(body, syscall.RTA_OIF, binary.NativeEndian.AppendUint32(nil, index))
	return request(syscall.RTM_NEWROUTE, syscall.NLM_F_CREATE|syscall.NLM_F_REPLACE, body)
}

func broadcast(ip boot.IPv4, prefix int) (last boot.IPv4) {
	binary.BigEndian.PutUint32(last[:], binary.BigEndian.Uint32(ip[:])|(1<<(32-prefix)-1))
	return last
}

// request puts the header before a body, whose parts are padded to four bytes each. Source: netlink(7).
func request(kind, flags uint16, body []byte) []byte {
	message := make([]byte, syscall.SizeofNlMsghdr, syscall.SizeofNlMsghdr+len(body))
	binary.NativeEndian.PutUint32(message, uint32(cap(message)))
	binary.NativeEndian.PutUint16(message[4:], kind)
	binary.NativeEndian.PutUint16(message[6:], flags|syscall.NLM_F_REQUEST|syscall.NLM_F_ACK)
	return append(message, body...)
}

func appendAttribute(body []byte, kind uint16, value []byte) []byte {
	body = binary.NativeEndian.AppendUint16(body, uint16(syscall.SizeofRtAttr+len(value)))
	body = binary.NativeEndian.AppendUint16(body, kind)
	return append(body, value...) // all of ours have four bytes
}

func openNetlink() (int, error) {
	fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, syscall.NETLINK_ROUTE)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	_ = syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &syscall.Timeval{Sec: netlinkSeconds})
	return fd, nil
}

// ask sends one request and waits for its acknowledgement.
func ask(link int, message []byte) error {
	if err := syscall.Sendto(link, message, 0, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}); err != nil {
		return os.NewSyscallError("sendto", err)
	}
	buffer := make([]byte, 4096)
	count, _, err := syscall.Recvfrom(link, buffer, 0)
	if err != nil {
		return os.NewSyscallError("recvfrom", err)
	}
	return parseAcknowledgement(buffer[:count])
}

// parseAcknowledgement reads an NLMSG_ERROR, whose error is 0 when all is well.
func parseAcknowledgement(answer []byte) error {
	body := syscall.SizeofNlMsghdr
	if len(answer) < body+4 || binary.NativeEndian.Uint16(answer[4:]) != syscall.NLMSG_ERROR {
		return errors.New("the kernel gave no answer")
	}
	if code := int32(binary.NativeEndian.Uint32(answer[body:])); code != 0 {
		return syscall.Errno(-code)
	}
	return nil
}
