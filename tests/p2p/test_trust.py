"""Whatever others hold and say: the right bytes come, soon, as long as somebody has them. Simulated."""

from __future__ import annotations

import random

import numpy as np
import pytest
from simulation import SHARD, Holder, Simulation
from test_policy import bits, swarm

from mooncake_hpc.p2p.hope import Hope
from mooncake_hpc.p2p.peer_state import REST, STUCK, View
from mooncake_hpc.p2p.scheduler import PATIENCE, STALLED, Swarm

pytestmark = pytest.mark.slow

ALL = bits(0, 1, 2, 3)
KINDS = ["good", "wrong", "mixed", "dead", "silent", "drip", "idle", "lying"]
AT_MOST_S = 5.0, 3.0  # seconds above twice the time that good holders alone take: in all, and for each bad holder


def give(made: Swarm, name: str, now: float, right: bool = True) -> int:
    """Have the source give the next shard; which one."""
    shard = made.choose(name, now)
    assert shard is not None
    made.begin(name, shard, now)
    made.received(name, SHARD, now)
    if right:
        made.verified(name, shard, now)
    else:
        made.wrong(name, shard, now)
    return shard


def test_what_is_wrong_on_this_host_comes_from_elsewhere() -> None:
    made = swarm(seed=View("seed", "far", ALL), near=View("near", "here", ALL))
    assert made.choose("seed", 0.0) is None
    shard = give(made, "near", 0.0, right=False)
    assert give(made, "seed", 0.0) == shard
    assert made.choose("seed", 0.0) is None, "one wrong shard may be an accident"
    assert {give(made, "near", 0.1) for _ in range(3)} == {0, 1, 2, 3} - {shard} and made.done


def test_a_holder_on_this_host_that_is_wrong_again_and_again_is_left_out() -> None:
    made = swarm(seed=View("seed", "far", ALL), near=View("near", "here", ALL))
    for _ in range(2):
        give(made, "near", 0.0, right=False)
    assert made.choose("near", 0.0) is None and made.needs_news and not made.copying(0.0)
    assert {give(made, "seed", 0.0) for _ in range(4)} == {0, 1, 2, 3}


def test_a_holder_that_is_wrong_again_and_again_is_asked_more_and_more_seldom_and_not_never() -> None:
    made, now, rests = swarm(32, near=View("near", "here", bits(*range(32), of=32))), 0.0, []
    for _ in range(12):
        give(made, "near", now, right=False)
        rests.append(max(0.0, made.sources["near"].resting_until - now))
        now += rests[-1]
        made.look(now)
    assert rests == sorted(rests) and rests[:3] == [0.0, REST[0], 2 * REST[0]] and rests[-1] == REST[1]
    give(made, "near", now)
    assert made.sources["near"].trusted and made.choose("near", now) is not None


@pytest.mark.parametrize("whole", [True, False])
def test_a_holder_on_this_host_that_fails_or_is_silent_is_left_out_until_it_answers(whole: bool) -> None:
    have = ALL if whole else bits(0, 1, 2)
    made = swarm(seed=View("seed", "far", ALL), near=View("near", "here", have), mate=View("mate", "x", ALL))
    shard = made.choose("near", 0.0)
    assert shard is not None
    made.begin("near", shard, 0.0)
    assert made.choose("seed", 0.0) in (None, 3)
    made.look(PATIENCE + STUCK)
    assert made.choose("seed", PATIENCE + STUCK) in {0, 1, 2, 3} - {shard}, "nothing has come from it"
    made.failed("near", [shard], SHARD, 3.0)
    assert made.choose("seed", 3.0) is not None
    made.answered("near", 20.0)
    assert give(made, "near", 20.0) is not None
    made.look(20.1)
    assert made.sources["near"].trusted and made.choose("seed", 20.0) in (None, 3)


def test_a_slow_holder_on_this_host_does_not_keep_others_from_being_asked() -> None:
    made = swarm(seed=View("seed", "far", ALL), near=View("near", "here", ALL))
    shard = made.choose("near", 0.0)
    assert shard is not None
    made.begin("near", shard, 0.0)
    for tenth in range(1, 30):
        made.received("near", 100, tenth / 10)  # never silent
        made.look(tenth / 10)
    rest = [give(made, "seed", 3.0) for _ in range(3)]
    assert {*rest, shard} == {0, 1, 2, 3}
    assert made.choose("seed", 3.0) == shard, "raced"


