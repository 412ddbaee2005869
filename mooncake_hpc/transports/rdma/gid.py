"""Which GID of a port to use: read from sysfs or told by the opened device, ranked by a pure function.

A RoCE port has a GID for each address of its network interface and each RoCE version, in an order that differs
from machine to machine, so a fixed index (3, say) is right on some only.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings

INFINIBAND = Path("/sys/class/infiniband")
ROCE_V2, ROCE_V1_OR_IB = "RoCE v2", "IB/RoCE v1"  # the kernel's words in gid_attrs/types
SHARED = ipaddress.ip_network("100.64.0.0/10")  # of carriers, and of overlay networks
UNUSED = bytes(16)


@dataclass(frozen=True, slots=True)
class Gid:
    """An entry of a port's GID table: 16 bytes, and what the kernel says about it."""

    index: int
    value: bytes
    kind: str = ROCE_V2
    netdev: str = ""  # "" also where the interface is in another network namespace

    @property
    def text(self) -> str:
        """As the original writes it: 16 bytes in hexadecimal, with colons."""
        return self.value.hex(":")

    def __str__(self) -> str:
        return f"{self.index}: {self.address} ({self.kind}, {self.netdev or 'no interface'})"

    @property
    def address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The address that the GID stands for; of an IPv4 network where it maps one."""
        whole = ipaddress.IPv6Address(self.value)
        return whole.ipv4_mapped or whole


def candidates(
    device: str, port: int, settings: Settings, folder: Path = INFINIBAND, table: Sequence[Gid] | None = None
) -> list[Gid]:
    """The GIDs to try, best first, out of the port's `table`, or of sysfs's where it is not given; a single one where
    MC_GID_INDEX or NCCL_IB_GID_INDEX names it.

    Raises ConfigError where there is no such port, and with the table where none will do.
    """
    where = folder / device / "ports" / str(port)
    if not where.is_dir():
        raise ConfigError(f"RDMA device {device} has no port {port} (MC_IB_PORT): no folder {where}")
    if table is None:
        table = read_table(where)
    wanted = settings.rdma.gid_index
    if wanted is not None:
        chosen = [gid for gid in table if gid.index == wanted]
        problem = f"has no GID of index {wanted} (MC_GID_INDEX or NCCL_IB_GID_INDEX)"
    else:
        chosen = rank(table, is_infiniband(device, port, folder))
        problem = "has no GID that can be used (RoCE v2 or InfiniBand): is its network interface up, with an address?"
    if not chosen:
        known = "; ".join(map(str, table)) or "none"
        raise ConfigError(f"RDMA device {device} port {port} {problem}. Its GIDs: {known}")
    return chosen


def rank(table: Iterable[Gid], infiniband: bool) -> list[Gid]:
    """Those that can be used, best first: by how far the address reaches, then by index.

    On Ethernet only RoCE v2 counts. Routable addresses come before private ones and those before link-local ones;
    in each class an entry whose interface is seen before one whose is not.
    """
    kind = ROCE_V1_OR_IB if infiniband else ROCE_V2
    usable = [gid for gid in table if gid.kind == kind and gid.value != UNUSED]
    return sorted(usable, key=lambda gid: (_reach(gid), not gid.netdev, gid.index))


def _reach(gid: Gid) -> int:
    """0 routable, 1 private, 2 link-local, 3 this host only."""
    address = gid.address
    if address.is_loopback or address.is_multicast or address.is_unspecified:
        return 3
    if address.is_link_local:
        return 2
    private = address.is_private or (address.version == 4 and address in SHARED)
    return 1 if private else 0


def read_table(where: Path) -> list[Gid]:
    """The used entries of the GID table of the port whose folder is `where`, by index: several files for each, and one
    for each unused one, of which soft-RoCE has a thousand."""
    table = []
    for name in sorted(os.listdir(where / "gids"), key=int):
        value = bytes.fromhex(_read(f"{where}/gids/{name}").replace(":", ""))
        if value in (b"", UNUSED):
            continue
        kind = _read(f"{where}/gid_attrs/types/{name}")
        if kind:
            table.append(Gid(int(name), value, kind, _read(f"{where}/gid_attrs/ndevs/{name}")))
    return table


def is_infiniband(device: str, port: int, folder: Path = INFINIBAND) -> bool:
    """Whether the port's link is InfiniBand; else it is Ethernet."""
    return _read(f"{folder}/{device}/ports/{port}/link_layer") == "InfiniBand"


def _read(file: str) -> str:
    """Its text; "" where the kernel has none: an unused entry's attributes fail with EINVAL."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(descriptor, 4096).decode().strip()
    except OSError:
        return ""
    finally:
        os.close(descriptor)
