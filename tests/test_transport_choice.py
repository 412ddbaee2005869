"""Which transport a command line means, on machines with and without RDMA devices: pure functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.transports.choice import Asked, Choice, choose, choose_here
from mooncake_hpc.transports.rdma import topology
from mooncake_hpc.transports.rdma.topology import NOWHERE, Device

UP = Device("rxe0", NOWHERE, (1,), Path("/dev/null"))
ALSO_UP = Device("rxe1", NOWHERE, (1,), Path("/dev/null"))
DOWN = Device("rxe2", NOWHERE, (), Path("/dev/null"))
ALL = (UP, ALSO_UP, DOWN)


def asked(protocol: str = "", default: str = "rdma", **flags: str | bool) -> Asked:
    """The flags as a command with this default protocol has them."""
    named = [*flags, *(["protocol"] if protocol else [])]
    return Asked(protocol=protocol or default, named=named, **flags)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", ["tcp", "shm"])
@pytest.mark.parametrize("devices", [(), ALL])
def test_a_named_protocol_is_never_replaced(protocol: str, devices: tuple[Device, ...]) -> None:
    assert choose(asked(protocol, device_name="erdma_0"), devices) == Choice(protocol)
    assert choose(asked(protocol, auto_discovery=True), devices) == Choice(protocol)


@pytest.mark.parametrize("devices", [(), (DOWN,)])
def test_tcp_where_nothing_is_named_and_no_device_can_be_used(devices: tuple[Device, ...]) -> None:
    choice = choose(asked(), devices)
    assert choice.protocol == "tcp" and choice.notice.endswith("using tcp")
    assert choice.notice.count("\n") == 0
    assert ("rxe2 (no active port)" if devices else "no device") in choice.notice


def test_rdma_where_nothing_is_named_and_a_device_can_be_used() -> None:
    assert choose(asked(), ALL) == Choice("rdma")


def test_a_device_means_rdma() -> None:
    for default in ("rdma", "auto"):
        assert choose(asked(default=default, device_name="rxe1, rxe0"), ALL) == Choice("rdma", "rxe1, rxe0")
    matrix = asked(default="auto", nic_priority_matrix="m.json")
    assert choose(matrix, ALL) == Choice("rdma", nic_priority_matrix="m.json")


@pytest.mark.parametrize("protocol", ["", "rdma"])
def test_a_named_device_that_is_missing(protocol: str) -> None:
    with pytest.raises(ConfigError, match=r"no RDMA device erdma_0; .* has rxe0, rxe1, rxe2 \(no active port\)"):
        choose(asked(protocol, device_name="rxe0,erdma_0"), ALL)
    with pytest.raises(ConfigError, match=r"no RDMA device erdma_0; .* has no device"):
        choose(asked(protocol, device_name="erdma_0"), ())


def test_a_named_device_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="--device_name=rxe2: cannot be used: rxe2: no active port"):
        choose(asked(device_name="rxe2"), ALL)


@pytest.mark.parametrize("devices", [(), (DOWN,)])
def test_rdma_without_a_device(devices: tuple[Device, ...]) -> None:
    for flags in (asked("rdma"), asked(nic_priority_matrix="m.json")):
        with pytest.raises(ConfigError, match=r"RDMA is asked for, but .*--protocol=tcp"):
            choose(flags, devices)


def test_auto() -> None:
    assert choose(asked("auto"), ALL) == choose(asked(default="auto"), ALL) == Choice("auto")
    assert choose(asked(auto_discovery=True), ALL) == Choice("auto", auto_discovery=True)
    assert choose(asked("rdma", auto_discovery=True), ALL) == Choice("rdma", auto_discovery=True)


def test_auto_takes_the_named_devices_that_are_there() -> None:
    choice = choose(asked("auto", device_name="rxe1,erdma_0,rxe2"), ALL)
    assert choice.device_name == "rxe1" and "rxe2 (no active port)" in choice.notice
    assert choose(asked("auto", device_name="erdma_0", nic_priority_matrix="m.json"), ()).protocol == "auto"


def test_what_this_machine_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by a look at files, before anything is started: an engine would find the same."""
    monkeypatch.setattr(topology, "devices", lambda *_: list(ALL))
    matrix = tmp_path / "matrix.json"
    flags = asked(nic_priority_matrix=str(matrix))
    with pytest.raises(ConfigError, match=r"--nic_priority_matrix=.*matrix\.json cannot be read: .*No such file"):
        choose_here(flags, Settings())
    matrix.write_text('{"cpu:0": [["rxe0"], ["mlx5_0"]]}')
    for protocol in ("", "auto"):
        with pytest.raises(ConfigError, match="no RDMA device mlx5_0; "):
            choose_here(asked(protocol, nic_priority_matrix=str(matrix)), Settings())
    assert choose_here(asked("tcp", nic_priority_matrix=str(matrix)), Settings()) == Choice("tcp")
    matrix.write_text('{"cpu:0": [["rxe0"], ["rxe1"]]}')
    assert choose_here(flags, Settings()).protocol == "rdma"
