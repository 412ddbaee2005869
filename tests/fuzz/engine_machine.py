"""A state machine over engines: buffers come and go on both sides, bytes move, the peer stops, dies and comes back.

Beside it a model holds what every byte must be; after each step both sides are compared with it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import select
import signal
import time
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mooncake_hpc import READ, REQUEST, WRITE, TransferEngine
from mooncake_hpc.core.errors import (
    AddressRejected,
    ForkError,
    MooncakeError,
    PeerLost,
    RegistrationError,
    TransferCancelled,
    TransferTimeout,
)
from mooncake_hpc.testing.peer import Bytes, PeerProcess, digest, pattern

MOST_BUFFERS = 4
SIZES = st.sampled_from([1, 8, 4095, 4096, 4097, 65536, 300_000])
PICK = st.integers(0, 9)
SEEDS = st.integers(1, 1 << 20)
ENDS = st.sampled_from(["wait", "join", "done", "select", "await", "cancel"])
MEANWHILE = st.sampled_from(["nothing", "stop", "cut", "register", "notify", "look up"])


class Peers:
    """The peer's process: used by one example after the other, and replaced where one has killed it."""

    def __init__(self) -> None:
        self.present: dict[str, PeerProcess] = {}
        atexit.register(self.close)

    def get(self, protocol: str) -> PeerProcess:
        if protocol not in self.present:
            self.present[protocol] = PeerProcess("P2PHANDSHAKE", protocol, "machine:1")
        return self.present[protocol]

    def kill(self, protocol: str) -> None:
        self.present.pop(protocol).kill()

    def close(self) -> None:
        while self.present:
            self.present.popitem()[1].close()


peers = Peers()


class Remote:
    """A buffer of the peer's, and what it must hold."""

    def __init__(self, address: int, model: Bytes, readonly: bool) -> None:
        self.address, self.model, self.readonly, self.registered = address, model, readonly, True


class Local:
    """A buffer of ours, and what it must hold."""

    def __init__(self, memory: Bytes, allocated: bool) -> None:
        self.memory, self.model, self.allocated = memory, memory.copy(), allocated


