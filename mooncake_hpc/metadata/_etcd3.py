"""One connection to one etcd endpoint. This module, `_streams` and `_grpc` alone touch etcd3, grpc and protobuf.

etcd3 0.12.0 cannot be imported beside protobuf 4 and later (its generated code is too old) and registers
files named `rpc.proto` and `kv.proto` in protobuf's default pool. So it is loaded as a private copy: its
modules run under an `__import__` of their own and never enter `sys.modules`, and its messages are built from
the descriptors in its own generated files, in a descriptor pool of their own.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from mooncake_hpc.core import process
from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata import _grpc
from mooncake_hpc.metadata._failures import Failure, Kind, failure_of, text_of
from mooncake_hpc.metadata._private import PrivatePackage
from mooncake_hpc.metadata._streams import Changing, KeyStream

T = TypeVar("T")

VERSION = "0.12.0"
INSTALL = "pip install 'mooncake-hpc[etcd]'"
DESCRIPTORS = ("kv", "auth", "rpc")  # in the order of their imports
CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # http_proxy is for the web, not for a cluster's etcd
    ("grpc.use_local_subchannel_pool", 1),  # a new connection never inherits the back-off of a dropped one
    ("grpc.max_receive_message_length", -1),  # a listing of many keys may exceed the default of 4 MiB
]


@dataclass(frozen=True, slots=True)
class Access:
    """How to get in: user and password, paths of PEM files. Empty means unused; `ca` switches TLS on."""

    user: str = ""
    password: str = field(default="", repr=False)
    ca: str = ""
    cert: str = ""
    key: str = ""

    @classmethod
    def of(cls, settings: Settings) -> Access:
        """What the settings say; ConfigError where one of them needs another."""
        if bool(settings.etcd_user) != bool(settings.etcd_password):
            raise ConfigError(
                "MOONCAKE_HPC_ETCD_USER and MOONCAKE_HPC_ETCD_PASSWORD (or …_PASSWORD_FILE): set both or none"
            )
        if bool(settings.etcd_cert) != bool(settings.etcd_key):
            raise ConfigError("MOONCAKE_HPC_ETCD_CERT and MOONCAKE_HPC_ETCD_KEY: set both or none")
        if settings.etcd_cert and not settings.etcd_ca:
            raise ConfigError("MOONCAKE_HPC_ETCD_CERT needs MOONCAKE_HPC_ETCD_CA, which switches TLS on")
        return cls(settings.etcd_user, settings.etcd_password, settings.etcd_ca, settings.etcd_cert, settings.etcd_key)


def _messages(root: Path) -> dict[str, ModuleType]:
    """Stand-ins for etcd3's generated modules, built from the descriptors that these hold as a literal."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    pool = descriptor_pool.DescriptorPool()
    if hasattr(message_factory, "GetMessageClass"):  # protobuf 4.22 and later
        message_class = message_factory.GetMessageClass
    else:
        message_class = message_factory.MessageFactory(pool).GetPrototype
    modules = {}
    for name in DESCRIPTORS:
        text = (root / "etcdrpc" / f"{name}_pb2.py").read_text("utf-8")
        literal = re.search(r"serialized_pb=_b\(('.*')\)", text)
        if literal is None:
            raise ConfigError(f"{root}/etcdrpc/{name}_pb2.py holds no descriptor: reinstall, {INSTALL}")
        serialized = ast.literal_eval(literal[1]).encode("latin1")
        pool.AddSerializedFile(serialized)
        file = pool.FindFileByName(descriptor_pb2.FileDescriptorProto.FromString(serialized).name)
        module = ModuleType(f"{__name__}.{name}_pb2")
        for message, descriptor in file.message_types_by_name.items():
            setattr(module, message, message_class(descriptor))
        for enum in file.enum_types_by_name.values():
            vars(module).update({value.name: value.number for value in enum.values})
        modules[f"etcd3.etcdrpc.{name}_pb2"] = module
    return modules


_loading = process.lock()
_etcd3: ModuleType | None = None
_its_grpc: PrivatePackage | None = None


