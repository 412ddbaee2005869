"""Each fuzzer for a few seconds, from a seed that stays (longer: `launch/fuzz`); and that fuzzers find things."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

from fuzz import run, shrink, values
from fuzz.target import Case, Finding, Node, Target

SEED = os.environ.get("MOONCAKE_TEST_SEED", "1")
SECONDS = {
    "data": 8.0,
    "rpc": 6.0,
    "handshake": 5.0,
    "handoff": 5.0,
    "stranger": 6.0,
    "reader": 5.0,
    "records": 8.0,
    "boards": 5.0,
}
LEAST = {
    "data": 20_000,
    "rpc": 300,
    "handshake": 50,
    "handoff": 50,
    "stranger": 100,
    "reader": 20,
    "records": 500,
    "boards": 500,
}
"""Frames in that time, of a machine that does much else."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SECONDS))
def test_nothing_is_found(name: str) -> None:
    result = run.fuzz(run.make(name), SECONDS[name], SEED, shrink_seconds=15.0)
    assert not result.found, f"launch/fuzz --replay {result.file}\n{result.found}"
    assert result.frames >= LEAST[name], result.line()


class Brittle(Target):
    """Fails where any message holds a 7."""

    name = "brittle"

    def launch(self) -> Node:
        return None  # type: ignore[return-value]

    def check(self) -> None:
        pass

    def serve_check(self) -> None:
        pass

    def generate(self, chance: Random) -> Case:
        self.frames += 1
        return [[chance.randbytes(20) for _ in range(5)] for _ in range(5)]

    def run(self, case: Case) -> None:
        if any(7 in message for messages in case for message in messages):
            raise Finding("a 7")


def test_what_fails_is_made_small_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "FOUND", tmp_path)
    result = run.fuzz(Brittle(), 5.0, "x")
    assert result.found == "a 7" and result.file is not None
    assert shrink.load(result.file) == ("brittle", [[b"\x07"]])


def test_a_seed_gives_the_same_input_again() -> None:
    def some(seed: int) -> list[object]:
        chance = Random(seed)
        value = {"a": [1, 2, {"b": "c"}], "d": 1 << 40}
        return [
            (values.border(chance), values.mutate_json(chance, value), values.mutate_bytes(chance, b"x" * 90))
            for _ in range(200)
        ]

    assert some(1) == some(1) != some(2)


def test_json_is_mutated_by_field() -> None:
    """Most mutations are still JSON with most of the fields: what is rejected at once tests little."""
    import json

    chance, right = Random(3), 0
    for _ in range(1000):
        try:
            value = json.loads(values.mutate_json(chance, {"a": 1, "b": [1, 2], "c": "x", "d": {"e": None}}))
        except (ValueError, RecursionError):
            continue
        right += isinstance(value, dict) and len(value.keys() & {"a", "b", "c", "d"}) >= 3
    assert right > 500
