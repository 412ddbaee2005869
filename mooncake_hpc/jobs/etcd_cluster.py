"""A real etcd of several members for one job, one on each of its first hosts, that survives the loss of a minority."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata.embedded import EmbeddedEtcd, _join, _reachable, _resolve

START_TIMEOUT = 60.0  # seconds for the members to find one another: a batch system starts them, not at once
BASE_PORT, PORT_SPAN = 20000, 5000  # a job takes two ports from here, for clients and for members
# Older releases lose data when members restart or catch up (etcd's issues 13766 and 14256 among others).
LEAST = {(3, 4): 22, (3, 5): 6}


def job_port(job: int) -> int:
    """The client port of a job's members by the job's number; the next one is for the members."""
    return BASE_PORT + 2 * (job % PORT_SPAN)


def check_version(text: str, binary: str) -> None:
    """ConfigError where the text of `etcd --version` is of a release unfit for several members."""
    match = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise ConfigError(f"{binary} --version does not tell a version: {text.strip()[:200]!r}")
    series, patch = (int(match[1]), int(match[2])), int(match[3])
    if series < min(LEAST) or patch < LEAST.get(series, 0):
        raise ConfigError(
            f"{binary} is etcd {match[1]}.{match[2]}.{match[3]}, which can lose data with several members: "
            "install 3.4.22, 3.5.6 or later and name it in ETCD_BIN, or use one member"
        )


class EtcdMember(EmbeddedEtcd):
    """Start member `index` of an etcd on `hosts`, and wait until a majority serves. Use as a context manager.

    Clients use `port`, members `port + 1`. With a `password`, the first member switches authentication on.
    ConfigError: no etcd, or an unfit one. MetadataError: the members do not find one another in time.
    """

    def __init__(
        self, hosts: Sequence[str], index: int, port: int, password: str = "", settings: Settings | None = None
    ) -> None:
        if not 0 <= index < len(hosts):
            raise ConfigError(f"member {index} of the {len(hosts)} etcd hosts {', '.join(hosts)}")
        self._hosts, self._index, self._client_port = list(hosts), index, port
        super().__init__(hosts[index], password, settings)

    def _start(self, password: str) -> None:
        version = subprocess.run([self._binary, "--version"], capture_output=True, text=True, timeout=START_TIMEOUT)
        check_version(version.stdout, self._binary)
        peers = [f"http://{_join(_reachable(*_resolve(host)), self._client_port + 1)}" for host in self._hosts]
        self._name = f"m{self._index}"
        flags = [
            f"--name={self._name}",
            f"--listen-peer-urls={peers[self._index]}",
            f"--initial-advertise-peer-urls={peers[self._index]}",
            f"--initial-cluster={','.join(f'm{i}={peer}' for i, peer in enumerate(peers))}",
            f"--initial-cluster-token=mooncake-{self._client_port}",
        ]
        self._serve(self._client_port, flags, password if self._index == 0 else "", START_TIMEOUT)

    def _is_ours(self, members: Sequence[str]) -> bool:
        return sorted(members) == sorted(f"m{i}" for i in range(len(self._hosts)))
