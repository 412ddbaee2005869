"""An etcd store leaves the process that it lives in as it was, whatever else that process has loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mooncake_hpc.metadata.embedded import EmbeddedEtcd

CHECKOUT = Path(__file__).parents[1]
VENVS = CHECKOUT / ".mooncake" / "venvs"  # kept between runs

USE = """
import sys
from mooncake_hpc.metadata import open_store
from mooncake_hpc.core.settings import Settings
def use():
    with open_store(sys.argv[1], Settings(lease_ttl=1, metadata_timeout=5)) as store:
        store.publish("host/k", "v")
        assert store.get("host/k") == "v"
        assert store.list("host/") == {"host/k": "v"}
        store.withdraw("host/k")
"""

SNAPSHOT = """
import logging, os, signal, threading
def snapshot():
    root = logging.getLogger()
    return {
        "env": dict(os.environ),
        "root": (root.level, list(root.handlers), list(root.filters), root.disabled, logging.root.manager.disable),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "etcd3": {name: id(module) for name, module in sys.modules.items() if name.split(".")[0] == "etcd3"},
        "path": list(sys.path),
        "excepthooks": (sys.excepthook, threading.excepthook),
    }
"""

PROTOBUF = """
from google.protobuf import descriptor_pb2, descriptor_pool, struct_pb2
def protobuf_works():
    struct = struct_pb2.Struct()
    struct.update({"a": [1, "b"]})
    assert struct_pb2.Struct.FromString(struct.SerializeToString())["a"][1] == "b"
def default_pool_is_free():
    for name in ("rpc.proto", "kv.proto", "auth.proto"):
        try:
            descriptor_pool.Default().FindFileByName(name)
        except KeyError:
            continue
        raise AssertionError(name)
def take_the_names():
    for name in ("rpc.proto", "kv.proto"):
        ours = descriptor_pb2.FileDescriptorProto(name=name, package="etcdserverpb")
        ours.message_type.add(name="RangeRequest" if name == "rpc.proto" else "Another")
        descriptor_pool.Default().AddSerializedFile(ours.SerializeToString())
"""


@pytest.fixture(scope="module")
def etcd() -> Iterator[EmbeddedEtcd]:
    with EmbeddedEtcd() as running:
        yield running


def run(etcd: EmbeddedEtcd, *program: str, **env: str) -> str:
    """Run the program in a process of its own; what it printed on standard output."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program), etcd.endpoint],
        cwd=CHECKOUT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_host_state_is_unchanged(etcd: EmbeddedEtcd) -> None:
    run(
        etcd, USE, SNAPSHOT,
        "before = snapshot()", "use()", "after = snapshot()",
        "assert before == after, (before, after)",
        "new = [n for n in logging.root.manager.loggerDict if 'etcd' in n]",
        "assert all(n.startswith('mooncake_hpc.') for n in new), new",
        "assert threading.active_count() == 1, threading.enumerate()",
    )  # fmt: skip


def test_host_has_an_etcd3_of_its_own(etcd: EmbeddedEtcd) -> None:
    run(
        etcd, USE, SNAPSHOT, "from types import ModuleType",
        "for name in ('etcd3', 'etcd3.etcdrpc', 'etcd3.client'): sys.modules[name] = ModuleType(name)",
        "before = snapshot()", "use()", "assert before == snapshot()",
        "import etcd3; assert etcd3.__spec__ is None",
    )  # fmt: skip


@pytest.mark.parametrize("order", ["protobuf first", "store first"])
def test_beside_the_hosts_protobuf(etcd: EmbeddedEtcd, order: str) -> None:
    ours, theirs = [USE, "use()"], [PROTOBUF, "protobuf_works(); default_pool_is_free(); take_the_names()"]
    first, second = (theirs, ours) if order == "protobuf first" else (ours, theirs)
    run(etcd, *first, *second, "use()", "protobuf_works()")


def test_nothing_heavy_is_imported_before_a_store_is_opened(etcd: EmbeddedEtcd) -> None:
    run(
        etcd, "import sys, mooncake_hpc.metadata",
        "heavy = {'grpc', 'google.protobuf', 'numba', 'tenacity', 'six'} & set(sys.modules)",
        "assert not heavy, heavy",
        "mooncake_hpc.metadata.open_store('memory://x')",
        "assert 'grpc' not in sys.modules",
    )  # fmt: skip


def test_proxies_have_no_effect(etcd: EmbeddedEtcd) -> None:
    names = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    proxies = {name: "http://127.0.0.1:9" for name in names}
    embedded = "from mooncake_hpc.metadata.embedded import EmbeddedEtcd\nwith EmbeddedEtcd(): pass"
    run(etcd, USE, "use()", embedded, **proxies, no_proxy="", NO_PROXY="")


def test_nothing_accumulates(etcd: EmbeddedEtcd) -> None:
    run(
        etcd, USE, "import os, threading",
        "for _ in range(3): use()",
        "before = len(os.listdir('/proc/self/fd'))",
        "for _ in range(30): use()",
        "after = len(os.listdir('/proc/self/fd'))",
        "assert after <= before + 10, (before, after)",
        "assert threading.active_count() == 1",
        "tasks = len(os.listdir('/proc/self/task')); assert tasks < 40, tasks",
    )  # fmt: skip


def test_a_forked_child_cannot_harm_its_parents_store(etcd: EmbeddedEtcd) -> None:
    program = """
import os
import warnings
from mooncake_hpc.core.errors import ForkError
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+: fork() beside threads
settings = Settings(lease_ttl=1, metadata_timeout=5)
store = open_store(sys.argv[1], settings)
store.publish("k", "v")
child = os.fork()
if child == 0:
    try:
        store.get("k")
    except ForkError as error:
        store.close()
        os._exit(7 if f"belongs to process {os.getppid()}" in str(error) else 1)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert store.get("k") == "v"
store.close()
"""
    run(etcd, USE, program, GRPC_VERBOSITY="NONE")  # gRPC remarks on every fork beside its threads


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.20.3", "4.21.12", "5.29.6", "6.33.0", "7.35.0"])
def test_beside_other_protobufs(etcd: EmbeddedEtcd, version: str) -> None:
    folder = VENVS / f"protobuf-{version}"
    if not folder.is_dir():
        new = folder.with_name(f"{folder.name}.{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(new)]
        subprocess.run([*pip, f"protobuf=={version}"], check=True, timeout=100)
        new.rename(folder)
    check = f"import google.protobuf; assert google.protobuf.__version__ == {version!r}"
    run(etcd, check, USE, PROTOBUF, "protobuf_works(); take_the_names(); use()", PYTHONPATH=str(folder))
