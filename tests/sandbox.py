"""A real Slurm for tests: submit a batch script as a user does, wait for its end, look at what it left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conftest import ROOT, clean_env

SCRIPT = str(ROOT / "launch" / "slurm-sandbox")
HOSTS = str(ROOT / "launch" / "virtual-hosts")
NODES = 4
DAEMONS = {"slurmd", "slurmctld", "slurmscriptd", "munged"}
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
LEASE = 10  # seconds after which a killed process's keys vanish
LOCKED = 1 << 20  # bytes of memory that a submitting shell may lock: a job must raise it
RESULTS = (".out", ".json", ".log")  # of files that jobs may leave
SECRETS = {"MOONCAKE_HPC_ETCD_PASSWORD", "FLAGS_password"}  # variables whose values nothing may show
FILE_LIMIT = 4 << 20  # bytes; larger files are memory
KEYS = """
import sys
from mooncake_hpc.metadata.store import open_store
with open_store(sys.argv[1]) as store:
    print(*store.list("mooncake/"), sep="\\n")
"""
QUICK = (
    "--protocol=tcp", "--block_size=4096", "--batch_size=8", "--threads=2", "--buffer_size=1048576", "--duration=0.5",
    "--timeout=15",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Job:
    """A job, a task of an array or a component, as `scontrol show job` tells."""

    fields: dict[str, str]

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    @property
    def code(self) -> str:
        """`<exit code>:<signal>`."""
        return self.fields["ExitCode"]

    @property
    def name(self) -> str:
        """What the scripts call the job: tasks of an array apart, components together."""
        for key in ("HetJobId", "JobId"):
            if key in self.fields and "ArrayTaskId" not in self.fields:
                return self.fields[key]
        return f"{self.fields['ArrayJobId']}_{self.fields['ArrayTaskId']}"

    @property
    def output(self) -> str:
        file = Path(self.fields["StdOut"])
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def results(self) -> list[dict[str, object]]:
        """The lines of the JSON file in the submit folder; none where it was not written."""
        file = Path(self.fields["WorkDir"]) / f"{self.fields['JobName']}-{self.name}.json"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def __repr__(self) -> str:
        logs = sorted(Path(self.fields["WorkDir"]).glob("rank*.log"))
        ranks = "".join(f"\n{log.name}:\n{log.read_text(errors='replace')[-2000:]}" for log in logs)
        return f"{self.fields['JobName']} {self.name}: {self.state} {self.code}\n{self.output}{ranks}"


@dataclass
class Sandbox:
    """Slurm on the hosts h0, h1 …, and the hub, from which jobs are submitted."""

    name: str
    env: dict[str, str] = field(default_factory=dict)

    def __call__(self, *words: str) -> str:
        """Standard output of a verb of launch/slurm-sandbox."""
        result = subprocess.run([SCRIPT, *words], env=self.env, capture_output=True, text=True, timeout=150)
        assert result.returncode == 0, result
        return result.stdout

    def submit(
        self, script: str, *arguments: str, folder: Path, options: Sequence[str] = (), env: dict[str, str] | None = None
    ) -> str:
        """sbatch a script of slurm/ from `folder`; the job's id."""
        folder.mkdir(exist_ok=True)
        command = [SCRIPT, "run", "sbatch", "--parsable", *options, str(ROOT / "slurm" / script), *arguments]
        result = subprocess.run(
            command, env={**self.env, "TMPDIR": str(folder), **(env or {})}, cwd=folder, capture_output=True, text=True,
            timeout=60, preexec_fn=_lock_little,
        )  # fmt: skip
        assert result.returncode == 0, result
        return result.stdout.strip().partition(";")[0]

    def jobs(self, number: str) -> list[Job]:
        """The job; the tasks of an array; the components of a heterogeneous job."""
        lines = self("run", "scontrol", "-o", "show", "job", number).splitlines()
        return [Job(dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(\S*)", line))) for line in lines if line.strip()]

    def wait(self, number: str, seconds: float) -> list[Job]:
        """All of the job, ended; fails where that takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            begin = time.monotonic()
            jobs = self.jobs(number)
            if all(job.state in ENDED for job in jobs):
                return jobs
            assert time.monotonic() < deadline, f"not ended after {seconds} s:\n" + "\n".join(map(str, jobs))
            time.sleep(max(0.3, time.monotonic() - begin))  # in an emulated guest a look takes the job's time

    def wait_for(self, number: str, text: str, seconds: float = 90) -> Job:
        """The job once its output has `text`."""
        deadline = time.monotonic() + seconds
        while text not in (job := self.jobs(number)[0]).output:
            assert job.state not in ENDED and time.monotonic() < deadline, f"no {text!r} in:\n{job}"
            time.sleep(0.2)
        return job

    def run(self, script: str, *arguments: str, folder: Path, seconds: float = 90, **more: object) -> Job:
        """Submit and wait; a job that is one."""
        (job,) = self.wait(self.submit(script, *arguments, folder=folder, **more), seconds)  # type: ignore[arg-type]
        return job

    def compiled(self) -> set[tuple[str, int]]:
        """Files of numba's cache, and when they were written."""
        local = Path(self.env["MOONCAKE_HPC_LOCAL"]) / f"mooncake-hpc-{os.getuid()}" / "numba"
        cache = Path(self.env.get("NUMBA_CACHE_DIR") or local)
        return {(str(file), file.stat().st_mtime_ns) for file in cache.rglob("*.nb*")}

    def holders(self) -> dict[str, int]:
        """The process that keeps a host's namespaces, by host."""
        folder = ROOT / ".mooncake" / "hosts" / self.name
        files = [file for file in folder.glob("h*") if file.name != "etc_hosts"]
        return {file.name: int(file.read_text().split()[0]) for file in files}

    def processes(self) -> Iterator[tuple[str, int, str]]:
        """Host, id and command line of what runs on the hosts beside Slurm's daemons."""
        holders = self.holders()
        hosts = {_network(pid): host for host, pid in holders.items()}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in holders.values():
                continue
            with contextlib.suppress(OSError):
                host = hosts.get(_network(int(entry.name)))
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                name = (entry / "comm").read_text().strip()
                if host and state not in "ZX" and name not in DAEMONS:
                    yield host, int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()

    def left(self) -> list[str]:
        """What jobs left: processes on the hosts, files in the hosts' /dev/shm."""
        found = [f"{host}: {line}" for host, _, line in self.processes()]
        for host, pid in self.holders().items():
            found += [f"{host}: /dev/shm/{name}" for name in os.listdir(f"/proc/{pid}/root/dev/shm")]
        return found

    def check_clean(self, folder: Path, seconds: float = 20) -> None:
        """Cancels what is under way; fails where something is left `seconds` later. `folder` was the jobs' TMPDIR."""
        self("run", "scancel", "--user=root")
        wait_until(lambda: not self.left(), seconds, lambda: f"left behind: {self.left()}")
        left = [file for file in folder.rglob("*") if file.is_file() and file.suffix not in RESULTS]
        assert not left, f"left behind: {left}"


class Watch:
    """Looks for secrets of jobs while they run: on command lines, and in files that others than the owner may read.

    `secrets` are the values of variables of the processes on the hosts; `shown` says where one was seen.
    """

    def __init__(self, slurm: Sandbox, folder: Path) -> None:
        self._slurm, self._folder, self._begin = slurm, folder, time.time()
        self._lines: set[tuple[str, str]] = set()  # host and command line
        self.secrets: set[str] = set()
        self.shown: set[str] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.look()

    def _run(self) -> None:
        while not self._end.wait(0.5):
            self.look()

    def look(self) -> None:
        """One look at all processes and files; raises nothing where they go meanwhile."""
        for host, pid, line in self._slurm.processes():
            self._lines.add((host, line))
            with contextlib.suppress(OSError):
                for word in Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"):
                    name, _, value = word.partition("=")
                    if name in SECRETS and value:
                        self.secrets.add(value)
        for secret in self.secrets:
            self.shown |= {f"command line on {host}: {line}" for host, line in self._lines if secret in line}
        for file in self._files():
            with contextlib.suppress(OSError):
                found = file.lstat()
                if stat.S_ISREG(found.st_mode) and found.st_mode & 0o077 and found.st_size < FILE_LIMIT:
                    text = file.read_text(errors="replace")
                    self.shown |= {f"file {file}" for secret in self.secrets if secret in text}

    def _files(self) -> Iterator[Path]:
        """Files of the jobs, of the hosts' /dev/shm, and those of /tmp that are new."""
        for folder in (self._folder, *(Path(f"/proc/{pid}/root/dev/shm") for pid in self._slurm.holders().values())):
            with contextlib.suppress(OSError):
                yield from folder.rglob("*")
        with contextlib.suppress(OSError):
            for entry in os.scandir("/tmp"):
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime > self._begin and entry.is_file():
                        yield Path(entry.path)


@contextlib.contextmanager
def site_etcd(slurm: Sandbox) -> Iterator[SiteEtcd]:
    """An etcd on the hub, that jobs share. At the end no job has a key in it."""
    command = [HOSTS, "run", "hub", "--", sys.executable, "-m", "mooncake_hpc", "etcd", "--listen=hub"]
    env = {**slurm.env, "VIRTUAL_HOSTS": slurm.name}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            etcd = SiteEtcd(process.stdout.readline().strip(), env)
            yield etcd
            # those of killed processes hang on leases
            wait_until(lambda: not etcd.keys(), LEASE + 10, lambda: f"keys that are left: {etcd.keys()}")
        finally:
            process.terminate()


@dataclass(frozen=True)
class SiteEtcd:
    endpoint: str
    env: dict[str, str]

    def keys(self) -> list[str]:
        """All keys of all jobs."""
        command = [HOSTS, "run", "hub", "--", sys.executable, "-c", KEYS, self.endpoint]
        result = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result
        return result.stdout.split()


def wait_until(done: Callable[[], bool], seconds: float, complaint: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.2)


def _network(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _lock_little() -> None:
    """Slurm hands a submitting shell's soft limits to the job."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (LOCKED, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]))


@contextlib.contextmanager
def sandbox(nodes: int = NODES) -> Iterator[Sandbox]:
    """Up, with this process for its owner, and down: then none of its processes is left."""
    name = f"test-{os.getpid()}"
    local = ROOT / ".mooncake" / "test" / "local"  # stands for the nodes' own disks: kernels are compiled there once
    env = clean_env(SLURM_SANDBOX=name, MOONCAKE_HPC_PYTHON=sys.executable, MOONCAKE_HPC_LOCAL=str(local))
    slurm = Sandbox(name, env)
    slurm("up", str(nodes), "none", "--owner", str(os.getpid()))
    try:
        networks = {_network(pid) for pid in slurm.holders().values()}
        assert len(networks) == nodes + 1
        yield slurm
    finally:
        slurm("down")
    wait_until(lambda: not _users(networks), 10, lambda: f"namespaces that are still in use: {_users(networks)}")
    assert not (ROOT / ".mooncake" / "hosts" / name).exists()


def _users(networks: set[str]) -> list[int]:
    """Live processes in these network namespaces."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if _network(int(entry.name)) in networks:
                    found.append(int(entry.name))
    return found
