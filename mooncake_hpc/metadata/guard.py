"""Noticing at once that another process has put or removed a key of ours, by a stream that at rest asks for nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection

from mooncake_hpc.metadata._failures import Failure
from mooncake_hpc.metadata._streams import KeyStream

log = logging.getLogger(__name__)


class Guard:
    """Calls `on_change(key, lease)`, in a thread of its own, for each change of the keys that it covers.

    A stream ends with its connection: `cover` opens the next one. Not thread-safe.
    """

    def __init__(self, open_stream: Callable[[], KeyStream], on_change: Callable[[str, int], object]) -> None:
        self._open, self._on_change = open_stream, on_change
        self._stream: KeyStream | None = None
        self._thread: threading.Thread | None = None
        self._begun = False

    def cover(self, keys: Collection[str]) -> bool:
        """Look after these keys and no others; whether changes may have been missed since the last call."""
        if self._stream is not None and self._thread is not None and self._thread.is_alive():
            self._stream.cover(keys)
            return False
        missed, self._begun = self._begun, True
        try:
            self._stream = self._open()
        except Failure as error:
            log.debug("keys are not watched for now: %s", error)
            return missed
        self._stream.cover(keys)
        self._thread = threading.Thread(target=self._run, args=(self._stream,), name="mooncake-etcd-guard", daemon=True)
        self._thread.start()
        return missed

    def _run(self, stream: KeyStream) -> None:
        try:
            for key, lease in stream:
                self._on_change(key, lease)
        except Failure as error:
            log.debug("keys are not watched for now: %s", error)
        except Exception:  # the next `cover` opens another stream
            log.exception("keys are not watched for now")

    def close(self) -> None:
        """End the thread."""
        if self._stream is not None and self._thread is not None:
            self._stream.cancel()
            self._thread.join(5.0)
