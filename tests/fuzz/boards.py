"""Boards of holders, which readers read over the wire, and the memory that hostile holders offer.

A message pair is a holder's record and the bytes of its board. Beside it there is always one good holder, so that every
pull must end, soon, with the right bytes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from random import Random
from typing import Any

from fuzz import values
from fuzz.node import Commands
from fuzz.target import Case, Finding, Node, Target

SHARD = 65536
SHARDS = 9
CLAIMS = 32
BOARD_BYTES = 8 + 8 * CLAIMS + 8


@contextlib.contextmanager
def serve_boards() -> Iterator[tuple[Any, Commands]]:
    """The target: a reader, with a good holder and an evil one's engine in the same process."""
    import numpy as np

    from fuzz.records import only_ours
    from mooncake_hpc import P2PStore, TransferEngine
    from mooncake_hpc.core.errors import MooncakeError
    from mooncake_hpc.core.settings import Settings
    from mooncake_hpc.metadata.store import open_store
    from mooncake_hpc.p2p import availability as board
    from mooncake_hpc.testing.peer import pattern

    settings = Settings(lease_ttl=1, metadata_timeout=1, transfer_timeout=5)
    options: dict[str, Any] = {"protocol": "tcp", "bind_address": "127.0.0.1", "settings": settings}
    shared = open_store("memory://boards")
    data = pattern(5, SHARD * SHARDS - 1000)
    with (
        P2PStore("good:1", "memory://boards", **options) as good,
        P2PStore("reader:1", "memory://boards", **options) as reader,
        TransferEngine("evil:1", shared, **options) as evil,
    ):
        good.register("object", data, shard_size=SHARD)
        (key,) = [k for k in shared.list("mooncake_hpc/p2p/object/") if "good" in k]
        record = json.loads(shared.get(key) or "")
        boards, wrong = evil.allocate(4096), evil.allocate(data.size)
        wrong[:] = data
        wrong[SHARD : 3 * SHARD] = 7
        ports = {json.loads(text)["rpc_port"] for text in shared.list("mooncake/rpc_meta/").values()}
        ports |= {json.loads(text)["tcp_data_port"] for text in shared.list("mooncake/ram/").values()}
        only_ours(ports)
        evil_record = {**record, "segment": "evil:1", "generation": evil.generation, "bases": [int(wrong.ctypes.data)]}
        evil_record["board"] = [int(boards.ctypes.data), 1]

        def pull(text: str, digits: str) -> str:
            """Read the object beside such a holder: "" or what is wrong."""
            content = bytes.fromhex(digits)[: boards.size]
            boards[:] = 0
            boards[: len(content)] = np.frombuffer(content, np.uint8)
            with contextlib.suppress(UnicodeError):
                shared.publish(key.replace("good", "evil"), text)
            try:
                (array,) = reader.get_replica("object", timeout=20).arrays
                reader.delete_replica("object")
                return "" if np.array_equal(array, data) else "wrong bytes"
            except MooncakeError as error:
                return f"{type(error).__name__}: {error}"
            finally:
                shared.withdraw(key.replace("good", "evil"))

        def parse(digits: list[str]) -> int:
            """Read boards as such; how many."""
            for text in digits:
                memory = np.zeros(board.board_size(SHARDS), np.uint8)
                content = bytes.fromhex(text)[: memory.size]
                memory[: len(content)] = np.frombuffer(content, np.uint8)
                news = board.read_board(memory, 1, SHARDS)
                if news is not None:
                    assert len(news.have) == SHARDS and all(0 <= shard < SHARDS for _, shard in news.claims)
                    assert all(0 <= shard < SHARDS for shard in news.ending)
            return len(digits)

        yield {"record": evil_record}, {"pull": pull, "parse": parse}
    shared.close()


class Boards(Target):
    name = "boards"
    unit = "boards"

    def launch(self) -> Node:
        node = Node("boards")
        self._record = node.hello["record"]
        return node

    def generate(self, chance: Random) -> Case:
        """Boards that are parsed, and one that a holder has."""
        parsed = [self._board(chance) for _ in range(100)]
        record = values.mutate_json(chance, self._record) if chance.random() < 0.4 else values.dump(self._record)
        self.frames += len(parsed) + 1
        return [parsed, [record.encode("utf-8", "surrogatepass"), self._board(chance)]]

    def _board(self, chance: Random) -> bytes:
        token = 1 if chance.random() < 0.95 else values.border(chance)
        claims = b""
        for _ in range(CLAIMS):
            place = chance.choice((0, 0, 0, 1, SHARDS, SHARDS + 1, values.border(chance) & 0xFFFFFFFF))
            ending = chance.choice((0, 1 << 31))
            source = chance.choice((0, chance.getrandbits(32)))
            claims += source.to_bytes(4, "little") + ((place | ending) & 0xFFFFFFFF).to_bytes(4, "little")
        bits = chance.choice((b"\0" * 8, b"\xff" * 8, chance.randbytes(8)))
        data = token.to_bytes(8, "little") + claims + bits
        return values.mutate_bytes(chance, data) if chance.random() < 0.3 else data

    def run(self, case: Case) -> None:
        assert self.node is not None
        for messages in case:
            if len(messages) != 2:
                self.node.call("parse", [message.hex() for message in messages])
                continue
            text, board = messages
            if problem := self.node.call("pull", text.decode("utf-8", "replace"), board.hex(), timeout=60):
                raise Finding(f"beside a hostile holder: {problem}")

    def serve_check(self) -> None:
        assert self.node is not None
        if problem := self.node.call("pull", "{}", ""):
            raise Finding(problem)
        self.node.call("settle")
