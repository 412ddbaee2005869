"""--out touches only what this program has made: what else lies in its way stays, and an error names it."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, clean_env
from test_files import stop_a_pull
from test_store import SHARD, Open, content, opener, slow_sources  # noqa: F401 - fixtures

from mooncake_hpc.core.errors import MetadataError, P2PError
from mooncake_hpc.core.filelock import FileLock
from mooncake_hpc.p2p import P2PStore
from mooncake_hpc.p2p.fetch_files import fetch_path
from mooncake_hpc.p2p.folder import OPEN_FILES, Folder
from mooncake_hpc.p2p.manifest import FOLDER, Manifest, Part
from mooncake_hpc.p2p.partial import MARK
from mooncake_hpc.p2p.places import plan
from mooncake_hpc.p2p.register_files import register_path

pytestmark = pytest.mark.slow


def snapshot(root: Path) -> dict[str, object]:
    """All that lies there: what it is, where it leads, what it holds."""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            inside = os.readlink(path) if path.is_symlink() else path.read_bytes() if stat.S_ISREG(mode) else None
            found[str(path.relative_to(root))] = stat.filemode(mode), path.lstat().st_ino, inside
    return found


@pytest.fixture
def stores(opener: Open, tmp_path: Path) -> tuple[P2PStore, P2PStore]:  # noqa: F811
    """A trainer with an object "folder" of two files and "file" of one, and a reader."""
    trainer, reader = opener(), opener()
    model = tmp_path / "model"
    model.mkdir()
    (model / "f1").write_bytes(content(20 * SHARD, 1).tobytes())
    (model / "f2").write_bytes(content(100, 2).tobytes())
    register_path(trainer, "folder", str(model), shard_size=SHARD)
    register_path(trainer, "file", str(model / "f1"), shard_size=SHARD)
    return trainer, reader


def pull(store: P2PStore, name: str, out: Path | str, **options: bool) -> None:
    fetch_path(store, name, str(out), timeout=60, **options)
    store.delete_replica(name)


def a_folder(at: Path) -> None:
    (at / "results").mkdir(parents=True)
    (at / "results" / "thesis.txt").write_text("years of work")


def a_link_to_a_folder(at: Path) -> None:
    a_folder(at.with_name("backup"))
    at.symlink_to("backup")


def a_link_to_a_file(at: Path) -> None:
    at.with_name("victim").write_text("victim")
    at.symlink_to("victim")


def a_dangling_link(at: Path) -> None:
    at.symlink_to("nowhere")


def a_socket(at: Path) -> None:
    here = Path.cwd()
    os.chdir(at.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(at.name)
    os.chdir(here)


def a_device(at: Path) -> None:
    if os.geteuid():
        pytest.skip("hardware: needs root to make a device node")
    os.mknod(at, 0o666 | stat.S_IFCHR, os.makedev(1, 3))


def a_file(at: Path) -> None:
    at.write_text("half a download of another program")


THINGS = [a_folder, a_link_to_a_folder, a_link_to_a_file, a_dangling_link, a_socket, a_device, os.mkfifo]
OF_OTHERS = [*THINGS, a_file, os.mkdir]


@pytest.mark.parametrize("make", OF_OTHERS)
def test_a_partial_of_somebody_elses_stays(
    stores: tuple[P2PStore, P2PStore], tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "out.partial")
    before = snapshot(tmp_path)
    for name in ("folder", "file"):
        for overwrite in (False, True):
            with pytest.raises(P2PError, match=r"/out\.partial, where .*/out is to grow, is a"):
                pull(stores[1], name, tmp_path / "out", overwrite=overwrite)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("make", THINGS)
def test_what_is_no_plain_file_is_not_replaced(
    stores: tuple[P2PStore, P2PStore], tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "out")
    before = snapshot(tmp_path)
    for name in ("folder", "file"):
        for overwrite in (False, True):
            with pytest.raises(P2PError, match=r"/out is a"):
                pull(stores[1], name, tmp_path / "out", overwrite=overwrite)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("out", ["", ".", "..", "/", "a/..", "/proc/self/fd", "a\0b"])
def test_places_without_a_name(stores: tuple[P2PStore, P2PStore], tmp_path: Path, out: str) -> None:
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        for name in ("folder", "file"):
            with pytest.raises(P2PError):
                pull(stores[1], name, out, overwrite=True)
    finally:
        os.chdir(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_empty_folder_and_a_plain_file_are_replaced(stores: tuple[P2PStore, P2PStore], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(P2PError, match="the object a file"):
        pull(stores[1], "file", tmp_path / "out", overwrite=True)
    pull(stores[1], "folder", tmp_path / "out")
    a_file(tmp_path / "one")
    os.link(tmp_path / "one", tmp_path / "other name")
    with pytest.raises(P2PError, match="the object a folder"):
        pull(stores[1], "folder", tmp_path / "one", overwrite=True)
    pull(stores[1], "file", tmp_path / "one", overwrite=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "model" / "f1").read_bytes()
    assert (tmp_path / "other name").read_text() == "half a download of another program"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "other name", "out"]


def test_a_place_that_is_taken_meanwhile(
    stores: tuple[P2PStore, P2PStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and the move: a file is not replaced, nor a folder that is not empty."""
    for name, make in (("file", a_file), ("folder", a_folder)):
        fsync = os.fsync

        def then(fd: int, make: Callable[[Path], object] = make, fsync: Callable[[int], None] = fsync) -> None:
            monkeypatch.undo()
            make(tmp_path / "out")
            fsync(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(P2PError, match="/out"):
            fetch_path(
                stores[1], name, str(tmp_path / "out"), timeout=60,
                progress=lambda p, then=then: p.done == p.size and monkeypatch.setattr(os, "fsync", then),
            )  # fmt: skip
        assert snapshot(tmp_path / "out") or (tmp_path / "out").read_text().startswith("half")
        os.rename(tmp_path / "out", tmp_path / f"kept-{name}")
        pull(stores[1], name, tmp_path / f"out-{name}")
        shutil.rmtree(tmp_path / "out.partial")


def test_a_pull_goes_on_with_another_version(
    opener: Open,  # noqa: F811
    tmp_path: Path,
    slow_sources: None,  # noqa: F811
) -> None:
    """Files that only the old version had go; what the user has put there is named, and nothing is removed."""
    trainer, reader = opener(), opener()
    model, out = tmp_path / "model", tmp_path / "out"
    (model / "old").mkdir(parents=True)
    for name in ("a", "old/b"):
        (model / name).write_bytes(content(10 * SHARD, len(name)).tobytes())
    register_path(trainer, "o", str(model), shard_size=SHARD)
    stop_a_pull(reader, "o", out, shards=3)
    os.rename(model / "old", model / "new")
    (model / "c").write_bytes(b"c")
    register_path(trainer, "o", str(model), shard_size=SHARD, force=True)
    notes = tmp_path / "out.partial" / "content" / "old" / "notes"
    notes.write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(P2PError, match=r"content/old/notes is not of this program"):
        fetch_path(reader, "o", str(out), timeout=60)
    assert snapshot(tmp_path) == before
    notes.unlink()
    replica = fetch_path(reader, "o", str(out), timeout=60)
    assert replica.progress.resumed >= SHARD, "what the versions have in common"
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == ["a", "c", "new", "new/b"]
    assert (out / "new" / "b").read_bytes() == (model / "new" / "b").read_bytes()


@pytest.mark.parametrize("make", [a_link_to_a_file, os.mkfifo, a_dangling_link])
def test_links_where_an_earlier_pull_has_left_files(
    stores: tuple[P2PStore, P2PStore],
    tmp_path: Path,
    slow_sources: None,  # noqa: F811
    make: Callable[[Path], object],
) -> None:
    stop_a_pull(stores[1], "folder", tmp_path / "out")
    (tmp_path / "out.partial" / "content" / "f1").unlink()
    make(tmp_path / "out.partial" / "content" / "f1")
    before = snapshot(tmp_path)
    with pytest.raises(P2PError, match=r"content/(f1|victim) is .*not of this program"):
        pull(stores[1], "folder", tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_other_names_of_what_an_earlier_pull_has_left(
    stores: tuple[P2PStore, P2PStore],
    tmp_path: Path,
    slow_sources: None,  # noqa: F811
) -> None:
    stop_a_pull(stores[1], "folder", tmp_path / "out")
    made = tmp_path / "out.partial" / "content" / "f2"
    made.unlink()
    (tmp_path / "precious").write_text("precious")
    os.link(tmp_path / "precious", made)
    (tmp_path / "out.partial" / "content" / "f1").chmod(0o444)
    pull(stores[1], "folder", tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "out" / "f2").read_bytes() == (tmp_path / "model" / "f2").read_bytes()


def test_a_folder_that_is_swapped_for_a_link_is_not_followed(tmp_path: Path) -> None:
    """Every name on the way is opened by itself."""
    (tmp_path / "ours" / "sub").mkdir(parents=True)
    (tmp_path / "theirs").mkdir()
    folder = Folder(os.open(tmp_path / "ours", os.O_RDONLY | os.O_DIRECTORY), tmp_path / "ours")
    try:
        os.write(folder.file(("sub", "a")), b"x")
        for number in range(OPEN_FILES):
            folder.file((f"{number}",))
        os.rename(tmp_path / "ours" / "sub", tmp_path / "ours" / "before")
        (tmp_path / "ours" / "sub").symlink_to(tmp_path / "theirs")
        for names in (("sub", "a"), ("sub", "b")):
            with pytest.raises(OSError):
                folder.file(names)
        with pytest.raises(OSError):
            folder.make_folders(("sub", "c"))
        os.unlink(tmp_path / "ours" / "sub")
        (tmp_path / "ours" / "sub").mkdir()
        (tmp_path / "ours" / "sub" / "a").write_bytes(b"another file")
        with pytest.raises(P2PError, match=r"sub/a is not the file"):
            folder.file(("sub", "a"))
    finally:
        folder.close()
    assert list((tmp_path / "theirs").iterdir()) == []


def test_marks_that_are_none(
    stores: tuple[P2PStore, P2PStore],
    tmp_path: Path,
    slow_sources: None,  # noqa: F811
) -> None:
    stop_a_pull(stores[1], "file", tmp_path / "out")
    mark = tmp_path / "out.partial" / MARK
    good = mark.read_text()
    others = ["", "{}", "[]", "null", "[" * 100_000, good.replace("mooncake-hpc", "curl"), good[:-5]]
    for text in [*others, good.replace('[["content"]]', '[["content", 5]]')]:
        mark.write_text(text)
        with pytest.raises(P2PError, match="without this program's mark"):
            pull(stores[1], "file", tmp_path / "out")
    mark.rename(tmp_path / "mark")
    (tmp_path / "mark").write_text(good)
    mark.symlink_to(tmp_path / "mark")
    with pytest.raises(P2PError, match="without this program's mark"):
        pull(stores[1], "file", tmp_path / "out")
    mark.unlink()
    mark.write_text(good)
    (tmp_path / "out.partial").chmod(0o777)
    with pytest.raises(P2PError, match="mode 777"):
        pull(stores[1], "file", tmp_path / "out")
    (tmp_path / "out.partial").chmod(0o700)
    if os.geteuid() == 0:
        os.chown(tmp_path / "out.partial", 12345, -1)
        with pytest.raises(P2PError, match="user 12345"):
            pull(stores[1], "file", tmp_path / "out")
        os.chown(tmp_path / "out.partial", 0, -1)
    pull(stores[1], "file", tmp_path / "out")


def test_one_writer_at_a_time(
    stores: tuple[P2PStore, P2PStore],
    tmp_path: Path,
    slow_sources: None,  # noqa: F811
) -> None:
    stop_a_pull(stores[1], "file", tmp_path / "out")
    with (
        FileLock(tmp_path / "out.partial" / ".lock"),
        pytest.raises(P2PError, match=r"out\.partial is being written by another process"),
    ):
        pull(stores[1], "file", tmp_path / "out")
    pull(stores[1], "file", tmp_path / "out")


def manifest(*names: str, size: int = 0) -> Manifest:
    return Manifest("m", "v", (size,) * len(names), 1, "sha256", b"", FOLDER, tuple(Part(name) for name in names))


@pytest.mark.parametrize(
    "names",
    [
        ["../a"], ["/a"], ["a/../b"], ["."], ["./a"], ["a//b"], [""], ["/"], ["a\0b"], ["x" * 256], ["ü" * 128],
        ["d/" * 2100 + "a"], ["a", "a"], ["a", "a/b"], ["a/b", "a"], ["a", "a/"], ["a/", "a/"], ["\ud800"], ["a/b/.."],
    ],
)  # fmt: skip
def test_names_that_cannot_be(names: list[str]) -> None:
    with pytest.raises(MetadataError, match="object 'm': "):
        plan(manifest(*names), "top")


def test_names_that_can_be() -> None:
    names = ["a", "sub/", "sub/b", "…", "x" * 255, "\udcff", "a\nb", " ", "...", ".hidden/..x", "ab/c/d", "ab/c/e/"]
    folders, files = plan(manifest(*names), "top")
    assert [place.names for place in files] == [("top", *name.split("/")) for name in names if not name.endswith("/")]
    assert folders == [("top",), ("top", "sub"), ("top", "ab", "c", "e")]
    with pytest.raises(MetadataError, match="folder 'a/' has 5 bytes"):
        plan(manifest("a/", size=5), "top")
    with pytest.raises(MetadataError, match="0 names for 1"):
        plan(Manifest("m", "v", (0,), 1, "sha256", b"", FOLDER), "top")


def test_a_file_system_that_takes_two_names_for_one(tmp_path: Path) -> None:
    """As one that does not tell upper from lower case."""
    folder = Folder(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), tmp_path)
    try:
        folder.file(("a",))
        folder._known["A",] = folder._known["a",]
        os.link(tmp_path / "a", tmp_path / "A")
        with pytest.raises(P2PError, match="one file"):
            folder.file(("A",))
    finally:
        folder.close()


PULL = """
import os, resource, sys
from mooncake_hpc.p2p import P2PStore
from mooncake_hpc.p2p.fetch_files import fetch_path
from mooncake_hpc.p2p.register_files import register_path
limit, model, out = int(sys.argv[1]), *sys.argv[2:]
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
with P2PStore("127.0.0.1:1", "memory://m", protocol="tcp") as trainer, \\
     P2PStore("127.0.0.1:2", "memory://m", protocol="tcp") as reader:
    register_path(trainer, "o", model)
    fetch_path(reader, "o", out, timeout=60)
assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limit
"""


@pytest.mark.parametrize("prelude", [[], [str(ROOT / "tests" / "no_flock.py"), sys.executable, "-P"]])
def test_more_files_than_a_process_may_open(tmp_path: Path, prelude: list[str]) -> None:
    """Where there is flock(2), and where there is none."""
    files = {f"sub{number % 7}/__{number}_0.distcp": f"{number}".encode() * (number % 50) for number in range(300)}
    for name, data in files.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    words = ["-c", PULL, "64", str(tmp_path / "model"), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, *(prelude or ["-P"]), *words], env=clean_env(), capture_output=True, text=True
    )
    if done.returncode == 77:
        pytest.skip("hardware: this kernel has no seccomp filters")
    assert done.returncode == 0, done.stderr
    found = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*.distcp")}
    assert found == files and sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
