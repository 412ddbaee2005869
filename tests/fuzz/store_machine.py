"""A state machine over P2P stores: objects are registered, pulled, replaced and dropped, stores closed and opened."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mooncake_hpc import P2PStore
from mooncake_hpc.core.errors import MooncakeError, ObjectExists, ObjectNotFound, ObjectReplaced, P2PError, SizeMismatch
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.testing.peer import Bytes, pattern

STORES = 3
NAMES = st.sampled_from(["a", "a/b", "ä %2F"])
WHICH = st.integers(0, STORES - 1)
SIZES = st.sampled_from([1, 65536, 200_001, 1_000_000])
PATIENCE = 3.0  # seconds for other holders to put back what the one that left has taken along
spaces = itertools.count()


class StoreMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.space = f"memory://stores-{next(spaces)}"
        self.stores = [self._open(number) for number in range(STORES)]
        self.current: dict[str, Bytes] = {}  # what the name means
        self.holders: dict[str, dict[int, tuple[str, Bytes, Bytes]]] = {}  # by store: seed or replica, memory, content

    def _open(self, number: int) -> P2PStore:
        settings = Settings(lease_ttl=1.0, metadata_timeout=2.0)
        return P2PStore(f"store-{number}:1", self.space, protocol="tcp", bind_address="127.0.0.1", settings=settings)

    def teardown(self) -> None:
        for store in getattr(self, "stores", []):
            store.close()

    def _held(self, name: str) -> dict[int, tuple[str, Bytes, Bytes]]:
        return self.holders.setdefault(name, {})

    def _alive(self, name: str) -> bool:
        """Whether anybody holds what the name means now."""
        now = self.current.get(name)
        return now is not None and any(content is now for _, _, content in self._held(name).values())

    @rule(which=WHICH, name=NAMES, size=SIZES, seed=st.integers(1, 1 << 20), force=st.booleans(), same=st.booleans())
    def register(self, which: int, name: str, size: int, seed: int, force: bool, same: bool) -> None:
        """Somebody else's object is replaced by force only; equal content makes one more holder. Where all holders of
        what the name means have left, those of an older version, if there are any, may have put that in its place."""
        alive, held = self._alive(name), self._held(name)
        data = self.current[name].copy() if same and alive else pattern(seed, size)
        try:
            self.stores[which].register(name, data, force=force)
        except (ObjectExists, P2PError):
            assert (alive or held) and not force, "refused though nothing stands against it"
            return
        equal = alive and np.array_equal(data, self.current[name])
        ours = which in held and held[which][2] is self.current.get(name)
        assert equal or force or ours or not alive, "somebody else's object was replaced without force"
        content = self.current[name] if equal else data.copy()
        self.current[name] = content
        held[which] = ("seed", data, content)

    @rule(which=WHICH, name=NAMES, part=st.booleans())
    def pull(self, which: int, name: str, part: bool) -> None:
        alive, held = self._alive(name), self._held(name)
        byte_range, wait = None, PATIENCE if alive else 0.0
        if part and name in self.current and self.current[name].size > 10:
            byte_range = (3, self.current[name].size - 4)
        try:
            (array,) = self.stores[which].get_replica(name, timeout=20, wait=wait, byte_range=byte_range).arrays
        except ObjectNotFound:
            assert not alive
            return
        except (ObjectReplaced, SizeMismatch):
            assert not alive
            return
        except P2PError:
            assert which in held and byte_range is None, "refused though it is not here"
            return
        contents = [self.current[name]] if alive else [content for _, _, content in held.values()]
        begin, end = byte_range or (0, None)
        found = [content for content in contents if np.array_equal(array, content[begin:end])]
        assert found, "wrong bytes, or pulled from nobody"
        self.current[name] = found[0]
        if byte_range is None:
            held[which] = ("replica", array, found[0])

    @rule(which=WHICH, name=NAMES)
    def pull_into_wrong_memory(self, which: int, name: str) -> None:
        if not self._alive(name) or which in self._held(name):
            return
        with contextlib.suppress(SizeMismatch):
            self.stores[which].get_replica(name, np.zeros(self.current[name].size + 1, np.uint8), timeout=20)
            raise AssertionError("memory of another size was taken")

    @rule(which=WHICH, name=NAMES, kind=st.sampled_from(["seed", "replica"]))
    def drop(self, which: int, name: str, kind: str) -> None:
        held = self._held(name)
        call = self.stores[which].unregister if kind == "seed" else self.stores[which].delete_replica
        try:
            call(name)
        except ObjectNotFound:
            assert which not in held or held[which][0] != kind
            return
        assert held.pop(which)[0] == kind

    @rule(which=WHICH)
    def close_and_open(self, which: int) -> None:
        self.stores[which].close()
        self.stores[which] = self._open(which)
        for held in self.holders.values():
            held.pop(which, None)

    @rule(which=WHICH)
    def look(self, which: int) -> None:
        alive = {name for name in self.current if self._alive(name)}
        end = time.monotonic() + PATIENCE
        while alive - (found := {info.name: info for info in self.stores[which].list()}).keys():
            assert time.monotonic() < end, (alive, found)
        for name in self.current:
            if self._alive(name):
                assert found[name].size == self.current[name].size
                whole = sum(content is self.current[name] for _, _, content in self._held(name).values())
                assert 1 <= found[name].replicas <= whole

    @rule(which=WHICH, call=st.sampled_from(["", "x" * 600, "\0", "nobody's"]))
    def misuse(self, which: int, call: Any) -> None:
        store = self.stores[which]
        for use in (lambda: store.get_replica(call, timeout=1), lambda: store.unregister(call)):
            with contextlib.suppress(MooncakeError):
                use()
                raise AssertionError(f"{call!r} was found")

    @invariant()
    def bytes_are_as_they_must_be(self) -> None:
        for held in getattr(self, "holders", {}).values():
            for _, memory, content in held.values():
                assert np.array_equal(memory, content)
