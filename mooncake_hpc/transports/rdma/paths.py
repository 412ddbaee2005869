"""Which pairs of devices carry bytes to a peer, best first: a pure function of both sides' priority matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mooncake_hpc.transports.rdma.topology import Choices


@dataclass(frozen=True, slots=True)
class Path:
    """From a device of ours to one of the peer's, by their indices."""

    local: int
    remote: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All paths, best first; so many are used at a time."""

    paths: tuple[Path, ...]
    width: int


def plan(
    local: Sequence[str],
    local_matrix: Mapping[str, Choices],
    remote: Sequence[str],
    remote_matrix: Mapping[str, Choices],
) -> Plan:
    """Devices that are near to some memory come first, ours and the peer's paired by position, so that each carries
    something; the others and all further pairs are there for failures."""
    if not local or not remote:
        return Plan((), 0)
    near_local, far_local = _by_nearness(local, local_matrix.values())
    near_remote, far_remote = _by_nearness(remote, remote_matrix.values())
    width = max(len(near_local), len(near_remote))
    every_local, every_remote = near_local + far_local, near_remote + far_remote
    chosen = [Path(near_local[i % len(near_local)], near_remote[i % len(near_remote)]) for i in range(width)]
    longest = max(len(every_local), len(every_remote))
    for shift in range(len(every_remote)):
        for i in range(longest):
            local_index = every_local[i % len(every_local)]
            chosen.append(Path(local_index, every_remote[(i + shift) % len(every_remote)]))
    for local_index in every_local:
        chosen += [Path(local_index, remote_index) for remote_index in every_remote]
    return Plan(tuple(dict.fromkeys(chosen)), width)


def _by_nearness(names: Sequence[str], choices: Iterable[Choices]) -> tuple[list[int], list[int]]:
    """Indices of those that are near to memory at some location, and of the others."""
    wanted = {name for near, _ in choices for name in near}
    near = [index for index, name in enumerate(names) if name in wanted]
    far = [index for index, name in enumerate(names) if name not in wanted]
    return (near, far) if near else (far, [])
