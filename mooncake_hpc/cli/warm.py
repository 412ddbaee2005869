"""`mooncake-hpc warm`: compile all kernels on this host, so that the ranks of a job need not."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from mooncake_hpc.cli.gflags import FlagSet

FLAGS = FlagSet(
    "mooncake-hpc warm",
    "Compiles every kernel into numba's cache (NUMBA_CACHE_DIR, which belongs on a disk of the host). Run it once on "
    "each host before the ranks of a job start: else all of them compile the same at the same time.",
    {},
)


def main(arguments: Sequence[str], command: Sequence[str] = ()) -> int:
    """Compile; the exit code. Raises ConfigError and what the engine raises."""
    if FLAGS.parse(arguments, os.environ).wants_help:
        print(FLAGS.help(), end="")
        return 0
    from mooncake_hpc.warm import warm

    print(f"kernels are ready on {socket.gethostname()} after {warm():.1f} s", flush=True)
    return 0
