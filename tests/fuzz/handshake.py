"""The RDMA handshake: Connection frames to an engine over devices of software (`tests/fake_fabric.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from random import Random
from typing import Any

from fuzz import values
from fuzz.node import Commands
from fuzz.rpc_port import CONNECTION, RpcPort, frame
from fuzz.target import Case, Finding, Node

DEVICES = "a", "b"


@contextlib.contextmanager
def serve_handshake() -> Iterator[tuple[Any, Commands]]:
    """The target, and a client of the product beside it in the same process: the fabric is one process's."""
    import fake_fabric

    from mooncake_hpc import TransferEngine
    from mooncake_hpc.core.settings import RdmaSettings, Settings

    store, settings = "memory://handshake", Settings(rdma=RdmaSettings(rail_pause=0.3))
    options: dict[str, Any] = {"protocol": "rdma", "bind_address": "127.0.0.1", "settings": settings}
    with (
        fake_fabric.installed() as fabric,
        TransferEngine("target:1", store, device_name=",".join(DEVICES), **options) as target,
        TransferEngine("client:1", store, device_name="c", **options) as client,
    ):
        remote, local = target.allocate(1 << 16), client.allocate(1 << 16)

        def transfer(value: int) -> list[int]:
            """Bytes go there and back; how many queue pairs there are."""
            local[:] = value
            segment = client.open_segment("target:1")
            client.write(local, segment, int(remote.ctypes.data), timeout=10)
            local[:] = 0
            client.read(local, segment, int(remote.ctypes.data), timeout=10)
            return [int(local[0]), int(local.min()), int(local.max()), len(fabric.pairs)]

        yield {"name": target._directory.rpc_address("target:1")}, {"transfer": transfer}


class Handshake(RpcPort):
    name = "handshake"
    most = RpcPort.most | {"descriptors": 800}  # a completion queue for each path that somebody claims to be

    def launch(self) -> Node:
        node = Node("handshake")
        host, _, port = node.hello["name"].rpartition(":")
        self._address = (host, int(port))
        self._transfers = 0
        return node

    def generate(self, chance: Random) -> Case:
        case = []
        for _ in range(chance.choice((1, 2, 8))):
            value: dict[str, Any] = {
                "local_nic_path": f"peer-{chance.randrange(40)}:1@d{chance.randrange(3)}",
                "peer_nic_path": f"target:1@{chance.choice(DEVICES)}",
                "qp_num": [chance.randrange(1 << 24) for _ in range(chance.choice((1, 2, 2, 2, 3)))],
                "local_lid": chance.choice((0, 1, 0xFFFF)),
                "local_gid": chance.choice(("", ":".join(["01"] * 16), "fe:80" + ":00" * 13 + ":01")),
                "reply_msg": "",
                "payload": "",
            }
            if chance.random() < 0.7:
                value["ready_ack"] = chance.random() < 0.4
            if chance.random() < 0.5:
                value["mooncake_hpc"] = {"mtu": chance.choice((256, 1024, 4096, 0))}
            text = values.mutate_json(chance, value) if chance.random() < 0.6 else values.dump(value)
            case.append(values.cut(chance, frame(chance, CONNECTION, text)))
        self.frames += len(case)
        return case

    def serve_check(self) -> None:
        assert self.node is not None
        self._transfers = self._transfers % 250 + 1
        got = self.node.call("transfer", self._transfers)
        if got[:3] != [self._transfers] * 3:
            raise Finding(f"a client of the product read {got}, not {self._transfers}")
        if got[3] > 40 * 3 * 2 * 3 * 2:  # paths there are, times queue pairs, retired ones among them
            raise Finding(f"{got[3]} queue pairs")
        self.node.call("settle")
