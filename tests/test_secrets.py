"""A password of etcd's is in no output, log, result, error text, command line or printed value."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Start, clean_env

from mooncake_hpc.core.errors import ConfigError, MetadataError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.jobs.job_etcd import own_metadata
from mooncake_hpc.metadata._etcd3 import Access
from mooncake_hpc.metadata.embedded import EmbeddedEtcd
from mooncake_hpc.metadata.store import open_store

PASSWORD, WRONG = "marker-8QzK1", "marker-wrong-77"
MODULE = [sys.executable, "-m", "mooncake_hpc"]


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    """host:port of an etcd that wants the password."""
    with EmbeddedEtcd(password=PASSWORD) as etcd:
        yield etcd.endpoint


def password_file(folder: Path, content: bytes = f"{PASSWORD}\n".encode(), mode: int = 0o600) -> str:
    file = folder / "password"
    file.write_bytes(content)
    file.chmod(mode)
    return str(file)


def test_values_do_not_show_it() -> None:
    settings = Settings.from_env({"MOONCAKE_HPC_ETCD_USER": "root", "MOONCAKE_HPC_ETCD_PASSWORD": PASSWORD})
    access = Access.of(settings)
    assert settings.etcd_password == access.password == PASSWORD
    for value in (settings, access, dataclasses.replace(settings, etcd_user="other")):
        assert PASSWORD not in f"{value!r} {value}"


def test_a_file_holds_it(tmp_path: Path) -> None:
    name = "MOONCAKE_HPC_ETCD_PASSWORD_FILE"
    path = password_file(tmp_path)
    assert Settings.from_env({name: path}).etcd_password == PASSWORD
    with pytest.raises(ConfigError, match="both set") as both:
        Settings.from_env({name: path, "MOONCAKE_HPC_ETCD_PASSWORD": WRONG})
    assert PASSWORD not in str(both.value) and WRONG not in str(both.value)
    for bad, mode, message in [
        (PASSWORD.encode(), 0o640, "mode 0640"),
        (b"", 0o600, "1 to 1024 bytes"),
        (b"x" * 1025, 0o600, "1 to 1024 bytes"),
        (b"\xff\xfe", 0o600, "not UTF-8"),
    ]:
        with pytest.raises(ConfigError, match=message) as refused:
            Settings.from_env({name: password_file(tmp_path, bad, mode)})
        assert name in str(refused.value) and PASSWORD not in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Settings.from_env({name: "/nowhere"})


def test_a_refused_password_is_in_no_error(locked: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings = Settings(etcd_user="root", etcd_password=WRONG)
    with open_store(locked, settings) as store, pytest.raises(MetadataError) as refused:
        store.list("mooncake/")
    assert WRONG not in "".join(traceback.format_exception(refused.value)) + caplog.text


def test_etcd_takes_none_on_its_command_line(start: Start) -> None:
    for words in ([f"--password={PASSWORD}"], ["--password", PASSWORD]):
        refused = subprocess.run([*MODULE, "etcd", *words], env=clean_env(), capture_output=True, text=True, timeout=30)
        assert refused.returncode == 2 and "--fromenv=password" in refused.stderr, refused
        assert PASSWORD not in refused.stderr
    etcd = start(*MODULE, "etcd", "--fromenv=password", "--v=1", env=clean_env(FLAGS_password=PASSWORD))
    assert etcd.stdout is not None
    line = etcd.stdout.readline()
    while ":" not in line or " " in line.strip():  # its log comes first
        assert PASSWORD not in line
        line = etcd.stdout.readline()
    assert not showing(PASSWORD)
    login = Settings(etcd_user="root", etcd_password=PASSWORD)
    with open_store(line.strip(), login) as store:
        assert store.list("mooncake/") == {}
    etcd.terminate()
    assert PASSWORD not in etcd.communicate(timeout=20)[0]


def showing(text: str) -> list[str]:
    """Command lines of this machine with the text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            found += [line] if text in line else []
    return found


def test_a_started_etcds_password_is_in_a_private_file_as_long_as_it_runs() -> None:
    from contextlib import ExitStack

    with ExitStack() as stack:
        _, settings = own_metadata("embedded", "127.0.0.2:1", Settings(tcp_bind_address="127.0.0.2"), stack)
        file = Path(settings.etcd_password_file)
        assert file.stat().st_mode & 0o777 == 0o600
        read = Settings.from_env({"MOONCAKE_HPC_ETCD_PASSWORD_FILE": str(file)})
        assert read.etcd_password == settings.etcd_password != ""
    assert not file.exists()


@pytest.mark.slow
def test_a_trainer_and_an_inferencer_show_nothing(start: Start, locked: str, tmp_path: Path) -> None:
    """With everything logged, and a result; also where the password is wrong."""
    p2p = [*MODULE, "p2p", f"--metadata_server={locked}", "--protocol=tcp", "--v=1", f"--log_dir={tmp_path}"]
    env = clean_env(MOONCAKE_HPC_ETCD_USER="root", MOONCAKE_HPC_ETCD_PASSWORD=PASSWORD)
    words = [*p2p, "--cmd=trainer", "--local_server_name=127.0.0.1:21", "--size=4096", "--idle=2"]
    trainer = start(*words, env=env)
    puller = [*p2p, "--cmd=inferencer", "--local_server_name=127.0.0.1:22", f"--json={tmp_path}/result.json"]
    inferencer = subprocess.run(puller, env=env, capture_output=True, text=True, timeout=60)
    assert inferencer.returncode == 0, inferencer
    assert not showing(PASSWORD)
    wrong = {**env, "MOONCAKE_HPC_ETCD_PASSWORD": WRONG}
    refused = subprocess.run(puller, env=wrong, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and len(refused.stderr.splitlines()[-1]) < 400, refused
    shown = [trainer.communicate(timeout=30)[0], inferencer.stdout, inferencer.stderr, refused.stdout, refused.stderr]
    shown += [file.read_text() for file in tmp_path.iterdir()]
    assert len(shown) >= 8 and all(shown[0:2]), shown
    assert not [text for text in shown if PASSWORD in text or WRONG in text]
