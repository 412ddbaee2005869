"""Objects pulled into files and folders: written beside their place, and moved into it once they are whole.

A pull to PATH writes each verified shard to PATH.partial, so that one which was stopped goes on where it was: what lies
there is trusted as far as its digests match. Once all is there it is flushed to disk (fsync) and moved to PATH.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from mooncake_hpc.errors import MetadataError, P2PError
from mooncake_hpc.p2p.buffers import digest_all
from mooncake_hpc.p2p.holders import Bits
from mooncake_hpc.p2p.layout import Bytes, Memory
from mooncake_hpc.p2p.manifest import FILE, FOLDER, UNVERIFIED, Manifest
from mooncake_hpc.p2p.progress import OnProgress
from mooncake_hpc.p2p.replicating import Replica
from mooncake_hpc.p2p.store import P2PStore

CHUNK = 64 << 20  # bytes of one write: Ctrl-C is noticed between two


def fetch_path(
    store: P2PStore,
    name: str,
    path: str,
    *,
    wait: float = 0.0,
    timeout: float | None = None,
    progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
    overwrite: bool = False,
) -> Replica:
    """Pull an object into a file, or into a folder if it was one. Goes on where an earlier call was stopped.

    A file that is there already is replaced, once the new one is whole, with `overwrite` only; a folder must be
    empty. Raises P2PError where the place is taken, cannot be written or has no room, and as `P2PStore.get_replica`.
    """
    target = _Target(Path(path), overwrite)
    target.check_free()
    stop = cancel or threading.Event()
    try:
        replica = store.get_replica(
            name,
            wait=wait,
            timeout=timeout,
            progress=progress,
            cancel=stop,
            have=lambda manifest, arrays: target.open(manifest, arrays, stop),
            on_shard=lambda _manifest, shard: target.write(shard),
        )
        if replica.manifest.algorithm == UNVERIFIED:  # the original's: all of it is here, nothing written yet
            _write_all(store, name, replica, target, stop)
    except BaseException:
        target.abandon()
        raise
    try:
        target.finish()
    except BaseException:
        store.delete_replica(name)
        raise
    return replica


def _write_all(store: P2PStore, name: str, replica: Replica, target: _Target, stop: threading.Event) -> None:
    try:
        target.open(replica.manifest, replica.arrays, stop)
    except BaseException:
        store.delete_replica(name)
        raise
    for shard in range(replica.manifest.shards):
        target.write(shard)


@dataclass(slots=True)
class _Slot:
    """A file that holds bytes `begin` to `end` of the object."""

    path: Path
    begin: int
    end: int
    mode: int
    fd: int = -1


class _Target:
    """The files of one object under way, and the thread that writes them."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        self._path, self._overwrite = path, overwrite
        self._partial = path.with_name(path.name + ".partial")
        self._folders: list[Path] = []
        self._slots: list[_Slot] = []
        self._shards: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mooncake-p2p-files", daemon=True)
        self._error: OSError | None = None
        self._stop: threading.Event | None = None
        self._lock = -1

    def check_free(self) -> None:
        """Raise P2PError where a file is in our place that is to stay."""
        if self._path.is_file() and not self._overwrite:
            raise P2PError(f"{self._path} exists: choose another place, or replace it (overwrite=True, --overwrite)")

    def open(self, manifest: Manifest, arrays: Sequence[Bytes], stop: threading.Event) -> Bits:
        """Make the files, and load what is there already: the shards that are right. Raises P2PError."""
        self._manifest, self._memory, self._stop = manifest, Memory(arrays), stop
        folder = manifest.kind == FOLDER
        self.check_free()
        if self._path.is_dir() and (not folder or any(self._path.iterdir())):
            raise P2PError(f"{self._path} is a folder" + (" that is not empty" if folder else ", the object a file"))
        if folder and self._path.is_file():
            raise P2PError(f"{self._path} is a file, the object a folder")
        self._folders, self._slots = self._plan(folder)
        try:
            self._make(folder)
            have = self._load(arrays)
        except OSError as error:
            raise P2PError(_explain(error, self._partial, manifest.size)) from error
        self._thread.start()
        return have

    def _plan(self, folder: bool) -> tuple[list[Path], list[_Slot]]:
        """Empty folders to make, and files."""
        manifest = self._manifest
        if not folder:
            mode = manifest.parts[0].mode if manifest.kind == FILE and manifest.parts else 0
            return [], [_Slot(self._partial, 0, manifest.size, mode)]
        folders, slots, at = [], [], 0
        for part, size in zip(manifest.parts, manifest.sizes, strict=True):
            relative = PurePosixPath(part.name)
            if relative.is_absolute() or ".." in relative.parts or not relative.parts:
                raise MetadataError(f"object {manifest.name!r}: {part.name!r} leads out of the folder")
            if part.name.endswith("/"):
                folders.append(self._partial / relative)
            else:
                slots.append(_Slot(self._partial / relative, at, at + size, part.mode))
            at += size
        return folders, slots

    def _make(self, folder: bool) -> None:
        if folder:
            self._partial.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._partial, os.O_RDONLY | os.O_DIRECTORY)
            self._seize()
            ours = {slot.path for slot in self._slots}
            for path in self._partial.rglob("*"):
                if not path.is_dir() and path not in ours:
                    path.unlink()  # of another version
        for path in self._folders:
            path.mkdir(parents=True, exist_ok=True)
        for slot in self._slots:
            slot.path.parent.mkdir(parents=True, exist_ok=True)
            slot.fd = os.open(slot.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if not folder:
                self._lock = os.dup(slot.fd)
                self._seize()
            if os.fstat(slot.fd).st_size != slot.end - slot.begin:
                os.ftruncate(slot.fd, 0)
                if slot.end > slot.begin:
                    os.posix_fallocate(slot.fd, 0, slot.end - slot.begin)

    def _seize(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise P2PError(f"{self._partial} is being written by another process") from None

    def _load(self, arrays: Sequence[Bytes]) -> Bits:
        """Read all files into memory; which shards are right."""
        manifest = self._manifest
        have = np.zeros(manifest.shards, bool)
        if manifest.algorithm == UNVERIFIED or not any(_has_data(slot.fd) for slot in self._slots):
            return have
        for slot in self._slots:
            for fd, at, view in self._extents(slot.begin, slot.end, [slot]):
                os.preadv(fd, [view.data], at)
        found = digest_all(self._memory, manifest.shard_size, manifest.algorithm)
        length = len(manifest.digests) // max(1, manifest.shards)
        for shard in range(manifest.shards):
            have[shard] = found[shard * length : (shard + 1) * length] == manifest.digest(shard)
        return have

    def _extents(self, begin: int, end: int, slots: Sequence[_Slot]) -> Iterator[tuple[int, int, Bytes]]:
        """(descriptor, offset, bytes in memory) of the object's bytes from `begin` to `end`, none above CHUNK."""
        for slot in slots:
            low, high = max(begin, slot.begin), min(end, slot.end)
            for at in range(low, high, CHUNK):
                position = at - slot.begin
                for view in self._memory.views(at, min(at + CHUNK, high)):
                    yield slot.fd, position, view
                    position += view.nbytes

    def write(self, shard: int) -> None:
        """Write a verified shard, soon."""
        self._shards.put(shard)

    def _run(self) -> None:
        while (shard := self._shards.get()) is not None:
            try:
                for fd, at, view in self._extents(*self._manifest.span(shard), self._slots):
                    _write(fd, view, at)
            except OSError as error:
                self._error = error
                if self._stop is not None:
                    self._stop.set()
                return

    def finish(self) -> None:
        """Flush everything to disk and move it into place. Raises P2PError."""
        try:
            self._end_writing()
            for slot in self._slots:
                _set_mode(slot)
                os.fsync(slot.fd)
            for folder in sorted({slot.path.parent for slot in self._slots}, reverse=True):
                _sync_folder(folder)
            os.replace(self._partial, self._path)
            _sync_folder(self._path.absolute().parent)
        except OSError as error:
            raise P2PError(_explain(error, self._path, self._manifest.size)) from error
        finally:
            self._close()

    def abandon(self) -> None:
        """Keep what is there for another time."""
        try:
            self._end_writing()
        finally:
            self._close()

    def _end_writing(self) -> None:
        self._shards.put(None)
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            raise P2PError(_explain(self._error, self._partial, self._manifest.size)) from self._error

    def _close(self) -> None:
        for fd in [slot.fd for slot in self._slots if slot.fd >= 0] + ([self._lock] if self._lock >= 0 else []):
            os.close(fd)
        self._slots, self._lock = [], -1


def _has_data(fd: int) -> bool:
    try:
        return os.lseek(fd, 0, os.SEEK_DATA) >= 0
    except OSError:
        return False  # a hole from end to end


def _set_mode(slot: _Slot) -> None:
    """Give a file the permissions that it had with the trainer, as far as our umask allows."""
    made = os.fstat(slot.fd).st_mode & 0o666
    if slot.mode:
        os.fchmod(slot.fd, slot.mode & (made | (made & 0o444) >> 2))


def _write(fd: int, view: Bytes, at: int) -> None:
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done:].data, at + done)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explain(error: OSError, path: Path, size: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with contextlib.suppress(OSError):
            room = os.statvfs(path.absolute().parent)
            return f"{path}: no room for {size} bytes, {room.f_bavail * room.f_frsize} are free ({error})"
    return f"{path} cannot be written: {error}"
