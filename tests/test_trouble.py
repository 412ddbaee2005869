"""Threads outlive exceptions that nobody expected: each is logged once, and what failed is tried ever more seldom."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mooncake_hpc import TransferEngine
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.core.trouble import FIRST_PAUSE_S, Trouble
from mooncake_hpc.metadata.etcd import EtcdStore
from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.transports.tcp.client import TcpLane

SETTINGS = Settings(lease_ttl=1.0)


class Failing:
    """Stands for a method that raises so many times, and works from then on."""

    def __init__(self, real: Callable[..., Any], times: int) -> None:
        self._real, self._left = real, times
        self.calls: list[float] = []
        self.over = threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self.calls.append(time.monotonic())
        if len(self.calls) <= self._left:
            raise RuntimeError("a bug")
        result = self._real(*arguments)
        self.over.set()
        return result


def told(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if "a bug" in record.getMessage()]


def test_each_trouble_is_told_once_until_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    trouble = Trouble(logging.getLogger("test"), "the thread", 0.3)
    pauses = [trouble.pause_s(OSError("full")) for _ in range(5)]
    assert pauses == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 0.3, 0.3]
    trouble.pause_s(ValueError("odd"))
    trouble.over()
    assert trouble.pause_s(ValueError("odd")) == FIRST_PAUSE_S
    said = [(record.getMessage(), bool(record.exc_info)) for record in caplog.records]
    odd = ("the thread: ValueError('odd')", True)
    assert said == [("the thread: full", False), odd, odd]


def test_a_lease_is_kept_by_a_thread_that_met_a_bug(
    etcd: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(etcd, SETTINGS) as store, open_store(etcd) as other:
        assert isinstance(store, EtcdStore)
        renew = Failing(store._renew, 2)
        monkeypatch.setattr(store, "_renew", renew)
        store.publish("trouble/lease", "mine")
        assert renew.over.wait(20)
        assert other.get("trouble/lease") == "mine"
    assert len(told(caplog)) == 1


def test_a_watch_goes_on_after_a_bug(
    etcd: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[str, str | None] = {}
    there = threading.Event()

    def on_change(changes: Any) -> None:
        seen.update(changes)
        if "trouble/watch" in seen:
            there.set()

    with open_store(etcd, SETTINGS) as store:
        assert isinstance(store, EtcdStore)
        list_at = Failing(store.list_at, 4)
        monkeypatch.setattr(store, "list_at", list_at)
        with store.watch("trouble/", on_change):
            store.publish("trouble/watch", "mine")
            assert there.wait(20)
    assert len(told(caplog)) == 1
    gaps = np.diff(list_at.calls)
    assert gaps[3] > gaps[0]  # not as fast as it can


def test_a_lane_carries_on_after_a_bug(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with (
        TransferEngine("there:1", "memory://lane-bug", protocol="tcp") as there,
        TransferEngine("here:1", "memory://lane-bug", protocol="tcp") as here,
    ):
        remote, local = there.allocate(1000), here.allocate(1000)
        remote[:] = 7
        segment = here.open_segment("there:1")
        repair = Failing(TcpLane.repair, 4)
        monkeypatch.setattr(TcpLane, "repair", lambda lane: repair(lane))
        here.read(local, segment, int(remote.ctypes.data), timeout=20)
        assert local.tolist() == remote.tolist() and len(repair.calls) > 4
    assert len(told(caplog)) == 1
