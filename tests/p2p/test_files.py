"""Real files and folders through the P2P Store: what arrives, what is resumed, what is refused."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from test_store import SHARD, Open, content, opener, slow_sources  # noqa: F401 - fixtures

from mooncake_hpc.core.errors import P2PError, TransferCancelled
from mooncake_hpc.p2p import P2PStore, register_files
from mooncake_hpc.p2p.fetch_files import fetch_path
from mooncake_hpc.p2p.progress import Progress
from mooncake_hpc.p2p.register_files import register_path


def make_folder(root: Path) -> dict[str, bytes]:
    files = {"a.safetensors": 3 * SHARD + 5, "b.safetensors": 100, "sub/c.json": 7, "empty": 0}
    for name, size in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content(size, size).tobytes())
    return {name: (root / name).read_bytes() for name in files}


def stop_a_pull(store: P2PStore, name: str, out: Path, shards: int = 1) -> None:
    """Pull into `out`, and stop when so many shards are there; the sources must be slow."""
    cancel = threading.Event()

    def stop(progress: Progress) -> None:
        if progress.shards_done >= shards:
            cancel.set()

    with pytest.raises(TransferCancelled):
        fetch_path(store, name, str(out), cancel=cancel, progress=stop, timeout=60)


def test_files_and_folders(opener: Open, tmp_path: Path) -> None:  # noqa: F811
    trainer, reader = opener("auto"), opener("auto")
    files = make_folder(tmp_path / "model")
    register_path(trainer, "folder", str(tmp_path / "model"), shard_size=SHARD)
    register_path(trainer, "file", str(tmp_path / "model" / "a.safetensors"), shard_size=SHARD)
    (tmp_path / "model" / "a.safetensors").write_bytes(b"")  # what was published stays
    fetch_path(reader, "folder", str(tmp_path / "out"), timeout=60)
    assert {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*.*")} | {
        "empty": (tmp_path / "out" / "empty").read_bytes()
    } == files
    fetch_path(reader, "file", str(tmp_path / "one"), timeout=60)
    assert (tmp_path / "one").read_bytes() == files["a.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "one", "out"]


def test_a_stopped_pull_goes_on(opener: Open, tmp_path: Path, slow_sources: None) -> None:  # noqa: F811
    trainer, reader = opener(), opener()
    data = content(20 * SHARD)
    trainer.register("o", data, shard_size=SHARD)
    out = tmp_path / "o"
    stop_a_pull(reader, "o", out)
    assert not out.exists()
    replica = fetch_path(reader, "o", str(out), timeout=60)
    assert replica.progress.resumed >= SHARD
    assert sum(replica.progress.sources.values()) == data.nbytes - replica.progress.resumed
    assert out.read_bytes() == data.tobytes() and not list(tmp_path.glob("*.partial"))


def test_what_lies_there_is_trusted_as_far_as_it_is_right(
    opener: Open,  # noqa: F811
    tmp_path: Path,
    slow_sources: None,  # noqa: F811
) -> None:
    trainer, reader = opener(), opener()
    data = content(8 * SHARD)
    trainer.register("o", data, shard_size=SHARD)
    stop_a_pull(reader, "o", tmp_path / "o")
    wrong = data.copy()
    wrong[3 * SHARD] ^= 1
    (tmp_path / "o.partial" / "content").write_bytes(wrong.tobytes())
    replica = fetch_path(reader, "o", str(tmp_path / "o"), timeout=60)
    assert replica.progress.resumed == 7 * SHARD and (tmp_path / "o").read_bytes() == data.tobytes()


def test_places_that_cannot_be_written(opener: Open, tmp_path: Path) -> None:  # noqa: F811
    trainer, reader = opener(), opener()
    make_folder(tmp_path / "model")
    register_path(trainer, "folder", str(tmp_path / "model"))
    trainer.register("o", content(SHARD))
    (tmp_path / "file").write_bytes(b"x")
    for name, place in (("folder", "model"), ("folder", "file"), ("o", "model"), ("o", "file/o")):
        with pytest.raises(P2PError, match="/" + place.split("/")[0]):
            fetch_path(reader, name, str(tmp_path / place), timeout=60)
    with pytest.raises(P2PError, match="neither"):
        register_path(trainer, "x", str(tmp_path / "nothing"))


def test_permissions_and_empty_folders(opener: Open, tmp_path: Path) -> None:  # noqa: F811
    """Permissions as far as the reader's umask allows; what the folder cannot keep is refused, not lost."""
    trainer, reader = opener(), opener()
    make_folder(tmp_path / "model")
    modes = {"a.safetensors": 0o640, "b.safetensors": 0o444, "sub/c.json": 0o755, "empty": 0o4777}
    for name, mode in modes.items():
        (tmp_path / "model" / name).chmod(mode)
    (tmp_path / "model" / "none" / "none").mkdir(parents=True)
    register_path(trainer, "folder", str(tmp_path / "model"), shard_size=SHARD)
    register_path(trainer, "file", str(tmp_path / "model" / "sub" / "c.json"))
    before = os.umask(0o027)
    try:
        fetch_path(reader, "folder", str(tmp_path / "out"), timeout=60)
        fetch_path(reader, "file", str(tmp_path / "script"), timeout=60)
    finally:
        os.umask(before)
    found = {name: stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in modes}
    assert found == {name: mode & 0o750 for name, mode in modes.items()}
    assert stat.S_IMODE((tmp_path / "script").stat().st_mode) == 0o750
    assert (tmp_path / "out" / "none" / "none").is_dir()
    for odd in (tmp_path, tmp_path / "nowhere"):
        (tmp_path / "model" / "link").symlink_to(odd)
        with pytest.raises(P2PError, match="model/link is neither"):
            register_path(trainer, "odd", str(tmp_path / "model"))
        (tmp_path / "model" / "link").unlink()
    only = tmp_path / "only"
    (only / "folders").mkdir(parents=True)
    with pytest.raises(P2PError, match="holds no file"):
        register_path(trainer, "odd", str(only))


