"""What a node publishes about itself: segment and buffer descriptors, and their JSON in the original's schema.

Fields of ours live under the one extra key `mooncake_hpc`; the original ignores keys that it does not know.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

from mooncake_hpc.errors import MetadataError

OURS = "mooncake_hpc"


@dataclass(frozen=True, slots=True)
class BufferDescriptor:
    """A registered buffer: absolute address in its process, length in bytes, location name (`cpu:0`)."""

    address: int
    length: int
    name: str
    readonly: bool = False
    lkeys: tuple[int, ...] = ()  # of RDMA, one a device of the segment
    rkeys: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceDescriptor:
    """An RDMA device of a node: its GID as the original writes it, its LID (0 on Ethernet)."""

    name: str
    gid: str
    lid: int


@dataclass(frozen=True, slots=True)
class SegmentDescriptor:
    """All that a peer needs to move bytes to and from a segment."""

    name: str
    buffers: tuple[BufferDescriptor, ...] = ()
    tcp_data_host: str = ""
    tcp_data_port: int = 0
    tcp_proto_version: int = 1
    generation: str = ""  # random a process; empty when the original published it
    shm_socket: str = ""  # abstract Unix socket that hands out the memory files
    devices: tuple[DeviceDescriptor, ...] = ()  # of RDMA
    priority_matrix: dict[str, list[list[str]]] = field(default_factory=dict)
    rdma_server_name: str = ""  # stands for `name` in NIC paths

    @property
    def nic_server(self) -> str:
        """The part of its NIC paths before the @."""
        return self.rdma_server_name or self.name

    @property
    def spoken(self) -> str:
        """What it offers, for messages."""
        kinds = {"rdma": self.devices, "shm (on its own host, to its user)": self.shm_socket, "tcp": self.tcp_data_port}
        return ", ".join(kind for kind, offered in kinds.items() if offered) or "nothing that it publishes"

    def with_buffers(self, buffers: tuple[BufferDescriptor, ...]) -> SegmentDescriptor:
        """The same node with other buffers."""
        return replace(self, buffers=buffers)

    def to_json(self) -> str:
        """One line, sorted keys, newline at the end, as the original writes it."""
        ours = {
            "generation": self.generation,
            "shm_socket": self.shm_socket,
            "readonly": [i for i, b in enumerate(self.buffers) if b.readonly],
        }
        value: dict[str, Any] = {
            "buffers": [_buffer(b) for b in self.buffers],
            "name": self.name,
            "protocol": "rdma" if self.devices else "tcp",
            "rdma_server_name": self.rdma_server_name,
            "tcp_data_host": self.tcp_data_host,
            "tcp_data_port": self.tcp_data_port,
            "tcp_proto_version": self.tcp_proto_version,
            "timestamp": time.strftime("%Y-%m-%d %H:%M:%S"),
            OURS: ours,
        }
        if self.devices:
            value["devices"] = [{"gid": d.gid, "lid": d.lid, "name": d.name} for d in self.devices]
            value["priority_matrix"] = self.priority_matrix
        return json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> SegmentDescriptor:
        """Parse what anybody published. `where` names the source in the MetadataError of a malformed value."""
        try:
            value = json.loads(text)
            ours = value.get(OURS) or {}
            readonly = set(ours.get("readonly", ()))
            buffers = tuple(_parse_buffer(b, i in readonly) for i, b in enumerate(value.get("buffers") or ()))
            return cls(
                name=str(value["name"]),
                buffers=buffers,
                tcp_data_host=str(value.get("tcp_data_host") or ""),
                tcp_data_port=int(value.get("tcp_data_port") or 0),
                tcp_proto_version=int(value.get("tcp_proto_version") or 1),
                generation=str(ours.get("generation", "")),
                shm_socket=str(ours.get("shm_socket", "")),
                devices=tuple(
                    DeviceDescriptor(str(d["name"]), str(d["gid"]), int(d.get("lid") or 0))
                    for d in value.get("devices") or ()
                ),
                priority_matrix={
                    str(location): [[str(name) for name in names] for names in lists]
                    for location, lists in (value.get("priority_matrix") or {}).items()
                    if lists
                },
                rdma_server_name=str(value.get("rdma_server_name") or ""),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MetadataError(f"{where} holds no segment descriptor: {error!r}") from error


def _buffer(buffer: BufferDescriptor) -> dict[str, Any]:
    value: dict[str, Any] = {"addr": buffer.address, "length": buffer.length, "name": buffer.name}
    if buffer.rkeys:
        value |= {"lkey": list(buffer.lkeys), "rkey": list(buffer.rkeys)}
    return value


def _parse_buffer(value: dict[str, Any], readonly: bool) -> BufferDescriptor:
    lkeys, rkeys = (tuple(map(int, value.get(kind) or ())) for kind in ("lkey", "rkey"))
    return BufferDescriptor(
        int(value["addr"]), int(value["length"]), str(value.get("name", "")), readonly, lkeys, rkeys
    )
