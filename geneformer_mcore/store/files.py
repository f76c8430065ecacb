"""The files a store consists of, so that none is missed, added, cut or changed.

finished store  ->  {path: [bytes, SHA-256]}  ->  manifest  ->  compared whenever it is opened

TileDB's own filters check the tiles that are read, not which fragments are there, nor what
metadata says of them. Tiles are left to the filters: of their files only the size is kept, which
makes opening a store cheap.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geneformer_mcore.store.layout import MANIFEST_FILE

_FRAGMENTS = "__fragments"
_FRAGMENT_METADATA = "__fragment_metadata.tdb"


def list_files(folder: Path) -> dict[str, Path]:
    """{path relative to `folder`: file} of all files in it but the manifest, sorted."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            found[path.relative_to(folder).as_posix()] = path
    found.pop(MANIFEST_FILE, None)
    return dict(sorted(found.items()))


def describe_files(folder: Path) -> dict[str, list[Any]]:
    """{path: [bytes, SHA-256]}, what the manifest keeps; no SHA-256 (None) for files of tiles."""
    return {
        name: [path.stat().st_size, None if _is_tiles(name) else _digest(path)]
        for name, path in list_files(folder).items()
    }


def find_changes(folder: Path, expected: Mapping[str, list[Any]]) -> list[str]:
    """What is wrong with the files in `folder`, in a few words each; OSError if unreadable."""
    there = list_files(folder)
    problems = [f"{name} is missing" for name in expected if name not in there]
    for name, path in there.items():
        if name not in expected:
            problems.append(f"{name} is not of the store")
            continue
        size, digest = expected[name]
        found = path.stat().st_size
        if found != size:
            problems.append(f"{name} has {found:,} bytes of {size:,}")
        elif digest is not None and _digest(path) != digest:
            problems.append(f"{name} was changed since it was written")
    return problems


def _is_tiles(name: str) -> bool:
    parts = name.split("/")
    return _FRAGMENTS in parts and parts[-1] != _FRAGMENT_METADATA


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
