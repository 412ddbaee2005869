"""The flags that name a transport: the same in every command that moves bytes."""

from __future__ import annotations

from mooncake_hpc.cli.gflags import Flag, Parsed
from mooncake_hpc.transports.choice import Asked

RDMA_FLAGS = (
    Flag("device_name", "", "RDMA devices, separated by commas; default: all that can be used."),
    Flag("nic_priority_matrix", "", "JSON file of RDMA devices by memory location, as `mooncake-hpc topology` prints."),
    Flag("auto_discovery", False, "The same as --protocol=auto, unless a protocol is named."),
)


def asked(flags: Parsed) -> Asked:
    """What the flags say of the transport."""
    return Asked(
        flags.text("protocol"),
        flags.text("device_name"),
        flags.text("nic_priority_matrix"),
        flags.boolean("auto_discovery"),
        flags.named,
    )
