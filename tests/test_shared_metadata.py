"""The etcd that a command starts for itself and others: where it listens, and who may use it."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
from conftest import Start, clean_env

from mooncake_hpc.core.address import P2PHANDSHAKE
from mooncake_hpc.core.errors import MetadataError, MetadataUnavailable
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.jobs.hosts import Host
from mooncake_hpc.jobs.job_etcd import job_metadata, login_variables, own_metadata
from mooncake_hpc.jobs.mpi import World
from mooncake_hpc.metadata.store import open_store

HERE = Host.here()
ELSEWHERE = Host("elsewhere", "another-boot", "net:[1]", ("127.0.0.3",))
SETTINGS = Settings(tcp_bind_address="127.0.0.2")  # stands for an address that other hosts reach


@dataclass
class Ranks:
    """Rank 0's view of a job of two ranks on these hosts."""

    other: Host
    rank: int = 0
    told: Any = None

    @property
    def hosts(self) -> list[Host]:
        return [HERE, self.other]

    def broadcast(self, value: Any, _timeout: float, _what: str) -> Any:
        self.told = value
        return value

    def barrier(self, _timeout: float, _what: str) -> None:
        pass


def job_etcd(other: Host, stack: ExitStack) -> tuple[str, Settings]:
    return job_metadata("embedded", SETTINGS, cast("World", Ranks(other)), stack, 10)


def test_on_one_host_only_that_host_reaches_it() -> None:
    with ExitStack() as stack:
        endpoint, settings = job_etcd(HERE, stack)
        assert endpoint.startswith("127.0.0.1:") and login_variables(settings) == ""
        with open_store(endpoint, settings) as store:
            assert store.list("mooncake/") == {}


def test_other_hosts_need_the_jobs_password() -> None:
    with ExitStack() as stack:
        endpoint, settings = job_etcd(ELSEWHERE, stack)
        assert endpoint.startswith("127.0.0.2:")
        with open_store(endpoint, settings) as store:
            assert store.list("mooncake/") == {}
        for stranger in (SETTINGS, replace(settings, etcd_password="guessed")):
            with open_store(endpoint, stranger) as store, pytest.raises(MetadataError):
                store.list("mooncake/")


@pytest.mark.slow
def test_a_named_server_is_left_as_it_is(etcd: str) -> None:
    """One that cannot be reached is told before the ranks go on."""
    quick = replace(SETTINGS, metadata_timeout=0.5)
    with ExitStack() as stack:
        assert own_metadata("a:1", "node:1", SETTINGS, stack) == ("a:1", SETTINGS)
        for named in (etcd, P2PHANDSHAKE):
            assert job_metadata(named, SETTINGS, cast("World", Ranks(HERE)), stack, 10) == (named, SETTINGS)
        with pytest.raises(MetadataUnavailable, match=r"127\.0\.0\.1:1"):
            job_metadata("127.0.0.1:1", quick, cast("World", Ranks(HERE)), stack, 10)


@pytest.mark.slow
def test_a_trainer_with_an_embedded_etcd(start: Start) -> None:
    """It listens where the trainer does, and the line that it prints lets inferencers in."""
    p2p = [sys.executable, "-m", "mooncake_hpc", "p2p"]
    trainer = start(*p2p, "--cmd=trainer", "--metadata_server=embedded", "--local_server_name=127.0.0.2:1", "--size=99")
    assert trainer.stdout is not None
    line = next(line for line in trainer.stdout if "published in" in line)
    *login, server = shlex.split(line.partition("; ")[2])
    assert len(login) == 2 and re.fullmatch(r"--metadata_server=127\.0\.0\.2:\d+", server), line
    words = [*p2p, "--cmd=inferencer", server, "--local_server_name=127.0.0.2:2"]
    env = clean_env(MOONCAKE_HPC_METADATA_TIMEOUT="5")
    refused = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and "MetadataError" in refused.stderr, refused
    env.update(variable.split("=", 1) for variable in login)
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith("ALL DONE\n"), done
    trainer.send_signal(signal.SIGTERM)
    assert trainer.wait(timeout=20) == 0
