"""What the soak is made of: processes with a time limit each, and what their output says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "soak"


@dataclass(frozen=True)
class Part:
    """One kind of fault.

    shares:       arguments of Python for each process; those that have passed are not run again
    short:        arguments for a few repetitions, to try the runner
    limit_s:      for one share
    """

    name: str
    what: str
    shares: tuple[tuple[str, ...], ...]
    short: tuple[str, ...]
    limit_s: float

    def commands(self, is_short: bool) -> tuple[tuple[str, ...], ...]:
        """What is run."""
        return (self.short,) if is_short else self.shares


def _module(name: str, *arguments: object) -> tuple[str, ...]:
    return ("-W", "ignore", "-m", f"tests.soak.{name}", *map(str, arguments))


def _tests(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-rs", *arguments)


def _kills(*more: str) -> tuple[tuple[str, ...], ...]:
    return (_module("kills", "--kills", 25, "--steps", 120, *more),) * 4


EVENTS = "tests/soak/slurm"
PARTS = (
    Part(
        "kills",
        "SIGKILL at random instants of a training",
        _kills(),
        _module("kills", "--kills", 2, "--steps", 20),
        900,
    ),
    Part(
        "kills-asynchronous",
        "the same, saves written while it trains",
        _kills("--asynchronous"),
        _module("kills", "--kills", 2, "--steps", 20, "--asynchronous"),
        900,
    ),
    Part(
        "kill-points",
        "SIGKILL at every system call of a save",
        tuple(_module("kill_points", "--first", first, "--every", 4) for first in (1, 2, 3, 4)),
        _module("kill_points", "--every", 60),
        900,
    ),
    Part(
        "ingest-kills",
        "SIGKILL at random instants of a build",
        (_module("ingest_kills", "--kills", 25),) * 2,
        _module("ingest_kills", "--kills", 2),
        900,
    ),
    Part(
        "store-flips",
        "a flipped bit of a store",
        (_module("store_flips", "--flips", 200),),
        _module("store_flips", "--flips", 10),
        600,
    ),
    Part(
        "checkpoint-damage",
        "a flipped bit, a cut or lost file of a checkpoint",
        (_module("checkpoint_damage", "--damages", 100),),
        _module("checkpoint_damage", "--damages", 5),
        600,
    ),
    Part(
        "parity",
        "loss curves of every layout against plain PyTorch",
        (_module("parity_table", "--json", FOLDER / "parity.json"),),
        _module("parity_table", "--json", FOLDER / "parity_short.json", "tp1 pp1 dp1"),
        2400,
    ),
    Part(
        "reshard",
        "checkpoints of every layout loaded under every other",
        (_module("reshard"),),
        _module("reshard", "--most", 2),
        1800,
    ),
    Part(
        "slurm",
        "what can happen to a job on a cluster",
        (_tests(EVENTS),),
        _tests(EVENTS, "-k", "requeued"),
        2400,
    ),
    Part(
        "cases",
        "cases marked `soak` of the other tests",
        (_tests("-m", "soak", "tests"),),
        _tests("-m", "soak", "tests/unit"),
        2400,
    ),
    Part(
        "planted-faults",
        "faults planted into the code, one at a time, that tests must catch",
        (_module("planted_faults", "--no-control", "--results", FOLDER / "planted_faults.json"),),
        _module("planted_faults", "--package", "cells", "--no-control"),
        3600,
    ),
)

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