def test_slow_sources_do_not_take_all_the_room() -> None:
    """As many as a reader uses at a time are at work, and give next to nothing."""
    views = {f"s{n}": View(f"s{n}", f"h{n}", bits(*range(32), of=32)) for n in range(12)}
    made = swarm(32, **views)
    for n in range(12):
        if (shard := made.choose(f"s{n}", 5.0)) is not None:
            made.begin(f"s{n}", shard, 5.0)
    assert made.width >= 8
    made.look(8.0)
    assert made.width == 0
    made.see(View("good", "g", bits(*range(32), of=32)), 8.0)
    assert any(made.choose("good", 8.0 + passed * PATIENCE) is not None for passed in range(15))


def test_who_lets_turns_pass_has_none_and_its_claims_do_not_count() -> None:
    lie = {"seed": tuple(range(8))}
    made = swarm(8, seed=View("seed", "far", bits(*range(8), of=8)), liar=View("liar", "x", bits(of=8), lie))
    assert made.choose("seed", 0.0) is None
    now = 0.0
    while not made.done:
        now += 0.05
        made.look(now)
        while made.choose("seed", now) is not None:
            give(made, "seed", now)
    assert now < 3 * PATIENCE
    made.see(View("liar", "x", bits(0, of=8), lie), now)
    assert made.sources["liar"].takes_turns, "it has got something"


def test_what_a_reader_never_gets_is_no_hope() -> None:
    made = swarm(mate=View("mate", "x", bits(0, 1, 2), {"seed": (3,)}))
    hope = Hope(made)
    hope.look(0.0)
    assert hope.lost is None
    hope.look(STALLED)
    assert hope.lost == 3
    made.see(View("mate", "x", bits(0, 1, 2, 3)), STALLED)
    hope.look(STALLED)
    assert hope.lost is None


def test_a_mate_that_gets_nothing_has_no_share_of_this_hosts_shards() -> None:
    have = bits(*range(64), of=64)
    made = swarm(64, reader=View("reader", "far", have & (np.arange(64) > 0)), mate=View("mate", "here", bits(of=64)))
    before = made._ours_here(0.0).sum()
    assert 0 < before < 64
    made.look(STALLED)
    assert made._ours_here(STALLED).all()


def test_another_process_of_the_same_name_begins_anew() -> None:
    made = swarm(near=View("near", "here", ALL))
    for _ in range(2):
        give(made, "near", 0.0, right=False)
    made.see(View("near", "here", ALL), 0.1)
    assert made.choose("near", 0.1) is None
    made.see(View("near", "here", ALL), 0.1, anew=True)
    assert {give(made, "near", 0.1) for _ in range(4)} == {0, 1, 2, 3}


def mix(seed: int) -> tuple[Simulation, float]:
    """Readers, one good holder and up to eight others of any kind; and seconds within which the readers are to end."""
    chance = random.Random(seed)
    readers = chance.choice([1, 1, 1, 2])
    hosts = {i: chance.choice(["a", "b", str(i)]) for i in range(1, readers + 1)}
    forever = float("inf")
    others = {
        node: Holder(
            chance.choice(KINDS),
            chance.choice(["far", "far", "a", "b"]),
            chance.choice([1.0, 1.0, 0.5]),
            chance.choice([forever, forever, forever, chance.uniform(0, 300)]),
        )
        for node in range(readers + 1, readers + 1 + chance.randrange(1, 9))
    }
    run = Simulation(
        readers,
        chance.choice([1, 8, 48]),
        seed=seed,
        hosts={**hosts, 0: chance.choice(["0", "a"])},
        others=others,
        slow={0: chance.choice([1.0, 1.0, 0.2])},
        unit=chance.choice([0.002, 0.042, 0.5]),
    )
    alone_s = run.shards * run.unit / run.slow[0]
    bad = sum(one.kind != "good" for one in others.values())
    return run, 2 * alone_s + AT_MOST_S[0] + AT_MOST_S[1] * bad


@pytest.mark.parametrize("first", range(0, 60, 15))
def test_any_mix_of_holders_ends_within_the_bound(first: int) -> None:
    for seed in range(first, first + 15):
        run, bound_s = mix(seed)
        assert run.run(limit=2 * bound_s / run.unit) * run.unit <= bound_s, run
