"""The swarm's decisions, simulated, and the parts of the P2P Store that need no engine."""

from __future__ import annotations

import numpy as np
import pytest
from simulation import SHARD, Simulation

from mooncake_hpc.core.errors import ConfigError, MetadataError
from mooncake_hpc.core.names import check_name
from mooncake_hpc.p2p.availability import CLAIMS, Board, Place, board_size, by_source, read_board, source_id
from mooncake_hpc.p2p.catalog import Holder
from mooncake_hpc.p2p.digests import ALGORITHMS, digest_size, hashers
from mooncake_hpc.p2p.layout import Layout, Memory, pair
from mooncake_hpc.p2p.manifest import LARGEST, SMALLEST, Manifest, Part, by_name, choose_shard_size
from mooncake_hpc.p2p.peer_state import STUCK, View
from mooncake_hpc.p2p.scheduler import Swarm


@pytest.mark.parametrize(
    ("readers", "limit", "sent"), [(1, 1.03, 1.0), (2, 1.15, 1.1), (4, 1.25, 1.25), (8, 1.45, 1.5)]
)
def test_a_fan_out_costs_little_more_than_one_reader(readers: int, limit: float, sent: float) -> None:
    run = Simulation(readers, 64)
    assert run.run() <= 64 * limit
    assert run.sent[0] <= 64 * sent
    assert readers == 1 or all(run.sent[node] for node in range(1, readers + 1)), "every reader serves"


def test_slow_announcements_cost_little() -> None:
    assert Simulation(4, 64, delay=3.0, settle=3.0).run() <= 64 * 1.4


def test_the_first_holder_dies_once_all_shards_have_left_it() -> None:
    run = Simulation(4, 48, dies={0: 70.0})
    assert run.run() <= 48 * 2.5


def test_a_reader_dies() -> None:
    run = Simulation(4, 48, dies={2: 20.0})
    assert run.run() <= 48 * 2.0
    assert set(run.finished) == {1, 3, 4}


def test_a_late_reader_is_served_by_all() -> None:
    run = Simulation(4, 64, starts={4: 40.0})
    run.run()
    assert run.finished[4] - 40.0 <= 64 * 1.3


def test_a_host_pulls_a_shard_over_the_wire_about_once() -> None:
    run = Simulation(4, 48, hosts={1: "a", 2: "a", 3: "b", 4: "b"})
    run.run()
    assert sum(run.over_wire.values()) <= 1.35 * 2 * 48


def test_a_slow_source_does_not_hold_up_the_end() -> None:
    run = Simulation(3, 32, starts={1: 0.0, 2: 40.0, 3: 40.0}, slow={1: 0.02})
    assert run.run() <= 40 + 32 * 2.5


def swarm(shards: int = 4, **views: View) -> Swarm:
    made = Swarm("me", "here", np.full(shards, SHARD, np.int64), np.ones(shards, bool), np.zeros(shards, bool))
    for view in views.values():
        made.see(view)
    return made


def bits(*shards: int, of: int = 4) -> np.ndarray:
    have = np.zeros(of, bool)
    have[list(shards)] = True
    return have


def test_the_rarest_comes_first() -> None:
    made = swarm(a=View("a", "x", bits(0, 1, 2, 3)), b=View("b", "y", bits(0, 1, 2)), c=View("c", "z", bits(0, 1, 3)))
    assert made.choose("a", 0.0) in (2, 3)


def test_what_a_process_of_this_host_holds_is_copied_from_it() -> None:
    made = swarm(seed=View("seed", "far", bits(0, 1, 2, 3)), mate=View("mate", "here", bits(0, 1, 2)))
    assert made.choose("seed", 0.0) in (3, None)
    assert made.choose("mate", 0.0) in (0, 1, 2)


