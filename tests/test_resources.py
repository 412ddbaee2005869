"""What a process of ours costs: memory, idle time, what an import loads, and that kernels are compiled once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_env

from mooncake_hpc.testing.peer import PeerProcess

HEAVY = ("numba", "llvmlite", "grpc", "google.protobuf", "etcd3", "mpi4py", "pyverbs", "multiprocessing")
MB = 1e6
BATCHES = 30_000


def python(*arguments: str) -> str:
    """What a Python program prints; it must print nothing else, and end well."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=100, env=clean_env())
    assert done.returncode == 0 and done.stderr == "", done
    return done.stdout


def test_an_import_loads_nothing_heavy() -> None:
    show = f"import mooncake_hpc, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert python("-c", show) == "[]\n"


@pytest.mark.slow
def test_memory_idle_time_and_compiled_kernels(etcd: str) -> None:
    """As `benchmarks/run` measures them, over fewer batches."""
    with PeerProcess(etcd, "tcp", "resources:1") as target:
        target.call("allocate", 4096)
        where = [f"--metadata={etcd}", "--segment=resources:1", f"--target={target.pid}"]
        probe = [str(ROOT / "benchmarks" / "probe.py"), *where]
        python(*probe, "--name=resources:2", "--batches=1000", "--idle=0.1")  # may compile
        told = json.loads(python(*probe, "--name=resources:3", f"--batches={BATCHES}", "--idle=3"))
    for side in ("initiator", "target"):
        assert told[f"{side}_bytes"] <= 260 * MB, told
        assert told[f"{side}_growth_bytes"] <= 2 * MB, told
        assert told[f"{side}_idle_cores"] < 0.01, told
    assert told["worker_bytes"] <= 150 * MB, told
    assert told["compiled"] == 0, told


HOST = """
import logging, os, signal, sys, threading
def state():
    root = logging.getLogger()
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    return dict(os.environ), root.level, list(root.handlers), handlers, hooks, list(sys.path), threading.active_count()
import numpy as np
import mooncake_hpc as mh
before = state()
engine = mh.TransferEngine
with mh.EmbeddedEtcd() as etcd, engine("a:1", etcd.endpoint) as a, engine("b:1", etcd.endpoint) as b:
    a.allocate(1000)
    segment, block = b.open_segment("a:1"), np.ones(1000, np.uint8)
    b.register(block)
    b.read(block, segment, segment.buffers[0].address)
assert not block.any() and state() == before, (before, state())
assert not {"etcd3", "mpi4py", "pyverbs"} & set(sys.modules)
"""


@pytest.mark.slow
def test_a_host_program_is_as_it_was_after_engines_have_run_in_it() -> None:
    assert python("-c", HOST) == ""


CACHED = """
from numba import types
from mooncake_hpc.native import spin
spin.budget.compile((types.int64,))
print(sum(spin.budget.stats.cache_hits.values()))
"""


@pytest.mark.slow
def test_a_kernel_is_compiled_anew_when_what_it_calls_has_changed(tmp_path: Path) -> None:
    """As after `git pull` in an editable installation: else new words would be read by old machine code."""
    copy = tmp_path / "mooncake_hpc"
    shutil.copytree(ROOT / "mooncake_hpc", copy, ignore=shutil.ignore_patterns("__pycache__"))
    env = clean_env(NUMBA_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH=str(tmp_path))

    def hits() -> str:
        run = subprocess.run([sys.executable, "-c", CACHED], env=env, cwd=tmp_path, capture_output=True, check=True)
        return run.stdout.decode()

    assert [hits(), hits()] == ["0\n", "1\n"]
    os.utime(copy / "native" / "atomics.py", times=(1, 1))
    assert [hits(), hits()] == ["0\n", "1\n"]
