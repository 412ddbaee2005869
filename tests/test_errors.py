"""The tree of errors is what the module's docstring draws."""

from __future__ import annotations

import re

from mooncake_hpc.core import errors


def drawn() -> dict[str, set[str]]:
    """From the docstring: each error's bases."""
    bases: dict[str, set[str]] = {}
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"([ │├└─]*)(\w+)(?: \((\w+)\))?(?:  |$)", line):
            depth = len(match[1]) // 4
            parents[depth:] = [match[2]]
            above = parents[depth - 1] if depth else "Exception"
            bases[match[2]] = {above, match[3]} - {None}
    return bases


def test_the_tree_in_the_docstring_is_complete() -> None:
    real = {
        name: {base.__name__ for base in kind.__bases__}
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    assert drawn() == real


def test_errors_are_imported_by_their_public_name() -> None:
    from mooncake_hpc.errors import PeerLost  # type: ignore[import-not-found]

    import mooncake_hpc

    assert PeerLost is mooncake_hpc.errors.PeerLost is errors.PeerLost
