"""What went wrong with a call to etcd, and what that asks of the caller."""

from __future__ import annotations

from enum import Enum
from typing import Any

# status codes of gRPC, which may be a private copy, by name
REFUSALS = {
    "INVALID_ARGUMENT",
    "PERMISSION_DENIED",
    "FAILED_PRECONDITION",
    "RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED",
    "NOT_FOUND",
}


class Kind(Enum):
    """What a failed call asks of the caller."""

    UNAVAILABLE = "try another endpoint, or again"
    LOGIN = "log in again"
    LEASE = "the lease is gone"
    TOO_LARGE = "the request is too large"
    REFUSED = "give up"


class Failure(Exception):
    """A call that failed; the text is etcd's or gRPC's own."""

    def __init__(self, kind: Kind, details: str) -> None:
        super().__init__(details)
        self.kind = kind


def text_of(value: bytes) -> str:
    return value.decode("utf-8", "replace")  # a key of somebody else may hold anything


def failure_of(error: Any) -> Failure:
    """The Failure that a gRPC error means."""
    code, details = error.code().name, error.details() or ""
    text = f"{code}: {details}" if details else code
    if "too large" in details or "larger than max" in details:
        kind = Kind.TOO_LARGE
    elif code == "UNAUTHENTICATED" or "auth token" in details or "auth store is old" in details:
        kind = Kind.LOGIN
    elif "lease not found" in details:
        kind = Kind.LEASE
    elif code in REFUSALS and "too many requests" not in details:
        kind = Kind.REFUSED
    else:
        kind = Kind.UNAVAILABLE
    if "user name is empty" in details:
        text += " (this etcd wants a user: set MOONCAKE_HPC_ETCD_USER and MOONCAKE_HPC_ETCD_PASSWORD)"
    if "space exceeded" in details:
        text += (
            " (its database is full and takes no new keys: compact and defragment it, then `etcdctl alarm disarm`; or "
            "start it with a larger --quota-backend-bytes)"
        )
    return Failure(kind, text)
