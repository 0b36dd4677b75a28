#!/bin/sh
# Serves a disk until Ctrl-C, on a unix socket, on loopback TCP and with metrics,
# and shows one command for each common client: demo.sh BINARY [IMAGE]
set -eu
bin=$1
image=${2:-}
dir=$(mktemp -d "${TMPDIR:-/tmp}/nbdserve-demo.XXXXXX")
trap 'rm -rf "$dir"' EXIT
server=
trap '[ -z "$server" ] || kill -TERM "$server"' INT TERM # a shell's background ignores SIGINT

if [ -z "$image" ]; then
	image=$dir/disk.qcow2
	"$bin" image create -q -f qcow2 "$image" 1G
fi
set -- serve --listen "unix:$dir/nbd.sock" --listen tcp:localhost:0 --metrics localhost:0 --print-uri "$image"

# The URIs come through a pipe, so that they can be shown in their place.
mkfifo "$dir/uris"
"$bin" "$@" >"$dir/uris" &
server=$!
unix= tcp=
{ read -r unix && read -r tcp; } <"$dir/uris" || true
if [ -n "$tcp" ]; then
	cat <<EOF

Serving $image, until Ctrl-C:
  $unix
  $tcp
Metrics: the address in the log line above, /metrics, /healthz and /readyz

Try it from another terminal:
  nbdinfo '$unix'
  nbdcopy --progress '$unix' $dir/copy.raw
  qemu-img info '$unix'
  qemu-io -f raw -c 'write -P 7 0 64k' -c 'read -P 7 0 64k' '$unix'
  nbdsh -u '$unix' -c 'print(h.get_size())'
  fio --name=demo --ioengine=nbd --uri='$unix' --rw=randrw --bs=4k --iodepth=16 --size=64m --verify=crc32c
  mkdir -p $dir/mnt && nbdfuse $dir/mnt '$unix'

EOF
fi
status=0
while kill -0 "$server" 2>/dev/null; do # wait returns early when a signal comes
	wait "$server" && status=0 || status=$?
done
exit "$status"
