"""A watch of the keys under a prefix, in etcd."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mooncake_hpc.core.errors import MooncakeError
from mooncake_hpc.core.trouble import Trouble
from mooncake_hpc.metadata._failures import Failure
from mooncake_hpc.metadata._streams import Changing
from mooncake_hpc.metadata.watch import OnChange, Watch

if TYPE_CHECKING:
    from mooncake_hpc.metadata.etcd import EtcdStore

log = logging.getLogger(__name__)

PAUSES = (0.02, 0.5)  # seconds until the next stream, where one has failed: at first, and at most


class EtcdWatch(Watch):
    def __init__(self, store: EtcdStore, prefix: str, on_change: OnChange) -> None:
        super().__init__(prefix, on_change)
        self._store = store
        self._stream: Changing | None = None
        self._thread.start()

    def _run(self) -> None:
        trouble, pause = Trouble(log, f"etcd {self._store.spec}: watch of {self.prefix!r}"), PAUSES[0]
        while not self._closing.is_set():
            try:
                present, revision = self._store.list_at(self.prefix)
                self._list(present)
                self._stream = self._store.follow(self.prefix, revision + 1)
                if self._closing.is_set():
                    self._interrupt()
                pause = PAUSES[0]
                trouble.over()
                for changes in self._stream:
                    self._change(dict(changes))
            except (MooncakeError, Failure) as error:
                if not self._closing.is_set():
                    log.debug(
                        "etcd %s: watch of %r goes on with a new stream: %s", self._store.spec, self.prefix, error
                    )
                self._closing.wait(pause)
                pause = min(2 * pause, PAUSES[1])
            except Exception as error:
                self._closing.wait(trouble.pause_s(error))

    def _interrupt(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