def load() -> ModuleType:
    """The private etcd3, for use in this process. ConfigError, which says what to install, where it or what it needs is
    missing."""
    global _etcd3, _its_grpc
    with _loading:
        try:
            grpc = _grpc.use()
            if _etcd3 is None or grpc is not _its_grpc:
                installed = importlib.metadata.distribution("etcd3")
                if installed.version != VERSION:
                    raise ConfigError(f"etcd3 is {installed.version}, {VERSION} is needed: {INSTALL}")
                root = Path(str(installed.locate_file("etcd3")))
                _etcd3 = PrivatePackage(root, _messages(root), [grpc] if grpc else []).load("etcd3")
                _its_grpc = grpc
        except ImportError as error:
            raise ConfigError(f"etcd metadata needs the package {error.name}: {INSTALL}") from error
        return _etcd3


class Connection:
    """A channel to one endpoint `host:port`, thread-safe. Calls take a time-out (seconds), raise Failure."""

    def __init__(self, endpoint: str, access: Access) -> None:
        """Open without waiting; ConfigError for a PEM file that cannot be read."""
        self._package = load()
        self._call = threading.local()
        host, _, port = endpoint.rpartition(":")
        try:
            self._client = self._client_class()(
                host=host,
                port=port,
                ca_cert=access.ca or None,
                cert_cert=access.cert or None,
                cert_key=access.key or None,
                grpc_options=CHANNEL_OPTIONS,
            )
        except OSError as error:
            raise ConfigError(f"TLS for etcd: {error}") from error
        self._access = access

    def _client_class(self) -> Any:
        """etcd3's client with a time-out a call: 0.12.0 has one a client."""
        call = self._call

        class Client(self._package.Etcd3Client):  # type: ignore[misc, name-defined]
            @property
            def timeout(self) -> float | None:
                return getattr(call, "timeout", None)

            @timeout.setter
            def timeout(self, value: None) -> None:
                """The base class sets its own."""

        return Client

    def _do(self, timeout: float, call: Callable[[Any], T]) -> T:
        grpc = _grpc.module()
        self._call.timeout = timeout
        try:
            if self._access.user and self._client.metadata is None:
                self._log_in(timeout)
            return call(self._client)
        except ValueError as error:  # what gRPC says of a channel that another thread has closed
            if "closed" not in str(error):
                raise
            raise Failure(Kind.UNAVAILABLE, str(error)) from error
        except (grpc.RpcError, self._package.Etcd3Exception) as error:
            cause = error if isinstance(error, grpc.RpcError) else error.__context__
            raise failure_of(cause) from error

    def _log_in(self, timeout: float) -> None:
        # Not by etcd3's constructor: it adds call credentials, which gRPC refuses without TLS.
        rpc = self._package.etcdrpc
        request = rpc.AuthenticateRequest(name=self._access.user, password=self._access.password)
        reply = rpc.AuthStub(self._client.channel).Authenticate(request, timeout)
        self._client.metadata = (("token", reply.token),)

    def log_out(self) -> None:
        """Forget the token, so that the next call fetches another."""
        self._client.metadata = None

    def get(self, key: str, timeout: float) -> str | None:
        value, _ = self._do(timeout, lambda client: client.get(key))
        return None if value is None else text_of(value)

    def list(self, prefix: str, timeout: float) -> dict[str, str]:
        if prefix:
            reply = self._do(timeout, lambda client: client.get_prefix_response(prefix))
        else:
            reply = self._do(timeout, lambda client: client.get_all_response())
        return {text_of(item.key): text_of(item.value) for item in reply.kvs}

    def list_at(self, prefix: str, timeout: float) -> tuple[dict[str, str], int]:
        """All keys under a prefix that is not empty, and the store's revision that they are of."""
        reply = self._do(timeout, lambda client: client.get_prefix_response(prefix))
        return {text_of(item.key): text_of(item.value) for item in reply.kvs}, reply.header.revision

    def follow(self, prefix: str, revision: int, timeout: float) -> Changing:
        """The changes under a prefix from `revision` on, for at most `timeout` seconds."""
        rpc, key = self._package.etcdrpc, prefix.encode()
        create = rpc.WatchCreateRequest(key=key, range_end=_after(key), start_revision=revision)
        return Changing(self._watch([rpc.WatchRequest(create_request=create)], timeout, timeout))

    def follow_keys(self, timeout: float) -> KeyStream:
        """A stream of the changes of keys that are named to it, without an end; `timeout` is for a log-in."""
        return KeyStream(self._package.etcdrpc, lambda requests: self._watch(requests, None, timeout))

    def _watch(self, requests: Iterable[Any], seconds: float | None, timeout: float) -> Any:
        """A watch of etcd's for so many seconds. Raises Failure."""
        try:
            if self._access.user and self._client.metadata is None:
                self._do(timeout, lambda _client: None)  # logs in
            stub = self._package.etcdrpc.WatchStub(self._client.channel)
            return stub.Watch(iter(requests), seconds, metadata=self._client.metadata)
        except ValueError as error:
            raise Failure(Kind.UNAVAILABLE, str(error)) from error

    def put(self, key: str, value: str, lease: int, timeout: float) -> bool:
        """Put, over whatever is there. True."""
        self._do(timeout, lambda client: client.put(key, value, lease=lease))
        return True

    def put_if_absent(self, key: str, value: str, lease: int, timeout: float) -> bool:
        """Put where the key is absent; whether it did, or an earlier try whose answer was lost."""
        if self._do(timeout, lambda client: client.put_if_not_exists(key, value, lease=lease)):
            return True
        return self._if_leased(key, lease, timeout, lambda txn: txn.put(key, value, lease=lease))

    def put_if_ours(self, key: str, value: str, lease: int, timeout: float) -> bool:
        """Put where the key is absent or hangs on `lease` already; whether it did."""

        def absent(client: Any) -> bool:
            return bool(client.put_if_not_exists(key, value, lease=lease))

        leased = self._if_leased(key, lease, timeout, lambda txn: txn.put(key, value, lease=lease))
        return leased or self._do(timeout, absent)

    def delete_if_leased(self, key: str, lease: int, timeout: float) -> bool:
        """Delete where the key hangs on `lease`."""
        return self._if_leased(key, lease, timeout, lambda txn: txn.delete(key))

    def _if_leased(self, key: str, lease: int, timeout: float, action: Callable[[Any], Any]) -> bool:
        rpc = self._package.etcdrpc

        class HangsOn:
            """The comparison that 0.12.0 has no class for; servers know it since etcd 3.3."""

            def build_message(self) -> Any:
                compare = rpc.Compare
                return compare(key=key.encode(), target=compare.LEASE, result=compare.EQUAL, lease=lease)

        def transaction(client: Any) -> bool:
            done, _ = client.transaction([HangsOn()], [action(client.transactions)], [])
            return bool(done)

        return self._do(timeout, transaction)

    def grant(self, ttl: int, timeout: float) -> tuple[int, int]:
        """A new lease: its id, and the TTL in seconds that etcd gave, which may be above `ttl`."""
        lease = self._do(timeout, lambda client: client.lease(ttl))
        return lease.id, lease.ttl

    def keep_alive(self, lease: int, timeout: float) -> int:
        """The renewed TTL in seconds; 0 when the lease is gone."""
        replies = self._do(timeout, lambda client: list(client.refresh_lease(lease)))
        return replies[0].TTL if replies else 0

    def lease_keys(self, lease: int, timeout: float) -> set[str]:
        """The keys that hang on `lease`."""
        reply = self._do(timeout, lambda client: client.get_lease_info(lease))
        return {text_of(key) for key in reply.keys}

    def revoke(self, lease: int, timeout: float) -> None:
        """End the lease; every key that hangs on it goes too."""
        self._do(timeout, lambda client: client.revoke_lease(lease))

    def close(self) -> None:
        """Close the channel; calls under way in other threads fail as unavailable."""
        self._client.close()


def _after(prefix: bytes) -> bytes:
    """The first key behind all that start with `prefix`, which ends in no 0xff byte."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
