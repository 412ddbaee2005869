"""Both metadata stores, and what only etcd has: leases, fail-over, log-in, TLS, a host process left as it was."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from uuid import uuid4

import pytest

from mooncake_hpc.core.errors import ConfigError, MetadataError, MetadataUnavailable
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata import MetadataStore, open_store
from mooncake_hpc.metadata.embedded import EmbeddedEtcd, find_etcd
from mooncake_hpc.testing.metadata import MetadataStoreConformance, Open

TTL = 1.0
SETTINGS = Settings(lease_ttl=TTL, metadata_timeout=2)
CHECKOUT = Path(__file__).parents[1]

PUBLISHER = """
import sys
from mooncake_hpc.metadata import open_store
from mooncake_hpc.core.settings import Settings
store = open_store(sys.argv[1], Settings(lease_ttl=1, metadata_timeout=2))
for pair in sys.argv[2:]:
    store.publish(*pair.split("="))
print("published", flush=True)
sys.stdin.readline()
print(sorted(store.lost), flush=True)
store.close()
"""


def eventually(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Etcd:
    """An etcd, or one member of several in the same folder, to kill, wipe and start again on the same port."""

    def __init__(self, folder: Path, *flags: str, scheme: str = "http", member: int = 0, members: int = 1) -> None:
        self.folder, self.port, self.scheme = folder, free_port(), scheme
        self.data, self.peer = folder / f"data{member}", folder / f"peer:{member}"
        self.endpoint = f"127.0.0.1:{self.port}"
        url = f"{scheme}://{self.endpoint}"
        cluster = ",".join(f"m{i}=unix://peer:{i}" for i in range(members))
        folder.mkdir(exist_ok=True)
        self.command = [find_etcd(Settings()), f"--listen-client-urls={url}", f"--advertise-client-urls={url}"]
        self.command += [f"--listen-peer-urls=unix://peer:{member}", f"--initial-cluster={cluster}"]
        self.command += [f"--initial-advertise-peer-urls=unix://peer:{member}", f"--name=m{member}"]
        self.command += [f"--data-dir={self.data}", "--unsafe-no-fsync", "--log-level=error"]
        self.command += [f"--heartbeat-interval={10 * members}", f"--election-timeout={100 * members}", *flags]

    def spawn(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(self.command, cwd=self.folder, stdout=log, stderr=log)

    def start(self) -> None:
        self.spawn()
        assert eventually(self.serves, 10), (self.folder / "log").read_text()

    def serves(self) -> bool:
        if self.scheme == "https":
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return True
            return False
        connection = HTTPConnection("127.0.0.1", self.port, timeout=1)
        with suppress(OSError, HTTPException):
            connection.request("GET", "/health")
            return b'"true"' in connection.getresponse().read()
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wipe(self) -> None:
        shutil.rmtree(self.data)
        self.peer.unlink()

    def __enter__(self) -> Etcd:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


class Forwarder:
    """A TCP port that leads to `target`, until it is cut (refuses) or frozen (keeps silent)."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.target = (host, int(port))
        self.frozen, self.sockets = threading.Event(), []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(self.target)
                self.sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if not self.frozen.is_set():
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        for end in [self.listener, *self.sockets]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Publisher(subprocess.Popen[str]):
    """A process that publishes `key=value` pairs until it is told to end."""

    def __init__(self, endpoint: str, *pairs: str) -> None:
        super().__init__(
            [sys.executable, "-c", PUBLISHER, endpoint, *pairs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
        )
        assert self.stdout is not None
        assert self.stdout.readline() == "published\n"

    def __exit__(self, *exc: object) -> None:
        self.kill()  # also when it is stopped
        super().__exit__(None, None, None)


@pytest.fixture(scope="module")
def etcd() -> Iterator[EmbeddedEtcd]:
    with EmbeddedEtcd() as running:
        yield running


@pytest.fixture
def reader(etcd: EmbeddedEtcd) -> Iterator[MetadataStore]:
    with open_store(etcd.endpoint, SETTINGS) as store:
        assert store.list("") == {}, "an earlier test has left keys"
        yield store


class TestMemoryStore(MetadataStoreConformance):
    @pytest.fixture
    def open_another(self) -> Open:
        name = uuid4().hex
        return lambda: open_store(f"memory://{name}")

    def test_spaces_are_apart_and_end(self) -> None:
        with open_store("memory://a") as a, open_store("memory://b") as b:
            a.publish("k", "v")
            assert b.get("k") is None
        with open_store("memory://a") as again:
            assert again.list("") == {}


class TestEtcdStore(MetadataStoreConformance):
    @pytest.fixture
    def open_another(self, etcd: EmbeddedEtcd, reader: MetadataStore) -> Open:
        return lambda: open_store(etcd.endpoint, SETTINGS)

    def test_value_above_the_limit(self, opener: Open) -> None:
        store = opener()
        store.publish("k", "small")
        for size in (1_600_000, 5_000_000):  # etcd's own limit, and its gRPC server's
            with pytest.raises(MetadataError, match=rf"{size} bytes.*1572864 bytes") as caught:
                store.publish("k", "x" * size)
            assert not isinstance(caught.value, MetadataUnavailable)
        assert store.get("k") == "small"

    def test_a_listing_above_grpcs_message_size(self, opener: Open) -> None:
        store = opener()
        for i in range(6):
            store.publish(f"k{i}", str(i) * 1_000_000)
        assert {len(value) for value in store.list("k").values()} == {1_000_000}


# Leases


@pytest.mark.slow
def test_keys_outlive_the_ttl_while_their_process_lives(etcd: EmbeddedEtcd, reader: MetadataStore) -> None:
    with open_store(etcd.endpoint, SETTINGS) as store:
        store.publish("k", "v")
        time.sleep(2.5 * TTL)
        assert reader.get("k") == "v"


@pytest.mark.slow
def test_keys_vanish_within_the_ttl_after_kill_9(etcd: EmbeddedEtcd, reader: MetadataStore) -> None:
    with Publisher(etcd.endpoint, "a=1", "b=2") as publisher:
        assert reader.list("") == {"a": "1", "b": "2"}
        publisher.kill()
        assert eventually(lambda: reader.list("") == {}, TTL + 1)


@pytest.mark.slow
def test_stopped_for_three_ttls(etcd: EmbeddedEtcd, reader: MetadataStore) -> None:
    with Publisher(etcd.endpoint, "mine=old", "taken=old") as publisher:
        publisher.send_signal(signal.SIGSTOP)
        time.sleep(3 * TTL)
        assert reader.list("") == {}
        with open_store(etcd.endpoint, SETTINGS) as successor:
            successor.publish("taken", "old")  # even an equal value is the successor's
            publisher.send_signal(signal.SIGCONT)
            assert eventually(lambda: reader.get("mine") == "old", 2 * TTL)
            output, _ = publisher.communicate("end\n", timeout=10)
            assert output == "['taken']\n"
            assert reader.list("") == {"taken": "old"}


def test_old_process_leaves_its_successors_keys(etcd: EmbeddedEtcd, reader: MetadataStore) -> None:
    with Publisher(etcd.endpoint, "k=v", "own=1") as old, Publisher(etcd.endpoint, "k=v") as new:
        old.communicate("end\n", timeout=10)
        assert reader.list("") == {"k": "v"}
        new.communicate("end\n", timeout=10)
        assert reader.list("") == {}


def watchers(endpoint: str) -> int:
    """Keys and prefixes that clients have etcd tell them about."""
    connection = HTTPConnection(endpoint, timeout=10)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return next(int(line.split()[1]) for line in lines if line.startswith("etcd_debugging_mvcc_watcher_total "))


def test_takeover_is_logged(etcd: EmbeddedEtcd, reader: MetadataStore, caplog: pytest.LogCaptureFixture) -> None:
    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    with open_store(etcd.endpoint, SETTINGS) as old, open_store(etcd.endpoint, SETTINGS) as new:
        old.publish("k", "old")
        new.publish("k", "new")
        assert eventually(lambda: old.lost == {"k"} and bool(told()), 10)
        assert len(told()) == 1 and "another process has published k, which was ours" in told()[0], told()


def test_takeover_in_mid_trouble(etcd: EmbeddedEtcd, reader: MetadataStore) -> None:
    forwarder = Forwarder(etcd.endpoint)
    both = f"etcd://{forwarder.endpoint},{etcd.endpoint}"
    with open_store(both, SETTINGS) as old, open_store(etcd.endpoint, SETTINGS) as new:
        old.publish("k", "old")
        forwarder.frozen.set()
        new.publish("k", "new")
        forwarder.cut()
        assert eventually(lambda: old.lost == {"k"}, 10)
        assert reader.get("k") == "new"


@pytest.mark.slow
def test_takeover_after_trouble(etcd: EmbeddedEtcd, reader: MetadataStore) -> None:
    """Keys are watched over the other way as well."""
    forwarder = Forwarder(etcd.endpoint)
    both = f"etcd://{forwarder.endpoint},{etcd.endpoint}"
    with open_store(both, SETTINGS) as old:
        old.publish("k", "old")
        assert eventually(lambda: watchers(etcd.endpoint) == 1, 10)
        forwarder.cut()
        assert eventually(lambda: watchers(etcd.endpoint) == 0, 10)
        assert eventually(lambda: watchers(etcd.endpoint) == 1, 10)
        with open_store(etcd.endpoint, SETTINGS) as new:
            new.publish("k", "new")
            assert eventually(lambda: old.lost == {"k"}, 10)
            assert reader.get("k") == "new"


def test_only_what_is_published_is_watched(etcd: EmbeddedEtcd, reader: MetadataStore) -> None:
    with open_store(etcd.endpoint, SETTINGS) as store:
        assert watchers(etcd.endpoint) == 0
        for key in "abc":
            store.publish(key, "1")
        store.publish("a", "2")
        store.withdraw("b")
        store.publish("b", "again")
        store.withdraw("b")
        assert eventually(lambda: watchers(etcd.endpoint) == 2, 10)
    assert eventually(lambda: watchers(etcd.endpoint) == 0, 10)


def test_a_key_that_somebody_deletes_comes_back(etcd: EmbeddedEtcd, reader: MetadataStore) -> None:
    with open_store(etcd.endpoint, SETTINGS) as store:
        store.publish("k", "v")
        assert eventually(lambda: watchers(etcd.endpoint) == 1, 10)
        command = [Path(find_etcd(Settings())).with_name("etcdctl"), f"--endpoints={etcd.endpoint}", "del", "k"]
        subprocess.run(command, check=True, capture_output=True, env={"ETCDCTL_API": "3"})
        assert eventually(lambda: reader.get("k") == "v", 10)


@pytest.mark.slow
def test_a_withdrawal_that_failed_is_made_up_for(etcd: EmbeddedEtcd, reader: MetadataStore) -> None:
    forwarder = Forwarder(etcd.endpoint)
    with open_store(forwarder.endpoint, dataclasses.replace(SETTINGS, metadata_timeout=0.5)) as store:
        store.publish("k", "v")
        store.publish("kept", "v")
        forwarder.frozen.set()
        with pytest.raises(MetadataUnavailable):
            store.withdraw("k")
        forwarder.frozen.clear()
        assert eventually(lambda: reader.list("") == {"kept": "v"}, TTL)


@pytest.mark.slow
def test_wiped_etcd(tmp_path: Path) -> None:
    with Etcd(tmp_path / "etcd") as server, ExitStack() as stack:
        first, second = (stack.enter_context(open_store(server.endpoint, SETTINGS)) for _ in range(2))
        first.publish("a", "1")
        first.publish("b", "2")
        second.publish("c", "3")
        server.kill()
        server.wipe()
        server.start()
        first.publish("d", "4")  # finds the lease gone
        assert eventually(lambda: first.list("") == {"a": "1", "b": "2", "c": "3", "d": "4"}, 3)
        first.publish("a", "new")
        first.withdraw("b")
        assert second.list("") == {"a": "new", "c": "3", "d": "4"}


# Fail-over and deadlines


@pytest.mark.slow
def test_etcd_dies_and_returns(tmp_path: Path) -> None:
    with Etcd(tmp_path / "etcd") as server, open_store(server.endpoint, SETTINGS) as store:
        store.publish("k", "1")
        server.kill()
        returning = threading.Timer(0.5, server.start)
        returning.start()
        store.publish("k", "2")  # waits, within its deadline
        returning.join()
        assert store.get("k") == "2"


@pytest.mark.slow
def test_no_etcd_is_an_error_within_the_deadline() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    with open_store(endpoint, dataclasses.replace(SETTINGS, metadata_timeout=0.5)) as store:
        for call in (lambda: store.get("k"), lambda: store.publish("k", "v"), lambda: store.list("")):
            start = time.monotonic()
            with pytest.raises(MetadataUnavailable, match=rf"{endpoint} within 0\.5 s.*refused") as caught:
                call()
            assert isinstance(caught.value, ConnectionError)
            assert time.monotonic() - start < 1


def test_silent_etcd_is_an_error_within_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        store = open_store(endpoint, dataclasses.replace(SETTINGS, metadata_timeout=0.5))
        start = time.monotonic()
        with pytest.raises(MetadataUnavailable, match=endpoint):
            store.publish("k", "v")
        store.close()
        assert time.monotonic() - start < 2


@pytest.mark.slow
def test_idle_while_etcd_is_away(tmp_path: Path) -> None:
    with Etcd(tmp_path / "etcd") as server, open_store(server.endpoint, SETTINGS) as store:
        store.publish("k", "v")
        server.kill()
        used = time.process_time()
        time.sleep(2)
        assert time.process_time() - used < 0.2
        store.close()


@pytest.mark.parametrize("order", [0, 1])
def test_endpoints_that_never_answer_are_passed_over(etcd: EmbeddedEtcd, order: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dead = [f"127.0.0.1:{silent.getsockname()[1]}", f"127.0.0.1:{free_port()}", "no-such-host.invalid:2379"]
        spec = "etcd://" + ",".join([*dead[order:], etcd.endpoint, *dead[:order]])
        with open_store(spec, SETTINGS) as store:
            store.publish("k", "v")
            assert store.get("k") == "v"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "freeze"])
