"""launch/virtual-hosts: hosts are apart, know one another, have slow links, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Start, clean_env

pytestmark = pytest.mark.slow
SCRIPT = str(ROOT / "launch" / "virtual-hosts")
STATE = ROOT / ".mooncake" / "hosts"
SERVER = """
import socket, sys
listener = socket.create_server(("0.0.0.0", 7000))
print("ready", flush=True)
connection, _ = listener.accept()
total = 0
while data := connection.recv(1 << 20):
    total += len(data)
connection.sendall(str(total).encode())
"""
CLIENT = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 7000), timeout=30)
begin = time.monotonic()
connection.sendall(bytes(int(sys.argv[2])))
connection.shutdown(socket.SHUT_WR)
connection.recv(100)
print(time.monotonic() - begin)
"""


class Hosts:
    """One set of virtual hosts, named so that concurrent tests do not meet."""

    def __init__(self, name: str) -> None:
        self.name = f"{name}-{os.getpid()}"
        self.env = clean_env(VIRTUAL_HOSTS=self.name)

    def __call__(self, *words: str, check: bool = True) -> str:
        """Standard output, or with `check` off standard error of what may fail."""
        result = subprocess.run([SCRIPT, *words], env=self.env, capture_output=True, text=True, timeout=110)
        assert not check or result.returncode == 0, result
        return result.stdout if check else result.stderr

    def holders(self) -> list[int]:
        files = [file for file in (STATE / self.name).glob("h*") if file.name != "etc_hosts"]
        return [int(file.read_text().split()[0]) for file in files]


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    hosts = Hosts(request.node.name.replace("test_", "", 1)[:30])
    yield hosts
    holders = hosts.holders()
    hosts("down")
    assert not (STATE / hosts.name).exists()
    assert not any(alive(pid) for pid in holders)


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_gone(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there after {seconds} s: {pids}"
        time.sleep(0.05)


def test_hosts_are_apart_and_know_one_another(hosts: Hosts, tmp_path: Path) -> None:
    hosts("up", "2", "1gbit")
    assert hosts("list").split() == ["hub", "10.77.0.254", "h0", "10.77.0.1", "h1", "10.77.0.2"]
    assert hosts("run", "h1", "--", "hostname").strip() == "h1"
    assert hosts("run", "h1", "getent", "hosts", "h0", "hub").split()[::2] == ["10.77.0.1", "10.77.0.254"]
    hosts("run", "h0", "--", "touch", "/dev/shm/mine", str(tmp_path / "shared"))
    assert hosts("run", "h1", "--", "ls", "/dev/shm") == "" and not Path("/dev/shm/mine").exists()
    assert (tmp_path / "shared").exists()
    script = "import os, socket; print(os.getcwd(), socket.gethostname())"
    assert hosts("run", "h0", "--", sys.executable, "-c", script).split() == [os.getcwd(), "h0"]


@pytest.mark.parametrize(("source", "target"), [("h0", "hub"), ("hub", "h0")])
def test_links_are_slow_in_both_directions(hosts: Hosts, start: Start, source: str, target: str) -> None:
    hosts("up", "1", "8mbit")
    server = start(SCRIPT, "run", target, "--", sys.executable, "-c", SERVER, env=hosts.env)
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    seconds = float(hosts("run", source, "--", sys.executable, "-c", CLIENT, target, str(1 << 21)))
    assert seconds > 1.0  # 2 MiB at 1 MB/s, less the burst


def test_two_sets_do_not_meet(hosts: Hosts, start: Start) -> None:
    other = Hosts("other")
    try:
        hosts("up", "1", "none")
        other("up", "1", "none")
        server = start(SCRIPT, "run", "h0", "--", sys.executable, "-c", SERVER, env=hosts.env)
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        client = [sys.executable, "-c", CLIENT, "h0", "1"]
        assert "ConnectionRefusedError" in other("run", "hub", "--", *client, check=False)
        assert float(hosts("run", "hub", "--", *client)) < 60
    finally:
        other("down")


def test_run_becomes_its_command(hosts: Hosts, start: Start) -> None:
    hosts("up", "1", "none")
    assert subprocess.run([SCRIPT, "run", "h0", "--", "sh", "-c", "exit 7"], env=hosts.env, timeout=60).returncode == 7
    child = start(SCRIPT, "run", "h0", "--", sys.executable, "-c", "print(1, flush=True); input()", env=hosts.env)
    assert child.stdout is not None and child.stdout.readline() == "1\n"
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=10) == -signal.SIGKILL


def test_a_crashed_host_is_silent_and_empty(hosts: Hosts, start: Start) -> None:
    hosts("up", "2", "none")
    server = start(SCRIPT, "run", "h1", "--", sys.executable, "-c", SERVER, env=hosts.env)
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    hosts("run", "h1", "--", "touch", "/dev/shm/file")
    hosts("crash", "h1")
    assert server.wait(timeout=10) == -signal.SIGKILL
    hosts("mend", "h1")
    assert hosts("run", "h1", "--", "ls", "/dev/shm") == ""
    assert "ConnectionRefusedError" in hosts("run", "h0", "--", sys.executable, "-c", CLIENT, "h1", "1", check=False)


def test_down_ends_what_runs_and_may_be_repeated(hosts: Hosts, start: Start) -> None:
    hosts("down")
    hosts("up", "2", "none")
    child = start(SCRIPT, "run", "h1", "--", "sh", "-c", "setsid sleep 1000 & echo $!; wait", env=hosts.env)
    assert child.stdout is not None
    sleeper = int(child.stdout.readline())
    hosts("down")
    assert child.wait(timeout=10) == -signal.SIGKILL
    wait_gone([sleeper], 10)
    hosts("down")


def test_hosts_go_with_their_killed_owner(hosts: Hosts) -> None:
    script = f'"{SCRIPT}" up 2 none --owner $$ && echo up && sleep 1000'
    owner = subprocess.Popen(
        ["bash", "-c", script], env=hosts.env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert owner.stdout is not None and owner.stdout.readline() == "up\n"
    holders = hosts.holders()
    assert len(holders) == 3 and all(alive(pid) for pid in holders)
    os.killpg(owner.pid, signal.SIGKILL)
    owner.wait(timeout=10)
    owner.stdout.close()
    wait_gone(holders, 60)


def test_down_cleans_up_after_a_killed_up(hosts: Hosts) -> None:
    up = subprocess.Popen([SCRIPT, "up", "20", "none"], env=hosts.env, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(hosts.holders()) < 3:
        assert time.monotonic() < deadline and up.poll() is None
        time.sleep(0.01)
    os.killpg(up.pid, signal.SIGKILL)
    up.wait(timeout=10)
    holders = hosts.holders()
    hosts("down")
    wait_gone(holders, 10)
    hosts("up", "1", "none")


def test_hosts_go_with_their_folder(hosts: Hosts) -> None:
    """As when the checkout is deleted while they are up: nobody could name them any more."""
    hosts("up", "2", "none")
    holders = hosts.holders()
    assert len(holders) == 3 and all(alive(pid) for pid in holders)
    shutil.rmtree(STATE / hosts.name)
    wait_gone(holders, 20)


def test_mistakes_are_told(hosts: Hosts) -> None:
    assert "there are:" in hosts("run", "h0", "--", "true", check=False)
    assert "1 to 99" in hosts("up", "many", "none", check=False)
    assert "down" in hosts("up", check=False)
    hosts("up", "1", "none")
    assert "is up already" in hosts("up", "1", "none", check=False)
    assert "no host 'h1'" in hosts("run", "h1", "--", "true", check=False)
