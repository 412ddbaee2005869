"""The command `mooncake-hpc`, also `python -m mooncake_hpc`: subcommands, and errors turned into exit codes.

Exit codes: 0 done, 1 failed, 2 a flag or variable that cannot be, 3 done but what was printed is lost (standard output
closed, broken or full), 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from mooncake_hpc import __version__
from mooncake_hpc.cli import streams
from mooncake_hpc.cli.signals import Terminated, stoppable
from mooncake_hpc.core.errors import ConfigError, MooncakeError
from mooncake_hpc.core.limits import limit_error

USAGE = """usage: mooncake-hpc COMMAND [--flag=value …]

commands:
  bench    transfer_engine_bench: measure reads and writes of a target's memory
  p2p      p2p-store-example: publish an object, replicate it to many; `p2p ls` lists objects
  etcd     an embedded etcd in the foreground, for trials
  launch   ranks by mpirun or srun: mooncake-hpc launch --ranks=4 -- bench …
  topology this machine's RDMA devices, and which of them serve which memory
  warm     compile all kernels on this host, before a job's ranks start

`mooncake-hpc COMMAND --help` shows the command's flags.
"""


def _bench() -> Callable[[Sequence[str], Sequence[str]], int]:
    from mooncake_hpc.cli.transfer_engine_bench import main

    return main


def _etcd() -> Callable[[Sequence[str], Sequence[str]], int]:
    from mooncake_hpc.cli.etcd import main

    return main


def _launch() -> Callable[[Sequence[str], Sequence[str]], int]:
    from mooncake_hpc.cli.launch import main

    return main


def _p2p() -> Callable[[Sequence[str], Sequence[str]], int]:
    from mooncake_hpc.cli.p2p import main

    return main


def _topology() -> Callable[[Sequence[str], Sequence[str]], int]:
    from mooncake_hpc.cli.topology import main

    return main


def _warm() -> Callable[[Sequence[str], Sequence[str]], int]:
    from mooncake_hpc.cli.warm import main

    return main


COMMANDS = {
    "bench": _bench,
    "etcd": _etcd,
    "launch": _launch,
    "p2p": _p2p,
    "topology": _topology,
    "warm": _warm,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit code."""
    with streams.guarded() as output:
        code = _run(sys.argv[1:] if arguments is None else arguments)
    return streams.OUTPUT_LOST if code == 0 and output is not None and output.lost else code


def _run(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments else ""
    if name in ("-h", "-help", "--help", "help"):
        print(USAGE, end="")
        return 0
    if name == "--version":
        print(f"mooncake-hpc {__version__}")
        return 0
    if name not in COMMANDS:
        problem = f"unknown command {name!r}" if name else "no command"
        print(f"mooncake-hpc: {problem}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        with stoppable():
            return COMMANDS[name]()(arguments[1:], [*_myself(), name])
    except ConfigError as error:
        return _fail(name, error, 2)
    except (MooncakeError, TimeoutError) as error:
        return _fail(name, error, 1)
    except Terminated:
        return 143
    except KeyboardInterrupt:
        print(f"mooncake-hpc {name}: interrupted", file=sys.stderr)
        return 130
    except (OSError, MemoryError, RuntimeError) as error:
        if (limit := limit_error(error, "a limit is reached")) is not None:
            return _fail(name, limit, 1)
        if isinstance(error, OSError):  # a file or socket of this machine, named in the text
            return _fail(name, error, 1)
        raise


def _myself() -> list[str]:
    """How this program is started again."""
    if os.path.basename(sys.argv[0]) == "mooncake-hpc":
        return [sys.argv[0]]
    safe = ["-P"] if sys.flags.safe_path else []  # our package and no module of the current folder
    return [sys.executable, *safe, "-m", "mooncake_hpc"]


def _fail(name: str, error: Exception, code: int) -> int:
    print(f"mooncake-hpc {name}: {type(error).__name__}: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
