"""`mooncake-hpc warm`: compile all kernels on this host, so that the ranks of a job need not."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import mooncake_hpc
from mooncake_hpc.cli.gflags import FlagSet

FLAGS = FlagSet(
    "mooncake-hpc warm",
    "Compiles every kernel into numba's cache (NUMBA_CACHE_DIR, which belongs on a disk of the host). Run it once on "
    "each host before the ranks of a job start: else all of them compile the same at the same time. A second run "
    "for the same versions does nothing.",
    {},
)


def main(arguments: Sequence[str], command: Sequence[str] = ()) -> int:
    """Compile; the exit code. Raises ConfigError and what the engine raises."""
    if FLAGS.answer(FLAGS.parse(arguments, os.environ)):
        return 0
    stamp = _stamp()
    if stamp is not None and stamp.exists():
        print(f"kernels are ready on {socket.gethostname()}", flush=True)
        return 0
    from mooncake_hpc.warm import warm

    print(f"kernels are ready on {socket.gethostname()} after {warm():.1f} s", flush=True)
    if stamp is not None:
        stamp.touch()
    return 0


def _stamp() -> Path | None:
    """The file that says that the cache has everything; None where numba keeps its cache elsewhere.

    Named after all that a kernel's code depends on; "generic" is the one processor of numba's that is the same on every
    machine. Looked at without numba, whose import alone takes a second on a slow file system.
    """
    folder = os.environ.get("NUMBA_CACHE_DIR")
    if not folder:
        return None
    key = hashlib.sha256(f"{sys.version} {sys.prefix} {version('numba')} {version('numpy')}".encode())
    settings = {name for name in os.environ if name.startswith("NUMBA_")} - {"NUMBA_NUM_THREADS"}  # no code's matter
    for name in sorted(settings):  # NUMBA_CPU_NAME, for one
        key.update(f"{name}={os.environ[name]}".encode())
    for file in sorted(Path(mooncake_hpc.__file__).parent.rglob("*.py")):
        key.update(f"{file} {file.stat().st_mtime_ns} {file.stat().st_size}".encode())
    if os.environ.get("NUMBA_CPU_NAME") != "generic":
        with open("/proc/cpuinfo") as lines:
            processors = {line for line in lines if line.startswith(("model name", "Features"))}
        key.update("".join(sorted(processors)).encode())
    return Path(folder) / f"warm-{key.hexdigest()[:16]}"
