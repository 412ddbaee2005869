"""The one interface to whatever holds segment metadata: a flat, leased map of text keys to text values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from mooncake_hpc.metadata.watch import OnChange, Watch


class MetadataStore(ABC):
    """Thread-safe. Every call ends within the store's deadline (`Settings.metadata_timeout`, seconds) or
    raises MetadataUnavailable, which names the endpoints and the cause. A closed store raises MetadataError, one that a
    forked child has inherited ForkError.

    Published keys are *leased*: they vanish by themselves within `Settings.lease_ttl` seconds after this
    process dies. The store keeps them alive in the background and, when the lease or the store's whole
    content was lost, puts them back, except where somebody else's value stands in the key by then: that
    one is given up, as is one that somebody else puts while the lease lives: noticed at once, and logged.
    """

    spec: str  # what the user named, for messages: "127.0.0.1:2379", "memory://test"

    @abstractmethod
    def get(self, key: str) -> str | None:
        """The value, or None where the key is absent."""

    @abstractmethod
    def list(self, prefix: str) -> dict[str, str]:
        """All keys that start with `prefix`, with their values."""

    @abstractmethod
    def publish(self, key: str, value: str) -> None:
        """Put the leased value and keep it alive until `withdraw` or `close`.

        A key that this store does not hold yet is put over whatever is there. A new value of one that it holds
        is put only if nobody else's stands there since: else NameInUse, and the key is `lost`. One that is lost stays
        so until it is withdrawn, or published when nobody has it any more. MetadataError
        when the store refuses it: for a value above its size limit the text says both sizes.
        """

    @abstractmethod
    def create(self, key: str, value: str) -> bool:
        """As `publish` where the key is absent, in one step; False, with nothing done, where it is there."""

    @abstractmethod
    def watch(self, prefix: str, on_change: OnChange) -> Watch:
        """Have `on_change` called with the keys under `prefix` and with each later change, see `metadata.watch`.

        The caller closes the watch, before the store. Returns at once: a store that is away is waited for.
        """

    @abstractmethod
    def withdraw(self, key: str) -> None:
        """Stop keeping `key` alive, and remove it unless somebody has put it since this store did.

        Somebody else's value stays even where it is equal to ours.
        """

    @property
    @abstractmethod
    def lost(self) -> frozenset[str]:
        """Keys that were given up since another process has put its own value in them."""

    @abstractmethod
    def close(self) -> None:
        """Withdraw every published key, end all threads, close all connections. Idempotent; never raises.

        Without effect in a forked child.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
