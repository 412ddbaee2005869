"""The original's RDMA handshake (a Connection exchange at the RPC port): its JSON, and what we add to it.

A NIC path is `<server name>@<device>`. The active side sends a request, both bring their queue pairs to RTS, and the
active side sends the request again with `ready_ack` true where the answer had that key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from mooncake_hpc.core.decode import LONGEST_SMALL_VALUE, Lid, Reader
from mooncake_hpc.wire.descriptor import GID, OURS

MAX_NUMBERS = 4096
LONGEST_PATH = 1024  # characters: two names and an @
LONGEST_ERROR = 4096


@dataclass(frozen=True, slots=True)
class Hello:
    """One side's half: who speaks to whom, and where its queue pairs are."""

    local_path: str  # of the speaker
    peer_path: str
    numbers: tuple[int, ...]  # of its queue pairs, paired with the other side's by position
    lid: int = 0
    gid: bytes = b""  # empty from originals before 0.3.11: then it is in the segment's descriptor
    ready: bool | None = None  # None: it knows nothing of the second exchange
    mtu: int = 0  # of its port, in bytes; only ours say so
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {
            "local_nic_path": self.local_path,
            "peer_nic_path": self.peer_path,
            "qp_num": list(self.numbers),
            "local_lid": self.lid,
            "local_gid": self.gid.hex(":"),
            "reply_msg": self.error,
            "payload": "",
        }
        if self.ready is not None:
            value["ready_ack"] = self.ready
        if self.mtu:
            value[OURS] = {"mtu": self.mtu}
        return value

    @classmethod
    def from_json(cls, text: str, where: str) -> Hello:
        """Parse what a peer sent. Raises MalformedRecord, which begins with `where`, for anything else."""
        value = _read(text, where)
        return cls(
            local_path=value.local_nic_path or "",
            peer_path=value.peer_nic_path or "",
            numbers=value.qp_num or (),
            lid=value.local_lid or 0,
            gid=bytes.fromhex((value.local_gid or "").replace(":", "")),
            ready=value.ready_ack,
            mtu=(value.mooncake_hpc.mtu or 0) if value.mooncake_hpc else 0,
            error=value.reply_msg or "",
        )

    def ready_ack(self) -> Hello:
        """The second exchange's request."""
        return replace(self, ready=True)


_Path = Annotated[str, Meta(max_length=LONGEST_PATH)]
_Number = Annotated[int, Meta(ge=0, lt=1 << 24)]


class _Ours(Struct):
    mtu: Literal[0, 256, 512, 1024, 2048, 4096] | None = None


class _Handshake(Struct):
    """As sent; Mooncake before 0.3.11 leaves half of the fields out."""

    local_nic_path: _Path | None = None
    peer_nic_path: _Path | None = None
    qp_num: Annotated[tuple[_Number, ...], Meta(max_length=MAX_NUMBERS)] | None = None
    local_lid: Lid | None = None
    local_gid: Annotated[str, Meta(pattern=GID)] | None = None
    ready_ack: bool | None = None
    mooncake_hpc: _Ours | None = None
    reply_msg: Annotated[str, Meta(max_length=LONGEST_ERROR)] | None = None


_read = Reader(_Handshake, "RDMA handshake", LONGEST_SMALL_VALUE)
