#!/usr/bin/env bash
# The RDMA tests by whichever way this machine offers; called by launch/test.
#   launch/_rdma.sh --setup                   install what they need
#   launch/_rdma.sh FOLDER [ARGUMENT…]        run pytest with the arguments [tests/rdma]; its JUnit file is FOLDER/r.xml
# Natively where there are RDMA devices or this kernel makes soft-RoCE ones, else in the guest of launch/soft-roce-vm.
# Exit status: pytest's; 125 where there is no way.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/_env.sh"
source "$ROOT/launch/_peers.sh"

NICS=4
OTHER_PYVERBS=59.0  # tested too, with the libibverbs of its release
ORIGINALS="0.3.13.post1 0.3.12.post1 0.3.10.post2"

devices() { ls /sys/class/infiniband 2>/dev/null | tr '\n' ' '; }

# Only with the right to make devices, and never by loading a module to find out.
kernel_has_rxe() {
    [ "$(id -u)" = 0 ] && command -v rdma >/dev/null &&
        { modprobe -qn rdma_rxe || [ -d /sys/module/rdma_rxe ]; } 2>/dev/null
}

way() {
    if [ -n "$(devices)" ]; then echo native; elif kernel_has_rxe; then echo rxe; else echo guest; fi
}

# numba keeps its caches apart by processor; in the guest it is another one than here
warm_for_guest() {
    export NUMBA_CPU_NAME=generic
    "$PY" -P -m mooncake_hpc warm >&2
}

set_up() {
    "$ROOT/launch/setup-rdma" >/dev/null || exit 125
    set_up_peers $ORIGINALS
    if [ "$WAY" != native ]; then
        "$ROOT/launch/slurm-sandbox" install || exit 125
        MOONCAKE_TEST_PYVERBS=$("$ROOT/launch/setup-rdma" --beside "$OTHER_PYVERBS") || exit 125
        export MOONCAKE_TEST_PYVERBS
    fi
    if [ "$WAY" = guest ]; then
        "$ROOT/launch/soft-roce-vm" --setup || exit 125
        warm_for_guest
    fi
}

WAY=$(way)
[ -n "${MOONCAKE_TEST_RDMA:-}" ] || set_up  # within itself, in tests of its ways, all is there
[ "${1:-}" != --setup ] || exit 0
folder=$(realpath "$1")
shift
case " $*" in *" tests/"*) ;; *) set -- tests/rdma "$@" ;; esac
export MOONCAKE_TEST_RDMA=$WAY
cd "$ROOT"
pytest=("$PY" -m pytest -q --durations=12 --junitxml "$folder/r.xml" "$@")
case $WAY in
    native)
        say "RDMA tests: on this machine's devices, $(devices)"
        exec "${pytest[@]}" ;;
    rxe)
        say "RDMA tests: soft-RoCE on this machine's kernel, $(uname -r)"
        "$ROOT/launch/soft-roce" up "$NICS" || exit 125
        trap '"$ROOT/launch/soft-roce" down' EXIT
        "${pytest[@]}" ;;
    guest)
        say "RDMA tests: soft-RoCE in a guest, since this kernel ($(uname -r)) has neither devices nor rdma_rxe"
        exec "$ROOT/launch/soft-roce-vm" --nics "$NICS" --memory 7G --timeout 2400 --share "$folder" -- "${pytest[@]}" ;;
esac
