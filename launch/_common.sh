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
