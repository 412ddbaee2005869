"""Write the reference pages from the code: API, command line, environment variables, errors and JSON results.

mkdocs loads this file as a hook. `pages` needs no mkdocs, so that the tests can look for what is missing.
"""

from __future__ import annotations

import inspect
import posixpath
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import mooncake_hpc
from mooncake_hpc import __main__ as program
from mooncake_hpc.core import errors

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
HEAD = "<!-- Made by docs/generate.py. Do not edit. -->\n\n"

# Files of the repository that are pages of the site as well.
INCLUDED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing/index.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks/running.md",
    "benchmarks/results/bench.md": "benchmarks/results/bench.md",
    "benchmarks/results/bench-intel.md": "benchmarks/results/bench-intel.md",
    "benchmarks/results/p2p.md": "benchmarks/results/p2p.md",
    "benchmarks/results/rdma.md": "benchmarks/results/rdma.md",
    "slurm/README.md": "how-to/slurm.md",
}

# Error class: what usually causes it, and what to do.
CAUSES = {
    "MooncakeError": (
        "Base class. It is raised itself where a bench's transfer fails, with the cause in the text.",
        "Catch it to catch every error of this package.",
    ),
    "ConfigError": (
        "A flag, a variable or an argument has a value that is not accepted, or a file that it names cannot be used.",
        "The text names the flag or variable and what is accepted. Commands exit with code 2.",
    ),
    "DeviceError": (
        "A device, port, GID or queue pair cannot be used: no active port, too little locked memory, a wrong index.",
        "Run `mooncake-hpc topology`. Raise the limit of locked memory (`ulimit -l unlimited`), or name other devices.",
    ),
    "MetadataError": (
        "etcd refused an operation: no permission, a value that is too long, members that do not find one another.",
        "Read etcd's message in the text; check user and password (`MOONCAKE_HPC_ETCD_*`).",
    ),
    "MetadataUnavailable": (
        "etcd does not answer within `MOONCAKE_HPC_METADATA_TIMEOUT`: wrong endpoint, not started, or a firewall.",
        "Check the endpoint. Transfers to segments that are open go on meanwhile.",
    ),
    "MalformedRecord": (
        "Another program wrote a value under one of our keys, or a peer sent JSON that does not fit.",
        "The text names the key or peer and the field. Remove the key, or update the program that wrote it.",
    ),
    "SegmentNotFound": (
        "No process publishes this name. It has not started, has ended, uses another etcd or another "
        "`MC_METADATA_CLUSTER_ID`.",
        "Start the peer first, or compare the names and the metadata server of both sides.",
    ),
    "NameInUse": (
        "A living process publishes this name. It may be stopped, or have another secret.",
        "End that process, or give this one another name (`--local_server_name`).",
    ),
    "RegistrationError": (
        "Memory overlaps registered memory, is not contiguous, is not in host memory, or is not registered.",
        "Register each buffer once. Copy tensors from a GPU to the host first.",
    ),
    "ForkError": (
        "A child process uses an engine, batch, store or pool that it inherited by fork(2).",
        "Open a new one in the child. See [Fork and multiprocessing](../how-to/fork.md).",
    ),
    "WorkerError": (
        "Worker processes keep ending, for example by the kernel's out-of-memory killer.",
        "Look for the reason in `dmesg`; use fewer workers (`--workers`, `WorkerPool(count)`).",
    ),
    "LimitError": (
        "The process or the machine has no descriptors, threads, memory or disk left.",
        "The text says which limit to raise, for example `ulimit -n`.",
    ),
    "LockHeld": (
        "Another process holds a lock file, for example another pull into the same `--out`.",
        "Wait for that process. If it has ended on another host, remove the file that the text names.",
    ),
    "P2PError": (
        "The P2P Store refused: the object is here already, or is being pulled into this store.",
        "Use the object that is here, or `delete_replica` it first.",
    ),
    "ObjectNotFound": (
        "Nobody publishes an object of this name, or the last holder of some shards has left.",
        "Start the publisher, or wait for it (`wait=`, `--wait`). `mooncake-hpc p2p ls` lists objects.",
    ),
    "ObjectExists": (
        "Another process has registered other content under this name.",
        "Choose another name, or replace it (`force=True`, `--force`).",
    ),
    "ObjectReplaced": (
        "The name was registered again during the pull, and the holders of the old version have left.",
        "Pull again: this brings the new version.",
    ),
    "SizeMismatch": (
        "Buffers given to `get_replica` have other sizes, dtypes or shapes than what was published.",
        "The text has both. Give matching buffers, flat uint8 arrays of the sizes, or none.",
    ),
    "IntegrityError": (
        "Bytes do not match their digest, from every source. The publisher changed its memory after `register`.",
        "Do not write to registered arrays. Register the object again after a change.",
    ),
    "TransferError": (
        "A request failed for a reason that no subclass names. The text has peer, segment, address and cause.",
        "Read the cause. `failed` counts the requests of the batch that failed.",
    ),
    "AddressRejected": (
        "A request names a range that is not inside one registered buffer, here or at the peer, or writes to memory "
        "that peers may only read.",
        "Compare the address and length with `segment.buffers`. Open the segment again if the peer has restarted.",
    ),
    "PeerLost": (
        "The peer ended, restarted or cannot be reached, or this engine was closed.",
        "The text says which. After a restart of the peer, open the segment again and submit again.",
    ),
    "AuthenticationError": (
        "One side has no secret, both have different ones, or another process answers in the place of the peer.",
        "Give both sides the same `--secret_file`, or name the peer in `--allow_unauthenticated`.",
    ),
    "PeerSilent": (
        "The peer does not answer in time: it is stopped, overloaded, or cut off from the network.",
        "Check the peer and the network. A stopped process can continue, and then answers again.",
    ),
    "TransferTimeout": (
        "A batch is not done at its deadline. After `Batch.wait` it goes on; after `read`, `write` and `transfer` it "
        "is cancelled.",
        "Wait again or `cancel()` it; raise `timeout` or `MC_TRANSFER_TIMEOUT`. See [Tuning](../tuning.md).",
    ),
    "TransferCancelled": (
        "The owner of the batch or of the pull cancelled it.",
        "Nothing: no socket and no NIC touches its buffers any more.",
    ),
}

