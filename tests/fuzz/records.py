"""Values in the metadata store: segments, RPC addresses, and all that the P2P Store keeps there.

A message is a line: how it is used, the key it goes to, and the text. Most texts are only decoded, which is quick; the
others are published, and everything that reads such keys is called.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from fuzz import values
from fuzz.node import Commands
from fuzz.target import Case, Finding, Node, Target

OBJECT_BYTES = 300_000
CLOSED_PORT = 1
SLOWEST_S = 5.0  # a call, of something that is not there


def only_ours(ports: set[int]) -> None:
    """Names and ports in hostile records lead nowhere but to this process."""
    resolve = socket.getaddrinfo

    def literal(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host not in ("127.0.0.1", "::1", "0.0.0.0") or (port and int(port) not in {*ports, CLOSED_PORT}):
            raise socket.gaierror(socket.EAI_NONAME, "not for a fuzzer")
        return resolve(host, port, *arguments, **options)

    socket.getaddrinfo = literal  # type: ignore[assignment]


@contextlib.contextmanager
def serve_records() -> Iterator[tuple[Any, Commands]]:
    """The target: a store that holds an object, and one that reads it, beside whatever is published."""
    import numpy as np

    from mooncake_hpc import P2PStore
    from mooncake_hpc.core.errors import MooncakeError, ObjectNotFound, SegmentNotFound
    from mooncake_hpc.core.settings import Settings
    from mooncake_hpc.metadata.store import open_store
    from mooncake_hpc.testing.peer import pattern

    settings = Settings(lease_ttl=1, metadata_timeout=1, transfer_timeout=5)
    evil = open_store("memory://records")
    options: dict[str, Any] = {"protocol": "tcp", "bind_address": "127.0.0.1", "settings": settings}
    data = pattern(5, OBJECT_BYTES)
    with P2PStore("good:1", "memory://records", **options) as good, P2PStore("reader:1", evil, **options) as reader:
        good.register("object/of ours", data, shard_size=65536)
        good.register("state", {"a": np.ones((3, 4), np.float32), "b": np.arange(7)})
        samples = {**evil.list("mooncake_hpc/p2p/"), **evil.list("mooncake/")}
        ports = {json.loads(text)["rpc_port"] for key, text in samples.items() if "rpc_meta" in key}
        ports |= {json.loads(text)["tcp_data_port"] for key, text in samples.items() if "/ram/" in key}
        only_ours(ports)
        decoders = _decoders(good)
        local = reader.allocate(4096)
        counts = {"decoded": 0, "published": 0, "refused": 0}

        def timed(call: Callable[[], object], *missing: type[Exception]) -> None:
            """Errors of ours only, and soon; those in `missing` are no wonder."""
            began = time.monotonic()
            try:
                call()
            except MooncakeError:
                counts["refused"] += 1
            took = time.monotonic() - began
            if took > SLOWEST_S:
                raise TimeoutError(f"{call} took {took:.1f} s")

        def read_segment(name: str) -> None:
            segment = reader.engine.open_segment(name)
            for buffer in segment.buffers[:4]:
                with contextlib.suppress(MooncakeError):
                    size = min(4096, max(1, buffer.length))
                    reader.engine.read(local[:size], segment, buffer.address, timeout=0.3)

        def attempt(lines: list[str]) -> dict[str, int]:
            for line in lines:
                how, key, text = json.loads(line)
                if how == "decode":
                    counts["decoded"] += 1
                    with contextlib.suppress(MooncakeError):
                        decoders[_kind(key)](text)
                    continue
                counts["published"] += 1
                with contextlib.suppress(UnicodeError):
                    evil.publish(key, text)
                for name in ("evil:1", "good:1"):
                    timed(lambda name=name: reader.engine.probe(name))  # type: ignore[misc]
                    timed(lambda name=name: read_segment(name), SegmentNotFound)  # type: ignore[misc]
                timed(lambda: good.list())
                timed(lambda: good.list("evil"))
                timed(lambda: reader.get_replica("evil", timeout=0.3), ObjectNotFound)
                with contextlib.suppress(MooncakeError):
                    reader.delete_replica("evil")
                evil.withdraw(key)
            return counts

        def good_is_read(lines: list[str]) -> str:
            """With these values beside it: "" or what is wrong."""
            keys = []
            for line in lines:
                _, key, text = json.loads(line)
                with contextlib.suppress(UnicodeError):
                    evil.publish(key, text)
                    keys.append(key)
            try:
                names = [info.name for info in reader.list()]
                if not {"object/of ours", "state"} <= set(names):
                    return f"list() gives {names}"
                (array,) = reader.get_replica("object/of ours", timeout=20).arrays
                reader.delete_replica("object/of ours")
                return "" if np.array_equal(array, data) else "wrong bytes"
            except MooncakeError as error:
                return f"{type(error).__name__}: {error}"
            finally:
                for key in keys:
                    evil.withdraw(key)

        yield {"samples": samples}, {"attempt": attempt, "good_is_read": good_is_read}
    evil.close()


def _kind(key: str) -> str:
    if key.startswith("mooncake/"):
        return "rpc_meta" if "/rpc_meta/" in key else "ram"
    return "manifest" if "/manifest/" in key else "current" if key.endswith("/current") else "holder"


def _decoders(store: Any) -> dict[str, Callable[[str], object]]:
    """What reads each kind of value, and uses what it has read."""
    import numpy as np

    from mooncake_hpc.control.directory import RpcRecord
    from mooncake_hpc.p2p.catalog import Holder, version_of
    from mooncake_hpc.p2p.manifest import Manifest
    from mooncake_hpc.transports.base import Tables
    from mooncake_hpc.wire.descriptor import SegmentDescriptor

    ours = store._catalogue.current("object/of ours")

    def manifest(text: str) -> None:
        found = Manifest.from_json(text, "a key")
        if found.shards:
            found.digest(0), found.digest(found.shards - 1), found.span(found.shards - 1)
        found.same_content(ours)
        if found.shards < 1 << 20:
            Manifest.from_json(found.to_json(), "itself")

    def segment(text: str) -> None:
        found = SegmentDescriptor.from_json(text, "a key")
        Tables.of((b.address, b.address + b.length, b.readonly) for b in found.buffers)
        np.array([key for b in found.buffers for key in b.rkeys], np.uint32)
        SegmentDescriptor.from_json(found.to_json(), "itself")

    def holder(text: str) -> None:
        found = Holder.from_json(text, "a key", "good:1", ours)
        assert len(found.have) == ours.shards
        found.to_json()

    return {
        "rpc_meta": lambda text: RpcRecord.from_json(text, "a key").to_json(),
        "ram": segment,
        "manifest": manifest,
        "current": lambda text: version_of(text, "a key"),
        "holder": holder,
    }


class Records(Target):
    name = "records"
    unit = "values"

    def launch(self) -> Node:
        node = Node("records")
        self._samples = {key: json.loads(text) for key, text in node.hello["samples"].items() if text[0] in "{["}
        return node

    def generate(self, chance: Random) -> Case:
        messages = []
        used = chance.random() < 0.3
        for _ in range(4 if used else 200):
            key, value = chance.choice(list(self._samples.items()))
            if used:
                key = self._elsewhere(chance, key)
            text = values.mutate_json(chance, value) if chance.random() < 0.95 else values.dump(value)
            messages.append(json.dumps(["use" if used else "decode", key, text]).encode())
        self.frames += len(messages)
        return [messages]

    def _elsewhere(self, chance: Random, key: str) -> str:
        """A key of the same kind that is nobody's: another name's, or another holder's."""
        if key.startswith("mooncake/"):
            return key.replace("good:1", "evil:1").replace("reader:1", "evil:1")
        parts = key.split("/")
        if _kind(key) == "holder" and chance.random() < 0.5:
            return "/".join([*parts[:-1], chance.choice(("evil%3A1", "!", "", "%ff", "a%2Fb%3A1"))])
        parts[3] = "evil" if chance.random() < 0.9 else chance.choice(values.TEXTS)
        return "/".join(parts) if chance.random() < 0.95 else "/".join(parts[: chance.randrange(2, len(parts) + 1)])

    def run(self, case: Case) -> None:
        assert self.node is not None
        for messages in case:
            lines = [message.decode("utf-8", "replace") for message in messages]
            lines = [line for line in lines if self._is_line(line)]
            self.node.call("attempt", lines, timeout=120)
            used = [line for line in lines if line.startswith('["use"')]
            if used and (problem := self.node.call("good_is_read", used, timeout=60)):
                raise Finding(f"beside the values of others: {problem}")

    @staticmethod
    def _is_line(line: str) -> bool:
        """Whether the shrinker has left it one."""
        try:
            return len([str(word) for word in json.loads(line)]) == 3
        except (ValueError, TypeError):
            return False

    def serve_check(self) -> None:
        assert self.node is not None
        if problem := self.node.call("good_is_read", []):
            raise Finding(problem)
        self.node.call("settle")
