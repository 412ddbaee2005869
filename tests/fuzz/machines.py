"""The state machines as targets of `launch/fuzz`: a case is a number, from which hypothesis makes its examples."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import engine
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from fuzz.engine_machine import EngineMachine, peers
from fuzz.store_machine import StoreMachine
from fuzz.target import Case, Finding, Node, Target

EXAMPLES, STEPS = 5, 40  # of a case
engine.MAX_SHRINKING_SECONDS = 60


class Machine(Target):
    """hypothesis makes a failing example small itself, and shows it as a program."""

    unit = "steps"
    shrinks = False
    machine: type[RuleBasedStateMachine]

    def launch(self) -> Node:
        return None  # type: ignore[return-value]

    def stop(self) -> None:
        peers.close()

    def check(self) -> None:
        """There is no process but this one."""

    def serve_check(self) -> None:
        """As `check`."""

    def generate(self, chance: Random) -> Case:
        return [[str(chance.getrandbits(32)).encode()]]

    def run(self, case: Case) -> None:
        for messages in case:
            for message in messages:
                if message.isdigit():
                    self._run(int(message))

    def _run(self, seed: int) -> None:
        target = self

        class Seeded(self.machine):  # type: ignore[misc, name-defined]
            _hypothesis_internal_use_seed = seed

            def check_invariants(self, *arguments: Any, **options: Any) -> None:
                target.frames += 1
                super().check_invariants(*arguments, **options)

        Seeded.__qualname__ = Seeded.__name__ = self.machine.__name__
        chosen = settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        try:
            run_state_machine_as_test(Seeded, settings=chosen)
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", ()))
            raise Finding(f"{type(error).__name__}: {error}\n{notes}") from error


class Engines(Machine):
    name = "engines"
    machine = EngineMachine


class Stores(Machine):
    name = "stores"
    machine = StoreMachine