def test_one_process_of_this_host_that_has_all_is_enough() -> None:
    made = swarm(a=View("a", "here", bits(0, 1, 2, 3)), b=View("b", "here", bits(0, 1, 2, 3)))
    made.see(View("c", "here", bits(0, 1)))
    assert made.choose("b", 0.0) is None and made.choose("c", 0.0) is None
    shard = made.choose("a", 0.0)
    assert shard is not None and not made.needs_news
    made.begin("a", shard, 0.0)
    made.received("a", SHARD, 1.0)
    made.wrong("a", shard)
    assert made.choose("b", 1.0) == shard, "what it does not really have comes from another"
    made.failed("a", [], 0, 1.0)
    assert made.choose("b", 1.1) is not None, "as does all once it is gone"


def test_wrong_bytes_are_not_asked_for_again() -> None:
    made = swarm(2, a=View("a", "x", bits(0, of=2)))
    assert made.choose("a", 0.0) == 0
    made.begin("a", 0, 0.0)
    made.received("a", SHARD, 1.0)
    made.wrong("a", 0)
    assert made.choose("a", 100.0) is None
    assert made.sources["a"].backlog == 0 and not made.done


def test_a_failed_source_rests_longer_each_time() -> None:
    made = swarm(a=View("a", "x", bits(0, 1, 2, 3)))
    rests = []
    now = 0.0
    for _ in range(8):
        shard = made.choose("a", now)
        assert shard is not None
        made.begin("a", shard, now)
        made.failed("a", [shard], SHARD, now)
        assert made.choose("a", now) is None
        rests.append(made.sources["a"].resting_until - now)
        now = made.sources["a"].resting_until
    assert rests == sorted(rests) and rests[-1] == 8.0 > rests[0]


def test_a_stuck_source_is_raced() -> None:
    made = swarm(1, a=View("a", "x", bits(0, of=1)))
    made.begin("a", 0, 0.0)
    made.see(View("b", "y", bits(0, of=1)))
    assert made.choose("b", STUCK / 2) is None
    assert made.choose("b", 3 * STUCK) == 0
    made.begin("b", 0, 3 * STUCK)
    made.see(View("c", "z", bits(0, of=1)))
    assert made.choose("c", 3.5 * STUCK) is None, "two are enough"
    assert made.choose("c", 9 * STUCK) == 0, "but not two that both give nothing"
    made.received("b", SHARD, 4 * STUCK)
    assert made.verified("b", 0) and made.done
    made.given_up("a", 0, SHARD)
    assert made.fetching() == {}


def test_a_holder_that_vanishes_takes_its_claims_along() -> None:
    made = swarm(a=View("a", "x", bits(0, 1, 2, 3)), b=View("b", "y", bits(), {"a": (1, 2)}))
    assert made.load("a") == 1
    made.forget("b")
    assert made.load("a") == 0
    assert sorted(made.sources) == ["a"]


def test_a_source_may_fail_after_its_record_has_gone() -> None:
    made = swarm(a=View("a", "x", bits(0, 1, 2, 3)))
    made.forget("a")
    made.failed("a", [], 0, 1.0)
    assert not made.sources


def test_what_a_finished_reader_was_fetching_is_not_waited_for() -> None:
    """Its board is not read again, and so the claims last seen there would stand."""
    mate = View("mate", "far", bits(0, 1, 2), {"seed": (3,)})
    made = swarm(seed=View("seed", "x", bits(0, 1, 2, 3)), mate=mate)
    for shard in (0, 1, 2):
        made.begin("mate", shard, 0.0)
        made.received("mate", SHARD, 0.0)
        made.verified("mate", shard)
    assert made.choose("seed", 0.0) is None, "the mate will have it"
    made.see(View("mate", "far", bits(0, 1, 2, 3), dict(mate.fetching)))
    assert made.load("seed") == 0
    assert made.choose("seed", 0.0) == made.choose("mate", 0.0) == 3


