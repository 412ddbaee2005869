"""Who is where: publishes this node's segment and finds other nodes' segments.

With a metadata store under the original's keys, `mooncake/[<MC_METADATA_CLUSTER_ID>/]rpc_meta/<name>` and
`mooncake/[<id>/]ram/<name>`; a name with a slash in it stands in for `ram/<name>` as it is. Without a store
(P2PHANDSHAKE) a segment's name is the `host:port` of its RPC port, and every node answers for itself.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from msgspec import Struct

from mooncake_hpc.control import client
from mooncake_hpc.core.address import join, split
from mooncake_hpc.core.authentication import Authentication, Reason
from mooncake_hpc.core.decode import LONGEST_SMALL_VALUE, Name, Port, Reader
from mooncake_hpc.core.errors import (
    AuthenticationError,
    ConfigError,
    MetadataError,
    MetadataUnavailable,
    NameInUse,
    PeerLost,
    SegmentNotFound,
)
from mooncake_hpc.core.names import check_name, check_text
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.wire.descriptor import OURS, Ours, SegmentDescriptor
from mooncake_hpc.wire.rpc_frames import dumps

log = logging.getLogger(__name__)

ANOTHER_NAME = "end that process, or give this one another name (--local_server_name, TransferEngine's first argument)"
LAST_PORT = 65535
PROBE_TIMEOUT = 1.0  # seconds for the present holder of a name to show that it lives


@dataclass(frozen=True, slots=True)
class RpcRecord:
    """Where a node's RPC port is, and whose generation it is (empty: the original's)."""

    host: str
    port: int
    generation: str = ""

    def to_json(self) -> str:
        ours = {"generation": self.generation}
        return dumps({"ip_or_host_name": self.host, "rpc_port": self.port, OURS: ours})

    @classmethod
    def from_json(cls, text: str, where: str) -> RpcRecord:
        """Parse what anybody published. `where` names the source in the MalformedRecord of a bad value."""
        value = _read(text, where)
        generation = value.mooncake_hpc.generation if value.mooncake_hpc else None
        return cls(value.ip_or_host_name, value.rpc_port, generation or "")


class _Record(Struct):
    ip_or_host_name: Name
    rpc_port: Port
    mooncake_hpc: Ours | None = None


_read = Reader(_Record, "RPC address", LONGEST_SMALL_VALUE)


class Directory:
    """This node's entry, and look-ups. Thread-safe.

    `generation` is random a process and tells it from predecessors of the same name; its RPC port must
    already be listening at `rpc_host:rpc_port`. `.name` is the published name: in P2PHANDSHAKE mode
    (`store` None) that address, whatever was asked for.
    """

    def __init__(
        self,
        name: str,
        store: MetadataStore | None,
        settings: Settings,
        *,
        generation: str,
        rpc_host: str,
        rpc_port: int,
        authentication: Authentication | None = None,
    ) -> None:
        self.name = name.removeprefix("/") if store is not None else join(rpc_host, rpc_port)
        check_name(self.name, "the local server name")
        self._store = store
        self._settings = settings
        self._authentication = authentication or Authentication()
        self._own = RpcRecord(rpc_host, rpc_port, generation)
        cluster = settings.metadata_cluster_id
        check_text(cluster, "MC_METADATA_CLUSTER_ID")
        self._prefix = "mooncake/" + (cluster if not cluster or cluster.endswith("/") else cluster + "/")
        self._lock = threading.Lock()
        self._published = ""  # the descriptor as it was published last

    def publish(self, descriptor: SegmentDescriptor) -> None:
        """Make `descriptor` what others read under our name: one put; the RPC address goes before the first.

        Raises NameInUse, MetadataUnavailable, or MetadataError for more buffers than one value holds. After a
        failed first call nothing of ours stays published.
        """
        text = descriptor.to_json()
        with self._lock:
            if self._store is None:
                self._check_frame(text, len(descriptor.buffers))
            elif self._published:
                self._check_lost(self._store)
                self._put(self._store, text, len(descriptor.buffers))
            else:
                self._publish_first(self._store, text, len(descriptor.buffers))
            self._published = text

    def metadata_reply(self) -> str:
        """The answer to a Metadata frame: our descriptor in P2PHANDSHAKE mode, else null."""
        with self._lock:
            return self._published if self._store is None and self._published else dumps(None)

    @property
    def peer_to_peer(self) -> bool:
        """Whether there is no store: segments answer for themselves."""
        return self._store is None

    def lookup(self, name: str) -> SegmentDescriptor:
        """The present descriptor of a segment, never from a cache.

        Raises SegmentNotFound, MetadataUnavailable, MalformedRecord; ConfigError for what cannot be a name. Without a
        store the segment itself is asked: AuthenticationError.
        """
        name = _plain(name)
        if self._store is None:
            try:
                anybody = self._authentication.expect()
                return client.fetch_metadata(name, self._settings.metadata_timeout, self._settings, anybody)
            except AuthenticationError:
                raise
            except PeerLost as error:
                raise SegmentNotFound(f"no segment {name!r} (P2PHANDSHAKE): {error}") from error
        key = self._segment_key(name)
        text = self._store.get(key)
        if text is None:
            raise SegmentNotFound(f"no segment {name!r}: key {key!r} is absent from {self._store.spec}")
        return SegmentDescriptor.from_json(text, f"key {key!r} in {self._store.spec}")

    def rpc_address(self, name: str) -> str:
        """`host:port` of a segment's RPC port. Raises as `lookup`."""
        record = self._rpc_record(_plain(name))
        return join(record.host, record.port)

    def probe(self, name: str, timeout: float) -> client.ProbeReply:
        """Ask the process behind a segment whether it lives. Raises PeerLost, and as `lookup`."""
        record = self._rpc_record(_plain(name))
        reply = self._probe(_plain(name), record, timeout)
        if record.generation and reply.generation != record.generation:
            where = join(record.host, record.port)
            raise PeerLost(f"segment {name!r}: its process has ended, and another one answers at {where}")
        return reply

    def data_endpoint(self, descriptor: SegmentDescriptor) -> tuple[str, int]:
        """Host and port of a segment's TCP data port, also where an old version of the original did not
        publish them (v0.3.0 to v0.3.4: the port after its RPC port). Raises as `lookup`.
        """
        host, port = descriptor.tcp_data_host, descriptor.tcp_data_port
        if host and port:
            return host, port
        record = self._rpc_record(descriptor.name)
        if not port and record.port == LAST_PORT:
            raise MetadataError(f"segment {descriptor.name!r} tells no TCP data port, and its RPC port is the last one")
        return host or record.host, port or record.port + 1

    def withdraw(self) -> None:
        """Remove what we published, as far as it is still ours. Never raises: the leases end what is left."""
        with self._lock:
            published, self._published = self._published, ""
            if published and self._store is not None:
                self._withdraw(self._store)

    def _publish_first(self, store: MetadataStore, text: str, buffers: int) -> None:
        self._check_free(store)
        key = self._rpc_key(self.name)
        try:
            store.publish(key, self._own.to_json())
            record = self._rpc_record(self.name)
            if record != self._own:  # two processes found the name free at the same time
                winner = join(record.host, record.port)
                raise NameInUse(f"segment name {self.name!r} was taken by {winner} just now: {ANOTHER_NAME}")
            self._put(store, text, buffers)
        except BaseException:
            self._withdraw(store)
            raise

    def _check_free(self, store: MetadataStore) -> None:
        """Raise NameInUse when a living process holds our name."""
        try:
            holder = self._rpc_record(self.name)
            address = join(holder.host, holder.port)
            reply = self._probe(self.name, holder, PROBE_TIMEOUT)
        except AuthenticationError as error:
            if error.reason == Reason.ANOTHER_PROCESS:  # as below
                return
            raise NameInUse(
                f"segment name {self.name!r} belongs to a living process: {ANOTHER_NAME}: {error}"
            ) from error
        except client.Unanswered as error:
            raise NameInUse(
                f"segment name {self.name!r}: its holder is there and does not answer, stopped or busy: {ANOTHER_NAME}:"
                f" {error}"
            ) from error
        except (SegmentNotFound, PeerLost):
            return
        except MetadataUnavailable:
            raise
        except (MetadataError, ConfigError) as error:
            log.warning("replacing a malformed entry of %r in %s: %s", self.name, store.spec, error)
            return
        # any other generation is a process that was given the dead holder's port
        if reply.generation == holder.generation != self._own.generation:
            raise NameInUse(f"segment name {self.name!r} belongs to a living process at {address}: {ANOTHER_NAME}")

    def _probe(self, name: str, record: RpcRecord, timeout: float) -> client.ProbeReply:
        expected = self._authentication.expect(name, record.generation)
        return client.probe(join(record.host, record.port), timeout, self._settings, expected=expected)

    def _check_lost(self, store: MetadataStore) -> None:
        if lost := store.lost & {self._segment_key(self.name), self._rpc_key(self.name)}:
            raise NameInUse(f"another process has published {min(lost)!r} in {store.spec} after us: {ANOTHER_NAME}")

    def _check_frame(self, text: str, buffers: int) -> None:
        limit = self._settings.handshake_max_length
        if len(text) + 1 > limit:
            raise MetadataError(
                f"segment {self.name!r}: the descriptor of {buffers} buffers takes {len(text)} bytes, above "
                f"MC_HANDSHAKE_MAX_LENGTH={limit}: register fewer, larger ones, or raise it on all nodes"
            )

    def _put(self, store: MetadataStore, text: str, buffers: int) -> None:
        try:
            store.publish(self._segment_key(self.name), text)
        except (MetadataUnavailable, NameInUse):
            raise
        except MetadataError as error:
            raise MetadataError(
                f"segment {self.name!r}: cannot publish {buffers} buffers ({len(text)} bytes); if too many, "
                f"register fewer, larger ones: {error}"
            ) from error

    def _withdraw(self, store: MetadataStore) -> None:
        for key in (self._segment_key(self.name), self._rpc_key(self.name)):
            try:
                store.withdraw(key)
            except MetadataError as error:
                log.warning("key %r stays in %s until its lease ends: %s", key, store.spec, error)

    def _rpc_record(self, name: str) -> RpcRecord:
        if self._store is None:
            return RpcRecord(*split(name, self._settings.handshake_port))
        key = self._rpc_key(name)
        text = self._store.get(key)
        if text is None:
            raise SegmentNotFound(f"no segment {name!r}: key {key!r} is absent from {self._store.spec}")
        return RpcRecord.from_json(text, f"key {key!r} in {self._store.spec}")

    def _rpc_key(self, name: str) -> str:
        return f"{self._prefix}rpc_meta/{name}"

    def _segment_key(self, name: str) -> str:
        return self._prefix + (name if "/" in name else f"ram/{name}")


def _plain(name: str) -> str:
    """The name without Mooncake's slash. Raises ConfigError for what cannot be one."""
    name = name.removeprefix("/")
    check_name(name, "a segment's name")
    return name
