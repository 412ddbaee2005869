"""The embedded etcd serves, and nothing of it stays, however it or its starter ends."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mooncake_hpc.core.errors import ConfigError, MetadataError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata import embedded, open_store
from mooncake_hpc.metadata.embedded import EmbeddedEtcd

SETTINGS = Settings(lease_ttl=1, metadata_timeout=2)

STARTER = """
import os, sys, time
from mooncake_hpc.metadata.embedded import EmbeddedEtcd
etcd = EmbeddedEtcd()
if "fork" in sys.argv and os.fork() == 0:
    time.sleep(30)  # holds every descriptor of its parent
print(etcd.endpoint, flush=True)
time.sleep(30)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where etcd's temporary folders go; must be empty, and nobody's home, after every test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield tmp_path
    assert left_behind(tmp_path) == []


def processes(folder: Path) -> list[int]:
    """Processes whose working directory is below `folder`: etcd and its supervisor."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd").startswith(f"{folder}/"):
                found.append(int(entry.name))
        except OSError:  # gone, or not ours to look at
            continue
    return found


def left_behind(folder: Path) -> list[object]:
    return [*folder.iterdir(), *processes(folder)]


def eventually(condition: Callable[[], object], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def pid_of(program: str, folder: Path) -> int:
    return next(pid for pid in processes(folder) if Path(f"/proc/{pid}/comm").read_text().startswith(program))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0"])
def test_serves_and_leaves_nothing(host: str, folder: Path) -> None:
    with EmbeddedEtcd(host) as etcd:
        assert len(processes(folder)) == 2
        with open_store(etcd.endpoint, SETTINGS) as store:
            store.publish("k", "v")
            assert store.get("k") == "v"
    assert left_behind(folder) == []
    etcd.close()


def test_listens_on_one_address_only(folder: Path) -> None:
    with EmbeddedEtcd("127.0.0.1"):
        inodes = {
            os.readlink(link) for link in Path(f"/proc/{pid_of('etcd', folder)}/fd").iterdir() if os.path.islink(link)
        }
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        rows += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
        listening = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
        assert len(listening) == 1 and listening[0].startswith("0100007F:")


def test_password() -> None:
    with EmbeddedEtcd(password="with spaces and $") as etcd:
        access = dataclasses.replace(SETTINGS, etcd_user=etcd.user, etcd_password="with spaces and $")
        with open_store(etcd.endpoint, access) as store:
            store.publish("k", "v")
            assert store.get("k") == "v"
            with (
                open_store(etcd.endpoint, SETTINGS) as stranger,
                pytest.raises(MetadataError, match="MOONCAKE_HPC_ETCD_USER"),
            ):
                stranger.get("k")
            wrong = dataclasses.replace(access, etcd_password="guess")
            with open_store(etcd.endpoint, wrong) as stranger, pytest.raises(MetadataError, match="password"):
                stranger.get("k")


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_gone_after_sigkill_of_the_starter(how: str, folder: Path) -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER, how], stdout=subprocess.PIPE, start_new_session=True)
    assert starter.stdout is not None
    try:
        assert starter.stdout.readline()
        assert len(processes(folder)) == 2
        starter.kill()
        starter.wait()
        assert eventually(lambda: left_behind(folder) == [])
    finally:
        os.killpg(starter.pid, signal.SIGKILL) if how == "fork" else None
        starter.stdout.close()


def test_gone_when_the_starter_forgets_to_close(folder: Path) -> None:
    program = "from mooncake_hpc.metadata.embedded import EmbeddedEtcd as E; e = E(); print(e.endpoint)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30, check=True)
    assert done.stderr == b""
    assert eventually(lambda: left_behind(folder) == [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_gone_after_a_signal_to_the_supervisor(number: signal.Signals, folder: Path) -> None:
    with EmbeddedEtcd():
        os.kill(pid_of("python", folder), number)
        assert eventually(lambda: left_behind(folder) == [])


def test_etcd_and_its_folder_go_with_its_supervisor(folder: Path) -> None:
    with EmbeddedEtcd():
        os.kill(pid_of("python", folder), signal.SIGKILL)
        assert eventually(lambda: processes(folder) == [])
        assert len(left_behind(folder)) == 1
    assert left_behind(folder) == []


def test_the_next_start_removes_what_killed_ones_have_left(folder: Path) -> None:
    """Of this user, this boot and this program, and not in use: nothing else, whatever its name."""
    with EmbeddedEtcd() as in_use:
        (kept,) = folder.iterdir()
        starter = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE)
        assert starter.stdout is not None
        with starter.stdout:
            assert starter.stdout.readline()
        (left,) = set(folder.iterdir()) - {kept}
        for pid in [*(pid for pid in processes(left.parent) if in_folder(pid, left)), starter.pid]:
            os.kill(pid, signal.SIGKILL)
        starter.wait()
        assert eventually(lambda: not any(in_folder(pid, left) for pid in processes(folder))) and left.exists()
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        for name, mark in {"of-another-boot": b"0" * len(boot), "readable-by-all": boot, "target": boot}.items():
            (folder / f"mooncake-etcd-{name}").mkdir(0o755 if name == "readable-by-all" else 0o700)
            (folder / f"mooncake-etcd-{name}" / "owner").write_bytes(mark)
        (folder / "mooncake-etcd-target").rename(folder / "target")
        (folder / "mooncake-etcd-link").symlink_to(folder / "target")
        (folder / "mooncake-etcd-unmarked").mkdir(0o700)
        others = set(folder.iterdir()) - {left}
        with EmbeddedEtcd():
            assert eventually(lambda: not left.exists())
            assert others < set(folder.iterdir())
        with open_store(in_use.endpoint, SETTINGS) as store:
            assert store.get("k") is None
    assert set(folder.iterdir()) == others - {kept}
    for other in others - {kept}:
        subprocess.run(["rm", "-r", str(other)], check=True)


def in_folder(pid: int, folder: Path) -> bool:
    """Whether the process works there."""
    return os.path.realpath(f"/proc/{pid}/cwd") == str(folder)


def test_closing_after_etcd_has_died(folder: Path) -> None:
    with EmbeddedEtcd():
        os.kill(pid_of("etcd", folder), signal.SIGKILL)
        assert eventually(lambda: left_behind(folder) == [])


def test_variables_meant_for_another_etcd_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCD_LISTEN_CLIENT_URLS", "http://127.0.0.1:1")
    monkeypatch.setenv("ETCD_NAME", "another")
    with EmbeddedEtcd() as etcd, open_store(etcd.endpoint, SETTINGS) as store:
        assert store.get("k") is None


def test_several_at_once() -> None:
    with ThreadPoolExecutor(4) as pool:
        etcds = list(pool.map(lambda _: EmbeddedEtcd(), range(4)))
        assert len({etcd.endpoint for etcd in etcds}) == 4
        list(pool.map(EmbeddedEtcd.close, etcds))


def script(folder: Path, text: str) -> Settings:
    """Settings whose etcd is a shell script beside the temporary folder."""
    path = folder.parent / f"{folder.name}-etcd"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return Settings(etcd_binary=str(path))


def test_start_failure_shows_the_log(folder: Path) -> None:
    with pytest.raises(MetadataError, match=r"cannot start etcd .*it ended.*no space left") as caught:
        EmbeddedEtcd(settings=script(folder, "echo mvcc: no space left >&2; exit 1"))
    assert "127.0.0.1:" in str(caught.value)


@pytest.mark.slow
def test_start_has_a_deadline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "START_TIMEOUT", 2.0)
    with pytest.raises(MetadataError, match=r"does not serve within 2 s.*thinking"):
        EmbeddedEtcd(settings=script(folder, "echo thinking; exec sleep 30"))


@pytest.mark.slow
def test_a_port_taken_meanwhile_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = embedded._free_port
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1]])
        monkeypatch.setattr(embedded, "_free_port", lambda *where: next(ports, None) or choose(*where))
        with EmbeddedEtcd() as etcd, open_store(etcd.endpoint, SETTINGS) as store:
            assert store.get("k") is None


def test_another_etcd_on_the_port_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = embedded._free_port
    with EmbeddedEtcd() as other:
        ports = iter([other.port])
        monkeypatch.setattr(embedded, "_free_port", lambda *where: next(ports, None) or choose(*where))
        with EmbeddedEtcd() as etcd:
            assert etcd.port != other.port


def test_impossible_settings() -> None:
    with pytest.raises(ConfigError, match=r"/no/such/etcd.*ETCD_BIN"):
        EmbeddedEtcd(settings=Settings(etcd_binary="/no/such/etcd"))
    with pytest.raises(ConfigError, match=r"192\.0\.2\.77"):  # RFC 5737: no address of this machine
        EmbeddedEtcd("192.0.2.77")
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid"):
        EmbeddedEtcd("no-such-host.invalid")
