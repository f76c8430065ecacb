"""Parts of the soak (parts.yaml): processes with a time limit each, the counts in their output, and
results of an earlier start that still hold."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "soak"


@dataclass(frozen=True)
class Part:
    """One kind of fault, repeated by commands: a module of the soak, or pytest, with arguments.

    limit_s:      for one process
    short:        a few repetitions, to try the runner
    full, shares: so many processes; {share} is the number of one, from 1
    """

    name: str
    what: str
    limit_s: float
    short: str
    full: str
    shares: int = 1

    def commands(self, is_short: bool) -> list[list[str]]:
        """Arguments of Python for each process; those that have passed are not run again."""
        if is_short:
            return [_arguments(self.short)]
        shares = range(1, self.shares + 1)
        return [_arguments(self.full.format(share=share)) for share in shares]


def _arguments(command: str) -> list[str]:
    name, *more = shlex.split(command)
    if name == "pytest":
        return ["-m", "pytest", "-q", "-rs", *more]
    return ["-W", "ignore", "-m", f"tests.soak.{name}", *more]


PARTS = tuple(Part(**row) for row in yaml.safe_load((HERE / "parts.yaml").read_text()))

_COUNTED = (
    re.compile(r"^(\d+) (?:kills|bits flipped|damages|layouts|pairs)\b", re.MULTILINE),
    re.compile(r"^\d+ calls, (\d+) of them tried", re.MULTILINE),
    re.compile(r"\b(\d+) passed\b.* in "),
    re.compile(r"^caught: (\d+)$", re.MULTILINE),
)
_FAILED = (
    re.compile(r"\b(\d+) failed\b.* in "),
    re.compile(r"\b(\d+) errors?\b.* in "),
    re.compile(r"^missed: (\d+)$", re.MULTILINE),
)
_SKIPPED = re.compile(r"^SKIPPED \[\d+\] [^ ]+: (.*)$", re.MULTILINE)


def skipped(printed: str) -> str:
    """Why pytest has skipped tests; empty if it has not."""
    return "; ".join(dict.fromkeys(_SKIPPED.findall(printed)))


def counted(printed: str, code: int | None) -> tuple[int, int]:
    """(repetitions, failures) of a process, by what it has printed and by its exit code, which is
    None if it did not end in time."""
    passed = sum(int(found[-1]) for pattern in _COUNTED if (found := pattern.findall(printed)))
    failed = sum(int(found[-1]) for pattern in _FAILED if (found := pattern.findall(printed)))
    return passed + failed, max(failed, int(code != 0))


def commit(tree: Path) -> str:
    """Of the work tree; empty if it has changes, or there is no repository: nothing is known of it
    from before."""
    printed = []
    for command in (("rev-parse", "HEAD"), ("status", "--porcelain")):
        ended = subprocess.run(
            ["git", *command], cwd=tree, capture_output=True, text=True, check=False
        )
        printed.append(ended.stdout.strip() if ended.returncode == 0 else "unknown")
    return printed[0] if not printed[1] else ""


class Results:
    """{name: result} of one commit, in a file if one is given."""

    def __init__(self, file: Path | None, commit: str) -> None:
        found = json.loads(file.read_text()) if file is not None and file.exists() else {}
        is_same = bool(commit) and found.get("commit") == commit
        self.of: dict[str, dict[str, Any]] = found["results"] if is_same else {}
        self._file, self._commit, self._lock = file, commit, threading.Lock()

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Writes it down at once."""
        with self._lock:
            self.of[name] = result
            if self._file is not None:
                text = json.dumps({"commit": self._commit, "results": self.of}, indent=1)
                part = self._file.with_name(f".{self._file.name}.part")
                part.write_text(text + "\n")
                part.replace(self._file)