# Keys of JSON results, without indices. A name that ends in `.*` stands for all keys below it.
BENCH_KEYS = {
    "schema": "Version of this format. It changes when the meaning of a key changes.",
    "time": "When the result was made, local time with its offset.",
    "config.*": "The flags of the run, by name.",
    "machine.*": "Host, kernel, processor, cores, memory, and versions of Python and mooncake_hpc of rank 0.",
    "initiators": "One entry for each initiator, with the keys below and its own figures.",
    "initiators.name": "Its segment.",
    "initiators.rank": "Its rank; 0 without a launcher.",
    "initiators.host": "Its host.",
    "initiators.pid": "Its process id.",
    "initiators.targets": "The segments that it addressed.",
    "initiators.transports": "The transports that carried bytes.",
    "initiators.lane_bytes.*": "Bytes by lane, warm-up and verification included.",
    "transports": "The transports of all initiators.",
    "target_cpu_seconds": "Processor seconds of all targets in the timed windows; null where unknown.",
    "seconds": "Length of the timed window. Of several initiators, the longest.",
    "batches": "Batches that were completed.",
    "requests": "Requests that were completed.",
    "bytes": "Payload bytes.",
    "bytes_per_second": "Payload bytes over seconds.",
    "requests_per_second": "Requests over seconds.",
    "batch_latency_us.*": "Microseconds from submission to completion of a batch: count, mean, min, percentiles, max.",
    "request_latency_us.*": "Microseconds from the submission of a batch to the end of a request, for sampled batches.",
    "initiator_cpu_seconds": "Processor seconds of the initiators in the timed windows.",
    "errors": "Requests that failed.",
    "failure": "Text of the first error, or empty.",
    "compared_bytes": "Bytes that `--verify` compared.",
    "wrong_bytes": "Bytes that were not what they should be.",
}
MATRIX_KEYS = {
    **{key: BENCH_KEYS[key] for key in ("schema", "time", "config.*", "machine.*", "wrong_bytes")},
    "ranks": "One entry for each rank.",
    "ranks.name": "Its segment.",
    "ranks.host": "Its host.",
    "bytes_per_second": "A list for each initiator, with a number for each target, by rank; null on the diagonal.",
    "pairs": "One entry for each ordered pair, with the figures of an initiator.",
    "pairs.initiator": "Rank of the initiator.",
    "pairs.target": "Rank of the target.",
    "pairs.transports": "The transports that carried bytes.",
}
PULL_KEYS = {
    "version": "Version of this format. It changes when the meaning of a key changes.",
    "time": "When the result was made, seconds since 1970.",
    "name": "The inferencer's segment.",
    "host": "Its host.",
    "size": "Bytes of the object.",
    "shards": "Shards of the object.",
    "seconds": "Time of the pull.",
    "throughput": "Bytes that came from others, a second.",
    "sources.*": "Bytes by source.",
    "transports.*": "Transport by source.",
    "wrong": "Shards that did not match their digest, and were fetched again.",
    "failures": "Attempts that failed, and were made again.",
    "config.*": "The flags of the run, by name.",
}
FAN_OUT_KEYS = {
    **{key: PULL_KEYS[key] for key in ("version", "time", "size", "shards", "wrong", "failures")},
    "readers": "Ranks that pulled at the same time.",
    "alone": "Seconds of one reader alone; null with `--noalone`.",
    "seconds.*": "Seconds of the pull, by rank.",
    "served.*": "Bytes that a rank sent to others, by rank. Rank 0 is the publisher.",
    "slowest": "Seconds of the slowest rank.",
    "throughput": "Bytes a second that all readers together received.",
    "seeded": "Bytes that the publisher sent, in objects.",
    "efficiency": "Fan-out efficiency, defined on the [benchmark page](../benchmarks.md); null with `--noalone`.",
}


