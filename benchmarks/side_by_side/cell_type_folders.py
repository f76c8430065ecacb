"""Where benchmarks/cell_types.py keeps what it has done: folders named by what they are made of.

training files, vocabulary, configuration, settings, steps, ranks  ->  OUT/model_<hash>
that, the labelled file, seed, resamples                            ->  OUT/types_<stem>_<hash>

So another command in the same OUT finds nothing of the old one, and the same one finds all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

_LETTERS = 12


def name(start: str, *made_of: object) -> str:
    """`start`_<hash of plain values>: the same for the same ones, in this order."""
    text = json.dumps(made_of, sort_keys=True)
    return f"{start}_{hashlib.sha256(text.encode()).hexdigest()[:_LETTERS]}"


def facts(files: Iterable[Path]) -> list[list[object]]:
    """What tells each file from another, or from what it was before: path, bytes, time of its last
    change. To hash the content of large files would take as long as to read them."""
    found: list[list[object]] = []
    for path in files:
        there = path.resolve().stat()
        found.append([str(path.resolve()), there.st_size, there.st_mtime_ns])
    return found


def content(path: Path) -> str:
    """Hash of a small file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