def test_fail_over(etcd: EmbeddedEtcd, reader: MetadataStore, fault: str) -> None:
    ways = [Forwarder(etcd.endpoint), Forwarder(etcd.endpoint)]
    # A freeze costs a share of a deadline; the lease must outlast it.
    settings = dataclasses.replace(SETTINGS, lease_ttl=2)
    with open_store("etcd://" + ",".join(way.endpoint for way in ways), settings) as store:
        store.publish("k", "1")
        ways[0].frozen.set() if fault == "freeze" else ways[0].cut()
        store.publish("k", "2")
        assert reader.get("k") == "2"
        time.sleep(2.5)
        assert reader.get("k") == "2"  # the lease was kept over the other way
    for way in ways:
        way.cut()


@pytest.mark.slow
def test_a_cluster_loses_its_members_one_at_a_time(tmp_path: Path) -> None:
    with ExitStack() as stack:
        members = [Etcd(tmp_path / "etcd", member=i, members=3) for i in range(3)]
        for member in members:
            member.spawn()
            stack.callback(member.kill)
        assert eventually(lambda: all(member.serves() for member in members), 15)
        spec = "etcd://" + ",".join(member.endpoint for member in members)
        settings = Settings(lease_ttl=2, metadata_timeout=5)
        store = stack.enter_context(open_store(spec, settings))
        for i, member in enumerate(members):
            store.publish("k", str(i))
            member.kill()
            store.publish("k", f"{i}, without member {i}")
            assert store.get("k") == f"{i}, without member {i}"
            member.start()
        time.sleep(2.5)
        assert store.list("") == {"k": "2, without member 2"}


