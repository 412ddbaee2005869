"""Which files and folders an object becomes: the names in its manifest, checked, and their bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mooncake_hpc.core.errors import MetadataError
from mooncake_hpc.p2p.folder import Names, ancestors
from mooncake_hpc.p2p.manifest import FILE, FOLDER, Manifest

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes: NAME_MAX and PATH_MAX of Linux


@dataclass(frozen=True, slots=True)
class Place:
    """A file that holds bytes `begin` to `end` of the object. `mode` has permission bits, 0 where they are unknown."""

    names: Names
    begin: int
    end: int
    mode: int


def plan(manifest: Manifest, top: str) -> tuple[list[Names], list[Place]]:
    """Folders that are to be made, and files: below the name `top`, or that name itself. Raises MetadataError for names
    that lead elsewhere, cannot be, or do not go together."""
    if manifest.kind != FOLDER:
        mode = manifest.parts[0].mode if manifest.kind == FILE and manifest.parts else 0
        return [], [Place((top,), 0, manifest.size, mode)]
    if len(manifest.parts) != len(manifest.sizes):
        raise MetadataError(f"object {manifest.name!r}: {len(manifest.parts)} names for {len(manifest.sizes)} files")
    folders: list[Names] = [(top,)]
    files: list[Place] = []
    at = 0
    for part, size in zip(manifest.parts, manifest.sizes, strict=True):
        try:
            names = (top, *_split(part.name.removesuffix("/")))
        except ValueError as error:
            raise MetadataError(f"object {manifest.name!r}: {part.name[:300]!r} {error}") from None
        if not part.name.endswith("/"):
            files.append(Place(names, at, at + size, part.mode))
        elif size:
            raise MetadataError(f"object {manifest.name!r}: folder {part.name[:300]!r} has {size} bytes")
        else:
            folders.append(names)
        at += size
    _check_together(manifest.name, folders, files)
    return folders, files


def _split(name: str) -> Names:
    """The names in a relative path. Raises ValueError, which says what is wrong with it."""
    names = tuple(name.split("/"))
    if any(one in ("", ".", "..") for one in names):
        raise ValueError("leads out of the folder, or is no plain relative name")
    if "\0" in name:
        raise ValueError("holds a NUL")
    lengths = [len(os.fsencode(one)) for one in names]  # UnicodeEncodeError is a ValueError
    if max(lengths) > LONGEST_NAME or sum(lengths) + len(names) > LONGEST_PATH:
        raise ValueError(f"is too long: {LONGEST_NAME} bytes a name and {LONGEST_PATH} in all are possible")
    return names


def _check_together(name: str, folders: list[Names], files: list[Place]) -> None:
    both = [*folders, *(place.names for place in files)]
    if len({*both}) < len(both):
        twice = next(names for names in both if both.count(names) > 1)
        raise MetadataError(f"object {name!r}: {'/'.join(twice[1:])!r} is named twice")
    within = {*folders, *ancestors(both)}
    if wrong := [place.names for place in files if place.names in within]:
        raise MetadataError(f"object {name!r}: {'/'.join(wrong[0][1:])!r} is a file and a folder")