def test_few_shards_leave_the_first_holder_at_a_time() -> None:
    """And one that is nearly with its reader makes room for the next."""
    made = swarm(8, seed=View("seed", "far", bits(*range(8), of=8)))  # readers on a, b, … g, and here: the eighth turn
    for shard, host in enumerate("abcdefg"):
        fetching = {"seed": (shard,)} if shard > 2 else {}
        made.see(View(host, host, bits(*([] if fetching else [shard]), of=8), fetching))
    assert made.choose("seed", 0.0) is None, "four are leaving"
    made.see(View("e", "e", bits(of=8), {"seed": (4,)}, frozenset({4})))
    assert made.choose("seed", 0.0) == 7


def test_a_shard_that_no_reader_has_comes_before_others() -> None:
    made = swarm(seed=View("seed", "x", bits(0, 1, 2, 3)), mate=View("mate", "y", bits(0)))
    mate = made.sources["mate"]
    assert made.ahead(mate, 0.0) == mate.ahead
    made.begin("seed", 1, 0.0)
    made.begin("mate", 0, 0.0)
    assert made.ahead(mate, 0.0) == mate.ahead // 2 and made.ahead(made.sources["seed"], 0.0) == mate.ahead
    assert made.ahead(mate, 2 * STUCK) == mate.ahead, "nothing comes of it"
    made.received("seed", SHARD - 1000, 0.04)
    assert made.ends("seed", 1, 1000) and not made.ends("seed", 1, 500), "told once"
    assert made.ending == {1} and made.ahead(mate, 0.05) == mate.ahead
    made.received("seed", 1000, 0.05)
    assert made.verified("seed", 1) and not made.ending


# --- manifests, records, layouts


def manifest(**changes: object) -> Manifest:
    values: dict[str, object] = {
        "name": "a/b", "version": "v", "sizes": (8, 0, 7), "shard_size": 4, "algorithm": "sha256",
        "digests": bytes(4 * 32), "kind": "tensors", "parts": (Part("x", "<f4", (2, 1)), Part("y"), Part("z")),
    }  # fmt: skip
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


def test_manifest_there_and_back() -> None:
    one = manifest()
    assert Manifest.from_json(one.to_json(), "here") == one
    assert (one.size, one.shards, one.span(3)) == (15, 4, (12, 15))
    empty = manifest(sizes=(), digests=b"", parts=())
    assert (empty.size, empty.shards) == (0, 0)
    assert one.same_content(manifest(version="w")) and not one.same_content(manifest(shard_size=8, digests=bytes(64)))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", manifest().to_json().replace('"format":1', '"format":2')])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(MetadataError, match="key k"):
        Manifest.from_json(text, "key k")


def test_a_manifest_with_too_few_digests_is_refused() -> None:
    with pytest.raises(MetadataError, match="digests for 4 shards"):
        Manifest.from_json(manifest(digests=bytes(3 * 32)).to_json(), "key k")


def test_record_there_and_back() -> None:
    for have in (bits(0, 3), bits(), bits(0, 1, 2, 3), bits(of=0)):
        one = Holder("h:1", "g", "host", (1 << 47, 4096), have, Place(4096, 7) if len(have) else None, ("other",), True)
        fits = manifest(sizes=(len(have), 0), shard_size=1, kind="buffers", parts=())
        again = Holder.from_json(one.to_json(), "k", "h:1", fits)
        assert np.array_equal(again.have, have) and again.to_json() == one.to_json()
    for text in ("", "{}", one.to_json().replace('"shards":0', '"shards":"x"')):
        with pytest.raises(MetadataError):
            Holder.from_json(text, "k", "h:1", fits)


