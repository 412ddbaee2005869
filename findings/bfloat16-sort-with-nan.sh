#!/usr/bin/env bash
# ml_dtypes 0.5.4 with numpy 2.4.6: `np.sort` and `np.unique` of bfloat16 that holds a NaN leave the numbers unsorted.
#
# numpy sorts NaN to the end for its own floats. For bfloat16 it compares by `<` alone, which is false for a NaN on either
# side, so that numbers before and after the NaN are never compared. No warning. `np.unique` returns the same disorder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 ml_dtypes==0.5.4
"$work/venv/bin/python" - <<'PROGRAM'
import ml_dtypes
import numpy as np

numbers = np.array([3, np.nan, 1, 2, 0.5], np.float32)
small = numbers.astype(ml_dtypes.bfloat16)
print("float32, np.sort:   ", np.sort(numbers))
print("bfloat16, np.sort:  ", np.sort(small))
print("bfloat16, np.unique:", np.unique(small))
assert np.sort(numbers).tolist()[:4] == [0.5, 1, 2, 3]
for found in (np.sort(small), np.unique(small)):
    finite = [float(value) for value in found if not np.isnan(float(value))]
    assert finite == [3, 0.5, 1, 2] and np.isnan(float(found[1])), "this has changed"
PROGRAM
