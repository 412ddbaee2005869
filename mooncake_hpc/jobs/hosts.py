"""Machines of a job: which ranks share one, and where one listens so that all others reach it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mooncake_hpc.core.address import source_address
from mooncake_hpc.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Host:
    """Identity of a machine as far as addresses go: containers of one machine differ in the network namespace."""

    name: str
    boot_id: str
    network: str
    addresses: tuple[str, ...]  # other than loopback

    @classmethod
    def here(cls) -> Host:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
        return cls(socket.gethostname(), boot_id, os.readlink("/proc/self/ns/net"), tuple(_own_addresses()))

    def same(self, other: Host) -> bool:
        return (self.name, self.boot_id, self.network) == (other.name, other.boot_id, other.network)


def _own_addresses() -> Iterator[str]:
    """IPv4 addresses of our interfaces, and the source address of the IPv6 default route."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", os.fsencode(name)[:15])
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(query, 0x8915, request)  # SIOCGIFADDR, netdevice(7)
                address = socket.inet_ntoa(answer[20:24])
                if not address.startswith("127."):
                    yield address
    if routed := source_address("2001:db8::1"):  # a documentation prefix: reached by the default route
        yield routed


def shared_address(hosts: list[Host], bind_address: str = "") -> str:
    """Where rank 0 (this process, `hosts[0]`) listens for all ranks.

    127.0.0.1 when every rank is on this host; else `bind_address` if given, else the source address of our
    routes to the other hosts: the one that serves most of them.
    """
    others = [host for host in hosts[1:] if not host.same(hosts[0])]
    if not others:
        return "127.0.0.1"
    if bind_address:
        return bind_address
    votes: Counter[str] = Counter()
    for host in others:
        sources = {source_address(address) for address in host.addresses}
        votes.update(source for source in sources if source in hosts[0].addresses)
    if not votes:
        names = ", ".join(sorted({host.name for host in others}))
        raise ConfigError(f"no address of {hosts[0].name} routes to {names}: set MC_TCP_BIND_ADDRESS to one")
    return votes.most_common(1)[0][0]