class EngineMachine(RuleBasedStateMachine):
    protocols = ("tcp", "auto")

    @initialize(number=st.integers(0, 1))
    def begin(self, number: int) -> None:
        self.protocol = self.protocols[number]
        self.engine = TransferEngine("ours:1", "P2PHANDSHAKE", protocol=self.protocol, bind_address="127.0.0.1")
        self.peer = peers.get(self.protocol)
        self.remotes: list[Remote] = []
        self.locals: list[Local] = []
        self.add_local(65536, True, 1)
        self.add_remote(65536, True, False, 2)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.close()
        if self.protocol in peers.present:
            for remote in self.remotes:
                if remote.registered:
                    self.peer.call("drop", remote.address)

    # --- buffers --------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.locals) < MOST_BUFFERS)
    @rule(size=SIZES, allocate=st.booleans(), seed=SEEDS)
    def add_local(self, size: int, allocate: bool, seed: int) -> None:
        if allocate:
            memory = self.engine.allocate(size)
            memory[:] = pattern(seed, size)
        else:
            memory = pattern(seed, size)
            self.engine.register(memory)
        self.locals.append(Local(memory, allocate))

    @precondition(lambda self: len(self.locals) > 1)
    @rule(pick=PICK)
    def remove_local(self, pick: int) -> None:
        local = self.locals.pop(pick % len(self.locals))
        self.engine.unregister(local.memory)
        with contextlib.suppress(RegistrationError):
            self.engine.unregister(local.memory)
            raise AssertionError("unregistered twice")

    @precondition(lambda self: len(self.remotes) < MOST_BUFFERS)
    @rule(size=SIZES, allocate=st.booleans(), readonly=st.booleans(), seed=SEEDS)
    def add_remote(self, size: int, allocate: bool, readonly: bool, seed: int) -> None:
        if allocate:
            address = self.peer.call("allocate", size, seed)
        else:
            address = self.peer.call("register", size, seed, readonly, self.protocol == "tcp")
        self.remotes.append(Remote(address, pattern(seed, size), readonly and not allocate))

    @precondition(lambda self: len(self.remotes) > 1)
    @rule(pick=PICK)
    def remove_remote(self, pick: int) -> None:
        remote = self.remotes.pop(pick % len(self.remotes))
        self.peer.call("unregister", remote.address)
        local = self.locals[0]
        with contextlib.suppress(AddressRejected):
            self.engine.read(local.memory[:1], self._segment(), remote.address, timeout=10)
            raise AssertionError("unregistered memory was read")
        self.peer.call("digest", remote.address)

    # --- bytes ----------------------------------------------------------------------------------------------

    def _segment(self) -> Any:
        return self.engine.open_segment(self.peer.name)

    def _piece(self, ours: int, theirs: int, at: float, length: float) -> tuple[Local, int, Remote, int, int]:
        """A local and a remote buffer, offsets in them, and a length that fits into both."""
        local, remote = self.locals[ours % len(self.locals)], self.remotes[theirs % len(self.remotes)]
        most = min(local.memory.size, remote.model.size)
        size = max(1, int(length * most))
        return local, int(at * (local.memory.size - size)), remote, int(at * (remote.model.size - size)), size

    @rule(writing=st.booleans(), ours=PICK, theirs=PICK, at=st.floats(0, 1), length=st.floats(0, 1))
    def move(self, writing: bool, ours: int, theirs: int, at: float, length: float) -> None:
        local, here, remote, there, size = self._piece(ours, theirs, at, length)
        part, address = local.memory[here : here + size], remote.address + there
        if writing and remote.readonly:
            with contextlib.suppress(AddressRejected):
                self.engine.write(part, self._segment(), address, timeout=10)
                raise AssertionError("read-only memory was written")
        elif writing:
            self.engine.write(part, self._segment(), address, timeout=10)
            remote.model[there : there + size] = local.model[here : here + size]
        else:
            self.engine.read(part, self._segment(), address, timeout=10)
            local.model[here : here + size] = remote.model[there : there + size]

    @rule(theirs=PICK, before=st.booleans(), writing=st.booleans())
    def reach_over_a_border(self, theirs: int, before: bool, writing: bool) -> None:
        remote, local = self.remotes[theirs % len(self.remotes)], self.locals[0]
        size = min(2, local.memory.size)
        address = remote.address - size if before else remote.address + remote.model.size
        others = [(r.address, r.address + r.model.size) for r in self.remotes]
        if any(begin <= address and address + size <= end for begin, end in others):
            return
        with contextlib.suppress(AddressRejected):
            call = self.engine.write if writing else self.engine.read
            call(local.memory[:size], self._segment(), address, timeout=10)
            raise AssertionError("memory beside a buffer was touched")

    @rule(
        writing=st.booleans(), pieces=st.integers(1, 40), end=ENDS, meanwhile=MEANWHILE, seed=SEEDS,
        ours=PICK, theirs=PICK,
    )  # fmt: skip
    def submit(self, writing: bool, pieces: int, end: str, meanwhile: str, seed: int, ours: int, theirs: int) -> None:
        """A batch of consecutive pieces, something else while it runs, and one of the ways in which it ends."""
        local, _, remote, _, size = self._piece(ours, theirs, 0.0, 1.0)
        writing = writing and not remote.readonly
        cuts = np.unique(np.linspace(0, size, pieces + 1).astype(np.int64))
        requests = np.zeros(len(cuts) - 1, REQUEST)
        requests["opcode"], requests["target_id"] = WRITE if writing else READ, self._segment().id
        requests["local_addr"] = local.memory.ctypes.data + cuts[:-1]
        requests["remote_addr"] = remote.address + cuts[:-1]
        requests["length"] = np.diff(cuts)
        batch = self.engine.submit(requests)
        self._meanwhile(meanwhile, seed)
        try:
            self._end(batch, end)
        except TransferCancelled:
            assert end == "cancel"
            self._settle(local, remote, size, writing, seed)
        else:
            if writing:
                remote.model[:size] = local.model[:size]
            else:
                local.model[:size] = remote.model[:size]
        assert batch.done and len(batch) == len(requests)

    def _settle(self, local: Local, remote: Remote, size: int, writing: bool, seed: int) -> None:
        """After a cancelled batch some bytes have come: whole ones of the other side, and no others."""
        if writing:
            data = pattern(seed, remote.model.size)
            self.peer.call("fill", remote.address, seed)
            remote.model[:] = data
            return
        got, old, new = local.memory[:size], local.model[:size], remote.model[:size]
        assert ((got == old) | (got == new)).all(), "bytes of neither side"
        local.model[:size] = got

    def _meanwhile(self, what: str, seed: int) -> None:
        if what == "stop":
            self.peer.suspend()
            time.sleep(0.01)
            self.peer.resume()
        elif what == "cut":
            self.peer.call("cut_connections")
        elif what == "register":
            self.peer.call("drop", self.peer.call("allocate", 4096, seed))
            self.engine.unregister(self.engine.allocate(4096))
        elif what == "notify":
            self.engine.notify(self._segment(), "ours:1", str(seed))
            assert ["ours:1", str(seed)] in self.peer.call("notifications")
        elif what == "look up":
            assert self._segment().buffers and self.engine.probe(self.peer.name)

    def _end(self, batch: Any, how: str) -> None:
        if how == "join":
            assert batch.join(20)
        elif how == "done":
            end = time.monotonic() + 20
            while not batch.done:
                assert time.monotonic() < end
        elif how == "select":
            assert select.select([batch.fileno()], [], [], 20)[0]
        elif how == "await":

            async def wait() -> None:
                await asyncio.wait_for(asyncio.gather(*[_await(batch) for _ in range(3)]), 20)

            asyncio.run(wait())
        elif how == "cancel":
            batch.cancel()
        batch.wait(20)

    # --- the peer -------------------------------------------------------------------------------------------

    @rule()
    def read_from_a_stopped_peer(self) -> None:
        """A time-out, or bytes that were on the way; once it goes on so does all else."""
        local, remote = self.locals[0], self.remotes[0]
        size = min(local.memory.size, remote.model.size)
        segment = self._segment()
        self.peer.suspend()
        began = time.monotonic()
        try:
            self.engine.read(local.memory[:size], segment, remote.address, timeout=0.2)
        except (TransferTimeout, PeerLost):
            self._settle(local, remote, size, False, 0)
        else:
            local.model[:size] = remote.model[:size]
        finally:
            took = time.monotonic() - began
            self.peer.resume()
        assert took < 5, f"a read with a time-out of 0.2 s took {took:.1f} s"

    @rule()
    def cut(self) -> None:
        self.peer.call("cut_connections")

    @rule(dice=st.integers(0, 3), theirs=PICK)
    def kill(self, dice: int, theirs: int) -> None:
        """One time in four: to start another one takes a second."""
        if dice:
            return
        segment, remote, local = self._segment(), self.remotes[theirs % len(self.remotes)], self.locals[0]
        self.engine.read(local.memory[:1], segment, remote.address, timeout=10)
        local.model[:1] = remote.model[:1]
        peers.kill(self.protocol)
        with contextlib.suppress(PeerLost):
            self.engine.read(local.memory[:1], segment, remote.address, timeout=10)
            raise AssertionError("a dead peer was read")
        with contextlib.suppress(MooncakeError):
            self.engine.open_segment(self.peer.name)
            raise AssertionError("a dead peer was found")
        self.peer = peers.get(self.protocol)
        self.remotes.clear()
        self.add_remote(65536, True, False, 3)

    # --- our side -------------------------------------------------------------------------------------------

    @rule()
    def close_and_open(self) -> None:
        """Of a closed engine the buffers stay the caller's."""
        segment = self._segment()
        self.engine.close()
        for call in (
            lambda: self.engine.allocate(1),
            lambda: self.engine.open_segment(self.peer.name),
            lambda: self.engine.read(self.locals[0].memory[:1], segment, self.remotes[0].address, timeout=2),
        ):
            with contextlib.suppress(MooncakeError):
                call()
                raise AssertionError("a closed engine works")
        self.engine = TransferEngine("ours:1", "P2PHANDSHAKE", protocol=self.protocol, bind_address="127.0.0.1")
        for local in self.locals:
            self.engine.register(local.memory)

    @rule()
    def fork(self) -> None:
        """The child can use nothing of ours, and disturbs nothing."""
        segment, remote, memory = self._segment(), self.remotes[0], self.locals[0].memory
        child = os.fork()
        if child == 0:
            code = 1
            try:
                calls = (
                    lambda: self.engine.allocate(1),
                    lambda: self.engine.read(memory[:1], segment, remote.address),
                    lambda: self.engine.open_segment(self.peer.name),
                    lambda: self.engine.unregister(memory),
                )
                code = 0 if all(_refused(call) for call in calls) else 2
            finally:
                os._exit(code)
        end = time.monotonic() + 20
        while not (found := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise AssertionError("a forked child hangs")
            time.sleep(0.002)
        assert found[1] == 0, f"a forked child ended with {found[1]:#x}"

    @invariant()
    def bytes_are_as_they_must_be(self) -> None:
        if not hasattr(self, "engine"):
            return
        for local in self.locals:
            assert np.array_equal(local.memory, local.model)
        for remote in self.remotes:
            assert self.peer.call("digest", remote.address) == digest(remote.model)


async def _await(batch: Any) -> None:
    await batch


def _refused(call: Any) -> bool:
    try:
        call()
    except ForkError:
        return True
    return False