@pytest.mark.parametrize("shards", [1, 8, 63, 64, 65, 1000])
def test_a_board_shows_what_is_here_and_what_is_coming(shards: int) -> None:
    have = np.random.default_rng(shards).integers(0, 2, shards).astype(bool)
    board = Board(np.zeros(board_size(shards), np.uint8), have)
    names = {source_id(name): name for name in ("a", "b")}
    for shard in range(0, shards, 3):
        board.hold(shard)
        have[shard] = True
    for source, shard in (("a", 0), ("b", shards - 1), ("a", shards - 1), ("c", 0)):
        board.claim(source, shard)
    board.unclaim("b", shards - 1)
    board.unclaim("b", 0)  # was none
    found = read_board(board.memory.copy(), board.place.token, shards)
    assert found is not None and np.array_equal(found.have, have) and not found.ending
    assert {name: set(claimed) for name, claimed in by_source(found.claims, names).items()} == {"a": {0, shards - 1}}
    board.ending("a", shards - 1)
    board.ending("b", 0)  # is none
    again = read_board(board.memory.copy(), board.place.token, shards)
    assert again is not None and (again.claims, again.ending) == (found.claims, {shards - 1})
    board.unclaim("a", shards - 1)
    last = read_board(board.memory, board.place.token, shards)
    assert last is not None and not last.ending
    assert read_board(board.memory, board.place.token + 1, shards) is None


def test_a_board_has_room_for_so_many_claims() -> None:
    board = Board(np.zeros(board_size(100), np.uint8), np.zeros(100, bool))
    for shard in range(100):
        board.claim("a", shard)
    for shard in range(100):
        board.unclaim("a", shard)
    board.claim("a", 99)
    found = read_board(board.memory, board.place.token, 100)
    assert found is not None and found.claims == [(source_id("a"), 99)] and CLAIMS < 100


def test_a_record_of_a_terabyte_is_small() -> None:
    have = np.random.default_rng(1).integers(0, 2, 16384).astype(bool)
    assert len(Holder("host:12345", "0" * 16, "0" * 16, (1 << 46,), have, Place(1 << 46, 1 << 60)).to_json()) < 4096
    whole = manifest(sizes=(1 << 40,), shard_size=64 << 20, algorithm="xxh3-128", digests=bytes(16 * 16384), parts=())
    assert len(whole.to_json()) < 400_000


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_digests_of_pieces_are_those_of_the_whole(algorithm: str) -> None:
    data = np.arange(1000, dtype=np.uint8)
    pieces, whole = hashers(algorithm)(), hashers(algorithm)()
    whole.update(data)
    for begin in range(0, 1000, 300):
        pieces.update(data[begin : begin + 300])
    assert pieces.digest() == whole.digest() and len(whole.digest()) == digest_size(algorithm)


def test_an_unknown_digest_is_refused() -> None:
    with pytest.raises(ConfigError, match="xxh3-128"):
        hashers("md5")


def test_layouts_cut_at_both_sides_borders() -> None:
    arrays = [np.arange(n, dtype=np.uint8) for n in (7, 0, 3, 20)]
    local = Memory(arrays)
    remote = Layout([(1000, 5), (2000, 15), (3000, 10)])
    for begin in range(30):
        for end in range(begin, 31):
            pairs = pair(local, remote, begin, end)
            assert sum(n for _, _, n in pairs) == end - begin
            at = begin
            for ours, theirs, n in pairs:
                assert local.extents(at, at + n) == [(ours, n)] and remote.extents(at, at + n) == [(theirs, n)]
                at += n
            joined = np.concatenate([np.zeros(0, np.uint8), *local.views(begin, end)])
            assert np.array_equal(joined, np.concatenate(arrays)[begin:end])


def test_shard_sizes() -> None:
    assert choose_shard_size(0) == choose_shard_size(1) == SMALLEST
    assert choose_shard_size(1 << 40) == LARGEST
    assert choose_shard_size(1 << 30) == 4 << 20


def test_names() -> None:
    check_name("a/b c\nü😀" * 4, "a name")
    for name in ("", "x" * 600, "ü" * 257, "a\0b", "a\udc80", 7, None):
        with pytest.raises(ConfigError, match="a name"):
            check_name(name, "a name")
    parts = (Part("a"), Part("b"))
    assert by_name(parts, {"b": 2, "a": 1}) == [1, 2]
    for given in ({"a": 1}, {"a": 1, "b": 2, "c": 3}):
        with pytest.raises(ConfigError):
            by_name(parts, given)
