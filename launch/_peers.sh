# Sourced after _env.sh: the original's wheel, each version in a virtual environment of its own under $STATE/peers.

PEER_PACKAGE=mooncake-transfer-engine-non-cuda

# set_up_peers VERSION…: installs what is missing, and the system libraries that the original needs.
set_up_peers() {
    locked "$STATE/peers.lock" 900 _set_up_peers "$@"
}

_set_up_peers() {
    local version venv missing=() library package
    while read -r library package; do
        ldconfig -p | grep -q "$library" || missing+=("$package")
    done <<<'libibverbs.so.1 libibverbs1
libnuma.so.1 libnuma1
libcurl.so.4 libcurl4'
    [ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"
    for version in "$@"; do
        venv=$STATE/peers/$version
        [ -e "$venv/.complete" ] && continue
        say "installing the original, version $version"
        [ -x "$venv/bin/pip" ] || make_venv "$venv"
        pip_install "$venv/bin/python" "$PEER_PACKAGE==$version"
        touch "$venv/.complete"
    done
}

# peer_binary PYTHON: the bench itself. The wheel's command of that name only starts it, and leaves it running when
# that command is killed.
peer_binary() {
    local binary
    binary=$("$1" -c 'import importlib.util as u, pathlib as p
print(p.Path(u.find_spec("mooncake").submodule_search_locations[0], "transfer_engine_bench"))') || exit 1
    [ -x "$binary" ] || chmod +x "$binary"
    echo "$binary"
}
