"""A forked child can use nothing of its parent's, takes nothing from it, holds up nobody, and can open its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import clean_env
from numba.core.compiler_lock import global_compiler_lock

from mooncake_hpc import REQUEST, Batch, EmbeddedEtcd, P2PStore, Segment, TransferEngine, WorkerPool
from mooncake_hpc.control import client
from mooncake_hpc.core.address import bind_listener
from mooncake_hpc.core.errors import ForkError, PeerLost
from mooncake_hpc.core.memory import MemoryFile
from mooncake_hpc.core.process import here
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.jobs.mpi import World
from mooncake_hpc.metadata.etcd import EtcdStore
from mooncake_hpc.metadata.memory import MemoryStore
from mooncake_hpc.testing.peer import PeerProcess
from mooncake_hpc.wire.rpc_frames import Kind

SETTINGS = Settings(metadata_timeout=5, lease_ttl=2)
TRANSPORTS = ["tcp", "shm"]
OPERATORS = {"__enter__", "__await__", "__len__"}  # that are public calls, too
ENDS = {"close"}  # nothing happens, and nothing is raised

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")]


def in_child(function: Callable[[], Any], timeout: float = 30.0) -> Any:
    """What `function` returns in a forked child, by way of JSON; fails the test where it raises or hangs."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(function()).encode())
        except BaseException as error:
            os.write(writing, json.dumps(f"{type(error).__name__}: {error}").encode())
            os._exit(1)
        os._exit(0)
    os.close(writing)
    killer = threading.Timer(timeout, os.kill, (child, signal.SIGKILL))
    killer.start()
    with open(reading, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    killer.cancel()
    assert status == 0, said.decode() or f"ended with {status}"
    return json.loads(said)


def forked(work: Callable[[], Any]) -> int:
    """A child that does `work` and sleeps on: the caller kills it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            time.sleep(60)
        finally:
            os._exit(0)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


Engines = tuple[TransferEngine, TransferEngine]
over_each = pytest.mark.parametrize("protocol", TRANSPORTS)


@contextlib.contextmanager
def engines(protocol: str) -> Iterator[Engines]:
    """A reader, and whom it reads from; both in this process."""
    options: dict[str, Any] = {"protocol": protocol, "bind_address": "127.0.0.1", "settings": SETTINGS}
    with (
        TransferEngine("reader:1", "memory://fork", **options) as reader,
        TransferEngine("owner:1", "memory://fork", **options) as owner,
    ):
        yield reader, owner


class Reading:
    """A thread that reads all the time, and compares."""

    def __init__(self, engine: TransferEngine, segment: Segment) -> None:
        self.good, self.error = 0, ""
        self._engine, self._segment, self._stopping = engine, segment, False
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        block, number = self._engine.allocate(1 << 18), 0
        try:
            while not self._stopping:
                number = (number + 1) % 200
                block[:] = 255
                self._engine.read(block, self._segment, self._segment.buffers[0].address + (number << 10), 10)
                assert (block == 7).all(), "wrong bytes"
                self.good += 1
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def more(self) -> None:
        """Wait for some further reads."""
        good, deadline = self.good, time.monotonic() + 20
        while self.good < good + 5 and not self.error:
            assert time.monotonic() < deadline, "no read comes back"
            time.sleep(0.001)
        assert not self.error

    def __enter__(self) -> Reading:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()


def public_calls(kind: type) -> list[str]:
    return [
        name
        for name in dir(kind)
        if (not name.startswith("_") or name in OPERATORS)
        and name not in ENDS
        and (callable(member := inspect.getattr_static(kind, name)) or isinstance(member, property))
    ]


def call(owner: object, name: str) -> None:
    """With None for each argument that must be given: the process is looked at first."""
    member = getattr(owner, name)
    if callable(member):
        needed = [p for p in inspect.signature(member).parameters.values() if p.default is p.empty and p.kind < 2]
        result = member(*[None] * len(needed))
        if hasattr(result, "gen"):  # a context manager of contextlib's
            result.__enter__()
        if inspect.isgenerator(result):
            next(result)


def misses(owners: list[object]) -> list[str]:
    """Public calls of inherited objects that do not raise ForkError, or one that does not say what to do."""
    found = []
    for owner in owners:
        for name in public_calls(type(owner)):
            what = f"{type(owner).__name__}.{name}"
            try:
                call(owner, name)
            except ForkError as error:
                text = str(error)
                if not re.search(f"belongs to process {os.getppid()}.* open a new {type(owner).__name__}", text):
                    found.append(f"{what}: {text}")
            except BaseException as error:
                found.append(f"{what}: {type(error).__name__}: {error}")
            else:
                found.append(f"{what} returned")
        if hasattr(owner, "close"):
            owner.close("a cause") if isinstance(owner, Segment) else owner.close()
            if hasattr(owner, "__exit__"):
                owner.__exit__(None, None, None)
    return found


@pytest.mark.usefixtures("no_leaks")
def test_every_public_call_in_a_child_raises() -> None:
    with engines("tcp") as (reader, owner):
        memory, block = owner.allocate(1 << 20), reader.allocate(1 << 20)
        memory[:] = 7
        segment = reader.open_segment("owner:1")
        request = np.array([(0, segment.id, block.ctypes.data, memory.ctypes.data, block.nbytes)], REQUEST)
        with (
            WorkerPool(1) as pool, MemoryFile(4 << 20) as file, EmbeddedEtcd() as etcd,
            MemoryStore("fork") as store, store.watch("x", lambda _: None) as watch,
            P2PStore(metadata=store, engine=reader) as objects, EtcdStore([etcd.endpoint], SETTINGS) as etcd_store,
        ):  # fmt: skip
            job, batch = pool.fill(file.array, 1), reader.submit(request)
            world = World.__new__(World)
            world._process = here
            kinds = [reader, segment, batch, objects, pool, job, store, watch, etcd_store, etcd, world]
            assert in_child(lambda: misses(kinds)) == []
            job.wait()
            batch.wait()
            assert pool.verify(file.array, 1).wait() == 0 and (block == 7).all()
            assert {"submit", "transfer", "read", "__enter__"} <= set(public_calls(TransferEngine))
            assert {"wait", "done", "fileno", "__await__"} <= set(public_calls(Batch))


@pytest.mark.usefixtures("no_leaks")
@over_each
def test_nothing_of_the_parent_is_disturbed(protocol: str) -> None:
    with engines(protocol) as (reader, owner):
        owner.allocate(1 << 20)[:] = 7
        segment = reader.open_segment("owner:1")

        def forget() -> None:
            nonlocal segment, reading
            segment = reading = None  # type: ignore[assignment]
            gc.collect()

        with Reading(reader, segment) as reading:
            reading.more()
            for work in (lambda: None, lambda: reader.close(), lambda: owner.__exit__(None, None, None), forget):
                child = forked(work)
                reading.more()
                kill(child)
                reading.more()
            subprocess.run(["true"], check=True, preexec_fn=lambda: None)
            reading.more()


def sockets() -> set[str]:
    links = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the listing's own
            continue
    return {link for link in links if link.startswith("socket:")}


@over_each
def test_a_child_holds_no_socket_of_its_parent(protocol: str) -> None:
    """Neither listeners nor connections, also where only native code knows them; and what is not ours stays."""
    with engines(protocol) as (reader, owner):
        owner.allocate(1 << 20)[:] = 7
        with socket.create_server(("127.0.0.1", 0)) as alien, socket.socket() as plain:
            others = {os.readlink(f"/proc/self/fd/{each.fileno()}") for each in (alien, plain)}
            segment = reader.open_segment("owner:1")
            with Reading(reader, segment) as reading:
                reading.more()
                ours = sockets() - others
                kept = set(in_child(lambda: sorted(sockets())))
            assert len(ours) >= 6 and others <= kept
            assert not kept & ours


@pytest.mark.parametrize(
    ("host", "bind_all", "reached_at"),
    [("127.0.0.1", True, "127.0.0.2"), ("::1", False, "::1"), ("::1", True, "127.0.0.1")],
)
def test_connections_that_no_object_stands_for(host: str, bind_all: bool, reached_at: str) -> None:
    """Whatever address the listener has; those of another program's listener beside it stay."""
    listener = bind_listener(host, [0], bind_all)
    with listener, socket.create_server(("127.0.0.1", 0)) as alien, contextlib.ExitStack() as stack:
        accepted = []
        for server, address in ((listener, reached_at), (alien, "127.0.0.1")):
            stack.enter_context(socket.create_connection((address, server.getsockname()[1])))
            accepted.append(stack.enter_context(socket.socket(fileno=server._accept()[0])))  # type: ignore[attr-defined]
        ours, theirs = (os.readlink(f"/proc/self/fd/{each.fileno()}") for each in accepted)
        kept = in_child(lambda: sorted(sockets()))
        assert theirs in kept and ours not in kept


def test_a_fork_waits_for_the_compiler() -> None:
    """In the child nobody would ever give its lock back."""
    inside, left = threading.Event(), threading.Event()

    def compiling() -> None:
        with global_compiler_lock:
            inside.set()
            left.wait(0.3)

    thread = threading.Thread(target=compiling)
    thread.start()
    assert inside.wait(10)
    assert in_child(lambda: global_compiler_lock._lock.acquire(timeout=5))
    thread.join()


def test_an_exchange_of_another_thread() -> None:
    """The answer comes, and the other side sees the end of the connection while the child lives."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address, answers = f"127.0.0.1:{server.getsockname()[1]}", list[Any]()
        asking = threading.Thread(target=lambda: answers.append(client.exchange(address, Kind.PROBE, {}, 20, SETTINGS)))
        asking.start()
        connection, _ = server.accept()
        with connection:
            request = connection.recv(4096)
            child = forked(connection.close)
            try:
                connection.sendall(request)
                connection.settimeout(10)
                asking.join(10)
                assert answers == ["{}\n"] and connection.recv(1) == b""
            finally:
                kill(child)


OWNER = """
import os, sys, time, mooncake_hpc as mh
with mh.TransferEngine("owner:1", sys.argv[1], protocol=sys.argv[2], bind_address="127.0.0.1") as engine:
    engine.allocate(1 << 20)[:] = 7
    print("up", flush=True)
    sys.stdin.readline()  # once it has a reader
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(100)
"""


@over_each
def test_an_owner_that_is_killed_leaves_a_child(etcd: str, protocol: str) -> None:
    """Its readers learn of it at once, and its name is to be had again."""
    command = [sys.executable, "-c", OWNER, etcd, protocol]
    owner = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=clean_env(GRPC_VERBOSITY="NONE"))
    assert owner.stdin is not None and owner.stdout is not None
    child = 0
    try:
        assert owner.stdout.readline() == "up\n"
        with TransferEngine("reader:1", etcd, protocol=protocol, bind_address="127.0.0.1") as reader:
            segment = reader.open_segment("owner:1")
            with Reading(reader, segment) as reading:
                reading.more()
                owner.stdin.write("fork\n")
                owner.stdin.flush()
                child = int(owner.stdout.readline())
                reading.more()
                owner.kill()
                killed = time.monotonic()
                while not reading.error:
                    assert time.monotonic() < killed + 3, "the reader does not learn of it"
                    time.sleep(0.01)
            assert reading.error.startswith("PeerLost")
            os.kill(child, 0)  # it lives
            with PeerProcess(etcd, protocol, "owner:1"):
                assert reader.open_segment("owner:1").descriptor.generation != segment.descriptor.generation
    finally:
        owner.kill()
        if child:
            os.kill(child, signal.SIGKILL)
        owner.communicate()


STARTS = """
import multiprocessing, os, sys
import mooncake_hpc as mh

def read(name, protocol, results):
    import numpy as np
    said = "no parent's engine"
    if ENGINES:
        try:
            ENGINES[0].open_segment(name)
        except mh.errors.ForkError:
            said = "ForkError"
    with mh.TransferEngine("child:1", "P2PHANDSHAKE", protocol=protocol, bind_address="127.0.0.1") as engine:
        segment = engine.open_segment(name)
        block = engine.allocate(1 << 16)
        engine.read(block, segment, segment.buffers[0].address)
        results.put((said, int(block.sum())))

ENGINES = []
if __name__ == "__main__":
    for protocol in sys.argv[1:]:
        with mh.TransferEngine("parent:1", "P2PHANDSHAKE", protocol=protocol, bind_address="127.0.0.1") as engine:
            ENGINES[:] = [engine]
            engine.allocate(1 << 16)[:] = 3
            for method in ("fork",) if protocol == "shm" else ("fork", "forkserver", "spawn"):
                context = multiprocessing.get_context(method)
                results = context.Queue()
                process = context.Process(target=read, args=(engine.name, protocol, results))
                process.start()
                print(protocol, method, *results.get(timeout=60), flush=True)
                process.join(10)
                assert process.exitcode == 0
"""


def test_multiprocessing(tmp_path: Path) -> None:
    """A new engine works in a child, however that was started; an inherited one is refused."""
    (tmp_path / "starts.py").write_text(STARTS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "starts.py"), *TRANSPORTS],
        capture_output=True, text=True, timeout=100, env=clean_env(),
    )  # fmt: skip
    inherited = {"fork": "ForkError", "forkserver": "no parent's engine", "spawn": "no parent's engine"}
    expected = [f"tcp {method} {said} {3 << 16}" for method, said in inherited.items()]
    assert done.stdout.splitlines() == [*expected, f"shm fork ForkError {3 << 16}"], done.stderr
    assert done.returncode == 0 and done.stderr == ""
    assert set(inherited) == set(multiprocessing.get_all_start_methods())


@over_each
def test_a_new_engine_in_a_child_of_a_child(protocol: str) -> None:
    """Also under a name and in a store of which its parent has the like: `memory://` is of one process."""
    with engines(protocol) as (reader, owner):

        def own() -> list[Any]:
            options: dict[str, Any] = {"protocol": "tcp", "bind_address": "127.0.0.1"}
            with (
                TransferEngine("owner:1", "memory://fork", **options) as owner,
                TransferEngine("reader:1", "memory://fork", **options) as reader,
            ):
                memory, block = owner.allocate(4096), reader.allocate(4096)
                memory[:] = 9
                reader.read(block, reader.open_segment("owner:1"), memory.ctypes.data)
                batch = reader.submit(np.array([(0, 0, block.ctypes.data, memory.ctypes.data, 4096)], REQUEST))
                asyncio.run(asyncio.wait_for(batch, 10))
                return [int(block.sum()), misses([owner, reader, batch]) == []]

        def refused_below() -> list[Any]:
            mine = own()
            return [*mine, in_child(own), misses([reader, owner])]

        said = in_child(refused_below)
        assert said == [9 * 4096, False, [9 * 4096, False], []]


USES_ETCD = """
import gc, os, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+: fork() beside threads
from mooncake_hpc.core.errors import MetadataUnavailable
from mooncake_hpc.metadata import open_store
from mooncake_hpc.core.settings import Settings

def in_child(work):
    child = os.fork()
    if child == 0:
        work()
        sys.exit(0)  # by way of everything's deletion
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def use(key):
    mine, seen = open_store(sys.argv[1], settings), threading.Event()
    with mine.watch(key, lambda changes: changes and seen.set()):
        mine.publish(key, "w")
        assert seen.wait(10) and mine.get(key) == "w" and mine.get("fork/parent") == "v"
    return mine

def use_and_delete():
    global store
    mine = use("fork/child")
    del store
    gc.collect()
    mine.close()

def fork_again():
    mine = use("fork/middle")
    in_child(lambda: use("fork/grandchild").close())
    assert mine.get("fork/grandchild") is None
    try:
        open_store("127.0.0.1:1", Settings(metadata_timeout=0.3)).get("x")
    except MetadataUnavailable:
        return
    raise AssertionError("another kind of error")

settings = Settings(lease_ttl=2, metadata_timeout=10)
store, busy = open_store(sys.argv[1], settings), True
store.publish("fork/parent", "v")

def read():
    while busy:
        assert store.get("fork/parent") == "v"

threads = [threading.Thread(target=read) for _ in range(2)]
for thread in threads:
    thread.start()
for work in use_and_delete, fork_again, lambda: None:
    in_child(work)
busy = False
for thread in threads:
    thread.join()
assert store.get("fork/parent") == "v" and store.get("fork/child") is None
store.close()
print("all well")
"""


@pytest.mark.parametrize("support", ["", "0"])
def test_etcd_in_children_of_a_process_that_uses_it(etcd: str, support: str) -> None:
    """Whatever gRPC's own support of forks is set to, and with calls under way: it is loaded once more."""
    env = clean_env(GRPC_VERBOSITY="NONE", **({"GRPC_ENABLE_FORK_SUPPORT": support} if support else {}))
    done = subprocess.run([sys.executable, "-c", USES_ETCD, etcd], capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout == "all well\n", done.stderr


def test_an_embedded_etcd_is_its_starters_alone() -> None:
    with EmbeddedEtcd() as etcd:
        child = forked(lambda: etcd.close())
        try:
            with EtcdStore([etcd.endpoint], SETTINGS) as store:
                store.publish("k", "v")
                assert store.get("k") == "v"
            supervisor = etcd._supervisor
            begin = time.monotonic()
            etcd.close()  # the child does not hold the supervisor's input
            assert supervisor.returncode is not None and time.monotonic() - begin < 2
        finally:
            kill(child)


def test_nothing_is_said_in_a_child_that_ends_by_itself() -> None:
    """By way of the deletion of everything; with all warnings on."""
    program = """
import os, sys, warnings
import mooncake_hpc as mh
with (mh.TransferEngine("a:1", "memory://x", protocol="auto", bind_address="127.0.0.1") as a, mh.EmbeddedEtcd() as etcd,
      mh.TransferEngine("b:1", "memory://x", protocol="tcp", bind_address="127.0.0.1") as b):
    memory, block = a.allocate(4096), b.allocate(4096)
    segment = b.open_segment("a:1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        b.read(block, segment, memory.ctypes.data)
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", program], capture_output=True, text=True, timeout=60, env=clean_env()
    )
    assert done.returncode == 0 and "mooncake" not in done.stderr and "Traceback" not in done.stderr, done.stderr


@over_each
def test_the_cause_of_a_lost_segment_is_no_cancellation(protocol: str) -> None:
    """What is under way when the engine is closed was cancelled by nobody."""
    with engines(protocol) as (reader, owner):
        memory, block = owner.allocate(64 << 20), reader.allocate(64 << 20)
        segment = reader.open_segment("owner:1")
        rows = [(0, segment.id, block.ctypes.data, memory.ctypes.data, block.nbytes)] * 16
        batch = reader.submit(np.array(rows, REQUEST))
        reader.close()
        with pytest.raises(PeerLost, match="this engine was closed"):
            batch.wait(10)
