"""What a node publishes about itself: segment and buffer descriptors, and their JSON in the original's schema.

Fields of ours live under the one extra key `mooncake_hpc`; the original ignores keys that it does not know.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from msgspec import Meta, Struct

from mooncake_hpc.core.decode import Address, Count, Key, Length, Lid, Name, OptionalPort, Reader, Text, check_range

OURS = "mooncake_hpc"
MAX_BUFFERS = 1 << 20
MAX_DEVICES = 62  # each has a bit in a word of the rails' kernels
MAX_NAMES = 1024  # in one list of a priority matrix
GID = r"^([0-9a-fA-F]{2}(:?[0-9a-fA-F]{2}){15})?$"


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
        """Parse what anybody published. `where` names the source in the MalformedRecord of a malformed value."""
        value = _read(text, where)
        ours = value.mooncake_hpc or Ours()
        readonly = set(ours.readonly or ())
        buffers = tuple(
            BufferDescriptor(b.addr, b.length, b.name or "", i in readonly, b.lkey or (), b.rkey or ())
            for i, b in enumerate(value.buffers or ())
        )
        return cls(
            name=value.name,
            buffers=buffers,
            tcp_data_host=value.tcp_data_host or "",
            tcp_data_port=value.tcp_data_port or 0,
            tcp_proto_version=value.tcp_proto_version or 1,
            generation=ours.generation or "",
            shm_socket=ours.shm_socket or "",
            devices=tuple(DeviceDescriptor(d.name, d.gid, d.lid or 0) for d in value.devices or ()),
            priority_matrix={
                location: [names or [] for names in lists]
                for location, lists in (value.priority_matrix or {}).items()
                if lists
            },
            rdma_server_name=value.rdma_server_name or "",
        )


_Keys = Annotated[tuple[Key, ...], Meta(max_length=MAX_DEVICES)]
_Devices = Annotated[list[Text], Meta(max_length=MAX_NAMES)]


class _Buffer(Struct):
    """As published. Any field that some version of Mooncake leaves out, or fills with null, may be so here."""

    addr: Address
    length: Length
    name: Text | None = None
    lkey: _Keys | None = None
    rkey: _Keys | None = None

    def __post_init__(self) -> None:
        check_range(self.addr, self.length)


class _Device(Struct):
    name: Name
    gid: Annotated[str, Meta(pattern=GID)]
    lid: Lid | None = None


class Ours(Struct):
    """What our programs add to a value, under the key OURS."""

    generation: Text | None = None
    shm_socket: Text | None = None
    readonly: Annotated[list[Count], Meta(max_length=MAX_BUFFERS)] | None = None


class _Segment(Struct):
    name: Name
    buffers: Annotated[list[_Buffer], Meta(max_length=MAX_BUFFERS)] | None = None
    tcp_data_host: Text | None = None
    tcp_data_port: OptionalPort | None = None
    tcp_proto_version: Count | None = None
    mooncake_hpc: Ours | None = None
    devices: Annotated[list[_Device], Meta(max_length=MAX_DEVICES)] | None = None
    priority_matrix: dict[Text, Annotated[list[_Devices | None], Meta(max_length=16)] | None] | None = None
    rdma_server_name: Text | None = None


_read = Reader(_Segment, "segment descriptor")


def _buffer(buffer: BufferDescriptor) -> dict[str, Any]:
    value: dict[str, Any] = {"addr": buffer.address, "length": buffer.length, "name": buffer.name}
    if buffer.rkeys:
        value |= {"lkey": list(buffer.lkeys), "rkey": list(buffer.rkeys)}
    return value
