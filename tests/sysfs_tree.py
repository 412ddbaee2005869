"""A made-up /sys and /dev with RDMA devices, for tests without any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

GidRow = tuple[str, str, str]  # address, type, interface


def add_device(
    root: Path, name: str, *, numa: int | None = None, state: str = "4: ACTIVE", link: str = "Ethernet",
    gids: Sequence[GidRow | None] = (), accessible: bool = True,
) -> None:  # fmt: skip
    """One device with a port; `gids` fill its table in order, None leaves a hole."""
    sysfs = root / "sys/class"
    device = sysfs / "infiniband" / name
    number = len(list(sysfs.glob("infiniband_verbs/*")))
    write(device / "ports/1/state", state)
    write(device / "ports/1/link_layer", link)
    if numa is not None:
        write(device / "device/numa_node", str(numa))
    write(sysfs / f"infiniband_verbs/uverbs{number}/ibdev", name)
    if accessible:
        write(root / f"dev/infiniband/uverbs{number}", "")
    (device / "ports/1/gids").mkdir()
    for index, row in enumerate(gids):
        address, kind, netdev = row or ("0000:0000:0000:0000:0000:0000:0000:0000", "", "")
        write(device / f"ports/1/gids/{index}", address)
        if row:  # reading a hole's attributes fails, as a file that is not there does
            write(device / f"ports/1/gid_attrs/types/{index}", kind)
            write(device / f"ports/1/gid_attrs/ndevs/{index}", netdev)


def add_nodes(root: Path, count: int) -> None:
    """NUMA nodes 0 to count - 1."""
    for node in range(count):
        (root / f"sys/devices/system/node/node{node}").mkdir(parents=True)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")
