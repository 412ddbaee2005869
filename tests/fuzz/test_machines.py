"""The state machines for some seconds: always the same examples. `launch/fuzz --target engines` goes on from a seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from fuzz.engine_machine import EngineMachine, peers
from fuzz.store_machine import StoreMachine

BOUNDED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
    max_examples=8,
    stateful_step_count=25,
)


@pytest.fixture(autouse=True, scope="module")
def no_peers_stay() -> Iterator[None]:
    yield
    peers.close()


@pytest.mark.slow
def test_engines() -> None:
    run_state_machine_as_test(EngineMachine, settings=BOUNDED)


@pytest.mark.slow
def test_stores() -> None:
    run_state_machine_as_test(StoreMachine, settings=BOUNDED)
