"""`mooncake-hpc warm`: compile all kernels on this host, so that the ranks of a job need not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import mooncake_hpc
from mooncake_hpc.cli.gflags import FlagSet
from mooncake_hpc.native import cache_files as files
from mooncake_hpc.native.cache_folder import kernel_folder

FLAGS = FlagSet(
    "mooncake-hpc warm",
    "Compiles every kernel and keeps it in NUMBA_CACHE_DIR, else in XDG_CACHE_HOME or the home folder. Run it once on "
    "each host before the ranks of a job start: else all of them compile the same at the same time. A second run "
    "for the same versions finds them whole and does nothing. Exit code 1 where kernels cannot be kept.",
    {},
)


def main(arguments: Sequence[str], command: Sequence[str] = ()) -> int:
    """Compile; the exit code. Raises ConfigError and what the engine raises."""
    if FLAGS.answer(FLAGS.parse(arguments, os.environ)):
        return 0
    folder = kernel_folder()
    stamp = _stamp(folder) if folder else None
    if stamp is not None and _all_whole(stamp):
        print(f"kernels are ready on {socket.gethostname()}", flush=True)
        return 0
    from mooncake_hpc.jobs.kernel_cache import warm
    from mooncake_hpc.native.cache import unkept

    seconds = warm()
    if stamp is None or (lost := unkept()):
        what = "all of them" if stamp is None else f"{len(lost)} of them"
        print(f"mooncake-hpc warm: kernels work, but each process has to compile {what}", file=sys.stderr)
        return 1
    _write_stamp(stamp)
    print(f"kernels are ready on {socket.gethostname()} after {seconds:.1f} s", flush=True)
    return 0


def _stamp(folder: str) -> Path:
    """The file that names the files of all kernels.

    Named after all that a kernel's code depends on; "generic" is the one processor of numba's that is the same on every
    machine. Looked at without numba, whose import alone takes a second on a slow file system.
    """
    key = hashlib.sha256(f"{sys.version} {sys.prefix} {version('numba')} {version('numpy')}".encode())
    settings = {name for name in os.environ if name.startswith("NUMBA_")}
    for name in sorted(settings - {"NUMBA_NUM_THREADS", "NUMBA_CACHE_DIR"}):  # NUMBA_CPU_NAME, for one
        key.update(os.fsencode(f"{name}={os.environ[name]}"))
    for file in sorted(Path(mooncake_hpc.__file__).parent.rglob("*.py")):
        key.update(os.fsencode(f"{file} {file.stat().st_mtime_ns} {file.stat().st_size}"))
    if os.environ.get("NUMBA_CPU_NAME") != "generic":
        with open("/proc/cpuinfo") as lines:
            processors = {line for line in lines if line.startswith(("model name", "Features"))}
        key.update("".join(sorted(processors)).encode())
    return Path(folder) / f"warm-{key.hexdigest()[:16]}"


def _all_whole(stamp: Path) -> bool:
    """Whether the stamp is there and so is every file that it names: a node that lost power may have torn some."""
    try:
        names = stamp.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return bool(names) and all(files.whole(str(stamp.parent / name)) for name in names)


def _write_stamp(stamp: Path) -> None:
    """In one piece; without it the next run looks at every kernel again, which takes a second."""
    names = sorted(file.name for file in stamp.parent.glob(f"*{files.SUFFIX}"))
    temporary = stamp.with_name(f"{stamp.name}.{os.getpid()}{files.UNFINISHED}")
    with contextlib.suppress(OSError):
        temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        temporary.replace(stamp)
