"""The fuzzed side, a process of its own: `python -m fuzz.node KIND [FD…]`, driven by JSON lines on its standard input.

It says one line once it is up, and answers each `[command, argument…]` with `{"result": …}` or `{"error": …}`.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

Commands = dict[str, Callable[..., Any]]

HOMES = {"data": "data_port", "rpc": "rpc_port", "handshake": "handshake", "handoff": "handoff"}
HOMES |= {"reader": "handoff", "stranger": "stranger", "records": "records", "boards": "boards"}


def settle() -> None:
    """Give back what is not in use, so that memory can be compared."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING)
    replies = os.fdopen(os.dup(1), "w")  # print() of others would end up between our lines
    os.dup2(2, 1)
    kind, *fds = sys.argv[1:]
    module = importlib.import_module(f"fuzz.{HOMES[kind]}")
    serving: Callable[..., contextlib.AbstractContextManager[tuple[Any, Commands]]] = getattr(module, f"serve_{kind}")
    with serving(*map(int, fds)) as (hello, commands):
        commands = {"settle": settle, **commands}
        print(json.dumps({"result": hello}), file=replies, flush=True)
        for line in lines():
            command, *arguments = json.loads(line)
            try:
                reply = {"result": commands[command](*arguments)}
            except BaseException as error:
                logging.getLogger("fuzz").exception("%s failed", command)
                reply = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(reply), file=replies, flush=True)


def lines() -> Iterator[str]:
    yield from sys.stdin


if __name__ == "__main__":
    main()
