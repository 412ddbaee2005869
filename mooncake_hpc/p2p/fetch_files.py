"""Objects pulled into files and folders: written beside their place, and moved into it once they are whole.

A pull to PATH writes each verified shard to PATH.partial (`partial.py`), so that one which was stopped goes on where it
was: what lies there is trusted as far as its digests match. Once all is there it is flushed to disk (fsync) and moved
to PATH.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mooncake_hpc.core.errors import P2PError
from mooncake_hpc.p2p.buffers import digest_all
from mooncake_hpc.p2p.folder import ancestors
from mooncake_hpc.p2p.layout import Bytes, Memory
from mooncake_hpc.p2p.manifest import FOLDER, UNVERIFIED, Manifest
from mooncake_hpc.p2p.partial import CONTENT, Partial
from mooncake_hpc.p2p.peer_state import Bits
from mooncake_hpc.p2p.places import Place, plan
from mooncake_hpc.p2p.progress import OnProgress
from mooncake_hpc.p2p.replication import Replica
from mooncake_hpc.p2p.store import P2PStore

CHUNK = 64 << 20  # bytes of one write: Ctrl-C is noticed between two
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


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

    A plain file that is there already is replaced, once the new one is whole, with `overwrite` only; a folder must be
    empty; links, devices, FIFOs and sockets stay as they are. Raises P2PError where the place is taken, cannot be
    written or has no room, MetadataError for names of files that cannot be, and as `P2PStore.get_replica`.
    """
    target = _Target(path, overwrite)
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


class _Target:
    """The files of one object under way, and the thread that writes them."""

    def __init__(self, path: str, overwrite: bool) -> None:
        self._partial, self._overwrite = Partial(path), overwrite
        self._places: list[Place] = []
        self._size = 0  # bytes of the object
        self._shards: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mooncake-p2p-files", daemon=True)
        self._error: Exception | None = None
        self._stop: threading.Event | None = None

    def check_free(self) -> None:
        """Raise P2PError where something is in our place that is to stay."""
        with self._explained(self._partial.out):
            self._partial.check(self._overwrite)

    def open(self, manifest: Manifest, arrays: Sequence[Bytes], stop: threading.Event) -> Bits:
        """Make the files, and load what is there already: the shards that are right. Raises P2PError, MetadataError."""
        self._manifest, self._memory, self._stop, self._size = manifest, Memory(arrays), stop, manifest.size
        self._is_folder = manifest.kind == FOLDER
        self._folders, self._places = plan(manifest, CONTENT)
        with self._explained(self._partial.path):
            self._partial.check(self._overwrite, self._is_folder)
            self._partial.enter()
            self._make()
            have = self._load()
        self._thread.start()
        return have

    def _make(self) -> None:
        files, self._tree = [place.names for place in self._places], self._partial.folder
        self._partial.mark(self._manifest.name, self._manifest.version, files, self._folders)
        for names in self._folders:
            self._tree.make_folders(names)
        for place in self._places:
            if len(place.names) > 1:
                self._tree.make_folders(place.names[:-1])
            fd, size = self._tree.file(place.names), place.end - place.begin
            if os.fstat(fd).st_size != size:
                os.ftruncate(fd, 0)
                if size:
                    _reserve(fd, size)

    def _load(self) -> Bits:
        """Read all files into memory; which shards are right."""
        manifest = self._manifest
        have = np.zeros(manifest.shards, bool)
        if manifest.algorithm == UNVERIFIED or not any(_has_data(self._tree.file(p.names)) for p in self._places):
            return have
        for place in self._places:
            for fd, at, view in self._extents(place.begin, place.end, [place]):
                os.preadv(fd, [view.data], at)
        found = digest_all(self._memory, manifest.shard_size, manifest.algorithm)
        length = len(manifest.digests) // max(1, manifest.shards)
        for shard in range(manifest.shards):
            have[shard] = found[shard * length : (shard + 1) * length] == manifest.digest(shard)
        return have

    def _extents(self, begin: int, end: int, places: Sequence[Place]) -> Iterator[tuple[int, int, Bytes]]:
        """(descriptor, offset, bytes in memory) of the object's bytes from `begin` to `end`, none above CHUNK."""
        for place in places:
            low, high = max(begin, place.begin), min(end, place.end)
            for at in range(low, high, CHUNK):
                position = at - place.begin
                for view in self._memory.views(at, min(at + CHUNK, high)):
                    yield self._tree.file(place.names), position, view
                    position += view.nbytes

    def write(self, shard: int) -> None:
        """Write a verified shard, soon."""
        self._shards.put(shard)

    def _run(self) -> None:
        while (shard := self._shards.get()) is not None:
            begin, end = self._manifest.span(shard)
            try:
                for fd, at, view in self._extents(begin, end, self._of(begin, end)):
                    _write(fd, view, at)
            except Exception as error:  # `finish` must know of it, whatever it is
                self._error = error
                if self._stop is not None:
                    self._stop.set()
                return

    def _of(self, begin: int, end: int) -> list[Place]:
        """The files that bytes `begin` to `end` of the object lie in."""
        first = bisect_right(self._places, begin, key=lambda place: place.end)
        last = bisect_left(self._places, end, key=lambda place: place.begin)
        return self._places[first:last]

    def finish(self) -> None:
        """Flush everything to disk and move it into place. Raises P2PError."""
        try:
            with self._explained(self._partial.out):
                self._end_writing()
                for place in self._places:
                    fd = self._tree.file(place.names)
                    _set_mode(fd, place.mode)
                    os.fsync(fd)
                if self._is_folder:
                    for names in sorted({*self._folders, *ancestors([p.names for p in self._places])}, reverse=True):
                        self._tree.sync_folder(names)
                self._partial.move(self._overwrite, self._is_folder)
        finally:
            self._partial.close()

    def abandon(self) -> None:
        """Keep what is there for another time."""
        try:
            with self._explained(self._partial.path):
                self._end_writing()
        finally:
            self._partial.close()

    def _end_writing(self) -> None:
        self._shards.put(None)
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        """Turn an OSError into a P2PError that names the path."""
        try:
            yield
        except OSError as error:
            raise P2PError(_explain(error, path, self._size)) from error


def _reserve(fd: int, size: int) -> None:
    """Give a file its size, and its room on the disk where the file system can say that now. Raises OSError."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in NO_FALLOCATE:
            raise
        os.ftruncate(fd, size)


def _has_data(fd: int) -> bool:
    try:
        return os.lseek(fd, 0, os.SEEK_DATA) >= 0
    except OSError:
        return False  # a hole from end to end


def _set_mode(fd: int, mode: int) -> None:
    """Give a file the permissions that it had with the trainer, as far as our umask allows."""
    made = os.fstat(fd).st_mode & 0o666
    if mode:
        os.fchmod(fd, mode & (made | (made & 0o444) >> 2))


def _write(fd: int, view: Bytes, at: int) -> None:
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done:].data, at + done)


def _explain(error: OSError, path: Path, size: int) -> str:
    if error.errno in NO_ROOM:
        with contextlib.suppress(OSError):
            room = os.statvfs(path.absolute().parent)
            return f"{path}: no room for {size} bytes, {room.f_bavail * room.f_frsize} are free ({error})"
    return f"{path} cannot be written: {error}"