# Getting in


def certificates(folder: Path) -> None:
    """A CA, a certificate of it for 127.0.0.1, and a stranger's CA."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "stranger"):
        openssl("req", "-x509", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    openssl("req", *new_key, "-keyout", "node.key", "-out", "node.csr", "-subj", "/CN=node")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    signed_by = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "san")
    openssl("x509", "-req", "-in", "node.csr", "-out", "node.pem", *signed_by)


@pytest.mark.slow
def test_tls(tmp_path: Path) -> None:
    certificates(tmp_path)
    ca, cert, key = (str(tmp_path / name) for name in ("ca.pem", "node.pem", "node.key"))
    flags = [f"--cert-file={cert}", f"--key-file={key}", "--client-cert-auth", f"--trusted-ca-file={ca}"]
    good = dataclasses.replace(SETTINGS, etcd_ca=ca, etcd_cert=cert, etcd_key=key, metadata_timeout=1)
    with Etcd(tmp_path / "etcd", *flags, scheme="https") as server:
        with open_store(server.endpoint, good) as store:
            store.publish("k", "v")
            assert store.get("k") == "v"
        stranger = str(tmp_path / "stranger.pem")
        anonymous = dataclasses.replace(good, etcd_cert="", etcd_key="")
        for change in (
            dataclasses.replace(good, etcd_ca=stranger),
            anonymous,
            dataclasses.replace(anonymous, etcd_ca=""),  # no TLS at all
        ):
            bad = dataclasses.replace(change, metadata_timeout=0.5)
            with open_store(server.endpoint, bad) as store, pytest.raises(MetadataUnavailable):
                store.get("k")


def test_logs_in_again_when_etcd_has_forgotten_the_token(tmp_path: Path) -> None:
    def etcdctl(*arguments: str) -> None:
        command = [Path(find_etcd(Settings())).with_name("etcdctl"), f"--endpoints={server.endpoint}", *arguments]
        subprocess.run(command, check=True, capture_output=True, env={"ETCDCTL_API": "3"})

    access = dataclasses.replace(SETTINGS, etcd_user="root", etcd_password="secret")
    with Etcd(tmp_path / "etcd", "--bcrypt-cost=4") as server:
        etcdctl("user", "add", "root:secret")
        etcdctl("user", "grant-role", "root", "root")
        etcdctl("auth", "enable")
        with open_store(server.endpoint, access) as store:
            store.publish("k", "1")
            server.kill()
            server.start()  # simple tokens live in etcd's memory
            store.publish("k", "2")
            assert store.get("k") == "2"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"etcd_user": "root"}, "ETCD_PASSWORD"),
        ({"etcd_ca": "/ca", "etcd_cert": "/cert"}, "ETCD_KEY"),
        ({"etcd_cert": "/cert", "etcd_key": "/key"}, "ETCD_CA"),
        ({"etcd_ca": "/no/such/ca.pem"}, "/no/such/ca.pem"),
    ],
)
def test_impossible_settings(change: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        open_store("127.0.0.1:2379", dataclasses.replace(SETTINGS, **change))


@pytest.mark.parametrize(
    "spec",
    ["", "host", "host:0", "host:65536", "a:1,,b:2", "etcd://", "::1:2379", "memory://", "P2PHANDSHAKE", "redis://a:1"],
)
def test_impossible_specs(spec: str) -> None:
    with pytest.raises(ConfigError, match="etcd://host:port"):
        open_store(spec, SETTINGS)


def test_the_one_impossible_endpoint_of_several_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'a:1,b', there 'b': expected host:port"):
        open_store("etcd://a:1,b", SETTINGS)


def test_http_metadata_server_is_named_as_unsupported() -> None:
    with pytest.raises(ConfigError, match="not supported, use etcd"):
        open_store("http://127.0.0.1:8080/metadata", SETTINGS)


def test_ipv6() -> None:
    with EmbeddedEtcd("::1") as etcd, open_store(f"etcd://{etcd.endpoint}", SETTINGS) as store:
        assert etcd.endpoint.startswith("[::1]:")
        store.publish("k", "v")
        assert store.get("k") == "v"
