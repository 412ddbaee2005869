"""An etcd that a command starts for itself and for others: without a password only where nobody else reaches it."""

from __future__ import annotations

import secrets
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from mooncake_hpc.core.address import P2PHANDSHAKE, published_address
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.jobs.hosts import shared_address
from mooncake_hpc.jobs.mpi import World

if TYPE_CHECKING:
    from mooncake_hpc.metadata.embedded import EmbeddedEtcd

EMBEDDED = "embedded"  # what a user names instead of a metadata server
LOOPBACK = ("127.0.0.1", "::1")


def start_etcd(host: str, settings: Settings) -> tuple[EmbeddedEtcd, Settings]:
    """A running etcd that listens on `host`, and settings to log in to it."""
    from mooncake_hpc.metadata.embedded import EmbeddedEtcd

    password = "" if host in LOOPBACK else secrets.token_urlsafe(18)
    etcd = EmbeddedEtcd(host, password, settings)
    return etcd, replace(settings, etcd_user=etcd.user, etcd_password=password, etcd_password_file="")


def own_metadata(named: str, name: str, settings: Settings, stack: ExitStack) -> tuple[str, Settings]:
    """What `named` says, or an etcd of the process `name`, which others reach where they reach the process.

    Its password is in a file of the settings, of mode 0600, as long as `stack` is open.
    """
    if named != EMBEDDED:
        return named, settings
    etcd, settings = start_etcd(published_address(name, P2PHANDSHAKE, settings), settings)
    endpoint = stack.enter_context(etcd).endpoint
    if settings.etcd_password:
        settings = replace(settings, etcd_password_file=stack.enter_context(_password_file(settings.etcd_password)))
    return endpoint, settings


@contextmanager
def _password_file(password: str) -> Iterator[str]:
    """The path of a file that holds the password: what a process prints is often a file that all may read."""
    with tempfile.NamedTemporaryFile("w", prefix="mooncake-etcd-password-") as file:
        file.write(f"{password}\n")
        file.flush()
        yield file.name


def job_metadata(named: str, settings: Settings, world: World, stack: ExitStack, wait: float) -> tuple[str, Settings]:
    """What `named` says, or an etcd of the job: rank 0 starts it where all ranks reach it, and tells the others.

    Nothing is started before all ranks are here: what a rank cannot have on its host is told before. That a named one
    cannot be reached is told by rank 0 alone, as MetadataUnavailable, while the others wait.
    """
    world.barrier(wait, "all ranks have what they need of their hosts")
    if named != EMBEDDED:
        if named != P2PHANDSHAKE:
            if world.rank == 0:
                _reach(named, settings)
            world.barrier(wait, "rank 0 reaches the metadata server")
        return named, settings
    access = None
    if world.rank == 0:
        etcd, settings = start_etcd(shared_address(world.hosts, settings.tcp_bind_address), settings)
        stack.enter_context(etcd)
        access = (etcd.endpoint, settings.etcd_user, settings.etcd_password)
    endpoint, user, password = world.broadcast(access, wait, "rank 0 starts etcd")
    return endpoint, replace(settings, etcd_user=user, etcd_password=password, etcd_password_file="")


def login_variables(settings: Settings) -> str:
    """The variables that a printed command needs in front of it, each with a space behind, or "".

    They name the file that holds the password. One that the user has set in the environment is known to the user.
    """
    if not settings.etcd_password_file:
        return ""
    login = {
        "MOONCAKE_HPC_ETCD_USER": settings.etcd_user,
        "MOONCAKE_HPC_ETCD_PASSWORD_FILE": settings.etcd_password_file,
    }
    return "".join(f"{name}={shlex.quote(value)} " for name, value in login.items())


def _reach(server: str, settings: Settings) -> None:
    from mooncake_hpc.metadata.store import open_store

    with open_store(server, settings) as store:
        store.get("mooncake/")
