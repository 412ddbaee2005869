"""The flags that name a transport, and who may use it: the same in every command that moves bytes."""

from __future__ import annotations

from dataclasses import replace

from mooncake_hpc.cli.gflags import Flag, Parsed
from mooncake_hpc.core.authentication import Authentication
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.transports.choice import Asked

RDMA_FLAGS = (
    Flag("device_name", "", "RDMA devices, separated by commas; default: all that can be used."),
    Flag("nic_priority_matrix", "", "JSON file of RDMA devices by memory location, as `mooncake-hpc topology` prints."),
    Flag("auto_discovery", False, "The same as --protocol=auto, unless a protocol is named."),
)

AUTHENTICATION_FLAGS = (
    Flag("secret_file", "", "File with a secret of 16 bytes or more, which nobody else may read: peers prove that they "
         "know it before they move a byte. Default: MOONCAKE_HPC_SECRET_FILE."),
    Flag("allow_unauthenticated", "", "IP addresses and networks, separated by commas, of peers that need no proof: "
         "Mooncake's programs, for one. Default: MOONCAKE_HPC_ALLOW_UNAUTHENTICATED."),
)  # fmt: skip


def read_settings(flags: Parsed) -> Settings:
    """What the environment says, and the flags in its place. Raises ConfigError."""
    named = {flag.name: flags.text(flag.name) for flag in AUTHENTICATION_FLAGS if flag.name in flags.named}
    return replace(Settings.from_env(), **named)  # type: ignore[arg-type]


def check_secret(settings: Settings) -> None:
    """Raise ConfigError where this machine does not have the secret that the settings name."""
    Authentication.load(settings)


def asked(flags: Parsed) -> Asked:
    """What the flags say of the transport."""
    return Asked(
        flags.text("protocol"),
        flags.text("device_name"),
        flags.text("nic_priority_matrix"),
        flags.boolean("auto_discovery"),
        flags.named,
    )
