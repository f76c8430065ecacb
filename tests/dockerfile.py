"""The Dockerfile and .dockerignore, read as docker reads them."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path


def instructions(text: str) -> list[tuple[str, str]]:
    """(word, value) of each instruction of a Dockerfile; continued lines are one."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    parts = (line.strip().partition(" ") for line in joined.splitlines())
    return [(word.upper(), value.strip()) for word, _, value in parts if word]


def is_ignored(path: str, ignore_file: Path) -> bool:
    """Whether a path, relative to the project, is not copied by docker."""
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
