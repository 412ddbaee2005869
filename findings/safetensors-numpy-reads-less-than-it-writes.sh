#!/usr/bin/env bash
# safetensors 0.6.2: its numpy functions write bfloat16 and float8 tensors (arrays of ml_dtypes) that they cannot read.
#
# `safetensors.numpy.save` makes a valid file with dtype BF16, F8_E4M3 or F8_E5M2. `safetensors.numpy.load` of the same
# bytes raises KeyError: 'BF16'. A float32 tensor in the same file cannot be had either, as the whole call fails.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 ml_dtypes==0.5.4 safetensors==0.6.2
"$work/venv/bin/python" - <<'PROGRAM'
import json

import ml_dtypes
import numpy as np
from safetensors.numpy import load, save

seen = {}
for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
    tensors = {"weight": np.arange(4).astype(getattr(ml_dtypes, name)), "norm": np.ones(2, np.float32)}
    data = save(tensors)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        seen[name] = header["weight"]["dtype"], str(load(data)["weight"].dtype)
    except KeyError as error:
        seen[name] = header["weight"]["dtype"], f"KeyError: {error}"
    print(f"{name}: written as {seen[name][0]}, read: {seen[name][1]}")
assert seen == {
    "bfloat16": ("BF16", "KeyError: 'BF16'"),
    "float8_e4m3fn": ("F8_E4M3", "KeyError: 'F8_E4M3'"),
    "float8_e5m2": ("F8_E5M2", "KeyError: 'F8_E5M2'"),
}, "this has changed"
PROGRAM
