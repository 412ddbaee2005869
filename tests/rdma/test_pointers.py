"""The pointers behind pyverbs' objects are checked; where they are not as expected, pyverbs' own calls are used."""

from __future__ import annotations

import pytest

from mooncake_hpc import TransferEngine
from mooncake_hpc.testing.peer import pattern
from mooncake_hpc.transports.rdma import verbs_kernels as layout

SIZE = 300_000


def move(device: str) -> list[int]:
    """Write and read between two engines of this process; the functions that their kernels post with."""
    store = "memory://pointers"
    with (
        TransferEngine("a:1", store, protocol="rdma", bind_address="127.0.0.1", device_name=device) as a,
        TransferEngine("b:1", store, protocol="rdma", bind_address="127.0.0.1", device_name=device) as b,
    ):
        theirs, ours = a.allocate(2 * SIZE), b.allocate(2 * SIZE)
        ours[:SIZE] = pattern(1, SIZE)
        segment = b.open_segment("a:1")
        b.write(ours[:SIZE], segment, int(theirs.ctypes.data) + 7, timeout=60)
        assert (theirs[7 : 7 + SIZE] == ours[:SIZE]).all()
        b.read(ours[SIZE:], segment, int(theirs.ctypes.data) + 7, timeout=60)
        assert (ours[SIZE:] == ours[:SIZE]).all()
        lane = segment.routes[0].lanes[0]
        return [call.post for rail in lane._rails for call in rail.endpoint.calls()]  # type: ignore[attr-defined]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("wrong", ["QP_NUMBER", "CQ_CONTEXT", "CONTEXT_COMMAND_FD"])
def test_pointers_that_are_not_as_expected(nics: list[str], monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    from mooncake_hpc.transports.rdma import verbs

    monkeypatch.setattr(verbs, "pointers_work", True)
    real = move(nics[0])
    assert len(set(real)) == 1  # the provider's function
    monkeypatch.setattr(layout, wrong, getattr(layout, wrong) + 4)
    with pytest.warns(UserWarning, match="slow calls"):
        slow = move(nics[0])
    assert real[0] not in slow and not verbs.pointers_work
    assert move(nics[0])  # from now on without asking
