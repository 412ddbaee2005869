"""The original's RDMA handshake (a Connection exchange at the RPC port): its JSON, and what we add to it.

A NIC path is `<server name>@<device>`. The active side sends a request, both bring their queue pairs to RTS, and the
active side sends the request again with `ready_ack` true where the answer had that key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mooncake_hpc.errors import PeerLost
from mooncake_hpc.segment import OURS

MAX_NUMBERS = 4096
GID_BYTES = 16


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
    def from_json(cls, value: Any, where: str) -> Hello:
        """Parse what a peer sent. Raises PeerLost that begins with `where` for anything else than a handshake."""
        try:
            gid = bytes.fromhex(str(value.get("local_gid") or "").replace(":", ""))
            numbers = tuple(int(number) for number in value.get("qp_num") or ())
            ours = value.get(OURS) or {}
            if (
                len(numbers) > MAX_NUMBERS
                or any(not 0 <= n < 1 << 24 for n in numbers)
                or len(gid) not in (0, GID_BYTES)
            ):
                raise ValueError(f"{len(numbers)} queue pairs, a GID of {len(gid)} bytes")
            return cls(
                local_path=str(value.get("local_nic_path") or ""),
                peer_path=str(value.get("peer_nic_path") or ""),
                numbers=numbers,
                lid=int(value.get("local_lid") or 0) & 0xFFFF,
                gid=gid,
                ready=bool(value["ready_ack"]) if "ready_ack" in value else None,
                mtu=int(ours.get("mtu") or 0),
                error=str(value.get("reply_msg") or ""),
            )
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise PeerLost(f"{where} is no RDMA handshake: {error}") from error

    def ready_ack(self) -> Hello:
        """The second exchange's request."""
        return replace(self, ready=True)
