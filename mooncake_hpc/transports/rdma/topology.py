"""Which RDMA devices serve memory at which location: the NIC priority matrix, given or discovered from sysfs.

The matrix has for each memory location (`cpu:0`: NUMA node 0) the devices that are near to it and the others,
which serve it where the near ones fail. Its JSON is the original's: {"cpu:0": [["mlx5_0"], ["mlx5_1"]], …}.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.wire.libstdcxx_order import iteration_order

SYSFS = Path("/sys")
DEVFS = Path("/dev")
MIN_LOCATIONS = 2  # peers of two sockets look for cpu:1 even where we have but one
NOWHERE = -1  # the kernel's word for a device that is near no NUMA node, or none in particular
SYS_MOVE_PAGES = {"x86_64": 279, "aarch64": 239}.get(platform.machine())

Choices = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Topology:
    """The matrix: location → (near devices, others)."""

    matrix: Mapping[str, Choices]

    @property
    def devices(self) -> tuple[str, ...]:
        """Every device once, in the order in which a segment must list them.

        The original's readers do not look devices up by name: they number them by first appearance while they
        iterate the matrix, as parsed, in a hash map, and take the number as the index.
        """
        found: dict[str, None] = {}
        for location in iteration_order(sorted(self.matrix)):
            for names in self.matrix[location]:
                found.update(dict.fromkeys(names))
        return tuple(found)

    def choices(self, location: str) -> Choices:
        """(near devices, others) for memory at `location`; at an unknown one all are near."""
        return self.matrix.get(location) or (self.devices, ())

    def as_json(self) -> dict[str, list[list[str]]]:
        """The value of a segment's `priority_matrix`."""
        return {location: [list(near), list(others)] for location, (near, others) in self.matrix.items()}


@dataclass(frozen=True, slots=True)
class Device:
    """An RDMA device as sysfs has it."""

    name: str
    numa_node: int
    active_ports: tuple[int, ...]
    node: Path | None  # /dev/infiniband/uverbs<N>

    @property
    def problem(self) -> str:
        """Why it cannot be used; "" where it can."""
        if not self.active_ports:
            return "no active port"
        if self.node is None or not self.node.exists():
            return "no device file: is the module ib_uverbs loaded?"
        if not os.access(self.node, os.R_OK | os.W_OK):
            return f"no right to read and write {self.node}"
        return ""


def load(device_name: str, matrix_file: str, settings: Settings, sysfs: Path = SYSFS, devfs: Path = DEVFS) -> Topology:
    """The first of: the matrix in `matrix_file`, the devices named in `device_name` (commas between), the matrix in
    the file MC_CUSTOM_TOPO_JSON, discovery among MC_TE_FILTERS. Discovery may find none.

    Raises ConfigError for a file that holds no matrix and for a device that is not there.
    """
    names = _split(device_name)
    if matrix_file:
        topology = parse(_text(matrix_file, "--nic_priority_matrix"), f"--nic_priority_matrix={matrix_file}")
    elif names:
        topology = everywhere(names, sysfs)
    elif settings.rdma.topology_file:
        file = settings.rdma.topology_file
        topology = parse(_text(file, "MC_CUSTOM_TOPO_JSON"), f"MC_CUSTOM_TOPO_JSON={file}")
    else:
        return discover(settings.rdma.filters, sysfs, devfs)
    present = [device.name for device in devices(sysfs, devfs)]
    missing = [name for name in topology.devices if name not in present]
    if missing:
        raise ConfigError(
            f"no RDMA device {', '.join(missing)}; {sysfs / 'class/infiniband'} has {', '.join(present) or 'none'}"
        )
    return topology


def everywhere(names: Sequence[str], sysfs: Path = SYSFS) -> Topology:
    """The named devices as near ones of all locations, as `--device_name=a,b` means."""
    return Topology({location: (tuple(names), ()) for location in locations(sysfs)})


