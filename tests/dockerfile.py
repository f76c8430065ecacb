"""The Dockerfile and .dockerignore, read as docker reads them."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction; continued lines are one, comments are gone."""

    word: str
    value: str


def instructions(text: str) -> list[Instruction]:
    """All of a Dockerfile."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        Instruction(word.upper(), value.strip())
        for word, _, value in (line.strip().partition(" ") for line in joined.splitlines())
        if word
    ]


def sources(all_of_it: list[Instruction]) -> list[str]:
    """What COPY takes from the project."""
    copies = [each.value.split() for each in all_of_it if each.word == "COPY"]
    return [
        name
        for words in copies
        for name in words[:-1]
        if not any(w.startswith("--") for w in words)
    ]


def is_ignored(path: str, ignore_file: Path) -> bool:
    """Whether a path, relative to the project, is left out of what docker is given."""
    lines = (line.strip().rstrip("/") for line in ignore_file.read_text().splitlines())
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert not any(line.startswith("!") for line in patterns), "exceptions are not understood here"
    parts = path.split("/")
    return any(_matches(parts[: n + 1], pattern) for n in range(len(parts)) for pattern in patterns)


def _matches(parts: list[str], pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch(parts[-1], pattern[3:])
    wanted = pattern.split("/")
    return len(wanted) == len(parts) and all(map(fnmatch, parts, wanted))
