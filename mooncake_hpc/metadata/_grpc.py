"""The gRPC of this process: the host program's, and in a forked child of a process that has used it a private copy.

gRPC's core has pollers, threads and locks for the whole process. A child inherits them without the threads. Where
another thread had a call under way at the fork, gRPC leaves them as they are ("skipping fork() handlers"): a new
channel in the child then works, or hangs, or ends the process ("Check failed: g_active_poller"). So the child loads the
core once more, from a copy of its file, since the system's loader gives one file to a process once. It takes 0.3 s and
17 MB.
"""

from __future__ import annotations

import logging
import os
import shutil
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from mooncake_hpc.core import process
from mooncake_hpc.metadata._private import PrivatePackage

log = logging.getLogger(__name__)

CORE = "grpc._cython.cygrpc"
_user: process.Process | None = None  # whose threads the core has: this process's, or an ancestor's
_copy: PrivatePackage | None = None


def use() -> PrivatePackage | None:
    """Before a channel is made: the private copy, None for the host program's own. The caller holds a lock."""
    global _user, _copy
    if _user is not process.here:
        if _user is not None:
            _copy = _load_copy()
        _user = process.here
    return _copy


def module() -> ModuleType:
    """gRPC, as `use` has found it. Raises ImportError."""
    if _copy is not None:
        return _copy.load("grpc")
    import grpc

    return grpc  # type: ignore[no-any-return]


def _load_copy() -> PrivatePackage | None:
    """None where the system does not load code from memory: the inherited one may work as well."""
    import grpc
    from grpc._cython import cygrpc

    fd = os.memfd_create("cygrpc", os.MFD_CLOEXEC)
    try:
        with open(cygrpc.__file__, "rb") as source, open(fd, "wb", closefd=False) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        # by the process's number: the loader knows files that it has loaded by their paths, too
        loader = ExtensionFileLoader(CORE, f"/proc/{os.getpid()}/fd/{fd}")
        spec = spec_from_file_location(CORE, loader.path, loader=loader)
        assert spec is not None
        core = module_from_spec(spec)
        loader.exec_module(core)
    except (OSError, ImportError) as error:
        log.warning("gRPC cannot be loaded for this forked process, which uses what it has inherited: %s", error)
        return None
    finally:
        os.close(fd)
    return PrivatePackage(Path(grpc.__file__).parent, {CORE: core})
