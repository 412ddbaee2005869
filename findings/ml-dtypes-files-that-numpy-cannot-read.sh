#!/usr/bin/env bash
# ml_dtypes 0.5.4 with numpy 2.4.6: `np.save` writes an array of float8_e5m2 without a word, and `np.load` refuses that file.
#
# The dtype's `str` is '<f1', which numpy's own format does not know: ValueError "descr is not a valid dtype descriptor".
# bfloat16 and the other small floats come back as void ('|V2', '|V1'): the bytes are right, and their type is lost in
# silence. So a checkpoint in .npy or .npz files needs the names of its dtypes beside it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 ml_dtypes==0.5.4
"$work/venv/bin/python" - <<'PROGRAM'
import io

import ml_dtypes
import numpy as np


def round_trip(name: str) -> str:
    file = io.BytesIO()
    np.save(file, np.array([0, 1], np.float32).astype(getattr(ml_dtypes, name)))
    file.seek(0)
    try:
        return str(np.load(file).dtype)
    except ValueError as error:
        return f"ValueError: {error}"


seen = {name: round_trip(name) for name in ("float8_e5m2", "float8_e4m3fn", "bfloat16", "int4")}
for name, what in seen.items():
    print(f"{name}: np.load of what np.save wrote gives {what}")
assert seen == {
    "float8_e5m2": "ValueError: descr is not a valid dtype descriptor: '<f1'",
    "float8_e4m3fn": "|V1",
    "bfloat16": "|V2",
    "int4": "|V1",
}, "this has changed"
PROGRAM
