#!/usr/bin/env bash
# numba 0.68.1: a complete cache in NUMBA_CACHE_DIR is not used where the folder can be read but not written.
#
# A container image or a site's share brings compiled functions along. numba chooses the folder of a cache by whether it
# can write there. So it passes over the one that has everything: with a writable home it compiles again into the home,
# without a word; without one, `@njit(cache=True)` raises RuntimeError at import, "no locator available".
set -euo pipefail
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numba==0.68.1 numpy==2.4.6
cat >"$work/program.py" <<'PROGRAM'
import numba

try:

    @numba.njit(cache=True)
    def add(a, b):
        return a + b

    add(1, 2)
    print("taken from the cache" if sum(add.stats.cache_hits.values()) else "compiled")
except RuntimeError as error:
    print(f"RuntimeError: {str(error).split(':')[1].split(' for ')[0].strip()}")
PROGRAM
mkdir "$work/home"
export NUMBA_CACHE_DIR=$work/cache
first=$("$work/venv/bin/python" "$work/program.py")
second=$("$work/venv/bin/python" "$work/program.py")
chmod -R a=rX "$work/cache"
chmod 755 "$work"
chmod 644 "$work/program.py"
as=()
if [ "$(id -u)" = 0 ]; then  # root can write everywhere
    as=(setpriv --reuid=65534 --regid=65534 --clear-groups)
    chown 65534 "$work/home"
fi
with_home=$(HOME=$work/home "${as[@]}" "$work/venv/bin/python" "$work/program.py")
without_home=$(HOME=/proc "${as[@]}" "$work/venv/bin/python" "$work/program.py")
echo "writable, first process:             $first"
echo "writable, second process:            $second"
echo "read-only, with a writable home:     $with_home"
echo "read-only, without a writable home:  $without_home"
[ "$first/$second" = "compiled/taken from the cache" ]
[ "$with_home" = compiled ]
[ "$without_home" = "RuntimeError: no locator available" ]
