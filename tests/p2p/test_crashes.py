"""Fan-outs whose processes are killed, or whose etcd is away: nobody hangs, no byte is wrong, nothing is left."""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import Start, clean_env
from fanouts import SHARD, TTL, Trial

from mooncake_hpc.metadata.embedded import EmbeddedEtcd
from mooncake_hpc.metadata.store import open_store

PROGRAM = str(Path(__file__).with_name("fanouts.py"))
RESULT = '{"name": '  # how a result begins
pytestmark = pytest.mark.slow


def run(start: Start, etcd: str, trials: list[Trial], at_once: int = 1) -> list[dict[str, Any]]:
    """The trials' results, once no key of theirs is left in etcd."""
    plan = json.dumps([asdict(trial) for trial in trials])
    program = start(sys.executable, PROGRAM, etcd, plan, str(at_once), env=clean_env())
    output, _ = program.communicate(timeout=150)
    # what others say on standard error may stand before a result on its line
    results = [json.loads(line[line.index(RESULT) :]) for line in output.splitlines() if RESULT in line]
    assert program.returncode == 0 and len(results) == len(trials), output[-4000:]
    deadline = time.monotonic() + 4 * TTL + 10
    with open_store(etcd) as store:
        while keys := [*store.list("mooncake_hpc/p2p/"), *store.list("mooncake/")]:
            assert time.monotonic() < deadline, keys
            time.sleep(0.1)
    return results


def survivors(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Readers that were not killed, each checked for what holds in every case."""
    found = [reader for number, reader in result["readers"].items() if int(number) != result["kill"]]
    assert not result["hung"], result
    for reader in found:
        assert reader is not None and reader["left"] == [], result
        assert reader["wrong"] == 0 or reader["error"] == "ObjectNotFound", result
    return found


def test_the_trainer_is_killed_once_every_shard_has_left_it(start: Start, etcd: str) -> None:
    trials = [Trial(f"spread-{n}", readers=4, kill=0, at="spread", port=30000 + 10 * n) for n in range(4)]
    for result in run(start, etcd, trials, at_once=2):
        assert result["left_trainer"] == trials[0].shards
        for reader in survivors(result):
            assert reader["error"] == "", result
            assert len(reader["verified_at"]) == trials[0].shards


def test_killed_readers_cost_the_others_little(start: Start, etcd: str) -> None:
    """The others lose what was under way from it; before its lease has ended, too."""
    trials = [Trial(f"reader-{n}", readers=4, kill=1 + n % 4, at=0.1 + 0.1 * n, port=30100 + 10 * n) for n in range(4)]
    for result in run(start, etcd, trials, at_once=2):
        for reader in survivors(result):
            assert reader["error"] == "", result
            moments = [result["killed"], *[at for at in reader["verified_at"] if at > result["killed"]]]
            longest = max((b - a for a, b in pairwise(moments)), default=0.0)
            assert longest < TTL + 3.0, (longest, result)


def test_kills_at_fifty_random_moments(start: Start, etcd: str) -> None:
    chance = random.Random(4)
    trials = [
        Trial(f"random-{n}", kill=chance.randrange(4), at=round(chance.uniform(0.0, 0.9), 3), port=31000 + 10 * n)
        for n in range(50)
    ]
    results = run(start, etcd, trials, at_once=3)
    for result in results:
        for reader in survivors(result):
            if result["kill"] != 0 or result["left_trainer"] == trials[0].shards:
                assert reader["error"] == "", result
    assert sum(result["killed"] >= 0 for result in results) >= 40, "kills came too late to say anything"


def test_an_etcd_that_is_away_for_ten_seconds(start: Start) -> None:
    with EmbeddedEtcd() as etcd:
        pids = Path(f"/proc/{etcd._supervisor.pid}/task/{etcd._supervisor.pid}/children").read_text().split()
        assert Path(f"/proc/{pids[0]}/comm").read_text() == "etcd\n"
        away = 1.0, 10.0
        trial = Trial("away", shards=300, pause=0.15, readers=3, stop=(int(pids[0]), *away), ttl=5.0, port=32000)
        (result,) = run(start, etcd.endpoint, [trial])
    for reader in survivors(result):
        assert reader["error"] == "", result
        meanwhile = [at for at in reader["verified_at"] if away[0] + 1 < at < sum(away) - 1]
        assert len(meanwhile) * SHARD >= 20 * SHARD, "the transfers stood still"
