"""The parts of the RDMA transport that need no device: handshake texts, paths, the endpoint cache, tables of keys."""

from __future__ import annotations

import ctypes
import json
import random

import pytest

from mooncake_hpc.core.errors import MalformedRecord
from mooncake_hpc.native import ranges
from mooncake_hpc.transports.rdma.paths import Path, plan
from mooncake_hpc.transports.rdma.sieve import Sieve
from mooncake_hpc.wire.rdma_handshake import Hello

GID = bytes(10) + b"\xff\xff\x0a\x4d\x00\x01"


# --- handshake ------------------------------------------------------------------------------------------------


def test_a_request_is_written_as_the_original_writes_it() -> None:
    value = Hello("a:1@rxe0", "b:1@rxe1", (17, 18), 3, GID, False, 4096).to_json()
    assert value.pop("mooncake_hpc") == {"mtu": 4096}
    assert value == {
        "local_nic_path": "a:1@rxe0", "peer_nic_path": "b:1@rxe1", "qp_num": [17, 18], "local_lid": 3,
        "local_gid": "00:00:00:00:00:00:00:00:00:00:ff:ff:0a:4d:00:01", "ready_ack": False, "reply_msg": "",
        "payload": "",
    }  # fmt: skip


@pytest.mark.parametrize("ready", [None, False, True])
def test_a_handshake_is_read_as_it_was_written(ready: bool | None) -> None:
    said = Hello("a:1@rxe0", "b:1@rxe1", (1, 2, 3), 5, GID, ready, 1024, "no")
    assert Hello.from_json(json.dumps(said.to_json()), "it") == said
    assert ("ready_ack" in said.to_json()) == (ready is not None)


def test_an_old_original_says_less() -> None:
    text = '{"local_nic_path": "a@x", "peer_nic_path": "b@y", "qp_num": [4], "reply_msg": ""}'
    heard = Hello.from_json(text, "it")
    assert heard == Hello("a@x", "b@y", (4,))


@pytest.mark.parametrize(
    "value",
    [None, [], "text", 5, {"qp_num": 7}, {"qp_num": ["x"]}, {"qp_num": [-1]}, {"qp_num": [1 << 24]},
     {"qp_num": list(range(5000))}, {"local_gid": "zz"}, {"local_gid": "00:01"}, {"local_lid": "many"},
     {"mooncake_hpc": 3}, {"mooncake_hpc": {"mtu": "big"}},
     {"mooncake_hpc": {"mtu": 1}}, {"local_lid": 1 << 16}, {"local_nic_path": "a" * 2000}, {"qp_num": [True]}],
)  # fmt: skip
def test_anything_else_is_no_handshake(value: object) -> None:
    with pytest.raises(MalformedRecord, match="the reply of x holds no RDMA handshake"):
        Hello.from_json(json.dumps(value), "the reply of x")


# --- paths ----------------------------------------------------------------------------------------------------


def near(*names: str, far: tuple[str, ...] = ()) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    return {"cpu:0": (names, far)}


def test_devices_are_paired_by_position() -> None:
    made = plan("ab", near("a", "b"), "cd", near("c", "d"))
    assert made.width == 2 and made.paths[:2] == (Path(0, 0), Path(1, 1))
    assert set(made.paths) == {Path(i, j) for i in range(2) for j in range(2)}


@pytest.mark.parametrize(("local", "remote", "width"), [("abc", "d", 3), ("a", "bcd", 3), ("ab", "cdef", 4)])
def test_every_near_device_is_on_some_path(local: str, remote: str, width: int) -> None:
    made = plan(local, near(*local), remote, near(*remote))
    used = made.paths[: made.width]
    assert made.width == width and len(set(made.paths)) == len(made.paths) == len(local) * len(remote)
    assert {path.local for path in used} == set(range(len(local)))
    assert {path.remote for path in used} == set(range(len(remote)))


def test_others_come_after_near_ones_and_both_change_first() -> None:
    made = plan("ab", near("b", far=("a",)), "cd", near("d", far=("c",)))
    assert made.width == 1 and made.paths == (Path(1, 1), Path(0, 0), Path(1, 0), Path(0, 1))


def test_devices_that_no_matrix_names_are_used_all_the_same() -> None:
    assert plan("ab", {}, "c", near("x")).width == 2
    assert plan("a", near("a"), "", {}).paths == ()


# --- the endpoint cache ---------------------------------------------------------------------------------------


def test_sieve_evicts_what_was_not_used_since_the_hand_passed() -> None:
    used: set[str] = set()

    def visited(value: str) -> bool:
        was = value in used
        used.discard(value)
        return was

    cache: Sieve[str, str] = Sieve(visited)
    for key in "abcd":
        cache.put(key, key)
    used |= {"a", "c"}
    assert cache.evict() == "b"  # a is spared once
    assert cache.evict() == "d"  # and c
    cache.put("e", "e")
    used.add("a")
    assert sorted([cache.evict() or "", cache.evict() or ""]) == ["c", "e"]
    assert cache.evict() == "a" and cache.evict() is None and len(cache) == 0


def test_sieve_evicts_something_also_when_all_is_used() -> None:
    cache: Sieve[int, int] = Sieve(lambda _: True)
    for key in range(5):
        cache.put(key, key)
    assert {cache.evict() for _ in range(5)} == set(range(5))


# --- tables of keys -------------------------------------------------------------------------------------------


def test_the_row_is_that_of_a_range_that_reaches_furthest() -> None:
    chooser = random.Random(3)
    for _ in range(200):
        entries = []
        for number in range(chooser.randrange(12)):
            start = chooser.randrange(100)
            entries.append((start, start + chooser.randrange(1, 40), (number, 7)))
        table = ranges.keyed(entries)
        base = int(table.ctypes.data)
        for address in range(-1, 145):
            holding = [(end, row) for start, end, row in entries if start <= address < end]
            found = ranges.row(base, address)
            assert (found != 0) == bool(holding)
            assert ranges.room(base, address) == max((end - address for end, _ in holding), default=0)
            if holding:
                furthest = max(end for end, _ in holding)
                assert get_word(found) in {row[0] for end, row in holding if end == furthest}


def get_word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value
