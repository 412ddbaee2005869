# Sourced by scripts that need no virtual environment:
#   ROOT    the checkout            STATE   where the scripts keep what they make; nothing of it is under version control

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
STATE=$ROOT/.mooncake

die() { echo "$(basename "$0"): $*" >&2; exit 1; }
say() { echo "$(basename "$0"): $*" >&2; }

# show_help: the head of the calling script. help_if_asked ARGUMENT…: nothing but that where it is asked for.
show_help() { sed -n '2,/^set /s/^# \?//p' "$0"; }
usage() { show_help >&2; exit 2; }
help_if_asked() { case "${1:-}" in -h | -help | --help) show_help; exit 0 ;; esac; }

# locked FILE SECONDS COMMAND…: run it in a subshell while no other process has FILE locked. By flock(1); where the file
# system has no locks, as Lustre mounted without -o flock, by a link FILE.owner that says who made it.
locked() {
    local file=$1 seconds=$2
    shift 2
    mkdir -p "$(dirname "$file")"
    (
        code=0
        flock -E 75 -w "$seconds" 9 2>/dev/null || code=$?
        case $code in
            0) ;;
            75) die "another process has held $file for $seconds s" ;;
            *) own_link "$file.owner" "$seconds" ;;
        esac
        "$@"
    ) 9>>"$file"
}

# own_link LINK SECONDS: make it when nobody has it, and remove it when this subshell ends. A process of this machine that
# has ended has nothing; of another machine's that cannot be told from here.
own_link() {
    local link=$1 until=$((SECONDS + $2)) me=$BASHPID owner machine process started
    while ! ln -sn "$(machine):$me:$(start_of "$me"):$(hostname)" "$link" 2>/dev/null; do
        owner=$(readlink "$link") || { [ -w "$(dirname "$link")" ] || die "$(dirname "$link") cannot be written"; continue; }
        IFS=: read -r machine process started _ <<<"$owner"
        if [ "$machine" = "$(machine)" ] && [ "$(start_of "$process")" != "$started" ] && mkdir "$link.removed" 2>/dev/null; then
            [ "$(readlink "$link")" != "$owner" ] || rm -f "$link"
            rmdir "$link.removed"
            continue
        fi
        find "$link.removed" -maxdepth 0 -mmin +1 -exec rmdir {} + 2>/dev/null || true  # its maker was killed
        [ $SECONDS -lt $until ] || die "process $process of host ${owner##*:} has held $link for $2 s; if it has ended, remove $link"
        sleep 0.2
    done
    trap "rm -f $(printf %q "$link")" EXIT
}

machine() { cat /proc/sys/kernel/random/boot_id; }
# start_of PROCESS: when it started; nothing where it has ended.
start_of() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 !~ /[ZX]/ {print $20}'; }

# apt_install PACKAGE…: only as root, and only where apt-get exists.
apt_install() {
    command -v apt-get >/dev/null || die "please install: $*"
    [ "$(id -u)" = 0 ] || die "please install (as root): apt-get install $*"
    say "apt-get install $*"
    mkdir -p "$STATE"
    local apt=(apt-get -qq -o DPkg::Lock::Timeout=600)
    { "${apt[@]}" update && DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends "$@"; } \
        >"$STATE/apt.log" 2>&1 </dev/null || { tail -20 "$STATE/apt.log" >&2; die "apt-get failed: $*"; }
}

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