def pages() -> dict[str, str]:
    """All generated pages, by path below docs/."""
    made = {"api": api(), "cli": command_line(), "environment": environment(), "errors": error_table()}
    made["results"] = results()
    copies = {page: relinked((ROOT / file).read_text(encoding="utf-8"), file, page) for file, page in INCLUDED.items()}
    return {**{f"reference/{name}.md": HEAD + text for name, text in made.items()}, **copies}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to mkdocs' files."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page to files of the repository, as the site has them."""
    path = page.file.src_uri
    return markdown if page.file.generated_by else relinked(markdown, f"docs/{path}", path)


def relinked(text: str, file: str, page: str) -> str:
    """The text of a file of the repository for the site's page: a link to a file that is no page is its words alone."""

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
        to = path.removeprefix("docs/") if path.startswith("docs/") else INCLUDED.get(path, "")
        if to:
            return f"[{words}]({posixpath.relpath(to, posixpath.dirname(page) or '.')}{anchor or ''})"
        return words if (ROOT / path).exists() else match[0]

    return re.sub(r"\[([^\]\n]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)", link, text)


# --- Python API ---------------------------------------------------------------------------------------------------

CLASSES = ("TransferEngine", "Segment", "Batch", "P2PStore", "EmbeddedEtcd", "WorkerPool", "Settings")
RETURNED = {"P2PStore": ("Replica", "Manifest", "ObjectInfo")}  # what their methods return or take
CONSTANTS = {
    "READ": "Value of a request's `opcode`: copy from the segment to local memory.",
    "WRITE": "Value of a request's `opcode`: copy from local memory to the segment.",
    "REQUEST": "The dtype of an array of requests for `TransferEngine.submit`. `target_id` is `Segment.id`. Addresses "
    "are absolute: `local_addr` in this process, `remote_addr` in the peer's. `length` is in bytes.",
}