def discover(only: Iterable[str] = (), sysfs: Path = SYSFS, devfs: Path = DEVFS) -> Topology:
    """Usable devices by distance: near to a NUMA node are those of it, and those of none in particular."""
    allowed = set(only)
    usable = [device for device in devices(sysfs, devfs) if not device.problem]
    chosen = [device for device in usable if device.name in allowed or not allowed]
    matrix = {}
    for location in locations(sysfs):
        node = int(location.partition(":")[2])
        near = [device.name for device in chosen if device.numa_node in (node, NOWHERE)]
        matrix[location] = (tuple(near), tuple(d.name for d in chosen if d.name not in near))
    return Topology(matrix)


def devices(sysfs: Path = SYSFS, devfs: Path = DEVFS) -> list[Device]:
    """All RDMA devices of this machine, usable or not, by name."""
    folder = sysfs / "class/infiniband"
    return [_device(entry, devfs) for entry in sorted(folder.iterdir())] if folder.is_dir() else []


def device(name: str, sysfs: Path = SYSFS, devfs: Path = DEVFS) -> Device:
    """The RDMA device of that name; without ports where there is none."""
    return _device(sysfs / "class/infiniband" / name, devfs)


def _device(folder: Path, devfs: Path) -> Device:
    ports = sorted(int(port.name) for port in folder.glob("ports/*"))
    active = [port for port in ports if _line(folder / f"ports/{port}/state").startswith("4:")]  # "4: ACTIVE"
    verbs = next((other for other in folder.parent.parent.glob("infiniband_verbs/uverbs*")
                  if _line(other / "ibdev") == folder.name), None)  # fmt: skip
    numa = _line(folder / "device/numa_node")  # no such file: a device of software
    return Device(
        name=folder.name,
        numa_node=int(numa or NOWHERE),
        active_ports=tuple(active),
        node=devfs / "infiniband" / verbs.name if verbs else None,
    )


def locations(sysfs: Path = SYSFS) -> list[str]:
    """`cpu:<n>` for each NUMA node; at least two."""
    nodes = {int(path.name[4:]) for path in (sysfs / "devices/system/node").glob("node[0-9]*")}
    return [f"cpu:{node}" for node in sorted(nodes | set(range(MIN_LOCATIONS)))]


def location_of(address: int) -> str:
    """`cpu:<n>` of the NUMA node where the page at `address` lies; "" while it is untouched, or on failure."""
    if SYS_MOVE_PAGES is None:
        return ""
    page = ctypes.c_void_p(address & -os.sysconf("SC_PAGESIZE"))
    node = ctypes.c_int(-errno.ENOENT)
    libc = ctypes.CDLL(None, use_errno=True)
    # without target nodes move_pages(2) moves nothing and only tells
    libc.syscall(SYS_MOVE_PAGES, 0, ctypes.c_ulong(1), ctypes.byref(page), None, ctypes.byref(node), 0)
    return f"cpu:{node.value}" if node.value >= 0 else ""


def parse(text: str, where: str) -> Topology:
    """A matrix out of its JSON. `where` names the source in the ConfigError of what is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
    if not isinstance(value, dict) or not value:
        raise ConfigError(f'{where} is no object like {{"cpu:0": [["mlx5_0"], ["mlx5_1"]]}}')
    topology = Topology({location: _choices(entry, f"{where}, {location}") for location, entry in value.items()})
    if not topology.devices:
        raise ConfigError(f"{where} names no device")
    return topology


def _choices(entry: object, where: str) -> Choices:
    """Both lists of a location. A name in both, or twice, counts where it comes first."""
    lists = entry if isinstance(entry, list) else []
    right = 1 <= len(lists) <= 2 and all(isinstance(names, list) for names in lists)
    if not right or not all(isinstance(name, str) and name for names in lists for name in names):
        raise ConfigError(f"{where}: expected [[near devices], [other devices]], not {reprlib.repr(entry)}")
    near = tuple(dict.fromkeys(lists[0]))
    return near, tuple(name for name in dict.fromkeys(lists[-1]) if name not in near)


def _split(names: str) -> list[str]:
    return list(dict.fromkeys(name for word in names.split(",") if (name := word.strip())))


def _text(file: str, flag: str) -> str:
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag}={file} cannot be read: {error}") from error


def _line(file: Path) -> str:
    """The file's text; "" where there is none."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
