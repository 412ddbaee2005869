"""An etcd of three real members under traffic: whatever befalls one of them, no transfer fails and no key is lost."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from test_metadata import Etcd, eventually

from mooncake_hpc import P2PStore, TransferEngine
from mooncake_hpc.core.errors import MetadataError, ObjectNotFound
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata import open_store
from mooncake_hpc.metadata.embedded import find_etcd
from mooncake_hpc.testing.peer import PeerProcess, digest, pattern

pytestmark = pytest.mark.slow

SETTINGS = Settings(lease_ttl=5.0, metadata_timeout=6.0)
OBJECT = pattern(3, 3 << 20)
PATIENCE = 3.0  # seconds for keys to come back: see `Segment.refresh`
STEPS = 2  # of each kind of traffic, during a fault and after it


class Gate:
    """A TCP port that leads to a member: open, cut (connections end, new ones too), or frozen (all is kept back)."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.state = "open"
        self._pairs: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def set(self, state: str) -> None:
        self.state = state
        if state != "frozen":  # what was frozen has holes in it
            while self._pairs:
                with contextlib.suppress(OSError):
                    self._pairs.pop().shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    if self.state == "cut":
                        raise OSError("cut")
                    far = socket.create_connection(("127.0.0.1", self.port), 5)
                except OSError:
                    near.close()
                    continue
                self._pairs += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                while self.state == "frozen":
                    time.sleep(0.05)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.set("cut")