def api() -> str:
    """A section for each public name: classes first, in the order in which a reader meets them."""
    names = [*CLASSES, *sorted(set(mooncake_hpc.__all__) - {*CLASSES, "errors"})]
    text = (
        "# Python API\n\n`import mooncake_hpc as mh` loads the standard library and numpy only. Each name loads what "
        "it needs when it is first used. Times are in seconds and sizes in bytes, unless a name ends in a unit. "
        "The exceptions are on a page of their own: [Errors](errors.md).\n\n"
    )
    for name in names:
        value = getattr(mooncake_hpc, name)
        if not inspect.isclass(value):
            text += _constant(name, value)
            continue
        text += f"::: mooncake_hpc.{name}\n\n"
        home = sys.modules[value.__module__]
        for other in RETURNED.get(name, ()):
            found = getattr(home, other)
            text += f"::: {found.__module__}.{other}\n\n"
    settings = mooncake_hpc.Settings()
    nested = [value for _, value in _values(settings) if is_dataclass(value)]
    return text + "".join(f"::: {type(value).__module__}.{type(value).__name__}\n\n" for value in nested)


def _constant(name: str, value: Any) -> str:
    text = f"## {name}\n\n{_told(CONSTANTS, name, 'CONSTANTS')}\n\n"
    if (members := getattr(value, "fields", None)) is None:
        return f"{text}Its value is `{value}`.\n\n"
    text += "| field | dtype | offset |\n| --- | --- | --- |\n"
    text += "".join(f"| `{field}` | `{member[0]}` | {member[1]} |\n" for field, member in members.items())
    return f"{text}\nIts size is {value.itemsize} bytes.\n\n"


# --- command line -------------------------------------------------------------------------------------------------


def flag_sets() -> dict[str, Any]:
    """The FlagSet of each subcommand of `mooncake-hpc`."""
    return {name: inspect.unwrap(load()).__globals__["FLAGS"] for name, load in program.COMMANDS.items()}


def command_line() -> str:
    text = (
        "# Command line\n\n`mooncake-hpc COMMAND --help` prints what this page has. `launch/transfer_engine_bench` "
        "is `mooncake-hpc bench`, and `launch/p2p-store-example` is `mooncake-hpc p2p`.\n\n"
        "Flags have the forms of gflags: `--x=1`, `--x 1`, `-x=1`; booleans `--flag`, `--noflag`, `--flag=false`. "
        "The last mention of a flag wins. Every command also takes `--help`, `--version`, `--flagfile=FILE`, "
        "`--fromenv=NAME`, `--tryfromenv=NAME` and `--undefok=NAME`.\n\n"
        "| exit code | meaning |\n| --- | --- |\n"
        "| 0 | The command has done what it was asked for. |\n"
        "| 1 | It failed. The last line names the error; see [Errors](errors.md). |\n"
        "| 2 | A flag or a variable has a value that is not accepted. Nothing was started. |\n"
        "| 3 | It was done, but its output is lost: standard output is closed, broken or full. |\n"
        "| 130 | Ctrl-C. |\n| 143 | SIGTERM. |\n\n"
    )
    for name, flags in flag_sets().items():
        text += f"## mooncake-hpc {name}\n\n{_line(flags.about)}\n\n"
        for title, group in flags.groups.items():
            text += f"### {title} {{: #{name}-{_slug(title)} }}\n\n"
            text += "| flag | type | default | meaning |\n| --- | --- | --- | --- |\n"
            text += "".join(_flag(flag) for flag in group) + "\n"
        if not flags.groups:
            text += "It has no flags of its own.\n\n"
    return text


def _flag(flag: Any) -> str:
    kind = type(flag.default).__name__ + (f", {flag.unit}" if flag.unit else "")
    default = str(flag.default).lower() if isinstance(flag.default, bool) else str(flag.default)
    choices = f" One of {', '.join(f'`{choice}`' for choice in flag.choices if choice)}." if flag.choices else ""
    return f"| `--{flag.name}` | {kind} | {f'`{default}`' if default else ''} | {_line(flag.help)}{choices} |\n"


# --- environment variables ----------------------------------------------------------------------------------------


