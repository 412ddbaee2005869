"""Arrows between folders of the package go one way, type-only imports included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "mooncake_hpc"
# From the ground up: a folder imports only what stands before it.
LAYERS = (
    "core",
    "wire",
    "native",
    "metadata",
    "control",
    "transports",
    "workers",
    "engine",
    "jobs",
    "bench",
    "p2p",
    "cli",
    "testing",
)
BESIDE = {("bench", "p2p"), ("p2p", "bench")}  # two users of the engine, which do not know one another
TOP = {"__init__.py", "__main__.py", "py.typed"}


def imports(path: Path) -> Iterator[str]:
    """The modules of ours that the file imports, by full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folders(names: Iterator[str]) -> set[str]:
    return {parts[1] for name in names if (parts := name.split("."))[0] == "mooncake_hpc" and len(parts) > 1}


def test_the_package_has_these_folders_and_no_others() -> None:
    present = {entry.name for entry in PACKAGE.iterdir() if entry.name != "__pycache__"}
    assert present == {*LAYERS, *TOP}


@pytest.mark.parametrize("folder", LAYERS)
def test_arrows_go_down(folder: str) -> None:
    allowed = LAYERS[: LAYERS.index(folder) + 1]
    wrong = {
        f"{path.relative_to(ROOT)} imports {other}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for other in folders(imports(path)) & set(LAYERS)
        if other not in allowed or (folder, other) in BESIDE
    }
    assert not wrong
