#!/usr/bin/env bash
# pytest-mpi 0.6 and mpi-pytest 2026.0 install the same module, `pytest_mpi`: the second one replaces the first, and pip
# says nothing.
#
# Afterwards pip lists both, `pip check` finds nothing wrong, and pytest does not know `--with-mpi` any more: it ends with
# a usage error. Uninstalling the second one does not bring it back: the file `pytest_mpi/__init__.py` goes with it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" --disable-pip-version-check)
"${pip[@]}" install -q pytest==8.4.2 pytest-mpi==0.6 mpi4py==4.1.2 mpich==5.0.2
echo 'def test_nothing(): pass' >"$work/test_it.py"
run() { "$work/venv/bin/python" -m pytest -q -p no:cacheprovider --with-mpi "$work/test_it.py" >"$work/out" 2>&1 && echo 0 || echo $?; }
alone=$(run)
"${pip[@]}" install -q mpi-pytest==2026.0
"${pip[@]}" check
both=$(run)
echo "exit code of pytest --with-mpi with pytest-mpi alone: $alone"
echo "and with mpi-pytest beside it: $both: $(grep -o 'unrecognized arguments: --with-mpi' "$work/out")"
[ "$alone" = 0 ] && [ "$both" = 4 ]
"${pip[@]}" uninstall -q -y mpi-pytest
after=$(run)
echo "after mpi-pytest was uninstalled: $after"
[ "$after" = 4 ]