class _Recorder(dict[str, str]):
    """An empty environment that remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, None] = {}

    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        self.asked[key] = None
        return default

    def __contains__(self, key: object) -> bool:
        self.asked[str(key)] = None
        return False


def variables() -> dict[str, str]:
    """Each variable that Settings reads, and the field that it sets."""
    recorder = _Recorder()
    mooncake_hpc.Settings.from_env(recorder)
    with tempfile.NamedTemporaryFile("w", suffix=".secret") as file:  # of mode 0600
        file.write("x")
        file.flush()
        return {name: _field(name, ("0", "1", "2", "7", "1024", "20000", "x", file.name)) for name in recorder.asked}


def _field(name: str, candidates: tuple[str, ...]) -> str:
    before = dict(_flat(mooncake_hpc.Settings()))
    for text in candidates:
        try:
            after = dict(_flat(mooncake_hpc.Settings.from_env({name: text})))
        except errors.ConfigError:
            continue
        changed = [field for field, value in after.items() if value != before[field]]
        if changed:
            return next((field for field in changed if after[field] == text), changed[0])
    raise LookupError(f"{name} changes no field of Settings")


def _values(settings: Any) -> Iterator[tuple[str, Any]]:
    return ((field.name, getattr(settings, field.name)) for field in fields(settings))


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in _values(settings):
        if is_dataclass(value):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def defaults() -> dict[str, Any]:
    """The default of each field, `rdma.` before those of RDMA."""
    return dict(_flat(mooncake_hpc.Settings()))


def environment() -> str:
    """docs/variables.md with the field of Settings for each variable, and the default that the code has."""
    known, values = variables(), defaults()
    lines = []
    for line in (DOCS / "variables.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        name = re.match(r"`(\w+)`", cells[0]) if cells else None
        if cells and cells[0] == "variable":
            line = "| variable | accepts | default | meaning | field of `Settings` |"
        elif cells and set(cells[0]) <= {"-"}:
            line = "| --- | --- | --- | --- | --- |"
        elif name and name[1] in known:
            field = known[name[1]]
            line = (
                f"| {cells[0]} | {accepted(name[1], values[field])} | {shown(values[field])} | {cells[2]} | `{field}` |"
            )
        elif name:
            line = f"| {cells[0]} | a folder | {cells[1]} | {cells[2]} | |"
        lines.append(line)
    return relinked("\n".join(lines) + "\n", "docs/variables.md", "reference/environment.md")


def accepted(name: str, default: Any) -> str:
    """What values the variable may have, by what the code says of wrong ones."""
    said = []
    for wrong in ("x", "-" + "9" * 30):
        try:
            mooncake_hpc.Settings.from_env({name: wrong})
        except errors.ConfigError as error:
            said.append(str(error))
    text = " ".join(said)
    if limits := re.search(r"is outside (-?\d+) to (\d+)", text):
        high = int(limits[2])
        power = high.bit_length() - 1
        return f"{limits[1]} to {f'2^{power}' if power >= 20 and high == 1 << power else high}"
    if "seconds" in text:
        return "seconds above 0"
    return "0 or 1" if isinstance(default, bool) else "text"


def shown(value: Any) -> str:
    """A default as the table has it."""
    if value is None or value == "" or value == ():
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int) and value >= 1 << 20:
        power = (value.bit_length() - 1) // 10
        return f"{value >> 10 * power} {('', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- errors -------------------------------------------------------------------------------------------------------


def error_classes() -> dict[str, type[Exception]]:
    """Public error classes by name, bases before what derives from them."""
    found = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    return {name: kind for name, kind in found.items() if issubclass(kind, errors.MooncakeError)}


def error_table() -> str:
    text = (
        "# Errors\n\nEvery exception that this package raises on purpose is a `MooncakeError`, and most are also of a "
        "kind that Python has. Its text names the peer, the segment, the device and the address.\n\n"
        "| error | is also | what it means |\n| --- | --- | --- |\n"
    )
    classes = error_classes()
    for name, kind in classes.items():
        bases = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
        text += f"| [`{name}`](#{name.lower()}) | {bases} | {_line(_first_paragraph(kind))} |\n"
    text += "\n"
    for name in classes:
        cause, fix = _told(CAUSES, name, "CAUSES")
        text += f"## {name}\n\n{_line(inspect.getdoc(classes[name]) or '')}\n\n**Cause.** {cause}\n\n**Fix.** {fix}\n\n"
    return text


def _first_paragraph(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0]


# --- JSON results -------------------------------------------------------------------------------------------------


def samples() -> dict[str, tuple[str, Mapping[str, Any], Mapping[str, str]]]:
    """By title: what writes it, an object as the code makes it, and what its keys mean."""
    from mooncake_hpc.bench import matrix, node, plan, report, runner
    from mooncake_hpc.p2p import progress
    from mooncake_hpc.p2p import report as p2p

    config = plan.BenchConfig()
    result = node.Result("h1:12345", ["h0:12345"], runner.Measured(), ["tcp"], {"tcp/h0:12345/0": 1})
    bench = report.json_object(config, [result], 0.0)
    pairs = {(0, 1): result, (1, 0): result}
    square = matrix.Matrix(config, ["h0:12345", "h1:12345"], ["h0", "h1"], pairs).as_json()
    pulled = progress.Progress(1)
    pulled.sources["h0:12345"], pulled.transports["h0:12345"] = 1, "tcp"
    pull = p2p.pull_json("h1:12345", "h1", {"cmd": "inferencer"}, pulled)
    fan_out = p2p.FanOut(1, 1, 1, 1.0, {1: 1.0}, {0: 1}).as_json()
    return {
        "Bench": ("`mooncake-hpc bench --json=FILE`", bench, BENCH_KEYS),
        "Matrix": ("`mooncake-hpc bench --pattern=matrix --json=FILE`", square, MATRIX_KEYS),
        "Pull": ("`mooncake-hpc p2p --cmd=inferencer --json=FILE`", pull, PULL_KEYS),
        "Fan-out": ("`mooncake-hpc p2p --json=FILE` under a launcher", fan_out, FAN_OUT_KEYS),
    }


def keys(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of an object, those of lists' entries without an index."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield f"{prefix}{key}", inner
            yield from keys(inner, f"{prefix}{key}.")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from keys(inner, prefix)


def explained(key: str, known: Mapping[str, str]) -> str:
    """The key of `known` that explains `key`, or "". Figures of an initiator or pair are explained at the top."""
    bare = key.removeprefix("initiators.").removeprefix("pairs.")
    for name in (key, bare):
        for candidate in (name, *(f"{name.rsplit('.', n)[0]}.*" for n in range(1, name.count(".") + 1))):
            if candidate in known:
                return candidate
    return bare if bare.split(".")[0] in {name.split(".")[0] for name in BENCH_KEYS} and bare != key else ""


def results() -> str:
    text = (
        "# JSON results\n\nA command with `--json=FILE` appends its result as one line of JSON. Units are bytes and "
        "seconds, and microseconds in names that end in `_us`.\n\n"
    )
    for title, (command, sample, known) in samples().items():
        text += f"## {title}\n\n{command} writes it.\n\n| key | type | meaning |\n| --- | --- | --- |\n"
        rows: dict[str, str] = {}
        for key, value in keys(sample):
            name = explained(key, known)
            if name in known and (name == key or name.endswith(".*")):
                rows.setdefault(name, _type(value) if name == key else "object")
        text += "".join(f"| `{name}` | {kind} | {known[name]} |\n" for name, kind in rows.items()) + "\n"
    return text


def _type(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "text", list: "list", dict: "object"}
    return names.get(type(value), "null")


def _told(texts: Mapping[str, Any], name: str, table: str) -> Any:
    if name not in texts:
        raise LookupError(f"{name} is missing in {table} of docs/generate.py")
    return texts[name]


def _line(text: str) -> str:
    """One line that is safe in a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")


if __name__ == "__main__":
    for path, page in pages().items():
        print(f"--- {path}\n{page}")
