"""Signals end a program by an exception, wherever it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from conftest import clean_env

from mooncake_hpc.cli.signals import Terminated, stoppable


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Leaves pytest its own."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_in_a_destructor_is_not_lost(number: signal.Signals, kind: type[BaseException]) -> None:
    class Interrupted:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    with pytest.raises(kind) as caught, stoppable():
        Interrupted()
        time.sleep(20)
    assert caught.type is kind


def test_without_a_signal_handlers_are_what_they_were() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stoppable():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


PROGRAM = """
import atexit, sys, time
from mooncake_hpc.cli.signals import stoppable
def last():
    print("closing", flush=True)
    time.sleep(0.3)
    print("closed", flush=True)
class Late:
    def __del__(self):
        print("late", flush=True)
        time.sleep(0.3)
        print("over", flush=True)
late = Late()
atexit.register(last)
try:
    with stoppable():
        print("ready", flush=True)
        time.sleep(20)
except KeyboardInterrupt:
    sys.exit(0)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_an_echo_does_not_cut_the_last_steps_short(number: signal.Signals) -> None:
    """Launchers and terminals send a signal several times, also while the interpreter already ends."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env=clean_env()
    ) as program:
        assert program.stdout is not None
        for line in program.stdout:
            if line in ("ready\n", "closing\n", "late\n"):
                program.send_signal(number)
    assert line == "over\n"
    assert program.returncode == 0