def test_a_file_that_is_there_stays_unless_it_may_be_replaced(opener: Open, tmp_path: Path) -> None:  # noqa: F811
    trainer, reader = opener(), opener()
    data = content(3 * SHARD)
    trainer.register("o", data)
    out = tmp_path / "o"
    out.write_bytes(b"precious")
    with pytest.raises(P2PError, match=r"/o exists.*--overwrite"):
        fetch_path(reader, "o", str(out), timeout=60)
    with pytest.raises(P2PError, match="/o exists"):  # at once: it does not wait for the object to appear
        fetch_path(reader, "later", str(out), wait=60)
    assert out.read_bytes() == b"precious" and [path.name for path in tmp_path.iterdir()] == ["o"]
    fetch_path(reader, "o", str(out), timeout=60, overwrite=True)
    assert out.read_bytes() == data.tobytes()


def test_files_that_vanish_or_shrink(opener: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    trainer, reader = opener(), opener()
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(content(3 * SHARD).tobytes())
    found = register_files._files

    def then(spoil: Any) -> None:
        monkeypatch.setattr(register_files, "_files", lambda root: [found(root), spoil()][0])

    then(lambda: (tmp_path / "a").unlink())
    with pytest.raises(P2PError, match="/a"):
        register_path(trainer, "folder", str(tmp_path))
    stat = os.stat
    monkeypatch.undo()

    def larger(path: Any, **options: Any) -> os.stat_result:
        real = stat(path, **options)
        return os.stat_result([*real[:6], real.st_size + 5, *real[7:]]) if str(path).endswith("/b") else real

    monkeypatch.setattr(os, "stat", larger)
    with pytest.raises(P2PError, match="shorter"):
        register_path(trainer, "b", str(tmp_path / "b"))
    monkeypatch.undo()
    assert trainer.list() == []
    register_path(trainer, "b", str(tmp_path / "b"))
    (tmp_path / "b").write_bytes(b"")  # what is served is a copy
    fetch_path(reader, "b", str(tmp_path / "out"), timeout=60)
    assert (tmp_path / "out").read_bytes() == content(3 * SHARD).tobytes()


def test_no_room_on_disk(opener: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A small file system: full from the start, and full in the middle for one that allocates nothing in advance."""
    if os.geteuid():
        pytest.skip("hardware: needs root to mount a small file system")
    trainer, reader = opener(), opener()
    data = content(40 * SHARD)
    trainer.register("o", data, shard_size=SHARD)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=True)
    try:
        with pytest.raises(P2PError, match=f"no room for {data.nbytes} bytes"):
            fetch_path(reader, "o", str(small / "out"), timeout=60)
        monkeypatch.setattr(os, "posix_fallocate", lambda fd, at, length: os.ftruncate(fd, at + length))
        with pytest.raises(P2PError, match=os.strerror(errno.ENOSPC)):
            fetch_path(reader, "o", str(small / "out"), timeout=60)
        assert not (small / "out").exists()
        assert reader.list()[0].holders.keys() == {trainer.name}
        for left in small.iterdir():
            shutil.rmtree(left)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    fetch_path(reader, "o", str(tmp_path / "out"), timeout=60)
    assert (tmp_path / "out").read_bytes() == data.tobytes()
