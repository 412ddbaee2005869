"""Odd input: each a clear, typed error or the right result, and nothing left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_store import SHARD, Open, content, opener  # noqa: F401 - a fixture

from mooncake_hpc.core.errors import ConfigError, RegistrationError, SizeMismatch

OBJECTS = np.array([object()])
STRIDED = np.zeros((10, 10), np.uint8)[:, ::2]


@pytest.mark.parametrize("data", [5, None, object(), OBJECTS, STRIDED, [np.zeros(5), "text"], {"a": [1, 2]}, "text"])
def test_what_is_no_memory_is_refused(opener: Open, data: Any) -> None:  # noqa: F811
    store = opener()
    with pytest.raises(RegistrationError):
        store.register("o", data)
    assert store.list() == []
    store.register("o", content(10))


def test_a_tensor_that_is_none_is_named(opener: Open) -> None:  # noqa: F811
    with pytest.raises(RegistrationError, match="'lr': "):
        opener().register("o", {"weight": content(10), "lr": 0.1})


@pytest.mark.parametrize("name", ["", None, 7, b"x", "x" * 513, "a\0b", "a\udcff"])
def test_what_is_no_name_is_refused(opener: Open, name: Any) -> None:  # noqa: F811
    store = opener()
    with pytest.raises(ConfigError):
        store.register(name, content(10))
    with pytest.raises(ConfigError):
        store.get_replica(name)


@pytest.mark.parametrize(
    "options", [{"shard_size": -1}, {"shard_size": 1.5}, {"algorithm": "md4"}, {"shard_size": "a"}]
)
def test_options_that_cannot_be(opener: Open, options: Any) -> None:  # noqa: F811
    store = opener()
    with pytest.raises(ConfigError):
        store.register("o", content(10), **options)


@pytest.mark.parametrize("byte_range", [(5, 4), (-1, 2), (0, 11), (1,), (0.5, 2), "ab"])
def test_ranges_that_cannot_be(opener: Open, byte_range: Any) -> None:  # noqa: F811
    trainer, reader = opener(), opener()
    trainer.register("o", content(10))
    with pytest.raises(SizeMismatch):
        reader.get_replica("o", byte_range=byte_range, timeout=30)


def test_tensors_of_no_size(opener: Open) -> None:  # noqa: F811
    trainer, reader = opener(), opener()
    state = {"none": np.zeros((0, 5), np.float32), "some": np.arange(7, dtype=np.int16), "scalar": np.array(3.5)}
    trainer.register("state", state)
    tensors = reader.get_replica("state", timeout=60).tensors()
    for name, tensor in state.items():
        assert tensors[name].shape == tensor.shape and np.array_equal(tensors[name], tensor), name
    nothing = {"a": np.zeros(0), "b": np.zeros((3, 0), np.int8)}
    trainer.register("nothing", nothing)
    assert {k: v.shape for k, v in reader.get_replica("nothing", timeout=60).tensors().items()} == {
        "a": (0,),
        "b": (3, 0),
    }
    trainer.register("no tensor", {})
    assert reader.get_replica("no tensor", timeout=60).tensors() == {}
    trainer.register("no buffer", [])
    assert reader.get_replica("no buffer", timeout=60).arrays == []
