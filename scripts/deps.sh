#!/bin/sh
# Installs the Debian packages that the tests need and that are missing. Where it
# cannot, it says in one line what is missing and fails.
set -u
packages="gcc libc6-dev qemu-utils libnbd-bin nbdfuse python3-libnbd nbdkit fio e2fsprogs xfsprogs btrfs-progs fuse3
iproute2 openssl nbd-client strace procps util-linux mount systemd"

missing=
for p in $packages; do
	status=$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null) || status=
	[ "$status" = installed ] || missing="$missing $p"
done
[ -n "$missing" ] || exit 0

fail() {
	echo "deps: $1; missing Debian packages:$missing" >&2
	exit 1
}
command -v apt-get >/dev/null 2>&1 || fail "this is no Debian system, install their like"
[ "$(id -u)" = 0 ] || fail "not root, run: sudo apt-get install$missing"
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
# Package lists in an image may be stale: refresh them only when they do not do.
# shellcheck disable=SC2086
apt-get install -y --no-install-recommends $missing >"$log" 2>&1 ||
	{ apt-get update >"$log" 2>&1 && apt-get install -y --no-install-recommends $missing >"$log" 2>&1; } ||
	fail "apt-get failed ($(tail -n 1 "$log"))"
