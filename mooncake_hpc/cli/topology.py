"""`mooncake-hpc topology`: this machine's RDMA devices, and the NIC priority matrix that an engine would use."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence

from mooncake_hpc.cli import glog
from mooncake_hpc.cli.gflags import Flag, FlagSet
from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.transports.rdma import gid, topology

FLAGS = FlagSet(
    "mooncake-hpc topology",
    "Prints the NIC priority matrix, which is also what --nic_priority_matrix=FILE takes, as JSON on standard output; "
    "and on standard error the devices: NUMA node, active ports, the GIDs that would be tried, best first, and what "
    "keeps one from being used. Exit code 1 where none can be used.",
    {
        "Which": (
            Flag("device_name", "", "Only these devices, separated by commas."),
            Flag("nic_priority_matrix", "", "A matrix to check and complete instead of discovery."),
        ),
        "Logging (glog's)": (*glog.FLAGS, *glog.IGNORED),
    },
    epilog="Environment: MC_TE_FILTERS (the only devices to find), MC_CUSTOM_TOPO_JSON (a matrix instead of "
    "discovery), MC_GID_INDEX, MC_IB_PORT.",
)  # fmt: skip


def main(arguments: Sequence[str], command: Sequence[str] = ()) -> int:
    """Print both; the exit code. Raises ConfigError."""
    flags = FLAGS.parse(arguments, os.environ)
    if FLAGS.answer(flags):
        return 0
    glog.set_up(flags)
    settings = Settings.from_env()
    for device in topology.devices():
        print(describe(device, settings), file=sys.stderr)
    found = topology.load(flags.text("device_name"), flags.text("nic_priority_matrix"), settings)
    print(json.dumps(found.as_json(), indent=1))
    if not found.devices:
        folder = topology.SYSFS / "class/infiniband"
        print(f"no usable RDMA device on {socket.gethostname()} in {folder}", file=sys.stderr)
    return 0 if found.devices else 1


def describe(device: topology.Device, settings: Settings) -> str:
    """A line on the device, with its problem where it has one."""
    node = "any" if device.numa_node == topology.NOWHERE else device.numa_node
    ports = ", ".join(map(str, device.active_ports)) or "none"
    return f"{device.name}: NUMA node {node}, active ports {ports}, {device.problem or _gids(device, settings)}"


def _gids(device: topology.Device, settings: Settings) -> str:
    try:
        return f"GID {'; '.join(map(str, gid.candidates(device.name, settings.rdma.port, settings)))}"
    except ConfigError as error:
        return str(error)
