"""The NIC priority matrix: given, discovered in a made-up sysfs, and the order in which devices are published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sysfs_tree import add_device, add_nodes

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.transports.rdma import topology
from mooncake_hpc.transports.rdma.topology import Topology
from mooncake_hpc.wire.libstdcxx_order import iteration_order

AUTO = Settings.from_env({})
EIGHT_GPUS = {f"cuda:{i}": ((f"mlx5_{i}",), tuple(f"mlx5_{j}" for j in range(8) if j != i)) for i in range(8)}


def load(root: Path, device_name: str = "", matrix: str = "", **env: str) -> Topology:
    return topology.load(device_name, matrix, Settings.from_env(env), root / "sys", root / "dev")


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    """Four devices, two on each of two NUMA nodes."""
    add_nodes(tmp_path, 2)
    for name, numa in (("mlx5_0", 0), ("mlx5_1", 0), ("mlx5_2", 1), ("mlx5_3", 1)):
        add_device(tmp_path, name, numa=numa)
    return tmp_path


# --- the order of a reader's hash map; the expected ones are from programs compiled with g++ 12.2 ---------------


@pytest.mark.parametrize(
    ("keys", "order"),
    [
        (["cpu:0", "cpu:1"], ["cpu:1", "cpu:0"]),
        (["cpu:0", "cpu:1", "cpu:2"], ["cpu:2", "cpu:1", "cpu:0"]),
        (
            ["cpu:0", "cpu:1", *(f"cuda:{i}" for i in range(8))],
            ["cuda:7", "cuda:6", "cuda:4", "cuda:3", "cuda:2", "cuda:5", "cuda:1", "cuda:0", "cpu:1", "cpu:0"],
        ),
    ],
)
def test_iteration_order(keys: list[str], order: list[str]) -> None:
    assert iteration_order(keys) == order


def test_iteration_order_of_a_map_that_has_grown() -> None:
    order = (18, 17, 15, 13, 6, 7, 5, 2, 1, 3, 16, 8, 19, 9, 10, 14, 11, 0, 4, 12)
    assert iteration_order([f"npu:{i}" for i in range(20)]) == [f"npu:{i}" for i in order]


@pytest.mark.slow
def test_iteration_order_of_many_has_all() -> None:
    keys = [f"location:{i}" for i in range(700)]
    assert sorted(iteration_order(keys)) == sorted(keys)


# --- published devices ------------------------------------------------------------------------------------------


def test_devices_are_in_the_readers_order(two_sockets: Path) -> None:
    """A reader that iterates cpu:1 first numbers that node's near devices first."""
    assert load(two_sockets).devices == ("mlx5_2", "mlx5_3", "mlx5_0", "mlx5_1")


def test_devices_do_not_depend_on_the_order_in_the_file(two_sockets: Path) -> None:
    matrix = load(two_sockets).matrix
    assert Topology(dict(reversed(matrix.items()))).devices == Topology(matrix).devices


def test_devices_with_gpus() -> None:
    assert Topology(EIGHT_GPUS).devices[0] == "mlx5_7"
    assert sorted(Topology(EIGHT_GPUS).devices) == [f"mlx5_{i}" for i in range(8)]


def test_named_devices_are_the_same_for_every_location(two_sockets: Path) -> None:
    found = load(two_sockets, "mlx5_3, mlx5_0,mlx5_3")
    assert found.devices == ("mlx5_3", "mlx5_0")
    assert found.as_json() == {f"cpu:{i}": [["mlx5_3", "mlx5_0"], []] for i in range(2)}


# --- discovery --------------------------------------------------------------------------------------------------


def test_discovery_prefers_the_own_numa_node(two_sockets: Path) -> None:
    assert load(two_sockets).as_json() == {
        "cpu:0": [["mlx5_0", "mlx5_1"], ["mlx5_2", "mlx5_3"]],
        "cpu:1": [["mlx5_2", "mlx5_3"], ["mlx5_0", "mlx5_1"]],
    }


def test_a_device_of_no_node_is_near_to_all(tmp_path: Path) -> None:
    add_nodes(tmp_path, 1)
    add_device(tmp_path, "rxe0")
    add_device(tmp_path, "rxe1", numa=-1)
    assert load(tmp_path).as_json() == {"cpu:0": [["rxe0", "rxe1"], []], "cpu:1": [["rxe0", "rxe1"], []]}


def test_filters(two_sockets: Path) -> None:
    found = load(two_sockets, MC_TE_FILTERS="mlx5_1, mlx5_2,none_such")
    assert found.as_json() == {"cpu:0": [["mlx5_1"], ["mlx5_2"]], "cpu:1": [["mlx5_2"], ["mlx5_1"]]}


