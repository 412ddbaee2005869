"""Transfer engine, bench and P2P store for HPC and inference clusters.

Importing this loads the standard library and numpy; the names below load what they need when first used.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mooncake_hpc.core import errors

if TYPE_CHECKING:
    from mooncake_hpc.core.request import READ, REQUEST, WRITE
    from mooncake_hpc.core.settings import Settings
    from mooncake_hpc.engine.batch import Batch
    from mooncake_hpc.engine.engine import TransferEngine
    from mooncake_hpc.engine.remote_segment import Segment
    from mooncake_hpc.metadata.embedded import EmbeddedEtcd
    from mooncake_hpc.p2p.store import P2PStore
    from mooncake_hpc.workers import WorkerPool

_HOMES = {
    "READ": "core.request",
    "WRITE": "core.request",
    "REQUEST": "core.request",
    "Batch": "engine.batch",
    "TransferEngine": "engine.engine",
    "EmbeddedEtcd": "metadata.embedded",
    "P2PStore": "p2p.store",
    "Segment": "engine.remote_segment",
    "Settings": "core.settings",
    "WorkerPool": "workers",
}

__all__ = [
    "READ",
    "REQUEST",
    "WRITE",
    "Batch",
    "EmbeddedEtcd",
    "P2PStore",
    "Segment",
    "Settings",
    "TransferEngine",
    "WorkerPool",
    "errors",
]
# `from mooncake_hpc.errors import …` is public, wherever the module is kept
sys.modules[f"{__name__}.errors"] = errors
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
