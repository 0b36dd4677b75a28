package main

import (
	"fmt"
	"net"
	"strings"
)

// uriOf is the NBD URI of an export behind a listening address. socket is the
// absolute path of a unix socket; for TCP it is not used.
func uriOf(addr net.Addr, socket, export string) string {
	name := uriEscape(export)
	if strings.HasPrefix(name, "/") {
		name = "%2F" + name[1:] // two slashes in a row would begin an authority
	}
	if _, ok := addr.(*net.UnixAddr); ok {
		return fmt.Sprintf("nbd+unix:///%s?socket=%s", name, uriEscape(socket))
	}
	host := addr.String()
	if tcp, ok := addr.(*net.TCPAddr); ok && tcp.IP.IsUnspecified() {
		host = fmt.Sprintf("localhost:%d", tcp.Port)
	}
	return fmt.Sprintf("nbd://%s/%s", strings.TrimSuffix(host, fmt.Sprintf(":%d", defaultPort)), name)
}

// uriEscape writes all bytes in percent form that may mean something in the path
// or query of a URI; clients differ in what they take literally.
func uriEscape(s string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/"
	var b strings.Builder
	for i := range len(s) {
		if strings.IndexByte(plain, s[i]) >= 0 {
			b.WriteByte(s[i])
		} else {
			fmt.Fprintf(&b, "%%%02X", s[i])
		}
	}
	return b.String()
}
