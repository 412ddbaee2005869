"""What an engine has registered, as lists: what comes in, what goes out, what is published."""

from __future__ import annotations

from collections.abc import Iterable

from mooncake_hpc.core.errors import RegistrationError
from mooncake_hpc.core.memory import containing, describe
from mooncake_hpc.transports.base import Registration
from mooncake_hpc.wire.descriptor import BufferDescriptor

Registrations = tuple[Registration, ...]


def describe_all(
    objects: Iterable[object], location: str, remote_accessible: bool, writable_by_peers: bool
) -> list[Registration]:
    """A registration of each object's memory. Raises RegistrationError for what is no memory."""
    return [
        Registration(
            v.address,
            v.nbytes,
            location,
            v.readonly,
            remote_accessible,
            v.owner,
            containing(v.address, v.nbytes),
            writable_by_peers=writable_by_peers,
        )
        for v in [describe(obj) for obj in objects]
    ]


def take_out(known: Registrations, objects: Iterable[object]) -> tuple[Registrations, Registrations]:
    """Those of `known` that are the objects' memory, the newest of equal ones first, and those that are left.

    Raises RegistrationError for memory that is not registered.
    """
    left = list(known)
    for view in [describe(obj) for obj in objects]:
        found = [r for r in left if (r.address, r.length) == (view.address, view.nbytes)]
        if not found:
            raise RegistrationError(f"memory {view.address:#x}+{view.nbytes} is not registered")
        left.remove(found[-1])
    return tuple(r for r in known if r not in left), tuple(left)


def published(registrations: Registrations) -> tuple[BufferDescriptor, ...]:
    """The buffers that peers are told of."""
    return tuple(
        BufferDescriptor(r.address, r.length, r.location, r.readonly_for_peers)
        for r in registrations
        if r.remote_accessible
    )


def release(gone: Registrations, left: Registrations) -> None:
    """Close the memory files of allocations that are gone, but for those that other registrations lie in."""
    kept = {r.file.serial for r in left if r.file is not None}
    for registration in gone:
        if registration.allocated and registration.file is not None and registration.file.serial not in kept:
            registration.file.close()