class Cluster:
    """Three members, each behind a gate; `spec` names the gates."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.members = [Etcd(folder, *flags, member=number, members=3) for number in range(3)]
        self.gates = [Gate(member.port) for member in self.members]
        self.spec = "etcd://" + ",".join(gate.endpoint for gate in self.gates)

    def __enter__(self) -> Self:
        for member in self.members:
            member.spawn()
        self.await_all()
        return self

    def __exit__(self, *exc: object) -> None:
        for gate in self.gates:
            gate.close()
        for member in self.members:
            member.kill()

    def await_all(self) -> None:
        assert eventually(lambda: all(member.serves() for member in self.members), 20)

    def ctl(self, *arguments: str, user: str = "") -> str:
        endpoints = ",".join(member.endpoint for member in self.members)
        command = [str(Path(find_etcd(Settings())).with_name("etcdctl")), f"--endpoints={endpoints}", *arguments]
        command += [f"--user={user}"] if user else []
        return subprocess.run(command, check=True, capture_output=True, text=True, env={"ETCDCTL_API": "3"}).stdout

    def leader(self) -> int:
        """Its number."""
        return next(
            n for n, (_, status) in enumerate(self._statuses()) if status["leader"] == status["header"]["member_id"]
        )

    def member_id(self, number: int) -> str:
        return f"{self._statuses()[number][1]['header']['member_id']:x}"

    def _statuses(self) -> list[tuple[str, Any]]:
        found = {item["Endpoint"]: item["Status"] for item in json.loads(self.ctl("endpoint", "status", "-w", "json"))}
        return [(member.endpoint, found[member.endpoint]) for member in self.members]


class Traffic:
    """Traffic of a bench and of a fan-out, in threads; those in `names` must not fail. A context manager."""

    def __init__(self, spec: str, settings: Settings = SETTINGS) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._stopping = threading.Event()
        self._stack = contextlib.ExitStack()
        self._spec, self._settings = spec, settings
        self._options: dict[str, Any] = {"protocol": "tcp", "bind_address": "127.0.0.1", "settings": settings}
        env = {"MOONCAKE_HPC_LEASE_TTL": str(settings.lease_ttl), "MOONCAKE_HPC_METADATA_TIMEOUT": "6"}
        if settings.etcd_user:
            env |= {"MOONCAKE_HPC_ETCD_USER": settings.etcd_user, "MOONCAKE_HPC_ETCD_PASSWORD": settings.etcd_password}
        self._env = env

    def __enter__(self) -> Self:
        from conftest import clean_env

        enter = self._stack.enter_context
        options = self._options
        self._peer = enter(PeerProcess(self._spec, "tcp", "cluster-target:1", env=clean_env(**self._env)))
        self._remote = self._peer.call("allocate", 1 << 20, 8)
        self._engine = enter(TransferEngine("cluster-initiator:1", self._spec, **options))
        self._local = self._engine.allocate(1 << 20)
        self._trainer = enter(P2PStore("cluster-trainer:1", self._spec, **options))
        self._trainer.register("checkpoint", OBJECT)
        readers = [enter(P2PStore(f"cluster-reader-{n}:1", self._spec, **options)) for n in range(2)]
        self.observer = enter(open_store(self._spec, self._settings))
        jobs: list[tuple[str, Callable[[], None]]] = [("bench", self._bench), ("look-up", self._look_up)]
        jobs += [(f"reader {n}", lambda reader=reader: self._pull(reader)) for n, reader in enumerate(readers)]  # type: ignore[misc]
        self._threads = [threading.Thread(target=self._run, args=job, daemon=True) for job in jobs]
        self.names = {name for name, _ in jobs}
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)
        self._stack.close()

    def _run(self, name: str, job: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            try:
                job()
                self.counts[name] += 1
            except Exception as error:
                if name in self.names:
                    self.failures.append(f"{time.strftime('%X')} {name}: {type(error).__name__}: {error}")
            self._stopping.wait(0.02)

    def _bench(self) -> None:
        segment = self._engine.open_segment("cluster-target:1")
        self._engine.read(self._local, segment, self._remote, timeout=5)
        assert digest(self._local) == digest(pattern(8, 1 << 20))

    def _look_up(self) -> None:
        """What a process that comes now needs of etcd."""
        name = f"cluster-guest-{random.getrandbits(30)}:1"
        with TransferEngine(
            name, self._spec, protocol="tcp", bind_address="127.0.0.1", settings=self._settings
        ) as guest:
            guest.read(guest.allocate(4096), guest.open_segment("cluster-target:1"), self._remote, timeout=5)
        self._stopping.wait(0.2)

    def _pull(self, reader: P2PStore) -> None:
        with contextlib.suppress(ObjectNotFound):  # where an earlier try could not delete it
            reader.delete_replica("checkpoint")
        (array,) = reader.get_replica("checkpoint", timeout=20, wait=PATIENCE).arrays
        assert np.array_equal(array, OBJECT)
        reader.delete_replica("checkpoint")
        self._stopping.wait(0.1)

    def go_on(self, steps: int = STEPS) -> None:
        """Return once each kind of traffic has come on by so many steps; nothing has failed, and no key is lost."""
        before = dict(self.counts)
        assert eventually(
            lambda: self.failures or all(self.counts[n] >= before.get(n, 0) + steps for n in self.names), 30
        ), (before, self.counts)
        failures, self.failures = self.failures, []
        assert not failures, failures

    def check_keys(self) -> None:
        """All keys of those that live are there, on a lease that lives."""
        keys = self.observer.list("mooncake")
        for name in ("target", "initiator", "trainer", "reader-0", "reader-1"):
            for kind in ("ram", "rpc_meta"):
                assert f"mooncake/{kind}/cluster-{name}:1" in keys, (name, sorted(keys))
        assert any("/manifest/checkpoint/" in key for key in keys) and any("trainer" in key for key in keys)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def traffic(cluster: Cluster) -> Iterator[Traffic]:
    with Traffic(cluster.spec) as traffic:
        traffic.go_on()
        yield traffic


@contextlib.contextmanager
def killed(cluster: Cluster, number: int) -> Iterator[None]:
    cluster.members[number].kill()
    yield
    cluster.members[number].start()


@contextlib.contextmanager
def stopped(cluster: Cluster, number: int) -> Iterator[None]:
    cluster.members[number].process.send_signal(signal.SIGSTOP)
    yield
    cluster.members[number].process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def cut(cluster: Cluster, number: int) -> Iterator[None]:
    cluster.gates[number].set("cut")
    yield
    cluster.gates[number].set("open")


@contextlib.contextmanager
def frozen(cluster: Cluster, number: int) -> Iterator[None]:
    cluster.gates[number].set("frozen")
    yield
    cluster.gates[number].set("open")


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("fault", [killed, stopped, cut, frozen])
def test_a_member_fails_and_comes_back(
    cluster: Cluster, traffic: Traffic, fault: Any, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), fault(cluster, number):
        traffic.go_on()
    cluster.await_all()
    traffic.go_on()
    traffic.check_keys()
    assert len(caplog.messages) <= 8, caplog.messages


def test_the_leader_hands_over_and_is_stopped(cluster: Cluster, traffic: Traffic) -> None:
    leader = cluster.leader()
    cluster.ctl("move-leader", cluster.member_id((leader + 1) % 3))
    traffic.go_on()
    leader = cluster.leader()
    with stopped(cluster, leader):
        traffic.go_on()
    traffic.go_on()
    traffic.check_keys()


def test_history_is_compacted_under_watches(cluster: Cluster, traffic: Traffic) -> None:
    seen: list[str] = []
    with (
        open_store(cluster.spec, SETTINGS) as store,
        traffic.observer.watch("compacted/", lambda changes: seen.extend(value or "" for value in changes.values())),
    ):
        for number in range(5):
            store.publish("compacted/key", str(number))
            revision = json.loads(cluster.ctl("get", "compacted/key", "-w", "json"))["header"]["revision"]
            with contextlib.suppress(subprocess.CalledProcessError):  # by somebody else meanwhile
                cluster.ctl("compact", str(revision))
            for gate in cluster.gates:  # watches come back at revisions that are gone
                gate.set("open")
        assert eventually(lambda: seen and seen[-1] == "4", 10), seen
    traffic.go_on()
    traffic.check_keys()


def test_all_members_are_restarted(cluster: Cluster, traffic: Traffic) -> None:
    for member in cluster.members:
        member.kill()
    for member in cluster.members:
        member.spawn()
    cluster.await_all()
    traffic.go_on()
    traffic.check_keys()


def test_tokens_expire(tmp_path: Path) -> None:
    with Cluster(tmp_path / "auth", "--bcrypt-cost=4", "--auth-token-ttl=1") as cluster:
        cluster.ctl("user", "add", "root:secret")
        cluster.ctl("user", "grant-role", "root", "root")
        cluster.ctl("auth", "enable")
        settings = Settings(lease_ttl=5.0, metadata_timeout=6.0, etcd_user="root", etcd_password="secret")
        seen: list[str] = []
        with Traffic(cluster.spec, settings) as traffic:
            with traffic.observer.watch("auth/", lambda changes: seen.extend(v or "" for v in changes.values())):
                end = time.monotonic() + 3.0  # several lives of a token
                while time.monotonic() < end:
                    traffic.go_on(1)
                time.sleep(1.5)  # the observer's token is not used meanwhile
                traffic.observer.publish("auth/key", "1")
                assert eventually(lambda: seen == ["1"], 5), seen
            with stopped(cluster, cluster_leader(cluster)):
                traffic.go_on()
            traffic.check_keys()


def cluster_leader(cluster: Cluster) -> int:
    statuses = json.loads(cluster.ctl("endpoint", "status", "-w", "json", user="root:secret"))
    found = {item["Endpoint"]: item["Status"] for item in statuses}
    for number, member in enumerate(cluster.members):
        status = found[member.endpoint]
        if status["leader"] == status["header"]["member_id"]:
            return number
    raise AssertionError(statuses)


def test_a_full_database_is_told_with_the_remedy_and_left_as_soon_as_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is published stays, and transfers go on; what is new is refused. With room all goes on by itself."""
    settings = Settings(lease_ttl=3.0, metadata_timeout=6.0)
    with (
        Cluster(tmp_path / "full", f"--quota-backend-bytes={8 << 20}") as cluster,
        Traffic(cluster.spec, settings) as traffic,
    ):
        traffic.go_on()
        everything, traffic.names = traffic.names, {"bench"}
        with open_store(cluster.spec, SETTINGS) as filler:
            with pytest.raises(MetadataError, match=r"database space exceeded.*full.*alarm disarm.*quota"):
                for number in range(200):
                    filler.publish(f"filler/{number}", "x" * (1 << 20))
            caplog.clear()
            end = time.monotonic() + settings.lease_ttl + 0.5
            while time.monotonic() < end:
                traffic.go_on(1)
            traffic.check_keys()
            # of what is tried in vain meanwhile each says so once
            assert all("space exceeded" in text for text in caplog.messages), caplog.messages
        revision = json.loads(cluster.ctl("get", "x", "-w", "json"))["header"]["revision"]
        cluster.ctl("compact", str(revision))
        cluster.ctl("defrag")
        cluster.ctl("alarm", "disarm")
        assert eventually(lambda: traffic.observer.create("room", "1"), 10)
        traffic.names, before = everything, dict(traffic.counts)
        assert eventually(lambda: all(traffic.counts[name] > before[name] for name in everything), 10)
        traffic.failures.clear()  # of what was refused just before
        traffic.go_on()
        traffic.check_keys()
