"""The cases of the comparison over RDMA, on soft-RoCE devices rxe0 … rxe3."""

from __future__ import annotations

from cases import KIB, MIB, Case, Goal, faster_than
from contenders import Load
from rdma_contenders import Lane, Limited, Original, Ours, Perftest, Registration

DEPTH = 64  # requests under way
SIZES = {64: 0.85, 4 * KIB: 0.85, 64 * KIB: 0.90, MIB: 0.90}  # what of perftest's rate is to be reached


def _size(count: int) -> str:
    units = ((MIB, "MiB"), (KIB, "KiB"), (1, "B"))
    return next(f"{count // unit} {name}" for unit, name in units if count >= unit)


def _beside_perftest(operation: str, block: int, reach: float) -> Case:
    lane = Goal(
        "lane / perftest", lambda seen: seen["lane"].requests_per_second / seen["perftest"].requests_per_second, 0.95
    )
    goals = (faster_than("perftest", limit=reach, what="ours / perftest"), lane)
    contenders = {"ours": Ours, "lane": Lane, "perftest": Perftest}
    return Case(f"rdma {_size(block)} × {DEPTH} {operation}", Load(operation, block, DEPTH), contenders, goals)


def _one_write() -> Case:
    goal = Goal(
        "post to completion, lane / perftest",
        lambda seen: seen["perftest"].requests_per_second / seen["lane"].requests_per_second,
        1.25,
        at_least=False,
    )
    return Case("rdma 8 B × 1 write", Load("write", 8, 1), {"ours": Ours, "lane": Lane, "perftest": Perftest}, (goal,))


def _beside_original(load: Load, reach: float) -> Case:
    goal = faster_than("original", limit=reach, what="ours / original")
    contenders = {"ours": lambda stage: Ours(stage, queue_pairs=2), "original": Original}
    threads = f" × {load.threads}" if load.threads > 1 else ""
    name = f"rdma, 2 queue pairs, {_size(load.block)} × {load.batch}{threads} {load.operation}"
    return Case(name, load, contenders, (goal,))


def _two_devices() -> Case:
    contenders = {
        "ours": lambda stage: Limited(stage, "rxe0,rxe1", "rxe2,rxe3", queue_pairs=2),
        "one NIC": lambda stage: Limited(stage, "rxe0", "rxe2", queue_pairs=2),
    }
    goal = faster_than("one NIC", limit=1.8, what="two NICs / one")
    return Case("rdma, NICs of 160 Mbit/s, 64 KiB × 64 write", Load("write", 64 * KIB, 64), contenders, (goal,))


def _registration() -> Case:
    """Pages are faulted in by all cores, and devices registered with at once. In the guest that cannot gain more than a
    fifth: nine tenths of the time go into clearing pages, for which there are two cores instead of one."""
    contenders = {way: (lambda stage, way=way: Registration(stage, way)) for way in ("ours", "in turn")}
    goal = faster_than("in turn", limit=1.0, what="ours / one device after the other")
    return Case("rdma, registration of 256 MiB × 4 devices", Load("write", 256 * MIB, 4), contenders, (goal,))


CASES = (
    *(_beside_perftest(operation, block, reach) for operation in ("write", "read") for block, reach in SIZES.items()),
    _one_write(),
    _beside_original(Load("write", 4 * KIB, 32), 3),
    _beside_original(Load("write", 64 * KIB, 16), 1.6),
    _beside_original(Load("read", 64 * KIB, 16), 1.5),
    _beside_original(Load("write", 64 * KIB, 128, 4), 1.3),
    _two_devices(),
    _registration(),
)