def test_unusable_devices_are_left_out_with_a_reason(tmp_path: Path) -> None:
    add_device(tmp_path, "down", state="1: DOWN")
    add_device(tmp_path, "hidden", accessible=False)
    add_device(tmp_path, "good")
    assert load(tmp_path).devices == ("good",)
    problems = {d.name: d.problem for d in topology.devices(tmp_path / "sys", tmp_path / "dev")}
    assert problems["good"] == "" and "no active port" in problems["down"] and "ib_uverbs" in problems["hidden"]


def test_a_machine_without_rdma(tmp_path: Path) -> None:
    assert load(tmp_path).devices == ()
    assert load(tmp_path).choices("cpu:0") == ((), ())


def test_unknown_location_takes_all(two_sockets: Path) -> None:
    found = load(two_sockets)
    assert found.choices("cuda:3") == (found.devices, ())


# --- a given matrix ---------------------------------------------------------------------------------------------


def matrix_file(folder: Path, value: object) -> str:
    file = folder / "matrix.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(file)


def test_matrix_file_wins_over_names(two_sockets: Path) -> None:
    """As in the original, whose --device_name has a default."""
    value = {"cpu:0": [["mlx5_1"], ["mlx5_0"]], "cuda:0": [["mlx5_2"], []]}
    found = load(two_sockets, "mlx5_3", matrix_file(two_sockets, value))
    assert found.as_json() == value
    assert found.choices("cpu:0") == (("mlx5_1",), ("mlx5_0",))


def test_custom_topology_variable(two_sockets: Path) -> None:
    file = matrix_file(two_sockets, {"cpu:0": [["mlx5_1"], []]})
    assert load(two_sockets, MC_CUSTOM_TOPO_JSON=file).devices == ("mlx5_1",)
    assert load(two_sockets, "mlx5_0", MC_CUSTOM_TOPO_JSON=file).devices == ("mlx5_0",)


def test_a_name_counts_once(two_sockets: Path) -> None:
    file = matrix_file(two_sockets, {"cpu:0": [["mlx5_1", "mlx5_1"], ["mlx5_1", "mlx5_0"]]})
    assert load(two_sockets, "", file).choices("cpu:0") == (("mlx5_1",), ("mlx5_0",))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "7", '{"cpu:0": []}', '{"cpu:0": ["mlx5_0"]}', '{"cpu:0": [["mlx5_0"], [], []]}',
     '{"cpu:0": [[1], []]}', '{"cpu:0": [[""], []]}', '{"cpu:0": [[], []]}', '{"cpu:0": null}'],
)  # fmt: skip
def test_what_is_no_matrix(two_sockets: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"--nic_priority_matrix=.*matrix\.json"):
        load(two_sockets, "", matrix_file(two_sockets, text))


def test_no_such_file(two_sockets: Path) -> None:
    with pytest.raises(ConfigError, match="--nic_priority_matrix=/none/such cannot be read"):
        load(two_sockets, "", "/none/such")


def test_no_such_device(two_sockets: Path) -> None:
    with pytest.raises(ConfigError, match=r"no RDMA device mlx5_9; .* has mlx5_0, mlx5_1, mlx5_2, mlx5_3"):
        load(two_sockets, "mlx5_0,mlx5_9")
    with pytest.raises(ConfigError, match="no RDMA device mlx5_8"):
        load(two_sockets, "", matrix_file(two_sockets, {"cpu:0": [["mlx5_8"], []]}))


# --- the command ------------------------------------------------------------------------------------------------


def test_command(two_sockets: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from mooncake_hpc.cli.topology import main

    add_device(two_sockets, "mlx5_9", state="1: DOWN")
    devices, load = topology.devices, topology.load
    root = (two_sockets / "sys", two_sockets / "dev")
    monkeypatch.setattr(topology, "devices", lambda *_: devices(*root))
    monkeypatch.setattr(topology, "load", lambda *given: load(*given, *root))
    assert main([]) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["cpu:1"] == [["mlx5_2", "mlx5_3"], ["mlx5_0", "mlx5_1"]]
    assert "mlx5_0: NUMA node 0, active ports 1" in printed.err
    assert "mlx5_9: NUMA node any, active ports none, no active port" in printed.err
    assert main(["--device_name=mlx5_1"]) == 0
    assert json.loads(capfd.readouterr().out) == {f"cpu:{i}": [["mlx5_1"], []] for i in range(2)}


# --- memory -----------------------------------------------------------------------------------------------------


def test_location_of_memory() -> None:
    touched = np.ones(1 << 20, np.uint8)
    assert topology.location_of(touched.ctypes.data) in topology.locations()
    assert topology.location_of(8) == ""
