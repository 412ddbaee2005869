"""Signals end a program by an exception, wherever it is."""

from __future__ import annotations

import os
import signal
import time

import pytest

from mooncake_hpc.cli.signals import Terminated, stoppable


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
